"""LLM-Pruner: scores coupled structures by Taylor importance.

Source: Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS
2023, arXiv 2305.11627, section 3.2; docs/methods.md, section 6. A channel's score sums over its
slices; the first 4 and the last 2 layers are left whole and the others share the cut equally. With
heads, a group's score sums over its query, key and value rows and its output columns, and the
layers in between lose the same share of groups as of channels (`structures.shared`).

What differs:
- heads are cut only on request;
- the sequences come from the caller's text (authors: 10 of 64 tokens of BookCorpus);
- the ratio of the layers in between is raised so that the total is that of a uniform cut;
- no recovery training.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from prunenet.policies.methods.evidence.gradients import TaylorSums
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.evidence.structures import Scores
from prunenet.runtime.choices import check_choice

Variant = Literal["vector", "element1", "element2", "mix"]
"""Sum over a slice: |sum w g|, sum |w g|, sum w^2 G, or sum |w g - w^2 G / 2|."""


def scores(evidence: Evidence, *, variant: Variant = "element1") -> list[Float[Tensor, " _"]]:
    """Estimates the change of the loss when each channel is removed.

    Args:
        evidence: gradients are measured on 10 sequences of 64 tokens of its text.
        variant: see `Variant`.

    Raises:
        ValueError: an unknown variant, or no text.
    """
    check_choice("variant", variant, Variant)
    return [_importance(sums, variant) for sums in evidence.taylor]


def with_heads(evidence: Evidence, *, variant: Variant = "element1") -> Scores:
    """Estimates importances of channels and groups of heads, *per parameter*.

    Allocation "global" can then rank both together. Published rankings are within one kind of one
    layer, where this divides by a constant.
    """
    channels = [
        s / ffn.channel_parameters
        for s, ffn in zip(scores(evidence, variant=variant), evidence.ffns, strict=True)
    ]
    pairs = zip(evidence.group_taylor, evidence.attentions, strict=True)
    return Scores(
        channels,
        [_importance(sums, variant) / attention.group_parameters for sums, attention in pairs],
    )


def _importance(sums: TaylorSums, variant: Variant) -> Float[Tensor, " structures"]:
    importance: Tensor = getattr(sums, variant)
    return importance.abs().sum(0)
