"""Closed-form refit of a layer's down matrix after a cut: least squares, with or without a bias
(METHODS.md 5).

After SlimGPT (arXiv 2412.18110) and FASP (arXiv 2501.09412) (ridge least squares on the kept
channels), and FLAP, AAAI 2024, arXiv 2312.11983 (the mean bias). What differs:

- the ridge shrinks towards the kept columns W_K and not towards zero, so that strong damping is "no
  refit"; each column is damped by its channel's own energy, so that a rescaling of channels changes
  nothing;
- one formula for the weights and the bias together, on the covariance of the activations;
- the target may be what the *dense* model's layer wrote at the same tokens (as GPTAQ does for
  quantisation, arXiv 2504.02692: asymmetric calibration), so that a layer measured behind pruned
  ones also makes up for their error;
- damping and shrinkage are chosen across two texts: fitted on each, judged on the other, and then
  used on both together.

Notation: W the down matrix (d_model, d_ff), h the activations in front of it, H = E[h h^T], mu =
E[h], K the kept channels, R the removed ones. All is computed in float64 on the weight's device (on
the CPU where the device is MPS, which has none) and returned in the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from prunenet.models.masks import check_keep
from prunenet.refit.cholesky import damped_by_energy, damped_cholesky

if TYPE_CHECKING:  # for annotations alone: this floor's modules do not import each other
    from prunenet.refit.moments import Moments, Target

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Tried. On SmolLM2-135M, with 13k to 33k tokens, 0.1 to 1 is best almost everywhere."""
SHRINKAGES = (0.0, 0.03, 0.1, 0.3, 1.0)


@torch.no_grad()
def ridge(
    weight: Float[Tensor, "d_model d_ff"],
    second: Float[Tensor, "d_ff d_ff"],
    keep: Bool[Tensor, " d_ff"],
    *,
    damping: float = 1e-2,
    cross: Float[Tensor, "d_ff d_ff"] | None = None,
) -> Float[Tensor, "d_model kept"]:
    """W' = W_K + W_R H_RK (H_KK + damping D)^-1, D = diag(H_KK): the kept columns stand in for the
    removed ones.

    Minimises E|W t - W' h_K|^2 + damping * sum_j D_jj |W'_:j - W_:j|^2, with t = h. Given `cross`,
    t is what the dense layer had at the same tokens: W' = W_K + (W cross_:K - W_K H_KK)(H_KK +
    damping D)^-1; then even a layer that keeps everything changes.

    Args:
        weight: W, any float dtype.
        second: H, of the activations that the refitted matrix will read.
        keep: True where the channel stays; at least one.
        damping: of each column, relative to its channel's energy; at least 0, and more than 0
            unless H_KK has full rank.
        cross: E[t h^T]; default H.

    Raises:
        ValueError: a wrong mask, negative damping, or the damped H_KK is not positive definite (or
            not finite).
    """
    w, h = _working(weight, second)
    check_keep(keep, w.shape[1])
    return _solved(w, h, None if cross is None else cross.to(w), keep.to(w.device), damping).to(
        weight
    )


@torch.no_grad()
def ridge_with_bias(
    weight: Float[Tensor, "d_model d_ff"],
    moments: Moments,
    keep: Bool[Tensor, " d_ff"],
    *,
    damping: float = 1e-2,
    target: Target | None = None,
) -> tuple[Float[Tensor, "d_model kept"], Float[Tensor, " d_model"]]:
    """(W', b): `ridge` on the covariance C = H - mu mu^T, and the bias that makes the mean output
    exact.

    b = W mu - W' mu_K = W_R mu_R + (W_K - W'_K) mu_K, to be *added* to the bias that the layer has.

    Args:
        weight: W, any float dtype.
        moments: of the activations that the refitted matrix will read.
        keep: True where the channel stays; at least one.
        damping: of each column, relative to its channel's variance C_jj.
        target: of the dense layer at the same tokens (`prunenet.refit.moments.paired_moments`);
            default: the layer itself.

    Raises:
        ValueError: as `ridge`.
    """
    w, h, mean = _working(weight, moments.second, moments.mean)
    check_keep(keep, w.shape[1])
    wanted = mean if target is None else target.mean.to(w)
    cross = None if target is None else target.cross.to(w) - torch.outer(wanted, mean)
    keep = keep.to(w.device)
    refitted = _solved(w, h - torch.outer(mean, mean), cross, keep, damping)
    return refitted.to(weight), (w @ wanted - refitted @ mean[keep]).to(weight)


