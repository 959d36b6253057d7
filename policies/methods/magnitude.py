"""Norms of the weights (METHODS.md section 6). Known to collapse: on SmolLM2-135M worse than random channels."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from prunenet.policies.methods.evidence import Evidence


def scores(evidence: Evidence, *, matrix: Literal["gate", "up", "down", "product"] = "product") -> list[Float[Tensor, " _"]]:
    """Norm of each channel's slice of one matrix, or |W_g[j]| |W_u[j]| |W_d[:, j]| (ungated: |W_1[j]| |W_2[:, j]|).

    Args:
        evidence: its weights are read.
        matrix: where the FFN has no gate, "gate" and "up" are both its one input matrix.
    """
    if matrix != "product":
        return [getattr(norms, matrix) for norms in evidence.norms]
    return [norms.up * norms.down * (norms.gate if norms.gated else 1) for norms in evidence.norms]
