"""Measures how far a keep mask moves the singular values of a weight matrix, exactly.

Source: the reward of PruneNet (arXiv 2501.15296, section 3). What differs from the paper and its
package (docs/methods.md, sections 1.2 and 2):

* No singular value decomposition. The singular values of W[K] are the square roots of the
  eigenvalues of G - W[R]^T W[R], where G = W^T W is computed once: a (d_model, d_model) problem in
  place of (d_ff, d_model).
* Distances lie in [0, 1], so a reward 1 - distance is bounded; the paper's is 1 / distance.
* Besides the paper's Kolmogorov-Smirnov (KS) distance: 1-Wasserstein, which also sees the scale,
  and the energy removed.

Precision, measured on matrices of SmolLM2-135M against float64 `svdvals`: a float32 eigensolver
errs by up to 41 units of eps * lambda_max, nearly all of it in the last step, the iteration on the
tridiagonal matrix. With the reduction in float32 and that cheap step in float64 it is under 0.7
units. A bound of 8 units brackets the KS distance, and values equal to within rounding are ties on
every route (`prunenet.spectra.distances.tie_bands`); where the bracket leaves a doubt (1 mask in
96) the mask is solved again in float64: the answer of float64 at the price of float32. LAPACK comes
from scipy, whose OpenBLAS solves a 576 x 576 problem in 15 ms where torch (MKL) takes 22 (one core,
AMD EPYC), and from the upper triangle a seventh faster than from the lower. CUDA uses float64 and
solves all masks of a batch in one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.linalg import blas  # type: ignore[import-untyped]
from torch import Tensor

from prunenet.models.masks import check_keep
from prunenet.runtime.choices import check_choice
from prunenet.spectra.choices import Distance
from prunenet.spectra.distances import ks_distance, ks_sides, tie_bands, wasserstein_distance
from prunenet.spectra.scale import rescaled
from prunenet.spectra.tridiagonal import counts_below, eigenvalues, tridiagonal

# Largest error of an eigenvalue from float32 that is allowed for, relative to lambda_max (measured:
# see above).
_SLACK = 8 * torch.finfo(torch.float32).eps

_Gram = Float64[Tensor, "side side"]
_PerMask = Float64[Tensor, " masks"]
_Counts = Int[Tensor, " masks"]
# Float64 numbers that a batch of masks may hold on a GPU (2 GB); a larger one goes in parts.
_MOST = 2**28
# Two KS distances that differ by less differ by rounding alone: both are multiples of 1 / (n m).
_STEP = 1e-12


def gram(weight: Float[Tensor, "d_ff d_model"]) -> Float64[Tensor, "side side"]:
    """Returns the smaller of W^T W and W W^T in float64 (W^T W where d_ff >= d_model).

    It is on the weight's device if that is a CUDA device, else on the CPU.
    """
    work = weight.to(_work_device(weight), torch.float64)
    return work.T @ work if work.shape[0] >= work.shape[1] else work @ work.T


def energy_kept(
    weight: Float[Tensor, "d_ff d_model"], keep: Bool[Tensor, "masks d_ff"]
) -> _PerMask:
    """Returns |W[K]|_F^2 / |W|_F^2, in [0, 1]: the share of squared singular values kept.

    Needs no spectrum; 1 for a zero matrix.
    """
    energy = weight.to(_work_device(weight), torch.float64).square().sum(-1)
    total = energy.sum()
    if total == 0:
        return energy.new_ones(keep.shape[0])
    lost = torch.where(keep.to(energy.device), 0.0, energy).sum(-1)
    return (1 - lost / total).clamp(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class SpectralReference:
    """Holds one weight matrix of a dense layer and its spectrum, to compare masks with.

    Memory beyond the weight view: side^2 float64, 2.7 MB for SmolLM2-135M, 134 MB for Llama-2-7B.

    Attributes:
        weight: (d_ff, d_model), a view (see `rescaled` for extreme weights); pass `down`
            transposed.
        gram: (side, side), see `gram`.
        eigenvalues: (side,) of `gram`, falling: the squared singular values.
    """

    weight: Float[Tensor, "d_ff d_model"]
    gram: _Gram
    eigenvalues: Float64[Tensor, " side"]

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "d_ff d_model"],
        eigenvalues: Float64[Tensor, " side"] | None = None,
    ) -> SpectralReference:
        """Computes Gram matrix and eigenvalues of one matrix.

        Args:
            weight: (d_ff, d_model).
            eigenvalues: from an earlier call, which save half of the work.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        weight = rescaled(weight)
        matrix = gram(weight)
        return cls(weight, matrix, _eigenvalues(matrix) if eigenvalues is None else eigenvalues)

    @property
    def values(self) -> Float64[Tensor, " side"]:
        """Singular values of the whole matrix, falling."""
        return _roots(self.eigenvalues)

    def distance(
        self, keep: Bool[Tensor, "masks d_ff"], kind: Distance = "ks"
    ) -> Float[Tensor, " masks"]:
        """Measures how far each mask moves the spectrum.

        Args:
            keep: at least one channel each; widths may differ.
            kind: "ks", "wasserstein" (relative to the mean singular value, clipped), or "energy"
                (the share removed).

        Returns:
            (masks,) in [0, 1], float32, on the masks' device; exactly 0 for a full mask.

        Raises:
            ValueError: unknown kind, a mask of the wrong length, or one that keeps nothing.
        """
        check_keep(keep, self.weight.shape[0])
        check_choice("spectral distance", kind, Distance)
        result, cut = torch.zeros(keep.shape[0], device=keep.device), ~keep.all(-1)
        if kind == "energy":
            distance = 1 - energy_kept(self.weight, keep[cut])
        elif kind == "ks":
            distance = self._ks(keep[cut])
        else:
            eigenvalues, counts = _masked_eigenvalues(
                self.weight, self.gram, keep[cut], torch.float32
            )
            distance = wasserstein_distance(self.values, _roots(eigenvalues), counts, relative=True)
        result[cut] = distance.to(result)
        return result

    def _ks(self, keep: Bool[Tensor, "masks d_ff"]) -> _PerMask:
        if self.gram.is_cuda:
            return self._ks_solved(keep)
        slack = _SLACK * self.eigenvalues[0]
        least, most = (
            self._ks_counted(keep, slack) if self._all_wide(keep) else self._ks_between(keep, slack)
        )
        doubtful = most - least > _STEP
        if doubtful.any():
            most[doubtful] = self._ks_solved(keep[doubtful.to(keep.device)])
        return most

    def _all_wide(self, keep: Bool[Tensor, "masks d_ff"]) -> bool:
        side = len(self.gram)
        return (
            len(keep) > 0
            and side > 1
            and len(self.weight) >= side == self.weight.shape[1]
            and int(keep.sum(-1).min()) >= side
        )

    def _ks_counted(
        self, keep: Bool[Tensor, "masks d_ff"], slack: Tensor
    ) -> tuple[_PerMask, _PerMask]:
        """Bounds of KS by float32, for masks of as many values as the reference. Interlacing: none
        is above its own there, so that KS is the most values of a mask below a reference value,
        less those of the reference itself."""
        reduced = [
            tridiagonal(_masked_gram(self.weight, self.gram, mask, torch.float32))
            for mask in keep.cpu()
        ]
        diagonal, beside = (np.stack(part) for part in zip(*reduced, strict=True))
        rising, low = (
            self.eigenvalues.flip(0).numpy(),
            tie_bands(self.eigenvalues)[0].flip(0).numpy(),
        )
        counts = counts_below(
            diagonal, beside, np.concatenate((low - float(slack), low + float(slack)))
        )
        # No true value is below 0, whatever its rounding.
        more = np.where(low > 0, counts.reshape(len(keep), 2, -1), 0) - np.searchsorted(
            rising, rising
        )
        least, most = torch.from_numpy(more.max(-1).clip(min=0) / len(rising)).T
        return least, most.contiguous()

    def _ks_between(
        self, keep: Bool[Tensor, "masks d_ff"], slack: Tensor
    ) -> tuple[_PerMask, _PerMask]:
        """Bounds of KS by float32, for any masks."""
        values, counts = _masked_eigenvalues(self.weight, self.gram, keep, torch.float32)
        # Interlacing: removing rows never raises a singular value, so the reference bounds the true
        # values from above.
        highest = torch.minimum(values + slack, self.eigenvalues)
        bands = tie_bands(self.eigenvalues)
        below_high, above_high = ks_sides(self.eigenvalues, highest, counts, bands)
        below_low, above_low = ks_sides(
            self.eigenvalues, (values - slack).clamp(min=0), counts, bands
        )
        return torch.maximum(below_high, above_low), torch.maximum(below_low, above_high)

    def _ks_solved(self, keep: Bool[Tensor, "masks d_ff"]) -> _PerMask:
        """KS of values from float64, exact but for rounding."""
        found = _masked_eigenvalues(self.weight, self.gram, keep, torch.float64)
        return ks_distance(self.eigenvalues, *found, tie_bands(self.eigenvalues))


