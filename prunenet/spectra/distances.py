"""Distances between one sample and a batch of others: the distributions' largest gap, and the area
between them.

Ties decide a Kolmogorov-Smirnov (KS) distance: where both distributions jump at one value, rounding
that parts the two jumps leaves a gap as high as the jump. `tie_bands` says which singular values
are equal to within rounding, for every route alike.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

_PerMask = Float64[Tensor, " masks"]
_Counts = Int[Tensor, " masks"]
_Bands = Float64[Tensor, "2 n"]

# Half-width of a multiple singular value, relative to the largest. A float32 matrix made with equal
# ones scatters them over 10 to 18 units of eps (measured, sides 80 to 1024), so that 32 take in all
# of them.
_MULTIPLE = 32 * torch.finfo(torch.float32).eps
# Error of an eigenvalue in float64, relative to the largest. Eigensolvers are backward stable, so
# that they err by a small multiple of eps; 64 leave room for any side and for other processors'
# kernels (`prunenet.spectra.exact` measured 0.7).
_ROUNDING = 64 * torch.finfo(torch.float64).eps


def ks_distance(
    reference: Float[Tensor, " n"],
    candidates: Float[Tensor, "masks m"],
    counts: _Counts | None = None,
    bands: _Bands | None = None,
) -> _PerMask:
    """Two-sample Kolmogorov-Smirnov distance, in [0, 1]: the largest gap between two cumulative
    distributions.

    Equals `scipy.stats.ks_2samp(reference, candidate).statistic` where there are no bands.

    Args:
        reference: in any order.
        candidates: one sample a row, in any order within its valid part.
        counts: valid entries at the start of each row, at least 1; default all.
        bands: from where to where a candidate equals each reference value (`tie_bands`); default
            the value itself.
    """
    below, above = ks_sides(reference, candidates, counts, bands)
    return torch.maximum(below, above)


def tie_bands(squares: Float64[Tensor, " n"]) -> _Bands:
    """Lowest and highest square at which another singular value counts as equal to each of a
    matrix.

    A value with another, or zero, within 32 eps of float32 (relative to the largest) is a multiple
    one, whose band reaches as
    far: weights are float32 at best. The band of a simple value is the rounding of an eigenvalue in
    float64, 64 eps. Were it as wide as that of a multiple one, distances of ordinary matrices would
    move: of SmolLM2-135M one mask in 58 by a step (probe).

    Args:
        squares: the matrix's singular values squared, falling, 0 or more.
    """
    values = squares.sqrt()
    width = _MULTIPLE * values[0]
    near = (
        torch.cat((values.new_full((1,), torch.inf), values, values.new_zeros(1))).diff().neg()
        <= width
    )
    margin, rounding = torch.where(near[1:] | near[:-1], width, 0.0), _ROUNDING * squares[0]
    return torch.stack(
        ((values - margin).clamp(min=0).square() - rounding, (values + margin).square() + rounding)
    )


def wasserstein_distance(
    reference: Float[Tensor, " n"],
    candidates: Float[Tensor, "masks m"],
    counts: _Counts | None = None,
    *,
    relative: bool = False,
) -> _PerMask:
    """1-Wasserstein distance between two samples, in the samples' unit, 0 or more.

    Equals `scipy.stats.wasserstein_distance(reference, candidate)`.

    Args:
        reference, candidates, counts: as in `ks_distance`; values are 0 or more.
        relative: divide by the mean of the reference and clip to [0, 1]; 0 when the reference is
            zero.
    """
    points, gap = _cumulative_gap(reference, candidates, counts)
    top = points.nan_to_num(posinf=0.0).amax(-1, keepdim=True)
    steps = torch.where(points.isinf(), top, points).diff(dim=-1)
    distance = (gap[:, :-1].abs() * steps).sum(-1)
    if not relative:
        return distance
    scale = reference.to(torch.float64).mean()
    return (distance / scale).clamp(0, 1) if scale > 0 else torch.zeros_like(distance)


def ks_sides(
    reference: Float[Tensor, " n"],
    candidates: Float[Tensor, "masks m"],
    counts: _Counts | None,
    bands: _Bands | None = None,
) -> tuple[_PerMask, _PerMask]:
    """(sup F_candidate - F_reference, sup F_reference - F_candidate), F the cumulative
    distributions; 0 or more.

    The first is reached just below a value of the reference, the second at one; so candidates are
    counted there alone, and none within the value's band counts as below it or above it. The first
    falls and the second rises when candidates rise.
    """
    reference, (candidates, counts) = (
        reference.to(torch.float64).sort().values,
        _valid(candidates, counts),
    )
    edges = torch.stack((reference, reference)) if bands is None else bands.sort(-1).values
    low, high = (edge.expand(len(counts), -1).contiguous() for edge in edges)
    n, m = len(reference), counts[:, None].double()
    below = (
        torch.searchsorted(candidates, low).double() / m
        - torch.searchsorted(reference, reference).double() / n
    )
    above = torch.searchsorted(reference, reference, right=True).double() / n
    above = above - torch.searchsorted(candidates, high, right=True).double() / m
    return below.amax(-1).clamp(min=0), above.amax(-1).clamp(min=0)


def _valid(
    candidates: Float[Tensor, "masks m"], counts: _Counts | None
) -> tuple[Float64[Tensor, "masks m"], _Counts]:
    """Each row's valid entries, rising, with +inf in place of the others; how many are valid."""
    masks, m = candidates.shape
    if counts is None:
        counts = torch.full((masks,), m, device=candidates.device)
    invalid = torch.arange(m, device=candidates.device) >= counts[:, None]
    return candidates.to(torch.float64).masked_fill(invalid, torch.inf).sort(-1).values, counts


def _cumulative_gap(
    reference: Float[Tensor, " n"], candidates: Float[Tensor, "masks m"], counts: _Counts | None
) -> tuple[Float64[Tensor, "masks points"], Float64[Tensor, "masks points"]]:
    """(points, F_reference - F_candidate there): every value of either sample, rising; +inf in
    place of invalid ones.
    """
    reference, (candidates, counts) = (
        reference.to(torch.float64).sort().values,
        _valid(candidates, counts),
    )
    reference_rows = reference.expand(len(counts), -1).contiguous()
    points = torch.cat([reference_rows, candidates], -1).sort(-1).values
    at_most = torch.searchsorted(reference_rows, points, right=True)
    candidates_at_most = torch.searchsorted(candidates, points, right=True).minimum(counts[:, None])
    return points, at_most.double() / reference.shape[0] - candidates_at_most.double() / counts[
        :, None
    ].double()
