"""Evaluates architectures for a search over widths, each once, and keeps the losses in a file from
which a killed search continues.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch

from prunenet.policies.methods.widths.allocation import Budget, uniform
from prunenet.policies.methods.widths.space import Space
from prunenet.runtime.files import append, expanded, lock, whole_lines, write_atomic
from prunenet.runtime.json_files import JsonError, Positive, parse_json

SearchedAllocation = Literal["predictor", "evolution"]
"""Search that finds an allocation."""
Evaluator = Callable[[Sequence[int]], float]
"""Widths of all layers -> loss, lower is better, the same at every call.

Two attributes are optional: `many(list of widths) -> list of losses`, where several at once are
cheaper, and `key`, a string that tells its losses from those of other evaluators in one file.
"""
Widths = tuple[int, ...]
_TOGETHER = 8  # architectures between two writes, where several at once are cheaper


class _Row(TypedDict):
    """A line of the file."""

    evaluator: str
    widths: tuple[Positive, ...]
    loss: float


@dataclass(frozen=True, slots=True)
class Searched:
    """Holds the best architecture of a search.

    Attributes:
        widths: channels of each layer.
        loss: its loss.
        pairs: every architecture measured and its loss, each once, in order.
    """

    widths: list[int]
    loss: float
    pairs: list[tuple[Widths, float]]


class Evaluations:
    """Calls an evaluator once for each architecture.

    Args:
        evaluate: see `Evaluator`.
        path: a JSON-lines file of {"evaluator", "widths", "loss"}. Losses of this evaluator are
            taken from it, and new ones are added at once: a killed search, started again, repeats
            its steps without measuring and continues. Several searches may share a file.

    Attributes:
        pairs: architectures requested so far and their losses, in order.

    Raises:
        ValueError: the file holds another kind of line (the last one may be cut short).
    """

    def __init__(self, evaluate: Evaluator, path: str | Path | None = None) -> None:
        self.pairs: dict[Widths, float] = {}
        self._evaluate = evaluate
        self._path = None if path is None else expanded(path)
        self._key = "" if path is None else str(getattr(evaluate, "key", ""))
        self._known = {} if self._path is None else _read(self._path, self._key)

    def __call__(self, candidates: Sequence[Widths]) -> list[float]:
        """Returns the loss of each candidate.

        Raises:
            ValueError: a loss is not a finite number.
        """
        new = list(dict.fromkeys(widths for widths in candidates if widths not in self._known))
        together = _TOGETHER if hasattr(self._evaluate, "many") else 1
        for start in range(0, len(new), together):
            self._measure(new[start : start + together])
        self.pairs |= {
            widths: self._known[widths] for widths in candidates if widths not in self.pairs
        }
        return [self._known[widths] for widths in candidates]

    def _measure(self, new: Sequence[Widths]) -> None:
        many = getattr(self._evaluate, "many", None)
        losses = (
            [float(self._evaluate(widths)) for widths in new]
            if many is None
            else [float(loss) for loss in many(new)]
        )
        for widths, loss in zip(new, losses, strict=True):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of widths {list(widths)} is {loss}: the cut model overflows; load it"
                    " as float32 or bfloat16"
                )
            self._known[widths] = loss
        if self._path is not None:
            rows = (
                {"evaluator": self._key, "widths": list(widths), "loss": self._known[widths]}
                for widths in new
            )
            append(self._path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def best(self) -> Searched:
        """Returns the best architecture requested so far; of equal ones the first."""
        widths = min(self.pairs, key=self.pairs.__getitem__)
        return Searched(list(widths), self.pairs[widths], list(self.pairs.items()))


def best_of_random(
    budget: Budget,
    evaluate: Evaluator,
    count: int,
    *,
    space: Space | None = None,
    seed: int = 0,
    path: str | Path | None = None,
) -> Searched:
    """Returns the best of the uniform architecture and `count` - 1 random ones.

    This is the control of every search.

    Args:
        budget: of all layers.
        evaluate: see `Evaluator`.
        count: architectures measured, 1 or more; fewer where the space holds fewer.
        space: to draw from; default `Space.around(budget)`.
        seed: of the draws.
        path: see `Evaluations`.
    """
    evaluations = Evaluations(evaluate, path)
    generator = torch.Generator().manual_seed(seed)
    evaluations([tuple(uniform(budget))])
    evaluations(fresh(space or Space.around(budget), count - 1, generator, evaluations.pairs))
    return evaluations.best()


def fresh(
    space: Space, count: int, generator: torch.Generator, known: Container[Widths], *, tied: int = 1
) -> list[Widths]:
    """Draws different random architectures that are not known yet.

    Returns fewer where the space holds fewer.
    """
    found: dict[Widths, None] = {}
    for _ in range(10):
        drawn = space.draw(max(count - len(found), 0), generator, tied=tied)
        found |= dict.fromkeys(widths for widths in drawn if widths not in known)
        if len(found) >= count:
            break
    return list(found)[:count]


def _read(path: Path, key: str) -> dict[Widths, float]:
    lines, rest = whole_lines(path)
    if rest:  # a kill in the middle of a line
        with lock(path):
            lines, _ = whole_lines(path)
            write_atomic(path, b"".join(line + b"\n" for line in lines))
    known: dict[Widths, float] = {}
    for number, line in enumerate(lines, 1):
        try:
            row: _Row = parse_json(line, _Row)
        except JsonError as error:
            raise ValueError(
                f"line {number} of {path} is no evaluated architecture ({error}); remove the line,"
                " or give another file"
            ) from None
        if row["evaluator"] == key:
            known[row["widths"]] = float(row["loss"])
    return known
