"""Magnitude: scores channels by norms of their weights (docs/methods.md, section 6).

Source: a control, published in many forms. It is known to collapse: on SmolLM2-135M it is worse
than random channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunenet.models.heads import Attention
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.evidence.structures import Scores
from prunenet.runtime.choices import check_choice
from prunenet.spectra.choices import Matrix

Norm = Literal[Matrix, "product"]
"""Matrix of whose slices norms are taken, or the product over all matrices."""


def scores(evidence: Evidence, *, matrix: Norm = "product") -> list[Float[Tensor, " _"]]:
    """Returns the norm of each channel's slice of one matrix, or a product of norms.

    The product is |W_g[j]| |W_u[j]| |W_d[:, j]| (ungated: |W_1[j]| |W_2[:, j]|).

    Args:
        evidence: its weights are read.
        matrix: where the FFN has no gate, "gate" and "up" are both its one input matrix.

    Raises:
        ValueError: an unknown matrix.
    """
    check_choice("matrix", matrix, Norm)
    if matrix != "product":
        return [getattr(norms, matrix) for norms in evidence.norms]
    return [norms.up * norms.down * (norms.gate if norms.gated else 1) for norms in evidence.norms]


def with_heads(evidence: Evidence) -> Scores:
    """Returns products of norms for channels, and for groups of heads (our own control)."""
    return Scores(scores(evidence), [group_norms(attention) for attention in evidence.attentions])


def group_norms(attention: Attention) -> Float[Tensor, " groups"]:
    """Returns |W_q| |W_k| |W_v| |W_o|, Frobenius norms of each group's slices."""
    parts = (attention.query, attention.key, attention.value, attention.out.T)
    return torch.stack(
        [part.float().reshape(attention.groups, -1).norm(dim=1) for part in parts]
    ).prod(0)
