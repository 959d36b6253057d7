"""Compares a channel's weight row with the other rows of its matrix: leverages and twins.

A leverage says how much of the matrix' leading (or regularised) row space one row makes up. A twin
is another row that points in the same direction.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from prunenet.refit.cholesky import factored

_TINY, _CHUNK = 1e-30, 512
_Rows = Float32[Tensor, "d_ff d_model"]
_PerChannel = Float32[Tensor, " d_ff"]
_Square = Float32[Tensor, "d_model d_model"]
_FAILED = "a Gram matrix of weights is not positive definite: the weights are too large for float32"


def twin(units: list[_Rows]) -> _PerChannel:
    """Returns the largest |mean cosine| of each row with any other row.

    Each block of the symmetric cosine matrix is computed once.

    Args:
        units: rows of norm 1 of each matrix; cosines are averaged over the matrices.
    """
    best = units[0].new_zeros(len(units[0]))
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(best), _CHUNK)]
    for i, rows in enumerate(chunks):
        for columns in chunks[i:]:
            block = torch.stack([unit[rows] @ unit[columns].T for unit in units]).mean(0).abs_()
            if rows is columns:
                block.fill_diagonal_(0)
            best[rows] = torch.maximum(best[rows], block.amax(1))
            best[columns] = torch.maximum(best[columns], block.amax(0))
    return best


def leverage(rows: _Rows, gram: _Square) -> _PerChannel:
    """Returns each row's leverage in the leading d_model / 8 singular directions.

    That is the squared norm of its row in the matrix of left singular vectors.

    Args:
        rows: the matrix W.
        gram: W^T W.
    """
    values, vectors = leading(gram, max(1, len(gram) // 8))
    return (rows @ vectors).square() @ torch.where(
        values > 1e-5 * values[-1], 1 / values.clamp_min(_TINY), 0.0
    )


def leading(
    gram: _Square, count: int
) -> tuple[Float32[Tensor, " count"], Float32[Tensor, "d_model count"]]:
    """Returns the largest eigenvalues, rising, and their eigenvectors.

    Found by subspace iteration from a fixed start. On SmolLM2-135M, log leverages found so
    correlate at 0.98 to 0.99 with those of a full decomposition.

    Raises:
        ValueError: the matrix is not finite.
    """
    mean = gram.diagonal().mean().clamp_min(_TINY)
    scaled, size = gram / mean, (len(gram), min(len(gram), count + count // 4 + 1))
    basis = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(gram.device)
    # Orthogonalised by Cholesky QR: unlike Householder's, it is nearly all matrix products, which
    # threads share well.
    for _ in range(4):
        image = (scaled @ (scaled @ basis)).double()
        overlap = image.T @ image
        overlap.diagonal().add_(1e-12 * overlap.trace() + _TINY)
        basis = torch.linalg.solve_triangular(
            factored(overlap, _FAILED), image.T, upper=False
        ).T.float()
    # in float64: denormals of float32 give NaN
    values, vectors = torch.linalg.eigh((basis.T @ (scaled @ basis)).double())
    return values[-count:].float() * mean, basis @ vectors[:, -count:].float()


def ridge_leverage(rows: _Rows, gram: _Square) -> _PerChannel:
    """Returns w^T (G + lam I)^-1 w of each row w, with lam 1 % of the mean eigenvalue of G.

    Args:
        rows: the matrix W.
        gram: G = W^T W.

    Raises:
        ValueError: the matrix is not finite.
    """
    ridge = gram + torch.eye(len(gram), device=gram.device) * (
        0.01 * gram.diagonal().mean() + _TINY
    )
    # On the rows' own side: BLAS takes 0.75 of the time that it takes on their transpose.
    whitened: Tensor = torch.linalg.solve_triangular(
        factored(ridge, _FAILED).T, rows, upper=True, left=False
    )
    return whitened.square().sum(-1)
