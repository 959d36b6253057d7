"""Defines distributions over the keep masks of one layer, with exact log-probabilities.

The published PruneNet (arXiv 2501.15296) sums marginals with new noise, which is not the
probability of any action (docs/methods.md, section 1.2, item 2). Here every channel stays with
probability sigmoid(logit + offset), where one offset per layer makes the expected width the target.
Two distributions:

- `Bernoulli`: channels are independent; the width varies around the target.
- `FixedWidth`: the same, conditional on exactly `width` channels (the conditional Bernoulli
  distribution; Chen, Dempster and Liu, "Weighted finite population sampling to maximize entropy",
  Biometrika 1994). Rewards then do not differ by size.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from prunenet.models.masks import top_channels

# Halvings of a bracket some 80 wide, to 1e-6: two Newton steps, each of which squares the error,
# then reach the rounding.
_BISECTIONS = 26


def solve_offset(
    logits: Float[Tensor, "masks d_ff"], width: Int[Tensor, " masks"]
) -> Float[Tensor, "masks 1"]:
    """Solves sum_j sigmoid(logit_j + b) = width for the offset b of each mask.

    Differentiable in the logits. Bisection to 1e-6 and two Newton steps find the offset without
    gradient; a third step carries the exact implicit derivative, db / dlogit_j = -p_j (1 - p_j) /
    sum_i p_i (1 - p_i).

    Args:
        logits: any finite values.
        width: in [1, d_ff]; at d_ff the offset is finite and makes every channel practically
            certain.
    """
    # Keeps p (1 - p) away from 0 when everything is kept, where the offset would be infinite.
    target = width.clamp(max=logits.shape[1] - 1e-4).unsqueeze(1).to(torch.float64)
    z = logits.detach().to(torch.float64)
    low, high = -z.amax(1, keepdim=True) - 40, -z.amin(1, keepdim=True) + 40
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        over = torch.sigmoid(z + middle).sum(1, keepdim=True) > target
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    offset = (low + high) / 2
    for _ in range(2):
        p = torch.sigmoid(z + offset)
        slope = (p * (1 - p)).sum(1, keepdim=True).clamp(min=1e-12)
        newton = offset - (p.sum(1, keepdim=True) - target) / slope
        offset = torch.where((newton >= low) & (newton <= high), newton, offset)
    p = torch.sigmoid(z + offset)
    slope = (p * (1 - p)).sum(1, keepdim=True).clamp(min=1e-12)
    residual = torch.sigmoid(logits.to(torch.float64) + offset).sum(1, keepdim=True) - target
    return (offset - residual / slope).to(logits.dtype)


class Bernoulli:
    """Keeps channels independently, with the target width as their expected number.

    Args:
        logits: (cases, d_ff); only differences within a row matter.
        width: (cases,) target widths, in [1, d_ff].
        rows: (masks,) the case of each mask; default one mask per case. Many masks of one layer
            share a case, for which everything costly is computed once.
    """

    def __init__(
        self,
        logits: Float[Tensor, "cases d_ff"],
        width: Int[Tensor, " cases"],
        rows: Int[Tensor, " masks"] | None = None,
    ) -> None:
        self.width = width
        self.rows = torch.arange(len(width), device=width.device) if rows is None else rows
        self.shifted = logits + self._offset(logits)

    def _offset(self, logits: Float[Tensor, "cases d_ff"]) -> Float[Tensor, "cases 1"]:
        return solve_offset(logits, self.width)

    @cached_property
    def _probability(self) -> Float[Tensor, "cases d_ff"]:
        return torch.sigmoid(self.shifted)

    def sample(self, generator: torch.Generator) -> Bool[Tensor, "masks d_ff"]:
        """Draws the masks; an empty one is drawn again (its probability is about exp(-width))."""
        probability = self._probability.detach()[self.rows]
        keep = _coins(probability, generator)
        while bool((empty := ~keep.any(1)).any()):
            keep[empty] = _coins(probability[empty], generator)
        return keep

    def mode(self) -> Bool[Tensor, "masks d_ff"]:
        """Returns the `width` likeliest channels, for each mask."""
        logits = self.shifted.detach()
        cases = [
            top_channels(row, int(width)) for row, width in zip(logits, self.width, strict=True)
        ]
        return torch.stack(cases)[self.rows]

    def log_prob(self, keep: Bool[Tensor, "masks d_ff"]) -> Float[Tensor, " masks"]:
        """Returns the exact log-probability of each mask, in nats."""
        stay, go = logsigmoid(self.shifted)[self.rows], logsigmoid(-self.shifted)[self.rows]
        return torch.where(keep, stay, go).sum(1)

    def entropy(self) -> Float[Tensor, " masks"]:
        """Returns the entropy of each mask's distribution, in nats, in [0, d_ff ln 2]."""
        return (softplus(self.shifted) - self._probability * self.shifted).sum(1)[self.rows]


