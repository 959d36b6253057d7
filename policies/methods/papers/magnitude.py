"""Norms of the weights (METHODS.md section 6). Known to collapse: on SmolLM2-135M worse than random
channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunenet.models.heads import Attention
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.evidence.structures import Scores


def scores(
    evidence: Evidence, *, matrix: Literal["gate", "up", "down", "product"] = "product"
) -> list[Float[Tensor, " _"]]:
    """Norm of each channel's slice of one matrix, or |W_g[j]| |W_u[j]| |W_d[:, j]| (ungated:
    |W_1[j]| |W_2[:, j]|).

    Args:
        evidence: its weights are read.
        matrix: where the FFN has no gate, "gate" and "up" are both its one input matrix.
    """
    if matrix != "product":
        return [getattr(norms, matrix) for norms in evidence.norms]
    return [norms.up * norms.down * (norms.gate if norms.gated else 1) for norms in evidence.norms]


def with_heads(evidence: Evidence) -> Scores:
    """The products for channels, and |W_q| |W_k| |W_v| |W_o| (Frobenius norms) of each group of
    heads: a control of ours.
    """
    return Scores(scores(evidence), [group_norms(attention) for attention in evidence.attentions])


def group_norms(attention: Attention) -> Float[Tensor, " groups"]:
    """Product of the Frobenius norms of each group's slices of the four matrices."""
    parts = (attention.query, attention.key, attention.value, attention.out.T)
    return torch.stack(
        [part.float().reshape(attention.groups, -1).norm(dim=1) for part in parts]
    ).prod(0)
