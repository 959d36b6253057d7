"""Factorises symmetric matrices; a failure is a ValueError, never a LinAlgError of torch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def without_energy(second: Float[Tensor, "n n"]) -> bool:
    """Returns whether second moments are zero to float32: a dead layer, or activations below 1e-19.

    Below the smallest normal float32 (1.2e-38) an entry has no precision left, so that correlations
    between channels are rounding.
    """
    return 0 <= float(second.diagonal().mean()) < torch.finfo(torch.float32).tiny


def damped_by_energy(second: Float64[Tensor, "n n"], damping: float) -> Float64[Tensor, " n"]:
    """Returns damping * diag(H), with a floor for channels that are never active.

    The floor, damping * 1e-12 of the mean energy, keeps the damped H positive definite.
    """
    energy = second.diagonal()
    return damping * energy.clamp_min(1e-12 * float(energy.mean()))


def damped_cholesky(
    second: Float64[Tensor, "n n"], lam: float | Float64[Tensor, " n"], damping: float
) -> Float64[Tensor, "n n"]:
    """Returns the lower Cholesky factor of H + diag(lam).

    Args:
        second: H, second moments of activations.
        lam: added to the diagonal.
        damping: what the error message calls lam, relative to the energies.

    Raises:
        ValueError: H is not finite, or the sum is not positive definite.
    """
    if not bool(torch.isfinite(second).all()):
        raise ValueError(
            "the second moments of a layer's activations are NaN or infinite: weights are damaged,"
            " or their dtype overflows; load the model as float32, or prune from weights alone"
        )
    damped = second.clone()
    damped.diagonal().add_(lam)
    return factored(
        damped,
        f"the second moments of a layer's {len(second)} channels are not positive definite with"
        f" damping {damping}: they are measured on too few tokens, or in too little precision; load"
        " the model as float32, or prune from weights alone",
    )


def factored(matrix: Float[Tensor, "n n"], failure: str) -> Float[Tensor, "n n"]:
    """Returns the lower Cholesky factor of a symmetric matrix, in its dtype.

    Raises:
        ValueError: the matrix is not positive definite or not finite; says `failure`.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise ValueError(failure)
    result: Tensor = factor
    return result
