"""LILA: scores channels by the leave-one-out shift of leading singular values, from weights alone.

Source: LILA (2026), as summarised in docs/methods.md, section 6: M = |W_u|; s_j is the
Kolmogorov-Smirnov (KS) distance between the leading 32 singular values of M and those of M without
row j; the largest are kept.

What differs:
- [rec] what the KS distance compares. Between the two *samples* of 32 values it cannot rank
  anything: removing a row moves each singular value into the gap below it (Cauchy interlacing). The
  two empirical distributions then never differ by more than one step, and the distance is 1/32 for
  every row that moves a value at all. That reading is kept as `form="two_sample"`. The default,
  "mass", compares how the sum of the leading values is spread over them (the largest gap between
  the normalised cumulative sums). Nothing measured with it is the paper's number;
- the downdate is exact: the roots of the secular equation, for all rows at once, not one
  decomposition a row. Squared singular values agree with `svdvals` of the matrix without the row to
  2e-14 of the largest (tested, degenerate matrices included).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.runtime.choices import check_choice
from prunenet.spectra.distances import ks_distance, tie_bands

Comparison = Literal["mass", "two_sample"]
"""What the KS distance compares: cumulative sums of the values, or the two samples."""
_CHUNK = 2**19  # elements of the largest temporary: 4 MB stay in the cache
_SMALLEST = 1e-30  # of a denominator, in units of the largest eigenvalue
_EPS = torch.finfo(torch.float64).eps


def scores(
    evidence: Evidence, *, count: int = 32, form: Comparison = "mass"
) -> list[Float[Tensor, " _"]]:
    """Returns the KS distance, in [0, 1], that removing each channel's row causes.

    Args:
        evidence: its up matrices are read; 30 layers of 1536 x 576 take about a minute on one core.
        count: leading singular values compared; at most as many as the matrix has.
        form: see the module.

    Raises:
        ValueError: an unknown form, or weights that are not finite.
    """
    check_choice("form", form, Comparison)
    return [layer_score(ffn.up, count=count, form=form) for ffn in evidence.ffns]


def layer_score(
    up: Float[Tensor, "d_ff d_model"], *, count: int = 32, form: Comparison = "mass"
) -> Float64[Tensor, " d_ff"]:
    """Scores the rows of one matrix; arguments as for `scores`. Zeros for a zero matrix."""
    eigenvalues, drops = leave_one_out(up.double().abs(), min(count, *up.shape))
    if form == "two_sample":
        return ks_distance(eigenvalues, eigenvalues - drops, bands=tie_bands(eigenvalues))
    before = _cumulative(eigenvalues.sqrt())
    return (_cumulative((eigenvalues - drops).clamp_min(0).sqrt()) - before).abs().amax(-1)


def leave_one_out(
    matrix: Float64[Tensor, "rows side"], count: int
) -> tuple[Float64[Tensor, " count"], Float64[Tensor, "rows count"]]:
    """Computes the leading squared singular values and their drops without each row.

    Args:
        matrix: M, finite, on a device that has float64.
        count: in [1, side].

    Returns:
        Eigenvalues of M^T M, falling; and for each row what to subtract from them to get those of M
        without the row, 0 or more.
    """
    rising, vectors = torch.linalg.eigh(matrix.T @ matrix)
    eigenvalues = rising.flip(0).clamp_min(0)
    squares = (matrix @ vectors.flip(1)).square()
    top = eigenvalues[0]
    if top == 0:
        return eigenvalues[:count], squares[:, :count]
    drops = torch.empty_like(squares[:, :count])
    size = max(1, _CHUNK // (count * len(eigenvalues)))
    for start in range(0, len(squares), size):
        drops[start : start + size] = _drops(
            eigenvalues / top, squares[start : start + size] / top, count
        )
    return eigenvalues[:count], drops * top


def _cumulative(values: Float64[Tensor, "*rows count"]) -> Float64[Tensor, "*rows count"]:
    sums = values.cumsum(-1)
    return sums / sums[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)


def _drops(
    poles: Float64[Tensor, " side"], squares: Float64[Tensor, "rows side"], count: int
) -> Float64[Tensor, "rows count"]:
    """Solves 1 = sum_i z_i^2 / (pole_i - pole_k + t_k) for the drops t_k in [0, gap_k].

    Uses the "middle way" (R.-C. Li, "Solving secular equations stably and efficiently", LAPACK
    Working Note 89). Each step replaces the terms of the poles from k up and those below by one
    pole each, with their value and slope, and solves the remaining quadratic. A step that leaves
    the bracket is replaced by bisection, and so is every second late one: the model fails where
    poles coincide but for rounding, or roots with poles.
    """
    gap = torch.cat([poles, poles.new_zeros(1)]).diff().neg()[:count]
    offsets = poles - poles[:count, None]
    above = torch.ones_like(offsets, dtype=torch.bool).tril()
    head = above[:, :count].double()
    result = _start(offsets, squares, gap)
    low, high = torch.zeros_like(result), gap.expand_as(result).clone()
    open_ = torch.arange(len(squares), device=poles.device)
    for turn in range(150):
        drop, column = result[open_], squares[open_].unsqueeze(-1)
        inverse = offsets + drop.unsqueeze(-1)
        inverse = torch.where(
            above, inverse.clamp_min(_SMALLEST), inverse.clamp_max(-_SMALLEST)
        ).reciprocal_()
        both = (inverse @ column).squeeze(-1)
        upper = ((inverse[..., :count] * head) @ column[:, :count]).squeeze(-1)
        inverse.square_()
        both_slope = (inverse @ column).squeeze(-1)
        upper_slope = ((inverse[..., :count] * head) @ column[:, :count]).squeeze(-1)
        far = both > 1  # the drop is too small
        low[open_] = below = torch.where(far, drop, low[open_])
        high[open_] = beyond = torch.where(far, high[open_], drop)
        following = _step(drop, gap, (upper, upper_slope), (both - upper, both_slope - upper_slope))
        inside = (following > below) & (following < beyond)
        if turn >= 10 and turn % 2:
            inside = torch.zeros_like(inside)
        following = torch.where(inside, following, (below + beyond) / 2)
        arrived = (both - 1).abs() <= 8 * _EPS * (1 + 2 * upper - both)  # rounding of the two sums
        result[open_] = following = torch.where(arrived, drop, following)
        # Convergence is quadratic in units of the distance to the nearest pole; bisection is linear
        # and needs smaller steps.
        scale = torch.where(inside, 1e-9, 1e-13) * torch.minimum(following, gap - following)
        settled = arrived | ((following - drop).abs() <= scale + 2 * _EPS * following + 1e-18)
        open_ = open_[~settled.all(-1)]
        if len(open_) == 0:
            break
    return result


def _start(
    offsets: Float64[Tensor, "count side"],
    squares: Float64[Tensor, "rows side"],
    gap: Float64[Tensor, " count"],
) -> Float64[Tensor, "rows count"]:
    """Approximates the root with the terms of all poles but k and k + 1 taken at pole k.

    Takes one matrix product for all rows.
    """
    count, side = offsets.shape
    near = torch.eye(count, side, dtype=torch.bool, device=gap.device)
    near |= near.roll(1, 1)
    inverse = torch.where(near | (offsets.abs() < _SMALLEST), 0.0, offsets.reciprocal())
    following = torch.nn.functional.pad(squares, (0, 1))[:, 1 : count + 1]
    root = _root(1 - squares @ inverse.T, squares[:, :count], following, gap)
    return torch.where((root >= 0) & (root <= gap), root, gap / 2)


def _step(
    drop: Tensor, gap: Tensor, upper: tuple[Tensor, Tensor], lower: tuple[Tensor, Tensor]
) -> Tensor:
    """Returns the next drop, from (value, slope) of the terms of poles from k up, and below k."""
    rest = gap - drop
    c = 1 - (upper[0] - upper[1] * drop) - (lower[0] + lower[1] * rest)
    return _root(c, upper[1] * drop.square(), lower[1] * rest.square(), gap)


def _root(c: Tensor, s: Tensor, p: Tensor, gap: Tensor) -> Tensor:
    """Returns the t in (0, gap) with c = s / t + p / (t - gap).

    It is a root of c t^2 - (c gap + s + p) t + s gap.
    """
    b = c * gap + s + p
    root = (b.square() - 4 * c * s * gap).clamp_min(0).sqrt()
    # Two forms of the same root, of which the sign of b decides the one without cancellation.
    return torch.where(
        b > 0, 2 * s * gap / (b + root), (b - root) / torch.where(c == 0, 1.0, 2 * c)
    )
