"""Describes the architectures of a search: vectors of widths, one per layer, under one budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from prunenet.policies.methods.widths.allocation import Budget

_LEVELS = 24  # of a layer, where no step is given
_BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class Space:
    """Holds the range of widths of each layer.

    Widths are multiples of `step`, but for a rest of less than one step in one layer.

    Attributes:
        budget: spent by every architecture as far as its `round_to` allows.
        low, high: fewest and most channels of each layer.
        step: channels between two levels of a layer, a multiple of the budget's `round_to`.
    """

    budget: Budget
    low: tuple[int, ...]
    high: tuple[int, ...]
    step: int

    @classmethod
    def around(cls, budget: Budget, *, span: float = 0.3, step: int | None = None) -> Space:
        """Makes the space in which each layer keeps the budget's share of its channels +- `span`.

        Ranges end at the layer's floor and at its d_ff.

        Args:
            budget: of all layers.
            span: share of d_ff, in (0, 1].
            step: default about a twenty-fourth of the widest layer.

        Raises:
            ValueError: the span is out of range, the step is no multiple of `round_to`, or the
                floors exceed the budget.
        """
        if not 0 < span <= 1:
            raise ValueError(f"a span of widths must be in (0, 1], got {span}")
        step = level_step(budget, step)
        least = [budget.least(layer) for layer in range(len(budget.d_ff))]
        if budget.cost(least) > budget.parameters:
            raise ValueError(
                f"{budget.share:.1%} of the channels are fewer than every layer must keep; remove"
                " less"
            )
        low, high = [], []
        for floor, d_ff in zip(least, budget.d_ff, strict=True):
            # On levels, and so that the budget's share lies between them.
            lowest = (
                max(math.floor((budget.share - span) * d_ff / step), math.ceil(floor / step)) * step
            )
            low.append(min(lowest, d_ff))
            high.append(
                min(max(math.ceil((budget.share + span) * d_ff / step) * step, lowest), d_ff)
            )
        # Where floors are above the share, the other layers must be able to keep fewer channels.
        return cls(
            budget,
            tuple(low if budget.cost(low) <= budget.parameters else least),
            tuple(high),
            step,
        )

    def narrowed(self, low: Sequence[int], high: Sequence[int]) -> Space:
        """Returns the part of the space between these widths.

        Returns the space itself where no architecture in that part spends the budget.
        """
        inner = replace(
            self, low=tuple(map(max, self.low, low)), high=tuple(map(min, self.high, high))
        )
        spends = (
            self.budget.cost(inner.low) <= self.budget.parameters <= self.budget.cost(inner.high)
        )
        return (
            inner
            if spends and all(a <= b for a, b in zip(inner.low, inner.high, strict=True))
            else self
        )

    def draw(
        self, count: int, generator: torch.Generator, *, tied: int = 1
    ) -> list[tuple[int, ...]]:
        """Draws random architectures: uniform in every layer's range, then shifted to the budget.

        The shift is one share of d_ff for all layers.

        Args:
            count: how many, not necessarily different.
            generator: of the draws, on the CPU.
            tied: how many adjacent layers share one draw.
        """
        d_ff, low, high = (
            torch.tensor(row, dtype=torch.float64)
            for row in (self.budget.d_ff, self.low, self.high)
        )
        groups = torch.arange(len(d_ff)) // tied
        drawn = torch.rand(count, int(groups[-1]) + 1, generator=generator, dtype=torch.float64)[
            :, groups
        ]
        wanted = self._shifted(low + drawn * (high - low), d_ff, low, high)
        widths = torch.floor((wanted + 1e-9) / self.step) * self.step
        widths = torch.where(wanted >= d_ff - 1e-6, d_ff, widths.clamp_min(low)).long()
        widths = self._raised(widths, wanted, self.step, self.high, spread=True)
        # The rest goes to one layer: the others stay on the levels.
        widths = self._raised(widths, wanted, self.budget.round_to, self.budget.d_ff, spread=False)
        return [tuple(row) for row in widths.tolist()]

    def _shifted(
        self,
        drawn: Float64[Tensor, "count layers"],
        d_ff: Float64[Tensor, " layers"],
        low: Float64[Tensor, " layers"],
        high: Float64[Tensor, " layers"],
    ) -> Float64[Tensor, "count layers"]:
        """Adds to each row the share of d_ff at which it spends the budget."""
        costs = torch.tensor(self.budget.costs, dtype=torch.float64)
        below, above = (
            torch.full((len(drawn), 1), -1.0).double(),
            torch.ones(len(drawn), 1).double(),
        )
        for _ in range(_BISECTIONS):
            shift = (below + above) / 2
            over = (torch.clamp(drawn + shift * d_ff, low, high) @ costs)[
                :, None
            ] > self.budget.parameters
            below, above = torch.where(over, below, shift), torch.where(over, shift, above)
        return torch.clamp(drawn + below * d_ff, low, high)

    def _raised(
        self,
        widths: Int64[Tensor, "count layers"],
        wanted: Float64[Tensor, "count layers"],
        step: int,
        most: Sequence[int],
        *,
        spread: bool,
    ) -> Int64[Tensor, "count layers"]:
        """Raises widths where the shortfall is largest, until no step fits the budget.

        Args:
            widths: rounded down.
            wanted: before rounding.
            step: channels of one raise.
            most: widths up to which layers are raised.
            spread: whether a raise reduces a layer's shortfall, so that the next one goes to
                another layer.
        """
        costs, cap = torch.tensor(self.budget.costs), torch.tensor(list(most))
        shortfall, left = (
            wanted - widths,
            self.budget.parameters - (widths * costs).sum(1, keepdim=True),
        )
        while True:
            rise = torch.minimum((widths // step + 1) * step, cap) - widths
            possible = (rise > 0) & (rise * costs <= left)
            if not bool(possible.any()):
                return widths
            chosen = shortfall.masked_fill(~possible, -torch.inf).argmax(1, keepdim=True)
            change = torch.zeros_like(widths).scatter_(
                1, chosen, rise.gather(1, chosen)
            ) * possible.any(1, keepdim=True)
            widths, left = widths + change, left - (change * costs).sum(1, keepdim=True)
            if spread:
                shortfall = shortfall - change


def level_step(budget: Budget, step: int | None = None) -> int:
    """Returns the channels between two levels of a layer.

    Args:
        budget: of all layers.
        step: the number itself; default about a twenty-fourth of the widest layer.

    Raises:
        ValueError: it is no multiple of the budget's `round_to`.
    """
    if step is None:
        return max(1, round(max(budget.d_ff) / _LEVELS / budget.round_to)) * budget.round_to
    if step < 1 or step % budget.round_to:
        raise ValueError(
            f"widths are multiples of {budget.round_to}, so levels cannot be {step} apart; give a"
            " multiple"
        )
    return step
