"""Says when too few tokens reach a group for its activations to be known, and what stands in.

A router may send an expert any number of tokens. With damping lam a refit of d_ff channels has at
most d_ff / (1 + lam) degrees of freedom: the sum of s / (s + lam) over the eigenvalues s of the
normalised second moments, whose sum is d_ff, is largest where all are 1. With fewer tokens than
that, at the strongest damping that is tried, a fold of the text fits anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunenet.models.groups import FFN, Group
from prunenet.refit.moments import Moments
from prunenet.refit.ridge import DAMPINGS


def least_tokens(d_ff: int) -> int:
    """Tokens of each fold below which an expert is cut from weights: a quarter of its channels."""
    return math.ceil(d_ff / (1 + max(DAMPINGS)))


def few_tokens(group: Group, folds: Sequence[Moments]) -> bool:
    """Whether too few tokens of a fold reach an expert, or none a dense FFN: others have all of the
    text, however little that is.
    """
    least = 1 if group.expert is None else least_tokens(group.width)
    return any(fold.tokens < least for fold in folds)


def from_weights(ffn: FFN) -> Moments:
    """Moments of unrelated channels, each with the energy that its input weights give it.

    With them elimination ranks channels by |g|^2 |u|^2 |d|^2, and a refit changes nothing.
    """
    rows: list[Tensor] = [ffn.up] if ffn.gate is None else [ffn.gate, ffn.up]
    energies = torch.stack([row.float().square().sum(1) for row in rows]).prod(0)
    return Moments(torch.diag(energies), torch.zeros_like(energies), 1)
