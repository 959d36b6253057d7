"""A small seeded search over named numbers and choices, with a log of JSON lines from which a
killed search continues.

Each proposal is a function of the space, the seed and the trials before it (a fresh sampler each
time), so that a resumed search makes the trials that an unbroken one would have made.

Sources: the tree-structured Parzen estimator of Bergstra et al., "Algorithms for Hyper-Parameter
Optimization", NeurIPS 2011, as implemented by Optuna (Akiba et al., KDD 2019, arXiv 1907.10902)
with its defaults (from version 5 on, all variables jointly).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from prunenet.runtime.files import write_atomic

Value = float | int | str
Strategy = Literal["tpe", "random"]


@dataclass(frozen=True, slots=True)
class Span:
    """A number in [low, high]."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several options, without an order."""

    options: tuple[int | str, ...]


Space = Mapping[str, Span | Choice]


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of the space, and what it is worth.

    Attributes:
        params: a value for each name of the space.
        value: of the objective, lower is better; infinite where the objective was not finite.
    """

    params: dict[str, Value]
    value: float


class SearchError(ValueError):
    """A log that is damaged, or that belongs to another search."""


def best(trials: Sequence[Trial]) -> Trial:
    """The first of those with the lowest value."""
    return min(trials, key=lambda trial: trial.value)


def search(
    objective: Callable[[Mapping[str, Value]], float],
    space: Space,
    trials: int,
    *,
    seed: int,
    strategy: Strategy = "tpe",
    starts: Sequence[Mapping[str, Value]] = (),
    log: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trial]:
    """Minimises an objective.

    Args:
        objective: deterministic; called once a trial.
        space: what is searched.
        trials: how many, those found in the log and the starting points among them; at least 1.
        seed: of every proposal, 0 or more.
        strategy: "tpe" proposes by all trials before, "random" draws each trial by itself.
        starts: points that are tried first.
        log: file of JSON lines that every trial is added to; a search with the same settings
            continues from it, at a larger `trials` too. Its first line says which search it is.
        settings: what else the objective depends on, JSON values.
        progress: called with (trials done, trials in all).

    Returns:
        The trials, in order.

    Raises:
        ValueError: no trials, or a seed below 0.
        SearchError: the log is damaged or belongs to another search.
        ImportError: "tpe" without Optuna.
    """
    if trials < 1 or seed < 0:
        raise ValueError(
            f"a search needs 1 trial or more and a seed of 0 or more, got {trials} and {seed}"
        )
    propose = _tpe() if strategy == "tpe" else _random
    header = dict(settings or {}) | {
        "strategy": strategy,
        "seed": seed,
        "starts": [dict(start) for start in starts],
    }
    header["space"] = {name: asdict(axis) for name, axis in space.items()}
    done = [] if log is None else _opened(log, header)[:trials]
    while len(done) < trials:
        number = len(done)
        # Seeds of neighbouring searches and of neighbouring trials must not meet.
        drawn = (seed * 1_000_003 + number) % 2**32
        params = dict(starts[number]) if number < len(starts) else propose(space, done, drawn)
        value = float(objective(params))
        done.append(Trial(params, value if math.isfinite(value) else math.inf))
        if log is not None:
            with log.open("a", encoding="utf-8") as file:
                file.write(_line(done[-1]))
        if progress is not None:
            progress(len(done), trials)
    return done


Propose = Callable[[Space, Sequence[Trial], int], dict[str, Value]]


def _random(space: Space, _done: Sequence[Trial], seed: int) -> dict[str, Value]:
    generator = torch.Generator().manual_seed(seed)
    params: dict[str, Value] = {}
    for name, axis in space.items():
        drawn = float(torch.rand((), generator=generator, dtype=torch.float64))
        if isinstance(axis, Span):
            params[name] = axis.low + drawn * (axis.high - axis.low)
        else:
            params[name] = axis.options[int(drawn * len(axis.options))]
    return params


def _tpe() -> Propose:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            f"a search by TPE needs optuna ({error}); pip install 'prunenet[search]'"
        ) from error

    @contextmanager
    def quiet() -> Iterator[None]:
        """A study announces itself in Optuna's log; a fresh one a trial would fill the caller's
        screen.
        """
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
        try:
            yield
        finally:
            optuna.logging.set_verbosity(before)

    def propose(space: Space, done: Sequence[Trial], seed: int) -> dict[str, Value]:
        axes: dict[str, optuna.distributions.BaseDistribution] = {
            name: (
                optuna.distributions.FloatDistribution(axis.low, axis.high)
                if isinstance(axis, Span)
                else optuna.distributions.CategoricalDistribution(axis.options)
            )
            for name, axis in space.items()
        }
        with quiet():
            study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
            for trial in done:
                finished = optuna.trial.create_trial(
                    params=dict(trial.params), distributions=axes, value=trial.value
                )
                study.add_trial(finished)
            params: dict[str, Value] = study.ask(axes).params
            return params

    return propose


def _line(trial: Trial) -> str:
    # JSON has no infinity.
    return (
        json.dumps(
            {"params": trial.params, "value": trial.value if math.isfinite(trial.value) else None}
        )
        + "\n"
    )


def _opened(log: Path, header: Mapping[str, Any]) -> list[Trial]:
    """The log's trials; a log that does not exist yet is begun, and a last line cut off by a kill
    is taken away.
    """
    header = json.loads(json.dumps(header))
    log.parent.mkdir(parents=True, exist_ok=True)
    # What was being written when the process was killed has no end of line.
    whole, _, rest = (log.read_text(encoding="utf-8") if log.exists() else "").rpartition("\n")
    lines = whole.splitlines()
    try:
        saved = header if not lines and not rest else dict(json.loads(lines[0])["search"])
        rows = [json.loads(line) for line in lines[1:]]
        trials = [
            Trial(row["params"], math.inf if row["value"] is None else float(row["value"]))
            for row in rows
        ]
    except (ValueError, KeyError, TypeError, IndexError):
        raise SearchError(
            f"{str(log)!r} is no log of a search, or is damaged; remove it or give another file"
        ) from None
    # The caller's settings come first: they explain a changed space or start.
    changed = [key for key in {**header, **saved} if saved.get(key) != header.get(key)]
    if changed:
        key = changed[0]
        raise SearchError(
            f"the search in {str(log)!r} was started with {key} {saved.get(key)!r}, not"
            f" {header.get(key)!r}; resume it with the same settings, or give another file"
        )
    if rest or not lines:
        write_atomic(
            log, (json.dumps({"search": header}) + "\n" + "".join(map(_line, trials))).encode()
        )
    return trials
