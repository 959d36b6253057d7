"""Defines the distribution over layer widths that training draws from, by one log-odds per layer.

Layer l keeps the share sigmoid(theta + offset_l) of its channels, where theta meets the budget
(`prunenet.models.masks.widths_for_budget` applies the same rule, rounded). The offsets do not
depend on the ratio, so that masks nest as the ratio rises.

Widths are drawn layer by layer under the environment's rules. The mean width of a layer follows
from theta, solved over the remaining layers for the remaining budget; the last layer takes all that
is left. The log-probability is exact, and its gradient reaches the offsets of this layer and of all
later ones.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunenet.models.masks import top_channels

_BISECTIONS = 40  # of theta in [-30, 30]: to 1e-10


def mean_shares(
    offsets: Float[Tensor, " layers"],
    layer: Int[Tensor, " sweeps"],
    budget: Float[Tensor, " sweeps"],
    costs: Float[Tensor, " layers"] | None = None,
) -> Float[Tensor, "sweeps layers"]:
    """Returns sigmoid(theta + offsets), with theta solved for the remaining budget.

    The shares of layer `layer` and of all later layers, times their costs (default 1), sum to the
    budget. Differentiable in the offsets: theta's derivative is that of the constraint (implicit
    function theorem). Shares of earlier layers have no meaning.
    """
    later = torch.arange(len(offsets), device=offsets.device) >= layer[:, None]
    with torch.no_grad():
        if costs is not None:
            later = later * costs
        low, high = torch.full_like(budget, -30.0), torch.full_like(budget, 30.0)
        for _ in range(_BISECTIONS):
            theta = (low + high) / 2
            over = (torch.sigmoid(theta[:, None] + offsets) * later).sum(1) > budget
            low, high = torch.where(over, low, theta), torch.where(over, theta, high)
        shares = torch.sigmoid(theta[:, None] + offsets)
        slope = shares * (1 - shares) * later
        weight = slope / slope.sum(1, keepdim=True).clamp_min(1e-12)
    # d theta / d offset_k = -weight_k: theta is a constant minus its weighted offsets.
    moving = theta[:, None] - ((offsets - offsets.detach()) * weight).sum(1, keepdim=True)
    return torch.sigmoid(moving + offsets)


class SweptWidths:
    """Draws the width of the current layer of each sweep, then keeps the best channels.

    Widths follow a normal distribution around the mean share, in whole multiples. Has the interface
    of the distributions in `prunenet.policies.training.subset`. The channels are those of the
    highest logits: the probability of such a mask is that of its width, and 0 for any other mask.
    The last layer takes all that is left of the budget.

    Args:
        logits: (layers, d_ff) of all channels, not trained here.
        offsets: (layers,) log-odds.
        layer: (masks,) current layer of each sweep.
        left: (masks,) channels that each sweep may still keep.
        round_to: widths are multiples of this.
        spread: standard deviation of a width, as a share of d_ff.
    """

    def __init__(
        self,
        logits: Float[Tensor, "layers d_ff"],
        offsets: Float[Tensor, " layers"],
        layer: Int[Tensor, " masks"],
        left: Int[Tensor, " masks"],
        *,
        round_to: int = 8,
        spread: float = 0.05,
    ) -> None:
        d_ff = logits.shape[1]
        later = len(offsets) - 1 - layer
        self._logits, self._layer, self._round = logits, layer, round_to
        most = d_ff // round_to
        self._low = torch.div(left - later * d_ff, round_to, rounding_mode="floor").clamp(1, most)
        self._high = (torch.div(left, round_to, rounding_mode="floor") - later).clamp(1, most)
        budget = (left / d_ff).to(offsets.dtype)
        shares = mean_shares(
            offsets, layer, torch.minimum(budget.clamp_min(1e-3), later + 1 - 1e-3)
        )
        self._mean = shares.gather(1, layer[:, None]) * d_ff / round_to
        self._spread = spread * d_ff / round_to

    @cached_property
    def _log_chances(self) -> Float[Tensor, "masks multiples"]:
        """Log-probability of every multiple: a normal density normalised over the allowed ones."""
        multiples = torch.arange(int(self._high.max()) + 1, device=self._mean.device)
        density = -0.5 * ((multiples - self._mean) / self._spread) ** 2
        outside = (multiples < self._low[:, None]) | (multiples > self._high[:, None])
        return density.masked_fill(outside, -torch.inf).log_softmax(1)

    def sample(self, generator: torch.Generator) -> Bool[Tensor, "masks d_ff"]:
        """Draws the masks, in pairs of mirrored draws, whose mean has less variance."""
        chances = self._log_chances.detach().exp()
        draws = torch.rand(
            (len(chances) + 1) // 2, generator=generator, device=generator.device
        ).to(chances.device)
        uniform = torch.stack((draws, 1 - draws), 1).flatten()[: len(chances), None]
        return self._masks((chances.cumsum(1) < uniform).sum(1))

    def mode(self) -> Bool[Tensor, "masks d_ff"]:
        """Returns the mask of the likeliest width of each row."""
        return self._masks(self._log_chances.detach().argmax(1))

    def _masks(self, multiples: Int[Tensor, " masks"]) -> Bool[Tensor, "masks d_ff"]:
        allowed = torch.minimum(torch.maximum(multiples, self._low), self._high) * self._round
        return torch.stack(
            [
                top_channels(self._logits[i], int(width))
                for i, width in zip(self._layer, allowed, strict=True)
            ]
        )

    def log_prob(self, keep: Bool[Tensor, "masks d_ff"]) -> Float[Tensor, " masks"]:
        """Returns the exact log-probability of each mask, in nats; -inf if it cannot be drawn."""
        multiples = torch.div(keep.sum(1), self._round, rounding_mode="floor")
        chances = self._log_chances
        value = chances.gather(1, multiples.clamp(max=chances.shape[1] - 1)[:, None]).squeeze(1)
        possible = (keep == self._masks(multiples)).all(1)
        return torch.where(possible, value, torch.full_like(value, -torch.inf))

    def entropy(self) -> Float[Tensor, " masks"]:
        """Returns the entropy of each width, in nats."""
        chances = self._log_chances
        return -(chances.exp() * chances.masked_fill(chances.isinf(), 0)).sum(1)
