"""Closed-form refit of a layer's down matrix after a cut: least squares, with or without a bias (METHODS.md 5).

After SlimGPT (arXiv 2412.18110) and FASP (arXiv 2501.09412) (ridge least squares on the kept channels), and FLAP, AAAI 2024,
arXiv 2312.11983 (the mean bias). What differs:

- the ridge shrinks towards the kept columns W_K and not towards zero, so that strong damping is "no refit";
- one formula for the weights and the bias together, on the covariance of the activations;
- the target may be what the *dense* model's layer wrote at the same tokens (as GPTAQ does for quantisation, arXiv 2504.02692:
  asymmetric calibration), so that a layer measured behind pruned ones also makes up for their error;
- damping and shrinkage are chosen on held-back moments.

Notation: W the down matrix (d_model, d_ff), h the activations in front of it, H = E[h h^T], mu = E[h], K the kept channels, R
the removed ones. All is computed in float64 on the weight's device (on the CPU where the device is MPS, which has none) and
returned in the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from prunenet.masks import check_keep

if TYPE_CHECKING:  # for annotations alone: this floor's modules do not import each other
    from prunenet.moments import Moments, Target

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
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
    """W' = W_K + W_R H_RK (H_KK + lam I)^-1, lam = damping * mean(diag H): the kept columns stand in for the removed ones.

    Minimises E|W t - W' h_K|^2 + lam |W' - W_K|^2, with t = h. Given `cross`, t is what the dense layer had at the same tokens:
    W' = W_K + (W cross_:K - W_K H_KK)(H_KK + lam I)^-1; then even a layer that keeps everything changes.

    Args:
        weight: W, any float dtype.
        second: H, of the activations that the refitted matrix will read.
        keep: True where the channel stays; at least one.
        damping: relative to the mean diagonal entry of H; at least 0, and more than 0 unless H_KK has full rank.
        cross: E[t h^T]; default H.

    Raises:
        ValueError: a wrong mask, negative damping, or H_KK + lam I is not positive definite (or not finite).
    """
    w, h = _working(weight, second)
    check_keep(keep, w.shape[1])
    return _solved(w, h, None if cross is None else cross.to(w), keep.to(w.device), damping).to(weight)


@torch.no_grad()
def ridge_with_bias(
    weight: Float[Tensor, "d_model d_ff"],
    moments: Moments,
    keep: Bool[Tensor, " d_ff"],
    *,
    damping: float = 1e-2,
    target: Target | None = None,
) -> tuple[Float[Tensor, "d_model kept"], Float[Tensor, " d_model"]]:
    """(W', b): `ridge` on the covariance C = H - mu mu^T, and the bias that makes the mean output exact.

    b = W mu - W' mu_K = W_R mu_R + (W_K - W'_K) mu_K, to be *added* to the bias that the layer has.

    Args:
        weight: W, any float dtype.
        moments: of the activations that the refitted matrix will read.
        keep: True where the channel stays; at least one.
        damping: relative to the mean diagonal entry of C.
        target: of the dense layer at the same tokens (`prunenet.moments.paired_moments`); default: the layer itself.

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
    """b = W_R mu_R, which makes the mean output exact where the kept columns stay as they are (FLAP).

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
        raise ValueError("the energy lost with a bias depends on the mean activations; give mean= as well")
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
    fit: Moments,
    held: Moments,
    keep: Bool[Tensor, " d_ff"],
    candidates: Sequence[float] = DAMPINGS,
    *,
    shrinkage: float = 0.0,
    targets: tuple[Target, Target] | None = None,
) -> float:
    """The damping whose `ridge`, fitted to one set of moments, loses least energy on another.

    Args:
        weight: W.
        fit: moments to refit with.
        held: moments of other text of the same kind: in the `self` regime, of other self-generated text.
        keep: True where the channel stays.
        candidates: dampings to try, at least one; of equal ones the first wins.
        shrinkage: of the fitted H, see `shrink`.
        targets: of the dense layer, on the text of `fit` and on that of `held`.

    Raises:
        ValueError: no candidates, or as `ridge`.
    """
    if not candidates:
        raise ValueError("no damping to choose from; give at least one candidate")
    losses = [_held_loss(weight, fit, held, keep, damping, shrinkage, targets) for damping in candidates]
    return candidates[losses.index(min(losses))]


def choose_shrinkage(
    weight: Float[Tensor, "d_model d_ff"],
    fit: Moments,
    held: Moments,
    keep: Bool[Tensor, " d_ff"],
    candidates: Sequence[float] = SHRINKAGES,
    *,
    damping: float = 1e-2,
    targets: tuple[Target, Target] | None = None,
) -> float:
    """The shrinkage of the fitted H whose `ridge` loses least energy on held-back moments. As `choose_damping`."""
    if not candidates:
        raise ValueError("no shrinkage to choose from; give at least one candidate")
    losses = [_held_loss(weight, fit, held, keep, damping, amount, targets) for amount in candidates]
    return candidates[losses.index(min(losses))]


def _held_loss(
    weight: Tensor,
    fit: Moments,
    held: Moments,
    keep: Tensor,
    damping: float,
    shrinkage: float,
    targets: tuple[Target, Target] | None,
) -> float:
    fitted, scored = (None, None) if targets is None else targets
    second, cross = shrink(fit.second, shrinkage), None if fitted is None else shrink(fitted.cross, shrinkage)
    # In float64: a refit rounded to the weight's half precision would blur the candidates.
    refitted = ridge(_working(weight)[0], second, keep, damping=damping, cross=cross)
    return lost(weight, held.second, keep, refitted, target=scored)


def _solved(
    w: Float64[Tensor, "d_model d_ff"],
    second: Float64[Tensor, "d_ff d_ff"],
    cross: Float64[Tensor, "d_ff d_ff"] | None,
    keep: Bool[Tensor, " d_ff"],
    damping: float,
) -> Float64[Tensor, "d_model kept"]:
    if damping < 0:
        raise ValueError(f"damping must be 0 or more, got {damping}")
    kept, removed = keep.nonzero().flatten(), (~keep).nonzero().flatten()
    block = second[kept][:, kept]
    # W cross_:K - W_K H_KK, so written that cross = H gives exactly what the plain form gives.
    right = w[:, removed] @ (second if cross is None else cross)[removed][:, kept]
    if cross is not None:
        right += w[:, kept] @ (cross[kept][:, kept] - block)
    block.diagonal().add_(damping * second.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(block)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise ValueError(f"the moments with damping {damping} are not positive definite; raise it, or measure more tokens")
    refitted: Tensor = w[:, kept] + torch.cholesky_solve(right.T, factor).T
    return refitted


def _energy(w: Float64[Tensor, "d_model d_ff"], second: Float64[Tensor, "d_ff d_ff"]) -> Float64[Tensor, ""]:
    return ((w @ second) * w).sum()


def _working(*tensors: Tensor) -> list[Tensor]:
    """In float64, on the device of the first where that has float64."""
    device = tensors[0].device if tensors[0].device.type != "mps" else torch.device("cpu")
    return [tensor.to(device, torch.float64) for tensor in tensors]
