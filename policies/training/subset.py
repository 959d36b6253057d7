"""Distributions over the keep masks of one layer, with the exact log-probability of the mask that
was played.

METHODS.md 1.2, item 2: the published PruneNet (arXiv 2501.15296) sums marginals with fresh noise,
which is not the probability of any action. Here every channel keeps with probability sigmoid(logit
+ offset); one offset per layer is solved so that the expected width is the target. Two
distributions:

- `Bernoulli`: the keeps are independent; the width varies around the target.
- `FixedWidth`: the same keeps, given that exactly `width` of them stay (the conditional Bernoulli
  distribution; Chen, Dempster and Liu, "Weighted finite population sampling to maximize entropy",
  Biometrika 1994). No reward is spent on differences in size.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from prunenet.models.masks import top_channels

# Halvings of a bracket some 80 wide, to where two Newton steps, which square the error, end at
# rounding.
_BISECTIONS = 26


def solve_offset(
    logits: Float[Tensor, "masks d_ff"], width: Int[Tensor, " masks"]
) -> Float[Tensor, "masks 1"]:
    """The offset b with sum_j sigmoid(logit_j + b) = width, for each mask; differentiable in the
    logits.

    Found by bisection to 1e-6 and two Newton steps, without gradient; another one then carries the
    exact implicit derivative, db / dlogit_j = -p_j (1 - p_j) / sum_i p_i (1 - p_i).

    Args:
        logits: any finite values.
        width: in [1, d_ff]; at d_ff the offset is a finite number that makes every keep practically
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
    """Independent keeps whose expected number is the target width.

    Args:
        logits: (cases, d_ff); only differences within a row matter.
        width: (cases,) target widths, in [1, d_ff].
        rows: (masks,) which case each mask belongs to; by default one mask per case. Many masks of
            one layer share a case, and everything costly is computed per case.
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
        """The masks. One that would keep nothing is drawn again, which at widths of practice never
        happens (exp(-width)).
        """
        probability = self._probability.detach()[self.rows]
        keep = _coins(probability, generator)
        while bool((empty := ~keep.any(1)).any()):
            keep[empty] = _coins(probability[empty], generator)
        return keep

    def mode(self) -> Bool[Tensor, "masks d_ff"]:
        """The `width` likeliest channels, for each mask."""
        logits = self.shifted.detach()
        cases = [
            top_channels(row, int(width)) for row, width in zip(logits, self.width, strict=True)
        ]
        return torch.stack(cases)[self.rows]

    def log_prob(self, keep: Bool[Tensor, "masks d_ff"]) -> Float[Tensor, " masks"]:
        """Exact log-probability of each mask, in nats."""
        stay, go = logsigmoid(self.shifted)[self.rows], logsigmoid(-self.shifted)[self.rows]
        return torch.where(keep, stay, go).sum(1)

    def entropy(self) -> Float[Tensor, " masks"]:
        """In nats, in [0, d_ff ln 2]."""
        return (softplus(self.shifted) - self._probability * self.shifted).sum(1)[self.rows]


class FixedWidth(Bernoulli):
    """The keeps of `Bernoulli` given that their number is exactly the target width.

    log P(mask) = sum of the independent log-probabilities - log P(number of keeps = width).
    Invariant to the offset, which only makes the second term well conditioned.
    """

    def _offset(self, logits: Float[Tensor, "cases d_ff"]) -> Float[Tensor, "cases 1"]:
        return solve_offset(logits.detach(), self.width)

    def sample(self, generator: torch.Generator) -> Bool[Tensor, "masks d_ff"]:
        """The masks, by rejection: the target is the mean width, so one draw in about 2.5 standard
        deviations is right.
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
        """Exact log-probability of each mask, in nats; -inf for a mask of another width."""
        exact = super().log_prob(keep) - self._log_mass[self.rows]
        return torch.where(keep.sum(1) == self.width[self.rows], exact, -torch.inf)

    def entropy(self) -> Float[Tensor, " masks"]:
        """Entropy of the independent keeps plus the log-mass of their number, in nats.

        An overestimate, by under 0.3 nats where logits are moderate and more where they are spread
        out; its gradient leaves the offset out. A figure for logs, not for training.
        """
        return super().entropy() + self._log_mass[self.rows]

    @cached_property
    def _log_mass(self) -> Float[Tensor, " cases"]:
        """log P(number of keeps = width)."""
        chances = torch.sigmoid(self.shifted.to(torch.float64))
        mass: Tensor = _LogMass.apply(chances, self.width)  # type: ignore[no-untyped-call]
        return mass.to(self.shifted.dtype)


class _LogMass(torch.autograd.Function):
    """log P(sum of independent keeps = width), from the characteristic function of the sum at M
    equally spaced frequencies.

    Exact for M > d_ff. Wide layers use fewer: with the width at the mean, masses that alias onto it
    lie 8 standard deviations away and more, under 1e-13 of it. M is odd, so that no factor 1 + p
    (e^iw - 1) vanishes.
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
    """Largest standard deviation of the number of keeps."""
    return math.sqrt(float((probability * (1 - probability)).sum(1).max().detach()))
