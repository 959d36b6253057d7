"""Refits a layer's down matrix after a cut by ridge least squares, in closed form
(docs/methods.md, section 5).

Source: SlimGPT (arXiv 2412.18110) and FASP (arXiv 2501.09412), ridge least squares on the kept
channels. What differs:

- the ridge shrinks towards the kept columns W_K and not towards zero, so that strong damping is "no
  refit"; each column is damped by its channel's own energy, so that a rescaling of channels changes
  nothing;
- the target may be what the *dense* model's layer wrote at the same tokens (as GPTAQ does for
  quantisation, arXiv 2504.02692: asymmetric calibration), so that a layer measured behind pruned
  ones also makes up for their error;
- damping is chosen across two texts: fitted on each and judged on the other. The refit then uses
  both together;
- a layer without energy (a gate of zeros, say) has nothing to refit and keeps its columns.

Notation: W the down matrix (d_model, d_ff), h the activations in front of it, H = E[h h^T], K the
kept channels, R the removed ones. Everything is computed in float64 (on the CPU where the weight's
device has none) and returned in the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from prunenet.models.masks import check_keep
from prunenet.refit.cholesky import damped_by_energy, damped_cholesky, without_energy
from prunenet.runtime.floats import in_float64

if TYPE_CHECKING:  # for annotations alone: this floor's modules do not import each other
    from prunenet.refit.moments import Moments, Target

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates. On SmolLM2-135M, with 13k to 33k tokens, 0.1 to 1 is best almost everywhere."""


@torch.no_grad()
def ridge(
    weight: Float[Tensor, "d_model d_ff"],
    second: Float[Tensor, "d_ff d_ff"],
    keep: Bool[Tensor, " d_ff"],
    *,
    damping: float = 1e-2,
    cross: Float[Tensor, "d_ff d_ff"] | None = None,
) -> Float[Tensor, "d_model kept"]:
    """Refits the kept columns to stand in for the removed ones.

    Computes W' = W_K + W_R H_RK (H_KK + damping D)^-1 with D = diag(H_KK), which minimises
    E|W t - W' h_K|^2 + damping * sum_j D_jj |W'_:j - W_:j|^2 for t = h. With `cross`, t is what the
    dense layer had at the same tokens, W' = W_K + (W cross_:K - W_K H_KK)(H_KK + damping D)^-1, and
    even a layer that keeps everything changes.

    Args:
        weight: W, any float dtype.
        second: H, of the activations that the refitted matrix will read.
        keep: True where the channel stays; at least one.
        damping: of each column, relative to its channel's energy; at least 0, and more than 0
            unless H_KK has full rank.
        cross: E[t h^T]; default H.

    Returns:
        W', or W_K where the kept channels have no energy.

    Raises:
        ValueError: a wrong mask, negative damping, or the damped H_KK is not positive definite (or
            not finite).
    """
    w, h = in_float64(weight, second)
    check_keep(keep, w.shape[1])
    keep = keep.to(w.device)
    block, right = _system(w, h, None if cross is None else cross.to(w), keep)
    return (w[:, keep] + _solution(block, right, damping)).to(weight)


@torch.no_grad()
def lost(
    weight: Float[Tensor, "d_model d_ff"],
    second: Float[Tensor, "d_ff d_ff"],
    keep: Bool[Tensor, " d_ff"],
    refitted: Float[Tensor, "d_model kept"] | None = None,
) -> float:
    """Returns E|W h - W' h_K|^2 / E|W h|^2: the share of output energy that a cut loses, from 0 up.

    Args:
        weight: W.
        second: H of the activations that the cut layer reads.
        keep: True where the channel stays.
        refitted: W'; default W_K, no refit.

    Returns:
        0 for a layer that writes nothing, whatever is cut.

    Raises:
        ValueError: a wrong mask.
    """
    w, h = in_float64(weight, second)
    check_keep(keep, w.shape[1])
    keep = keep.to(w.device)
    after = torch.zeros_like(w)
    after[:, keep] = w[:, keep] if refitted is None else refitted.to(w)
    whole = float(_energy(w, h))
    return float(_energy(w - after, h)) / whole if whole > 0 else 0.0


@torch.no_grad()
def choose_damping(
    weight: Float[Tensor, "d_model d_ff"],
    folds: Sequence[Moments],
    keep: Bool[Tensor, " d_ff"],
    candidates: Sequence[float] = DAMPINGS,
    *,
    targets: Sequence[Target] | None = None,
) -> float:
    """Returns the damping whose `ridge`, fitted to one fold, loses least energy on the other.

    Both directions count; of equal candidates the first wins.

    Args:
        weight: W.
        folds: two sets of moments. Of two kinds of text they choose what holds on a third; of one
            kind, too little damping for any other.
        keep: True where the channel stays.
        candidates: dampings to try, at least one.
        targets: of the dense layer, on the texts of both folds.

    Raises:
        ValueError: no candidates, not two folds, or as `ridge`.
    """
    if not candidates:
        raise ValueError("no damping to choose from; give at least one candidate")
    if len(folds) != 2:
        raise ValueError(
            "damping is chosen across two folds, fitted on each and judged on the other; got"
            f" {len(folds)}"
        )
    check_keep(keep, weight.shape[1])
    (w,) = in_float64(weight)
    keep = keep.to(w.device)
    systems, wholes = [], []
    for number, moments in enumerate(folds):
        second = moments.second.to(w)
        target = None if targets is None else targets[number]
        systems.append(_system(w, second, None if target is None else target.cross.to(w), keep))
        wholes.append(float(_energy(w, second)) if target is None else target.energy)
    losses = dict.fromkeys(candidates, 0.0)
    for fitted, judged in ((0, 1), (1, 0)):
        block, right = systems[judged]
        for damping in losses:
            change = _solution(*systems[fitted], damping)
            # added to the loss without a refit, which is the same for all
            added = ((change @ block - 2 * right) * change).sum()
            losses[damping] += float(added) / max(wholes[judged], torch.finfo(w.dtype).tiny)
    return min(losses, key=losses.__getitem__)


def _system(
    w: Float64[Tensor, "d_model d_ff"],
    second: Float64[Tensor, "d_ff d_ff"],
    cross: Float64[Tensor, "d_ff d_ff"] | None,
    keep: Bool[Tensor, " d_ff"],
) -> tuple[Float64[Tensor, "kept kept"], Float64[Tensor, "d_model kept"]]:
    """Returns H_KK and W cross_:K - W_K H_KK: the change of W_K times the former is the latter."""
    kept, removed = keep.nonzero().flatten(), (~keep).nonzero().flatten()
    block = second[kept][:, kept]
    # So written that cross = H gives exactly what the plain form gives.
    right = w[:, removed] @ (second if cross is None else cross)[removed][:, kept]
    if cross is not None:
        right += w[:, kept] @ (cross[kept][:, kept] - block)
    return block, right


def _solution(
    block: Float64[Tensor, "kept kept"], right: Float64[Tensor, "d_model kept"], damping: float
) -> Float64[Tensor, "d_model kept"]:
    """Returns right (block + damping diag(block))^-1; zeros where the block has no energy."""
    if damping < 0:
        raise ValueError(f"damping must be 0 or more, got {damping}")
    if without_energy(block):
        return torch.zeros_like(right)
    factor = damped_cholesky(block, damped_by_energy(block, damping), damping)
    solution: Tensor = torch.cholesky_solve(right.T, factor).T
    return solution


def _energy(
    w: Float64[Tensor, "d_model d_ff"], second: Float64[Tensor, "d_ff d_ff"]
) -> Float64[Tensor, ""]:
    return ((w @ second) * w).sum()
