"""Distances between one sample and a batch of others: the distributions' largest gap, and the area
between them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

_PerMask = Float64[Tensor, " masks"]
_Counts = Int[Tensor, " masks"]


def ks_distance(
    reference: Float[Tensor, " n"],
    candidates: Float[Tensor, "masks m"],
    counts: _Counts | None = None,
) -> _PerMask:
    """Two-sample Kolmogorov-Smirnov distance, in [0, 1]: the largest gap between two cumulative
    distributions.

    Equals `scipy.stats.ks_2samp(reference, candidate).statistic`.

    Args:
        reference: in any order.
        candidates: one sample a row, in any order within its valid part.
        counts: valid entries at the start of each row, at least 1; default all.
    """
    below, above = ks_sides(reference, candidates, counts)
    return torch.maximum(below, above)


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
    reference: Float[Tensor, " n"], candidates: Float[Tensor, "masks m"], counts: _Counts | None
) -> tuple[_PerMask, _PerMask]:
    """(sup F_candidate - F_reference, sup F_reference - F_candidate), F the cumulative
    distributions.

    The first falls and the second rises when candidates rise.
    """
    _, gap = _cumulative_gap(reference, candidates, counts)
    return (-gap).amax(-1).clamp(min=0), gap.amax(-1).clamp(min=0)


def _cumulative_gap(
    reference: Float[Tensor, " n"], candidates: Float[Tensor, "masks m"], counts: _Counts | None
) -> tuple[Float64[Tensor, "masks points"], Float64[Tensor, "masks points"]]:
    """(points, F_reference - F_candidate there): every value of either sample, rising; +inf in
    place of invalid ones.
    """
    masks, m = candidates.shape
    reference = reference.to(torch.float64).sort().values
    candidates = candidates.to(torch.float64)
    if counts is None:
        counts = torch.full((masks,), m, device=candidates.device)
    invalid = torch.arange(m, device=candidates.device) >= counts[:, None]
    candidates = candidates.masked_fill(invalid, torch.inf).sort(-1).values
    points = torch.cat([reference.expand(masks, -1), candidates], -1).sort(-1).values
    at_most = torch.searchsorted(reference.expand(masks, -1).contiguous(), points, right=True)
    candidates_at_most = torch.searchsorted(candidates, points, right=True).minimum(counts[:, None])
    return points, at_most.double() / reference.shape[0] - candidates_at_most.double() / counts[
        :, None
    ].double()
