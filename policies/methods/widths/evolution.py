"""Searches widths by evolution: level switches between two layers at a constant budget.

Source: Sieberling, Kuznedelev, Kurtic and Alistarh, "EvoPress: Towards Optimal Dynamic Model
Compression via Evolutionary Search", arXiv 2410.14649, and the authors' code; docs/methods.md,
section 5 ("Widths without data"). As there: one parent; each child takes min(a, b) switches, a and
b uniform in {1, 2, 3}; a switch makes one layer a level wider and another one a level narrower;
children are first judged on little text, the survivors on more; only a child that is no worse
replaces the parent.

What differs:
- FFN widths in place of sparsity, quantisation or dropped blocks;
- [rec] made for dozens of evaluations where the published search has thousands: a switch moves 1,
  2, 4 or 8 levels, and the first parent is the best of uniform and some random architectures
  (published where no level is the target itself);
- text does not change between generations, so that the parent is judged once, the search cannot end
  worse than it started on its own measure, and a killed search continues;
- no architecture is judged twice; where the draws find only known ones, the search has converged
  and ends early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prunenet.policies.methods.widths.allocation import Budget, fitted, uniform
from prunenet.policies.methods.widths.evaluations import (
    Evaluations,
    Evaluator,
    Searched,
    Widths,
    fresh,
)
from prunenet.policies.methods.widths.space import Space, level_step
from prunenet.runtime.choices import check_fields

_SIZES = 4  # a switch moves 1, 2, 4 or 8 levels
_TRIES = 200  # draws for one child


@dataclass(frozen=True, slots=True)
class Screen:
    """Selects children by a cheap loss before the full evaluation.

    Attributes:
        evaluate: for example the same loss on less text.
        survivors: children that are evaluated further, at least 1.
    """

    evaluate: Evaluator
    survivors: int


@dataclass(frozen=True, slots=True)
class Evolution:
    """Holds the options of an evolutionary search.

    Attributes:
        generations: 0 or more.
        offspring: children of a generation, 1 or more.
        initial: random architectures that compete with the start to be the first parent, 0 or more.
        screens: evaluations before the full one, from little text to more.

    Raises:
        ValueError: a number out of range.
    """

    generations: int = 24
    offspring: int = 2
    initial: int = 11
    screens: tuple[Screen, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        survivors = [screen.survivors for screen in self.screens]
        if min(self.generations, self.initial) < 0 or min(self.offspring, *survivors, 1) < 1:
            raise ValueError(
                "evolution takes 0 or more generations and initial architectures, and 1 or more"
                f" children and survivors, got generations={self.generations},"
                f" initial={self.initial}, offspring={self.offspring}, {survivors=}"
            )


def evolution_search(
    budget: Budget,
    evaluate: Evaluator,
    options: Evolution | None = None,
    *,
    start: Sequence[int] | None = None,
    step: int | None = None,
    seed: int = 0,
    path: str | Path | None = None,
) -> Searched:
    """Searches widths by evolution; the result is never worse than the start.

    Without screens, 1 + initial + generations * offspring architectures are evaluated, or fewer
    where the search converges; with screens, the children that survive the last one.

    Args:
        budget: spent by every architecture as `fitted` does.
        evaluate: the full evaluation.
        options: default `Evolution()`.
        start: an architecture to start from; default uniform.
        step: channels of one level, a multiple of `round_to`; default about a twenty-fourth of the
            widest layer.
        seed: of the switches.
        path: JSON-lines file of all evaluations, from which a killed search, started again,
            continues (see `Evaluations`).

    Raises:
        ValueError: a start or a step that does not fit, or as `Evaluations`.
    """
    options = options or Evolution()
    step = level_step(budget, step)
    generator = torch.Generator().manual_seed(seed)
    full = Evaluations(evaluate, path)
    screened = [(Evaluations(s.evaluate, path), s.survivors) for s in options.screens]
    first = [_started(budget, start)]
    first += fresh(Space.around(budget, step=step), options.initial, generator, first)
    seen = set(first)
    losses = full(first)
    parent, loss = _fittest(first, losses)[0], min(losses)
    for _ in range(options.generations):
        children = _children(budget, parent, step, options.offspring, seen, generator)
        if not children:
            break
        seen |= set(children)
        for evaluations, count in screened:
            children = _fittest(children, evaluations(children))[:count]
        losses = full(children)
        if min(losses) <= loss:
            parent, loss = _fittest(children, losses)[0], min(losses)
    return full.best()


def _started(budget: Budget, start: Sequence[int] | None) -> Widths:
    if start is None:
        return tuple(uniform(budget))
    widths = tuple(start)
    fits = len(widths) == len(budget.d_ff) and budget.cost(widths) <= budget.parameters
    if not fits or tuple(fitted(budget, [float(width) for width in widths])) != widths:
        raise ValueError(
            f"widths {list(widths)} are no start: it takes {len(budget.d_ff)} multiples of"
            f" {budget.round_to} that spend all of {budget.parameters} FFN parameters; `fitted`"
            " makes them"
        )
    return widths


def _fittest(children: Sequence[Widths], losses: Sequence[float]) -> list[Widths]:
    """Sorts children, best first; of equal ones the first drawn comes first."""
    return [
        child for _, child in sorted(zip(losses, children, strict=True), key=lambda pair: pair[0])
    ]


def _children(
    budget: Budget,
    parent: Widths,
    step: int,
    count: int,
    seen: set[Widths],
    generator: torch.Generator,
) -> list[Widths]:
    """Draws up to `count` different children of a parent that were not seen before."""
    found: dict[Widths, None] = {}
    for _ in range(count * _TRIES):
        if len(found) == count:
            break
        child = parent
        for _ in range(min(_below(3, generator), _below(3, generator)) + 1):
            child = _switched(budget, child, step << _below(_SIZES, generator), generator)
        if child not in seen:
            found[child] = None
    return list(found)


def _switched(budget: Budget, widths: Widths, amount: int, generator: torch.Generator) -> Widths:
    """Widens one layer by up to `amount` channels and narrows another by as many parameters."""
    step = budget.round_to
    wider = [i for i, width in enumerate(widths) if budget.d_ff[i] - width >= step]
    narrower = [i for i, width in enumerate(widths) if width - budget.least(i) >= step]
    if not wider or not narrower:
        return widths
    up, down = wider[_below(len(wider), generator)], narrower[_below(len(narrower), generator)]
    if up == down:
        return widths
    price = budget.costs[up] / budget.costs[down]
    amount = (
        min(amount, budget.d_ff[up] - widths[up], int((widths[down] - budget.least(down)) / price))
        // step
        * step
    )
    wanted = [float(width) for width in widths]
    wanted[up] += amount
    wanted[down] -= amount * price
    return tuple(fitted(budget, wanted))


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))
