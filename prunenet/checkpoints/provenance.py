"""Where a pruned model comes from: what `prunenet.json` holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, TypedDict

from transformers import PreTrainedModel

from prunenet.checkpoints.regimes import REGIMES
from prunenet.models.architectures import architecture_for
from prunenet.models.heads import QUERY_HEADS, attentions
from prunenet.models.layers import count_parameters, ffn_widths, text_config
from prunenet.models.modeling import HEADS
from prunenet.runtime.json_files import Count, Positive, Within, parse_json

FORMAT_VERSION = 1
UNRECORDED = "unrecorded"
"""Policy of a model whose record was lost: saved by another tool after it was pruned."""
_OF_GROUPS = ("dense_groups", "groups")
_LEFT_OUT = (*_OF_GROUPS, "group_heads", "padded_groups", "dense_layers", "layers")
"""Fields that are not written where they say nothing."""
_Widths = tuple[Annotated[int, Within(1, 2**24)], ...]  # masks of so many entries are made
_Groups = tuple[Annotated[int, Within(0, 2**24)], ...]


class BlockStep(TypedDict):
    """The training of one FFN, see `prunenet.refit.blocks`.

    Attributes:
        before, after: share of its output's energy that it loses on text of a kind that it was not
            trained on: refitted, and trained.
        strength: share of the way from the one to the other, in [0, 1]; 0: the refit stayed.
    """

    before: float
    after: float
    strength: float


class How(TypedDict, total=False):
    """The steps of a cut.

    Attributes:
        dtype: of the base model when it was cut, such as "bfloat16"; absent in older records.
        widths: "uniform", "per-layer" or "refined".
        predicted_gain: by which share per-layer widths lower perplexity; None: not predicted.
        channels: "policy", "blend" or "elimination".
        refit: "off", "layerwise", "sequential" or "blocks".
        round_to: what widths were asked to be multiples of; absent where that was left open.
        blocks: of each FFN that was trained, by the number of its group; absent where none was.
        residual_width, slicing, head: of a sliced residual stream: its width, the share of d_model
            that is gone, and "sliced" or "whole" for the LM head.
        text: what activations were measured on, see `prunenet.text.calibration.CalibrationSet`.
        few_tokens: number of the experts that too few tokens of that text reached, see
            `prunenet.refit.few_tokens`; absent where there are none.
        experts: numbers of the experts that stayed, by layer; absent where all did.
        experts_by: "aimer", "reap" or "random".
        structures: what a cut of whole layers or experts, or by another budget than parameters,
            could take.
        budget: what such a cut's ratio is a share of, see `prunenet.evaluation.slots.Cost`.
        of_all: whether that is a share of what all layers cost, and not FFN channels alone; absent
            where it is not.
        reached: the ratio that it reaches.
        tried: KL(dense || cut), nats per token on text held back, of each number of experts that
            was tried, by the number; channels alone are the greatest. Behind the refit.
    """

    dtype: str
    widths: str
    predicted_gain: float | None
    channels: str | None
    refit: str | None
    round_to: Positive
    blocks: dict[str, BlockStep]
    residual_width: Positive
    slicing: float
    head: str
    text: Mapping[str, Any]
    few_tokens: Count
    experts: dict[str, list[Count]]
    experts_by: str
    structures: str
    budget: str
    of_all: bool
    reached: float
    tried: dict[str, float]


class _Since(TypedDict, total=False):
    """What records of versions before do not say: they were LoRA's, with a linear schedule."""

    dtype: str
    updates: str
    embeddings: bool
    gentle_below: float
    warmup: float
    schedule: str
    betas: list[float]
    hidden: float
    average: float
    tokens: Count
    learned: Count
    window: Positive


class RecoveryStep(_Since):
    """One training after a cut, see `prunenet.recover`; losses in nats per token on text held back.

    Attributes:
        dtype: that models were loaded in, as asked for: "auto" is the stored one of each.
        updates, embeddings, gentle_below, warmup, schedule, betas, hidden, average: as in
            `prunenet.recover.Tuning`.
        tokens: that were read, in all steps.
        learned, window: tokens of the text that was learned from, without those held back, and of a
            block of it.
        steps, batch, micro_batch, rank, learning_rate, seed: as in `prunenet.recover.Tuning`.
        loss: "KL(dense || pruned)", the same over the "top 256 and rest", or "next token".
        loss_before, loss_after: of the model before the training, and as saved.
        best_step: after which the best state was seen; 0: no state was better.
        regime: of the text.
        text: as in `How`.
    """

    steps: Positive
    batch: Positive
    micro_batch: Positive
    rank: Positive
    learning_rate: float
    seed: int
    loss: str
    loss_before: float
    loss_after: float
    best_step: Count
    regime: str
    text: Mapping[str, Any]