@torch.no_grad()
def mean_bias(
    weight: Float[Tensor, "d_model d_ff"], mean: Float[Tensor, " d_ff"], keep: Bool[Tensor, " d_ff"]
) -> Float[Tensor, " d_model"]:
    """b = W_R mu_R, which makes the mean output exact where the kept columns stay as they are
    (FLAP).

    Raises:
        ValueError: a wrong mask.
    """
    w, mu = _working(weight, mean)
    check_keep(keep, w.shape[1])
    removed = ~keep.to(w.device)
    return (w[:, removed] @ mu[removed]).to(weight)


@torch.no_grad()
def lost(
    weight: Float[Tensor, "d_model d_ff"],
    second: Float[Tensor, "d_ff d_ff"],
    keep: Bool[Tensor, " d_ff"],
    refitted: Float[Tensor, "d_model kept"] | None = None,
    *,
    bias: Float[Tensor, " d_model"] | None = None,
    mean: Float[Tensor, " d_ff"] | None = None,
    target: Target | None = None,
) -> float:
    """E|W t - W' h_K - b|^2 as a share of E|W t|^2: the output energy that a cut loses, from 0 up.

    Args:
        weight: W.
        second: H of the activations that the cut layer reads.
        keep: True where the channel stays.
        refitted: W'; default W_K, no refit.
        bias: b, default 0. Needs `mean`.
        mean: mu.
        target: of the dense layer, whose activations are t then; default t = h.

    Returns:
        0 for a layer that writes nothing, whatever is cut.

    Raises:
        ValueError: a wrong mask, or a bias without the mean.
    """
    w, h = _working(weight, second)
    check_keep(keep, w.shape[1])
    if bias is not None and mean is None:
        raise ValueError(
            "the energy lost with a bias depends on the mean activations; give mean= as well"
        )
    keep = keep.to(w.device)
    after = torch.zeros_like(w)
    after[:, keep] = w[:, keep] if refitted is None else refitted.to(w)
    if target is None:
        difference = w - after
        whole, error = _energy(w, h), _energy(difference, h)
    else:
        whole = h.new_tensor(target.energy)
        # E|W t|^2 - 2 E[(W t)^T W' h] + E|W' h|^2
        error = whole - 2 * ((w @ target.cross.to(w)) * after).sum() + _energy(after, h)
    if bias is not None and mean is not None:
        b, mu = bias.to(w), mean.to(w)
        offset = w @ (mu if target is None else target.mean.to(w)) - after @ mu
        error = error - 2 * b @ offset + b @ b
    return float(error / whole) if float(whole) > 0 else 0.0


