"""LLM-Pruner: Taylor importance of coupled structures.

Source: Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS
2023, arXiv 2305.11627, section 3.2; METHODS.md section 6. A channel's score sums over its slices;
the first 4 and the last 2 layers are left whole and the others share the cut equally.

With heads, a group's score sums over its query, key and value rows and its output columns, and the
layers in between lose the same share of groups as of channels (see `structures.shared`).

What differs: heads are cut only where they are asked for; the sequences come from the caller's text
(authors: 10 of 64 tokens of BookCorpus); the ratio of the layers in between is raised so that the
total is that of a uniform cut; no recovery training.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from prunenet.policies.methods.evidence.gradients import TaylorSums
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.evidence.structures import Scores

Variant = Literal["vector", "element1", "element2", "mix"]


def scores(evidence: Evidence, *, variant: Variant = "element1") -> list[Float[Tensor, " _"]]:
    """Importance of each channel: the change of the loss that its removal is estimated to make.

    Args:
        evidence: gradients are measured on 10 sequences of 64 tokens of its text.
        variant: "vector" |sum w g|, "element1" sum |w g|, "element2" sum w^2 G, "mix" sum |w g -
            w^2 G / 2|, each over a slice.
    """
    return [_importance(sums, variant) for sums in evidence.taylor]


def with_heads(evidence: Evidence, *, variant: Variant = "element1") -> Scores:
    """Importance of each channel and each group of heads, *per parameter*, so that allocation
    "global" can rank both together.

    Published rankings are within one kind of one layer, where that divides by a constant.
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
