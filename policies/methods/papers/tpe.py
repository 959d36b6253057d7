"""Searches named numbers and choices with a seed, and logs JSON lines from which a killed search
continues.

Each proposal depends only on the space, the seed and the trials before it (a new sampler each
time). A resumed search therefore makes the trials that an uninterrupted one would have made.

Sources: the tree-structured Parzen estimator of Bergstra et al., "Algorithms for Hyper-Parameter
Optimization", NeurIPS 2011, as implemented by Optuna (Akiba et al., KDD 2019, arXiv 1907.10902)
with its defaults (from version 5 on, all variables jointly).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from prunenet.runtime.choices import check_choice
from prunenet.runtime.files import append, lock, whole_lines, write_atomic
from prunenet.runtime.json_files import JsonError, parse_json, shown

Value = float | int | str
Strategy = Literal["tpe", "random"]
"""Proposes by all trials so far (tree-structured Parzen estimator), or draws at random."""


@dataclass(frozen=True, slots=True)
class Span:
    """The numbers in [low, high]."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Several options, without an order."""

    options: tuple[int | str, ...]


Space = Mapping[str, Span | Choice]


@dataclass(frozen=True, slots=True)
class Trial:
    """Holds one point of the space and its value.

    Attributes:
        params: a value for each name of the space.
        value: of the objective, lower is better; infinite where the objective was not finite.
    """

    params: dict[str, Value]
    value: float


class _Header(TypedDict):
    search: dict[str, Any]


class _Row(TypedDict):
    params: dict[str, Value]
    value: float | None


class SearchError(ValueError):
    """Raised for a log that is damaged, or that belongs to another search."""


@dataclass(frozen=True, slots=True)
class Log:
    """Names the file of a search's trials.

    Attributes:
        path: JSON lines, the first of which identifies the search; every trial is added at once. A
            search with the same settings continues from it, at a larger number of trials too. One
            process searches at a time.
        settings: JSON values on which the objective depends besides the point.
    """

    path: Path
    settings: Mapping[str, Any]


def best(trials: Sequence[Trial]) -> Trial:
    """Returns the trial of the lowest value; of equal ones the first."""
    return min(trials, key=lambda trial: trial.value)


def search(
    objective: Callable[[Mapping[str, Value]], float],
    space: Space,
    trials: int,
    *,
    seed: int,
    strategy: Strategy = "tpe",
    starts: Sequence[Mapping[str, Value]] = (),
    log: Log | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trial]:
    """Minimises an objective.

    Args:
        objective: deterministic; called once a trial.
        space: the numbers and choices to search.
        trials: how many, including those in the log and the starting points; at least 1.
        seed: of every proposal, 0 or more.
        strategy: "tpe" proposes by all trials before, "random" draws each trial independently.
        starts: points that are tried first.
        log: where trials are kept; None keeps them in memory.
        progress: called with (trials done, trials in all).

    Returns:
        The trials, in order.

    Raises:
        ValueError: no trials, a seed below 0, or an unknown strategy.
        SearchError: the log is damaged or belongs to another search.
        CheckpointError: another process is writing the log, or it cannot be written.
        ImportError: "tpe" without Optuna.
    """
    if trials < 1 or seed < 0:
        raise ValueError(
            f"a search needs 1 trial or more and a seed of 0 or more, got {trials} and {seed}"
        )
    check_choice("strategy", strategy, Strategy)
    propose = _tpe() if strategy == "tpe" else _random
    header = {
        **({} if log is None else log.settings),
        "strategy": strategy,
        "seed": seed,
        "starts": [dict(start) for start in starts],
        "space": {name: asdict(axis) for name, axis in space.items()},
    }
    with nullcontext() if log is None else lock(log.path):
        done = [] if log is None else _opened(log.path, header)[:trials]
        while len(done) < trials:
            number = len(done)
            # Different for neighbouring searches and for neighbouring trials.
            drawn = (seed * 1_000_003 + number) % 2**32
            params = dict(starts[number]) if number < len(starts) else propose(space, done, drawn)
            value = float(objective(params))
            done.append(Trial(params, value if math.isfinite(value) else math.inf))
            if log is not None:
                append(log.path, _line(done[-1]))
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
        """Silences Optuna's message about a new study, of which there is one a trial."""
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


def _line(trial: Trial) -> bytes:
    # JSON has no infinity.
    value = trial.value if math.isfinite(trial.value) else None
    return json.dumps({"params": trial.params, "value": value}).encode() + b"\n"


def _opened(log: Path, header: Mapping[str, Any]) -> list[Trial]:
    """Reads the trials of a log; starts a new log, and removes a last line cut off by a kill. The
    log is locked.

    Raises:
        SearchError: the log is damaged or belongs to another search.
    """
    header = json.loads(json.dumps(header))
    lines, rest = whole_lines(log)
    try:
        saved: Mapping[str, Any] = header
        if lines or rest:
            saved = parse_json(lines[0] if lines else rest, _Header)["search"]
        trials = [_trial(line, header["space"]) for line in lines[1:]]
    except JsonError as error:
        raise SearchError(
            f"{str(log)!r} is no log of a search, or is damaged ({error}); remove it or give"
            " another file"
        ) from None
    # The caller's settings are named first: they explain a changed space or start.
    changed = [key for key in {**header, **saved} if saved.get(key) != header.get(key)]
    if changed:
        key = changed[0]
        raise SearchError(
            f"the search in {str(log)!r} was started with {key} {saved.get(key)!r}, not"
            f" {header.get(key)!r}; resume it with the same settings, or give another file"
        )
    if rest or not lines:
        first = json.dumps({"search": header}).encode() + b"\n"
        write_atomic(log, first + b"".join(map(_line, trials)))
    return trials


def _trial(line: bytes, space: Mapping[str, Any]) -> Trial:
    """The trial of a line. Raises JsonError where it is no point of the space."""
    row: _Row = parse_json(line, _Row)
    if row["params"].keys() != space.keys():
        raise JsonError(f"a trial has {len(row['params'])} parameters, and not {', '.join(space)}")
    for name, value in row["params"].items():
        axis = space[name]
        if "options" in axis:
            fits = value in axis["options"]
        else:
            fits = not isinstance(value, str) and axis["low"] <= value <= axis["high"]
        if not fits:
            raise JsonError(f"{name} of a trial is {shown(value)}, which was no choice")
    return Trial(row["params"], math.inf if row["value"] is None else float(row["value"]))
