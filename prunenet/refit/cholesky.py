"""Cholesky factors of damped second moments."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor


def damped_by_energy(second: Float64[Tensor, "n n"], damping: float) -> Float64[Tensor, " n"]:
    """damping * diag H; of a channel that is never active, the least that keeps a damped H positive
    definite.
    """
    energy = second.diagonal()
    return damping * energy.clamp_min(1e-12 * float(energy.mean()))


def damped_cholesky(
    second: Float64[Tensor, "n n"], lam: float | Float64[Tensor, " n"], damping: float
) -> Float64[Tensor, "n n"]:
    """The lower factor of H + diag(lam); `damping` is what the error calls lam.

    Raises:
        ValueError: the sum is not positive definite, or not finite.
    """
    damped = second.clone()
    damped.diagonal().add_(lam)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise ValueError(
            f"the moments with damping {damping} are not positive definite; raise it, or measure"
            " more tokens"
        )
    result: Tensor = factor
    return result
