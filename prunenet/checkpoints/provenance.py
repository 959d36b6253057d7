"""Where a pruned model comes from: what `prunenet.json` and the model card say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from transformers import PreTrainedModel

from prunenet.checkpoints.regimes import REGIMES
from prunenet.models.architectures import architecture_for
from prunenet.models.heads import QUERY_HEADS, attentions
from prunenet.models.layers import count_parameters, ffn_widths
from prunenet.models.modeling import HEADS
from prunenet.runtime.json_files import convert, parse_json, shown

FORMAT_VERSION = 1
_OF_GROUPS = ("dense_groups", "groups")
_OF_HEADS = (*_OF_GROUPS, "group_heads", "padded_groups")


class _RecoveryText(TypedDict):
    text: str


class _Recovery(TypedDict):
    """What the model card says of a training; the record has more."""

    steps: int
    batch: int
    loss: str
    loss_before: float
    loss_after: float
    best_step: int
    text: _RecoveryText


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Holds no time and no path, so that a repeated command writes the same bytes.

    Attributes:
        base_model: hub id, or the name of the local folder.
        revision: hub commit, or `sha256:...` of the local folder's configuration and weights; see
            `checkpoint.identify`.
        policy: name of the policy or method that chose the channels.
        policy_sha256: of the policy's files; None for a method that has none.
        regime: `weights`, `self` or `data` (DESIGN section 1).
        ratio: share of FFN channels that was asked to be removed, in [0, 1).
        seed: of everything random on the way; None if nothing was.
        dense_widths, widths: FFN channels of each layer before and after.
        parameters_before, parameters_after: tied tensors count once.
        non_embedding_before, non_embedding_after: the same without input and output embeddings.
        how: the steps: widths, channels, refit, text, as `prunenet.policies.apply.prune` took them.
        residual_widths: of a model whose residual stream is sliced
            (`prunenet.models.sliced_modeling`), at each point; None elsewhere.
        padded_to: width to which `checkpoint.export_padded` filled every layer with zeros; None in
            other checkpoints.
        dense_groups, groups: groups of attention heads of each layer before and after; None where
            heads were left whole. Then `ratio` says how much was removed, and not from where: as
            many parameters as that share of FFN channels.
        group_heads: query heads of a group.
        padded_groups: number to which `checkpoint.export_padded` filled groups with zeros.
        recovered: each training after the cut, see `prunenet.recover`.
    """

    base_model: str
    revision: str
    policy: str
    policy_sha256: str | None
    regime: str
    ratio: float
    seed: int | None
    dense_widths: tuple[int, ...]
    widths: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    non_embedding_before: int
    non_embedding_after: int
    how: Mapping[str, Any] = field(default_factory=dict)
    residual_widths: tuple[int, ...] | None = None
    padded_to: int | None = None
    dense_groups: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    group_heads: int | None = None
    padded_groups: int | None = None
    recovered: tuple[Mapping[str, Any], ...] = ()
    format_version: int = FORMAT_VERSION
    prunenet_version: str = field(default_factory=lambda: version("prunenet"))

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise ValueError(f"regime must be one of {', '.join(REGIMES)}, got {self.regime!r}")
        check_format(self.format_version)

    @classmethod
    def of(cls, dense: PreTrainedModel, narrow: PreTrainedModel, **choices: Any) -> Provenance:
        """Fills in widths and parameter counts from the two models; `choices` are the other
        fields.
        """
        (before, body_before), (after, body_after) = (
            count_parameters(dense),
            count_parameters(narrow),
        )
        return cls(
            dense_widths=tuple(ffn_widths(dense)),
            widths=tuple(ffn_widths(narrow)),
            parameters_before=before,
            parameters_after=after,
            non_embedding_before=body_before,
            non_embedding_after=body_after,
            **_heads(dense, narrow),
            **choices,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Provenance:
        """Reads `prunenet.json`.

        Raises:
            ValueError: the text is not one, or its fields contradict each other.
        """
        fields = parse_json(text, dict)
        check_format(fields.get("format_version", FORMAT_VERSION))
        provenance: Provenance = convert(fields, cls)
        check_consistent(provenance)
        return provenance

    def to_json(self) -> str:
        """`prunenet.json`. Fields about heads are there only where heads were cut, and recovery
        where there was one.
        """
        fields = {
            name: value
            for name, value in asdict(self).items()
            if value is not None or name not in _OF_HEADS
        }
        if not self.recovered:
            del fields["recovered"]
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def card(self, text: str | None = None, *, code: bool = False) -> str:
        """The model card (README.md); `text` is put after the summary; `code` says that the model
        needs code beside it.
        """
        trust = ", trust_remote_code=True" if code else ""
        widths = _numbers(self.widths)
        padding = (
            ""
            if self.padded_to is None
            else f"\nEvery layer is filled with zeros to {self.padded_to} channels."
        )
        addition = "" if text is None else f"\n{text.strip()}\n"
        looks_at = REGIMES[self.regime]
        chosen = "elimination" if self.how.get("channels") == "elimination" else self.policy
        steps = [
            f"{name} {self.how[name]}"
            for name in ("widths", "channels", "refit")
            if name in self.how
        ]
        how = f"\nHow: {', '.join(steps)}; policy: `{self.policy}`.\n" if steps else ""
        share = 1 - self.parameters_after / self.parameters_before
        removed = f"without {self.ratio:.1%} of its FFN channels, chosen by"
        if self.residual_widths:
            removed = (
                f"with its residual stream sliced to {min(self.residual_widths)} directions by"
            )
            widths += "; shortcuts and an LM head of its own count as parameters"
        heads = ""
        if self.groups is not None:
            removed = (
                f"without as many parameters as {self.ratio:.1%} of its FFN channels have, from"
                " channels and heads chosen by"
            )
            heads = (
                f"\n\nGroups of attention heads left, with {self.group_heads} query heads each:"
                f" {_numbers(self.groups)}."
            )
        if self.padded_groups is not None:
            heads += f"\nEvery layer is filled with zeros to {self.padded_groups} groups."
        return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [prunenet, pruned]
---
# {Path(self.base_model).name}, pruned by PruneNet to {self.parameters_after:,} parameters

`{self.base_model}` ({self.revision}) {removed} `{chosen}` in the
{self.regime} regime ({looks_at}). The licence and the limits of the base model apply.
{how}
| | before | after |
|---|---|---|
| parameters | {self.parameters_before:,} | {self.parameters_after:,} ({-share:.1%}) |
| without embeddings | {self.non_embedding_before:,} | {self.non_embedding_after:,} |

FFN channels left: {widths}.{padding}{heads}
{_recovery(self.recovered)}{addition}
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})
```

`prunenet.json` says how this checkpoint was made; `prunenet_masks.safetensors` holds the channels
kept, by their number in the base model.
"""


def check_format(version: object) -> None:
    """Raises ValueError for a format that this version of prunenet does not read."""
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format version is {shown(version)}, this prunenet reads {FORMAT_VERSION}; update"
            " prunenet"
        )


def check_consistent(provenance: Provenance) -> None:
    """Raises ValueError where a provenance that was read cannot be that of any cut."""
    said = provenance
    if not 0 <= said.ratio < 1:
        raise ValueError(f"ratio is {said.ratio:g}, not in [0, 1)")
    pairs = [("widths", said.dense_widths, said.widths)]
    if (said.dense_groups is None) != (said.groups is None):
        raise ValueError("of dense_groups and groups it has one, not both")
    if said.dense_groups is not None and said.groups is not None:
        pairs.append(("groups", said.dense_groups, said.groups))
    for name, dense, left in pairs:
        if not left or len(dense) != len(left) or len(left) != len(said.widths):
            raise ValueError(f"{name} has {len(left)} layers, dense_{name} {len(dense)}")
        if not all(1 <= after <= before for before, after in zip(dense, left, strict=True)):
            raise ValueError(f"{name} are not from 1 to dense_{name} in every layer")
    counts = ("parameters_before", "parameters_after", "non_embedding_before")
    optional = ("padded_to", "padded_groups", "group_heads")
    for name in (*counts, "non_embedding_after", *optional):
        value = getattr(said, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, not 1 or more")
    for step in said.recovered:
        convert(dict(step), _Recovery, "recovered")


def _heads(dense: PreTrainedModel, narrow: PreTrainedModel) -> dict[str, Any]:
    """The fields about heads; none where both models have the same ones."""
    row = architecture_for(dense.config)
    whole = [getattr(model.config, QUERY_HEADS, None) for model in (dense, narrow)]
    if not row.attention_in or (whole[0] == whole[1] and not hasattr(narrow.config, HEADS)):
        return {}
    before, after = attentions(dense), attentions(narrow)
    counts = {
        name: tuple(a.groups for a in found)
        for name, found in zip(_OF_GROUPS, (before, after), strict=True)
    }
    if len(set(counts.values())) == 1:
        return {}
    return counts | {"group_heads": len(before[0].query) // len(before[0].key)}


def _recovery(recovered: Sequence[Mapping[str, Any]]) -> str:
    """What the card says of it, one line for each training."""
    lines = ""
    for step in recovered:
        how = (
            f"low-rank training of its linears, {step['steps']} steps of {step['batch']} blocks,"
            f" text: {step['text']['text']}"
        )
        change = (
            f"{step['loss']} {step['loss_before']:.4f} before and {step['loss_after']:.4f} after,"
            " nats per token"
        )
        kept = (
            ""
            if step["best_step"]
            else "; nothing was better, so the weights are those from before"
        )
        lines += f"\nRecovered by {how}. On text held back: {change}{kept}.\n"
    return lines


def _numbers(counts: Sequence[int]) -> str:
    fewest, most = min(counts), max(counts)
    return (
        f"{most} in every layer"
        if fewest == most
        else f"{fewest} to {most} in a layer, {sum(counts)} in all"
    )
