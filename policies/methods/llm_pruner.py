"""LLM-Pruner: Taylor importance of coupled structures.

Source: Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, arXiv 2305.11627,
section 3.2; METHODS.md section 6. A channel's score sums over its slices; the first 4 and the last 2 layers are left whole and
the others share the cut equally.

What differs: FFN channels only; the sequences come from the caller's text (authors: 10 of 64 tokens of BookCorpus); the ratio
of the layers in between is raised so that the total is that of a uniform cut; no recovery training.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from prunenet.policies.methods.evidence import Evidence


def scores(
    evidence: Evidence, *, variant: Literal["vector", "element1", "element2", "mix"] = "element1"
) -> list[Float[Tensor, " _"]]:
    """Importance of each channel: the change of the loss that its removal is estimated to make.

    Args:
        evidence: gradients are measured on 10 sequences of 64 tokens of its text.
        variant: "vector" |sum w g|, "element1" sum |w g|, "element2" sum w^2 G, "mix" sum |w g - w^2 G / 2|, each over a slice.
    """
    return [getattr(sums, variant).abs().sum(0) for sums in evidence.taylor]