class FixedWidth(Bernoulli):
    """Keeps exactly the target width of channels: `Bernoulli`, conditional on the number kept.

    log P(mask) = sum of the independent log-probabilities - log P(number kept = width). It does not
    depend on the offset, which only makes the second term well conditioned.
    """

    def _offset(self, logits: Float[Tensor, "cases d_ff"]) -> Float[Tensor, "cases 1"]:
        return solve_offset(logits.detach(), self.width)

    def sample(self, generator: torch.Generator) -> Bool[Tensor, "masks d_ff"]:
        """Draws the masks by rejection.

        The target is the mean width, so that about one draw in 2.5 standard deviations is right.
        """
        keep = self.mode()
        width = self.width[self.rows]
        missing = width < keep.shape[1]
        probability = self._probability.detach()
        tries = 2 + math.ceil(2.5 * _spread(probability))
        while bool(missing.any()):
            masks = missing.nonzero().squeeze(1)
            draws = _coins(
                probability[self.rows[masks]].unsqueeze(1).expand(-1, tries, -1), generator
            )
            right = draws.sum(2) == width[masks].unsqueeze(1)
            hit = right.any(1)
            keep[masks[hit]] = draws[hit, right[hit].int().argmax(1)]
            missing[masks[hit]] = False
        return keep

    def log_prob(self, keep: Bool[Tensor, "masks d_ff"]) -> Float[Tensor, " masks"]:
        """Returns the exact log-probability of each mask, in nats; -inf for another width."""
        exact = super().log_prob(keep) - self._log_mass[self.rows]
        return torch.where(keep.sum(1) == self.width[self.rows], exact, -torch.inf)

    def entropy(self) -> Float[Tensor, " masks"]:
        """Returns the independent entropy plus the log-mass of the width, in nats.

        Overestimates by under 0.3 nats where logits are moderate, and by more where they are spread
        out. Its gradient omits the offset: use it for logs, not for training.
        """
        return super().entropy() + self._log_mass[self.rows]

    @cached_property
    def _log_mass(self) -> Float[Tensor, " cases"]:
        """log P(number kept = width)."""
        chances = torch.sigmoid(self.shifted.to(torch.float64))
        mass: Tensor = _LogMass.apply(chances, self.width)  # type: ignore[no-untyped-call]
        return mass.to(self.shifted.dtype)


class _LogMass(torch.autograd.Function):
    """Computes log P(number kept = width) from the characteristic function of the number.

    The function is evaluated at M equally spaced frequencies, which is exact for M > d_ff. Wide
    layers use fewer: with the width at the mean, masses that alias onto it lie 8 standard
    deviations away and more, under 1e-13 of it. M is odd, so that no factor 1 + p (e^iw - 1)
    vanishes.
    """

    @staticmethod
    def forward(ctx, p, width):  # type: ignore[no-untyped-def]
        d_ff = p.shape[1]
        m = min(d_ff + 1, 17 + 16 * math.ceil(_spread(p))) | 1
        # The other half of the frequencies are conjugates: their real parts count twice.
        angle = 2 * math.pi * torch.arange(m // 2 + 1, device=p.device, dtype=torch.float64) / m
        weight = torch.full_like(angle, 2 / m)
        weight[0] = 1 / m
        shift = torch.polar(torch.ones_like(angle), angle) - 1
        log_mass, slope = p.new_empty(p.shape[0]), torch.zeros_like(p)
        for row in range(p.shape[0]):
            factor = 1 + p[row] * shift[:, None]
            term = (
                weight * factor.prod(1) * torch.polar(torch.ones_like(angle), -angle * width[row])
            )
            mass = term.real.sum()
            log_mass[row] = torch.log(mass)
            if ctx.needs_input_grad[0]:
                slope[row] = ((term * shift) @ (1 / factor)).real / mass
        ctx.save_for_backward(slope)
        return log_mass

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (slope,) = ctx.saved_tensors
        return grad.unsqueeze(1) * slope, None


def _coins(
    probability: Float[Tensor, "*rows d_ff"], generator: torch.Generator
) -> Bool[Tensor, "*rows d_ff"]:
    draws = torch.rand(
        probability.shape, generator=generator, device=generator.device, dtype=torch.float32
    )
    return draws.to(probability.device) < probability


def _spread(probability: Float[Tensor, "cases d_ff"]) -> float:
    """Returns the largest standard deviation of the number kept."""
    return math.sqrt(float((probability * (1 - probability)).sum(1).max().detach()))