def shrink(second: Float[Tensor, "d_ff d_ff"], amount: float) -> Float[Tensor, "d_ff d_ff"]:
    """(1 - amount) H + amount diag(H): correlations are believed less, energies stay.

    Amount 1 leaves nothing to refit with.

    Raises:
        ValueError: the amount is not in [0, 1].
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"shrinkage must be in [0, 1], got {amount}")
    return torch.lerp(second, torch.diag(second.diagonal()), amount)


def choose_damping(
    weight: Float[Tensor, "d_model d_ff"],
    folds: Sequence[Moments],
    keep: Bool[Tensor, " d_ff"],
    candidates: Sequence[float] = DAMPINGS,
    *,
    shrinkage: float = 0.0,
    targets: Sequence[Target] | None = None,
) -> float:
    """The damping whose `ridge`, fitted to one set of moments, loses least energy on another, and
    the other way round.

    Args:
        weight: W.
        folds: two sets of moments. Of two kinds of text they choose what holds on a third; of one
            kind, too little damping for any other.
        keep: True where the channel stays.
        candidates: dampings to try, at least one; of equal ones the first wins.
        shrinkage: of the fitted H, see `shrink`.
        targets: of the dense layer, on the texts of both folds.

    Raises:
        ValueError: no candidates, not two folds, or as `ridge`.
    """
    tried = [(damping, shrinkage) for damping in candidates]
    return _best(weight, folds, keep, tried, targets, "damping")[0]


def choose_shrinkage(
    weight: Float[Tensor, "d_model d_ff"],
    folds: Sequence[Moments],
    keep: Bool[Tensor, " d_ff"],
    candidates: Sequence[float] = SHRINKAGES,
    *,
    damping: float = 1e-2,
    targets: Sequence[Target] | None = None,
) -> float:
    """The shrinkage of the fitted H whose `ridge` loses least energy on the other fold. As
    `choose_damping`.
    """
    return _best(
        weight, folds, keep, [(damping, amount) for amount in candidates], targets, "shrinkage"
    )[1]


@torch.no_grad()
def _best(
    weight: Tensor,
    folds: Sequence[Moments],
    keep: Tensor,
    tried: Sequence[tuple[float, float]],
    targets: Sequence[Target] | None,
    what: str,
) -> tuple[float, float]:
    """The (damping, shrinkage) of least loss, both directions together."""
    if not tried:
        raise ValueError(f"no {what} to choose from; give at least one candidate")
    if len(folds) != 2:
        raise ValueError(
            f"{what} is chosen across two folds, fitted on each and judged on the other; got"
            f" {len(folds)}"
        )
    check_keep(keep, weight.shape[1])
    (w,) = _working(weight)
    keep = keep.to(w.device)
    seconds = [moments.second.to(w) for moments in folds]
    crosses = seconds if targets is None else [target.cross.to(w) for target in targets]
    wholes = (
        [float(_energy(w, second)) for second in seconds]
        if targets is None
        else [target.energy for target in targets]
    )
    systems = [
        _system(w, h, None if t is h else t, keep) for h, t in zip(seconds, crosses, strict=True)
    ]
    losses = dict.fromkeys(tried, 0.0)
    for fitted, judged in ((0, 1), (1, 0)):
        block, right = systems[judged]
        for damping, amount in losses:
            system = systems[fitted]
            if amount:
                system = _system(
                    w, shrink(seconds[fitted], amount), shrink(crosses[fitted], amount), keep
                )
            change = _solution(*system, damping)
            # to the loss without a refit, the same for all
            added = ((change @ block - 2 * right) * change).sum()
            losses[damping, amount] += float(added) / max(wholes[judged], torch.finfo(w.dtype).tiny)
    return min(losses, key=losses.__getitem__)


def _solved(
    w: Float64[Tensor, "d_model d_ff"],
    second: Float64[Tensor, "d_ff d_ff"],
    cross: Float64[Tensor, "d_ff d_ff"] | None,
    keep: Bool[Tensor, " d_ff"],
    damping: float,
) -> Float64[Tensor, "d_model kept"]:
    return w[:, keep] + _solution(*_system(w, second, cross, keep), damping)


def _system(
    w: Float64[Tensor, "d_model d_ff"],
    second: Float64[Tensor, "d_ff d_ff"],
    cross: Float64[Tensor, "d_ff d_ff"] | None,
    keep: Bool[Tensor, " d_ff"],
) -> tuple[Float64[Tensor, "kept kept"], Float64[Tensor, "d_model kept"]]:
    """H_KK, and W cross_:K - W_K H_KK: what the change of W_K, times the former, should be."""
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
    """right (block + damping diag(block))^-1."""
    if damping < 0:
        raise ValueError(f"damping must be 0 or more, got {damping}")
    factor = damped_cholesky(block, damped_by_energy(block, damping), damping)
    solution: Tensor = torch.cholesky_solve(right.T, factor).T
    return solution


def _energy(
    w: Float64[Tensor, "d_model d_ff"], second: Float64[Tensor, "d_ff d_ff"]
) -> Float64[Tensor, ""]:
    return ((w @ second) * w).sum()


def _working(*tensors: Tensor) -> list[Tensor]:
    """In float64, on the device of the first where that has float64."""
    device = tensors[0].device if tensors[0].device.type != "mps" else torch.device("cpu")
    return [tensor.to(device, torch.float64) for tensor in tensors]
