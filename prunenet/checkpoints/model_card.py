"""Writes the model card, README.md, from a checkpoint's provenance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prunenet.checkpoints.provenance import UNRECORDED, Provenance, RecoveryStep
from prunenet.checkpoints.regimes import REGIMES


def card_of(
    made: Provenance, text: str | None = None, *, code: bool = False, loading: str = ""
) -> str:
    """Returns the model card of a pruned checkpoint.

    Args:
        made: its provenance.
        text: Markdown put after the summary, such as a table of results.
        code: whether the model needs code beside it.
        loading: how it is loaded, put above the example.
    """
    addition = "" if text is None else f"\n{text.strip()}\n"
    steps = [
        f"{name} {made.how.get(name)}"
        for name in ("widths", "channels", "refit")
        if name in made.how
    ]
    how = f"\nHow: {', '.join(steps)}; policy: `{made.policy}`.\n" if steps else ""
    share = 1 - made.parameters_after / made.parameters_before
    name = (
        f"{Path(made.base_model).name}, pruned by PruneNet to {made.parameters_after:,} parameters"
    )
    return f"""{_heading(name)}
{_summary(made)}
{how}
| | before | after |
|---|---|---|
| parameters | {made.parameters_before:,} | {made.parameters_after:,} ({-share:.1%}) |
| without embeddings | {made.non_embedding_before:,} | {made.non_embedding_after:,} |

{_counts(made)}
{_recovery(made.recovered)}{addition}
{_example(code, loading)}
`prunenet.json` says how this checkpoint was made; `prunenet_masks.safetensors`, where it is there,
holds the channels kept, by their number in the base model.
"""


def bare_card(name: str, parameters: int, width: int, loading: str) -> str:
    """Returns the model card of a padded checkpoint that has no provenance.

    Args:
        name: of the model.
        parameters: in all.
        width: of every FFN.
        loading: how it is loaded.
    """
    return f"""{_heading(f"{name}, a pruned model of {parameters:,} parameters")}
Every layer is filled with zeros to {width} channels. Another tool saved the pruned model, so
nothing says here how it was made.

{_example(False, loading)}"""


def _heading(name: str) -> str:
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [prunenet, pruned]
---
# {name}
"""


def _example(code: bool, loading: str) -> str:
    trust = ", trust_remote_code=True" if code else ""
    return f"""{loading}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})
```
"""


def _summary(made: Provenance) -> str:
    """What was cut, and by what."""
    chosen = "elimination" if made.how.get("channels") == "elimination" else made.policy
    removed = f"without {made.ratio:.1%} of its FFN channels, chosen by"
    if made.residual_widths:
        removed = f"with its residual stream sliced to {min(made.residual_widths)} directions by"
    elif made.groups is not None:
        removed = (
            f"without as many parameters as {made.ratio:.1%} of its FFN channels have, from"
            " channels and heads chosen by"
        )
    if made.policy == UNRECORDED:
        return (
            f"`{made.base_model}` ({made.revision}) without {made.ratio:.1%} of its FFN channels."
            " Another tool saved the pruned model before this one, so nothing says how they were\n"
            "chosen. The licence and the limits of the base model apply."
        )
    return (
        f"`{made.base_model}` ({made.revision}) {removed} `{chosen}` in the\n{made.regime} regime"
        f" ({REGIMES[made.regime]}). The licence and the limits of the base model apply."
    )


def _counts(made: Provenance) -> str:
    """What each layer has left."""
    said = f"FFN channels left: {_numbers(made.widths)}"
    if made.residual_widths:
        said += "; shortcuts and an LM head of its own count as parameters"
    said += "."
    if made.padded_to is not None:
        said += f"\nEvery layer is filled with zeros to {made.padded_to} channels."
    if made.groups is not None:
        said += (
            f"\n\nGroups of attention heads left, with {made.group_heads} query heads each:"
            f" {_numbers(made.groups)}."
        )
    if made.padded_groups is not None:
        said += f"\nEvery layer is filled with zeros to {made.padded_groups} groups."
    return said


def _recovery(recovered: Sequence[RecoveryStep]) -> str:
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
