"""Losses of widths with a known optimum, for tests of searches: a few layers are sensitive, and
neighbours interact.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from prunenet.models.masks import width_at
from prunenet.policies.methods import Budget


def room(layers: int, d_ff: int, ratio: float = 0.3, **options: int) -> Budget:
    """A budget of equal layers, 10 parameters a channel."""
    kept = layers * 10 * width_at(d_ff, ratio, options.get("round_to", 8))
    return Budget((d_ff,) * layers, (10,) * layers, kept, **options)


class Planted:
    """Sum of s (x^2 + 0.3 x) over layers, x the share removed, and c x x' over neighbours; counts
    its calls.

    The first layer and the last two are the sensitive ones, as in SmolLM2-135M (docs/methods.md, section 1.2).

    Args:
        d_ff: of each layer.
        seed: of the sensitivities.
        dies_after: calls until it raises KeyboardInterrupt, as a kill would come.
    """

    def __init__(
        self, d_ff: Sequence[int], seed: int = 0, *, dies_after: int | None = None
    ) -> None:
        draws = np.random.default_rng(seed)
        self.d_ff = np.array(d_ff)
        self.sensitivity = np.exp(draws.normal(-1, 0.5, len(d_ff)))
        self.sensitivity[[0, -2, -1]] = 8, 4, 6
        self.between = np.exp(draws.normal(-2, 0.5, len(d_ff) - 1))
        self.key = f"planted {seed}"
        self.calls: list[tuple[int, ...]] = []
        self.dies_after = dies_after

    def __call__(self, widths: Sequence[int]) -> float:
        if len(self.calls) == self.dies_after:
            raise KeyboardInterrupt
        self.calls.append(tuple(widths))
        removed = 1 - np.array(widths) / self.d_ff
        own = (self.sensitivity * (removed**2 + 0.3 * removed)).sum()
        return float(own + (self.between * removed[1:] * removed[:-1]).sum())


def optimum(budget: Budget, loss: Planted) -> tuple[list[int], float]:
    """The best of all architectures that spend the budget, by trying every one; for a few layers of
    a few levels.
    """
    levels = [
        range(budget.least(layer), d_ff + 1, budget.round_to)
        for layer, d_ff in enumerate(budget.d_ff)
    ]
    every = [
        widths for widths in itertools.product(*levels) if budget.cost(widths) == budget.parameters
    ]
    best = min(every, key=loss)
    return list(best), loss(best)