class _Version(TypedDict, total=False):
    format_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How a pruned model was made.

    Holds neither time nor path, so that a repeated command writes the same bytes.

    Attributes:
        base_model: hub id, or the name of the local folder.
        revision: hub commit, or `sha256:...` of the files that make the local model; see
            `prunenet.checkpoints.identity.identify`.
        policy: name of the policy or method that chose the channels; `UNRECORDED`: nothing says so.
        policy_sha256: of the policy's files; None for a method that has none.
        regime: `weights`, `self` or `data` (docs/design.md, section 1).
        ratio: share of FFN channels asked to be removed, in [0, 1).
        seed: of everything random on the way; None if nothing was.
        dense_widths, widths: FFN channels of each layer before and after.
        parameters_before, parameters_after: tied tensors count once.
        non_embedding_before, non_embedding_after: the same without input and output embeddings.
        how: the steps, as `prunenet.policies.apply.prune` took them.
        residual_widths: of a model with a sliced residual stream
            (`prunenet.models.sliced_modeling`), at each point; None elsewhere.
        padded_to: width to which `prunenet.checkpoints.save.export_padded` filled every layer with
            zeros; None in other checkpoints.
        dense_groups, groups: groups of attention heads of each layer before and after, 0 where
            attention is gone; None where heads were left whole. Else `ratio` states an amount, as
            many parameters as that share of FFN channels has, and not a place.
        group_heads: query heads of a group.
        padded_groups: number to which groups were filled with zeros.
        dense_layers: decoder layers of the base model; None where all stay.
        layers: numbers of those that stay, rising; widths and groups are theirs.
        recovered: each training after the cut.
    """

    base_model: str
    revision: str
    policy: str
    policy_sha256: str | None
    regime: str
    ratio: Annotated[float, Within(0, 1)]
    seed: int | None
    dense_widths: _Widths
    widths: _Widths
    parameters_before: Positive
    parameters_after: Positive
    non_embedding_before: Count
    non_embedding_after: Count
    how: How = field(default_factory=How)
    residual_widths: _Widths | None = None
    padded_to: Positive | None = None
    dense_groups: _Groups | None = None
    groups: _Groups | None = None
    group_heads: Positive | None = None
    padded_groups: Positive | None = None
    dense_layers: Annotated[int, Within(1, 2**16)] | None = None
    layers: tuple[Count, ...] | None = None
    recovered: tuple[RecoveryStep, ...] = ()
    format_version: int = FORMAT_VERSION
    prunenet_version: str = field(default_factory=lambda: version("prunenet"))

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise ValueError(f"regime must be one of {', '.join(REGIMES)}, got {self.regime!r}")
        _check_version(self.format_version)
        _check_counts("channels", self.dense_widths, self.widths)
        if self.dense_groups is not None and self.groups is not None:
            _check_counts("groups of heads", self.dense_groups, self.groups)
        if self.layers is not None:
            rising = [*self.layers, self.dense_layers or 0]
            if rising != sorted(set(rising)) or len(self.layers) != len(self.widths):
                raise ValueError(
                    f"layers left are numbers that rise, one for each of the {len(self.widths)}"
                    f" widths, below {self.dense_layers}; got {list(self.layers)}"
                )

    @classmethod
    def of(cls, dense: PreTrainedModel, narrow: PreTrainedModel, **choices: Any) -> Provenance:
        """Builds a record whose widths and parameter counts are those of two models.

        Args:
            dense, narrow: before and after the cut; only shapes and configuration are read.
            choices: the other fields.
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
    def unrecorded(
        cls, dense: PreTrainedModel, narrow: PreTrainedModel, base_model: str, revision: str
    ) -> Provenance:
        """Builds a record from the two models alone, where the model's own was lost.

        The regime is `data`: whatever saved the model may have trained it on any text.

        Args:
            dense, narrow: as for `of`.
            base_model, revision: of the dense model.

        Raises:
            ValueError: the one cannot have been cut from the other.
        """
        before, after = ffn_widths(dense), ffn_widths(narrow)
        d_models = [text_config(model).hidden_size for model in (dense, narrow)]
        if len(before) != len(after) or d_models[0] != d_models[1]:
            raise ValueError(
                f"the model has {len(after)} layers of d_model {d_models[1]} and"
                f" {base_model} has {len(before)} of {d_models[0]}: the one was not"
                " cut from the other; give the model that was pruned"
            )
        return cls.of(
            dense,
            narrow,
            base_model=base_model,
            revision=revision,
            policy=UNRECORDED,
            policy_sha256=None,
            regime="data",
            ratio=max(0.0, 1 - sum(after) / sum(before)),
            seed=None,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Provenance:
        """Reads `prunenet.json`.

        Raises:
            ValueError: what is wrong with the text; `JsonError` where it is not such a record.
        """
        _check_version(parse_json(text, _Version).get("format_version", FORMAT_VERSION))
        made: Provenance = parse_json(text, cls)
        return made

    def to_json(self) -> str:
        """Writes `prunenet.json`; fields about heads, layers and recovery are left out where
        nothing was done.
        """
        fields = {
            name: value
            for name, value in asdict(self).items()
            if value is not None or name not in _LEFT_OUT
        }
        if not self.recovered:
            del fields["recovered"]
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _check_version(found: int) -> None:
    if found != FORMAT_VERSION:
        raise ValueError(
            f"format version is {found}, this prunenet reads {FORMAT_VERSION}; update prunenet"
        )


def _check_counts(what: str, before: Sequence[int], after: Sequence[int]) -> None:
    if len(before) != len(after) or any(b < a for b, a in zip(before, after, strict=True)):
        raise ValueError(
            f"{what} left must be at most as many as before in each layer, got {list(after)} of"
            f" {list(before)}"
        )


def _heads(dense: PreTrainedModel, narrow: PreTrainedModel) -> dict[str, Any]:
    """The fields about heads; none where both models have the same ones."""
    row = architecture_for(dense.config, type(dense))
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