def _masked_eigenvalues(
    weight: Float[Tensor, "d_ff d_model"],
    gram: _Gram,
    keep: Bool[Tensor, "masks d_ff"],
    dtype: torch.dtype,
) -> tuple[Float64[Tensor, "masks side"], _Counts]:
    """Squared singular values of each W[K], falling, padded with zeros, and how many count; `dtype`
    is the solver's.
    """
    counts = keep.sum(-1).clamp(max=gram.shape[0]).to(gram.device)
    if gram.is_cuda:
        return _stacked_eigenvalues(weight, gram, keep.to(gram.device)), counts
    result = gram.new_zeros(keep.shape[0], gram.shape[0])
    for row, mask in zip(result, keep.to(weight.device), strict=True):
        eigenvalues = _eigenvalues(_masked_gram(weight, gram, mask, dtype))
        row[: len(eigenvalues)] = eigenvalues
    return result, counts


def _stacked_eigenvalues(
    weight: Float[Tensor, "d_ff d_model"], gram: _Gram, keep: Bool[Tensor, "masks d_ff"]
) -> Float64[Tensor, "masks side"]:
    """Computes `_masked_eigenvalues` in float64, for as many masks at once as memory allows."""
    (d_ff, d_model), side, removed = weight.shape, len(gram), ~keep
    most, most_kept = int(removed.sum(-1).max()), int(keep.sum(-1).max())
    down = most <= most_kept
    fewer, most = (removed, most) if down else (keep, most_kept)
    found = []
    part = max(1, _MOST // (2 * side**2 + most * d_model))
    for some in torch.split(torch.arange(len(keep), device=keep.device), part):
        if d_ff < d_model:
            grams = gram * (keep[some].unsqueeze(1) & keep[some].unsqueeze(2))
        else:
            # Rows that a mask has fewer of than the widest are filled up with zeros.
            order = fewer[some].int().argsort(dim=-1, descending=True)[:, :most]
            rows = weight[order].double() * fewer[some].gather(1, order).unsqueeze(-1)
            grams = gram - rows.mT @ rows if down else rows.mT @ rows
        found.append(torch.linalg.eigvalsh(grams).flip(-1).clamp(min=0))
    return torch.where(
        torch.arange(side, device=gram.device) < keep.sum(-1, keepdim=True), torch.cat(found), 0.0
    )


def _masked_gram(
    weight: Float[Tensor, "d_ff d_model"],
    gram: _Gram,
    keep: Bool[Tensor, " d_ff"],
    dtype: torch.dtype,
) -> Float[Tensor, "count count"]:
    """Returns the Gram matrix of W[K] on its smaller side; only its upper triangle is valid."""
    (d_ff, d_model), width = weight.shape, int(keep.sum())
    if d_ff < d_model:
        return gram[keep.to(gram.device)][:, keep.to(gram.device)].to(dtype)
    if width < d_model:
        return _product(weight[keep].T, dtype)
    if d_ff - width < width:
        return _product(weight[~keep], dtype, minus_from=gram)
    return _product(weight[keep], dtype)


def _product(
    rows: Float[Tensor, "rows side"],
    dtype: torch.dtype,
    minus_from: Float64[Tensor, "side side"] | None = None,
) -> Float[Tensor, "side side"]:
    """Returns X^T X, or `minus_from` - X^T X.

    On the CPU only the upper triangle is computed, at half the cost of a full product.
    """
    if rows.is_cuda:  # in float64, whatever torch may do to float32 products (TF32)
        rows = rows.double()
        return rows.T @ rows if minus_from is None else minus_from - rows.T @ rows
    rows = rows.to("cpu", dtype)
    syrk = blas.ssyrk if dtype == torch.float32 else blas.dsyrk
    columns = rows.contiguous().numpy().T  # column-major, as BLAS wants it: no copy
    start = {} if minus_from is None else {"beta": 1.0, "c": minus_from.to(dtype).numpy().T}
    return torch.from_numpy(syrk(-1.0 if start else 1.0, columns, **start))


def _eigenvalues(matrix: Float[Tensor, "n n"]) -> Float64[Tensor, " n"]:
    """Returns the eigenvalues of a symmetric matrix given by its upper triangle.

    They are 0 or more, falling, in float64.
    """
    if matrix.is_cuda:
        rising: Tensor = torch.linalg.eigvalsh(matrix.double(), UPLO="U")
        return rising.flip(0).clamp(min=0)
    return eigenvalues(matrix).flip(0).clamp(min=0)


def _roots(eigenvalues: Float64[Tensor, "*batch n"]) -> Float64[Tensor, "*batch n"]:
    floor = eigenvalues.shape[-1] * torch.finfo(torch.float64).eps * eigenvalues[..., :1]
    return torch.where(eigenvalues > floor, eigenvalues, 0.0).sqrt()


def _work_device(weight: Tensor) -> torch.device:
    return weight.device if weight.is_cuda else torch.device("cpu")
