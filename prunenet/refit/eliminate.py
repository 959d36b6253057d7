"""Eliminates FFN channels greedily, each drop followed by the best refit of those that stay
(docs/methods.md, section 5, "Greedy OBS").

Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
NIPS 1992, and its structured forms ZipLM (arXiv 2302.04089) and OSSCAR (arXiv 2403.12983): drop
argmin_j |W_:j|^2 / [H^-1]_jj, then update W and H^-1 by the Schur complement. What differs:

- Only what choosing needs is kept: A = H^-1 and G = W^T W. With a = A_:j / sqrt(A_jj), g = G_:j /
  sqrt(A_jj) and p = g - |w|^2 / 2 a, a drop is A - a a^T and G - p a^T - a p^T: no step touches
  d_model.
- Both updates wait until a block of drops is full and are then two matrix products, as in a blocked
  Cholesky factorisation. In between, only diagonals and the chosen columns are brought up to date.
  The dropped channels leave the matrices with the block. In float64 throughout: H^-1 spans too many
  magnitudes for float32.
- The reported loss is that of the refit with damping (`prunenet.refit.ridge`), on H without it.
- A layer without energy loses nothing: its channels go in the order of their numbers.

Cost: some 3 d_ff^3 multiply-adds for the whole path, in float64; about six d_ff x d_ff matrices at
the peak. A layer of 1536 channels (SmolLM2-135M) down to 384 takes 1.3 s on one core of an AMD
EPYC.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from prunenet.refit.cholesky import damped_by_energy, damped_cholesky, without_energy
from prunenet.runtime.floats import in_float64

_Square = Float64[Tensor, "d_ff d_ff"]
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Elimination:
    """Holds a layer's channels in the order in which they are dropped.

    Attributes:
        order: (dropped,) channel numbers, first dropped first.
        loss: (dropped,) share of the layer's output energy tr(W H W^T) lost after each drop and the
            refit of the other channels; from 0 up, 1 is all.
    """

    order: Int64[Tensor, " dropped"]
    loss: Float64[Tensor, " dropped"]


@torch.no_grad()
def eliminate(
    weight: Float[Tensor, "d_model d_ff"],
    second: Float[Tensor, "d_ff d_ff"],
    *,
    damping: float = 1e-2,
    least: int = 1,
    block: int = 64,
) -> Elimination:
    """Drops one channel after the other, each time the one that the refitted layer misses least.

    Costs are measured in the damped metric H + damping * diag(H), which a rescaling of channels
    (h_j by s, W_:j by 1 / s) leaves alone. Of equal channels the lower number goes first.

    Args:
        weight: the down matrix W, any float dtype.
        second: H = E[h h^T].
        damping: of each channel, relative to its energy H_jj; more than 0 unless H has full rank.
        least: channels that are left when it stops, in [1, d_ff].
        block: drops between two updates of the whole matrices; changes the speed, not the result.

    Raises:
        ValueError: `least` or `block` out of range; or the damped H is not positive definite (or
            not finite).
    """
    d_ff = weight.shape[1]
    if not 1 <= least <= d_ff or block < 1:
        raise ValueError(
            f"a layer of {d_ff} channels can be left with 1 to {d_ff} in blocks of 1 or more, got"
            f" {least}, {block}"
        )
    w, h = in_float64(weight, second)
    device = w.device
    if without_energy(h):
        order = torch.arange(d_ff - least, device=weight.device)
        return Elimination(order, torch.zeros(len(order), dtype=torch.float64, device=order.device))
    energy = ((w @ h) * w).sum()
    lam = damped_by_energy(h, damping)
    inverse, gram = torch.cholesky_inverse(damped_cholesky(h, lam, damping)), w.T @ w
    active = torch.arange(d_ff, device=device)
    orders, losses, factors = [], [], []
    left = d_ff - least
    while left:
        a, p, local, cost = _drop_block(inverse, gram, min(block, left))
        left -= len(local)
        factors.append(a.new_zeros(len(local), d_ff).index_copy_(1, active, a))
        orders.append(active[local])
        losses.append(cost)
        if left:
            kept = torch.ones_like(active, dtype=torch.bool).index_fill_(0, local, False)
            stay = kept.nonzero().flatten()
            a, p, active = a[:, stay], p[:, stay], active[stay]
            inverse = inverse[stay][:, stay].addmm_(a.T, a, alpha=-1)
            gram = gram[stay][:, stay].addmm_(torch.cat([p, a]).T, torch.cat([a, p]), alpha=-1)
    if not orders:
        return Elimination(active[:0].to(weight.device), energy[None][:0].to(weight.device))
    order = torch.cat(orders)
    damped = torch.cat(losses).cumsum(0)
    # A layer that writes nothing loses nothing; and the difference may round below 0.
    lost = (damped - _change(w[:, order], torch.cat(factors), order, lam)).clamp_min(0)
    return Elimination(
        order.to(weight.device),
        (lost / energy.clamp_min(torch.finfo(w.dtype).tiny)).to(weight.device),
    )


def score_order(elimination: Elimination, d_ff: int) -> Float64[Tensor, " d_ff"]:
    """Turns an elimination into scores for `prunenet.models.masks.top_channels`.

    At any width down to the elimination's last, both keep the same channels.

    Args:
        elimination: of a layer of d_ff channels.
        d_ff: channels of the layer.

    Returns:
        (d_ff,): the step at which a channel is dropped, from 0; the number of steps for those that
        are never dropped.
    """
    steps = len(elimination.order)
    scores = torch.full((d_ff,), float(steps), dtype=torch.float64, device=elimination.order.device)
    scores[elimination.order] = torch.arange(steps, dtype=torch.float64, device=scores.device)
    return scores


def _drop_block(
    inverse: _Square, gram: _Square, count: int
) -> tuple[
    Float64[Tensor, "count d_ff"],
    Float64[Tensor, "count d_ff"],
    Int[Tensor, " count"],
    Float64[Tensor, " count"],
]:
    """Chooses `count` channels and leaves the matrices as they are.

    Returns:
        a and p of each drop (see the module), the channels, and the damped loss of each.
    """
    panel, p = inverse.new_zeros(2, count, len(inverse))
    diagonal, norms = inverse.diagonal().clone(), gram.diagonal().clone()
    chosen, costs = [], []
    for k in range(count):
        ratio = norms / diagonal
        j = ratio.argmin(0, keepdim=True)  # stays a tensor: nothing here waits for a GPU
        root = diagonal[j].sqrt()
        column, product = inverse.index_select(0, j)[0], gram.index_select(0, j)[0]
        if k:
            at_j, p_at_j = panel[:k].index_select(1, j)[:, 0], p[:k].index_select(1, j)[:, 0]
            column = torch.addmv(column, panel[:k].T, at_j, alpha=-1)
            product = product - panel[:k].T @ p_at_j - p[:k].T @ at_j
        a = torch.div(column, root, out=panel[k])
        torch.addcmul(product / root, ratio[j], a, value=-0.5, out=p[k])
        diagonal.addcmul_(a, a, value=-1).index_fill_(0, j, 1)
        norms.addcmul_(p[k], a, value=-2).index_fill_(0, j, torch.inf)
        chosen.append(j)
        costs.append(ratio[j])
    return panel, p, torch.cat(chosen), torch.cat(costs)


def _change(
    dropped: Float64[Tensor, "d_model steps"],
    factors: Float64[Tensor, "steps d_ff"],
    order: Int[Tensor, " steps"],
    lam: Float64[Tensor, " d_ff"],
) -> Float64[Tensor, " steps"]:
    """Returns the squared norm, weighted by lam, of the change of W after each step.

    Dropped channels count as zeros. The change is the sum of w a^T over the steps, so its squared
    norm sums (w_s . w_t)(a_s . a_t), where the second product is weighted. W_:j of a step's channel
    is the sum of w_s a_s[j] up to that step: a triangular system for the w.
    """
    triangle = factors[:, order].triu_()
    w = torch.linalg.solve_triangular(triangle, dropped, upper=True, left=False)
    increments = []
    for start in range(0, len(order), _CHUNK):
        rows = slice(start, min(start + _CHUNK, len(order)))
        both = (w[:, rows].T @ w[:, : rows.stop]).mul_(
            (factors[rows] * lam) @ factors[: rows.stop].T
        )
        increments.append(both.tril_(start).sum(1) * 2 - both.diagonal(start))
    return torch.cat(increments).cumsum(0)
