"""Sends what a training logs to trackers of experiments, as one run: settings, values by step, and
results.

TensorBoard's log lies beside the state of every training, so its name asks for nothing more. Where
runs go, and whether a network is used, is the tracker's own setting: `WANDB_MODE=offline`,
`TRACKIO_DIR`, `MLFLOW_TRACKING_URI`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol, get_args

from prunenet.runtime import parallel

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
PROJECT = "prunenet"
"""Under which runs are filed."""


class _Run(Protocol):
    """One run of one tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def results(self, values: Mapping[str, float]) -> None: ...

    def end(self, failed: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Track:
    """What a training tells its trackers; of a stage, with the stage's name in front.

    Attributes:
        runs: of each tracker; none where nothing was asked for, or on other processes.
        prefix: in front of every name.
        start: added to every step: trackers want steps that rise from stage to stage.
    """

    runs: tuple[_Run, ...] = ()
    prefix: str = ""
    start: int = 0

    def stage(self, name: str, start: int) -> Track:
        """The same for a stage whose steps begin at `start`."""
        return Track(self.runs, f"{name}/", start)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Sends the values that are finite numbers."""
        numbers = self._named(values)
        for run in self.runs if numbers else ():
            run.log(numbers, self.start + step)

    def results(self, values: Mapping[str, Any]) -> None:
        """Sends what stands at the end."""
        for run in self.runs:
            run.results(self._named(values))

    def _named(self, values: Mapping[str, Any]) -> dict[str, float]:
        found = {}
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                found[f"{self.prefix}{name}"] = float(value)
        return found


NOTHING = Track()
"""Tells nobody."""


def check_trackers(names: Sequence[str]) -> None:
    """Checks that trackers are known and installed.

    Raises:
        ValueError: an unknown name.
        ImportError: one is not installed.
    """
    for name in names:
        if name not in get_args(Tracker):
            known = ", ".join(get_args(Tracker))
            raise ValueError(f"`report_to` knows {known}, got {name!r}")
        if find_spec(name) is None:
            raise ImportError(f"{name} is not installed: pip install 'prunenet[{name}]'")


@contextmanager
def tracking(names: Sequence[str], name: str, settings: Mapping[str, Any]) -> Iterator[Track]:
    """Yields where a training logs to; the runs end with the block, as failed where it raises.

    Args:
        names: of trackers, each a `Tracker`.
        name: of the run.
        settings: JSON values by name, nested ones as a path.

    Raises:
        ValueError, ImportError: as `check_trackers`.
    """
    check_trackers(names)
    asked = [name for name in dict.fromkeys(names) if name != "tensorboard"]
    if not asked or not parallel.is_first():
        yield NOTHING
        return
    flat = dict(_flat(settings))
    with ExitStack() as ends:
        yield Track(tuple(ends.enter_context(_run(tracker, name, flat)) for tracker in asked))


@contextmanager
def _run(tracker: str, name: str, settings: dict[str, Any]) -> Iterator[_Run]:
    kinds: dict[str, Callable[[Any, str, dict[str, Any]], _Run]]
    kinds = {"wandb": _Wandb, "trackio": _Trackio, "mlflow": _Mlflow}
    run = kinds[tracker](importlib.import_module(tracker), name, settings)
    try:
        yield run
    except BaseException:
        run.end(failed=True)
        raise
    run.end(failed=False)


class _Wandb:
    def __init__(self, module: Any, name: str, settings: dict[str, Any]) -> None:
        self.run = module.init(project=PROJECT, name=name, config=settings)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def results(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def end(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, module: Any, name: str, settings: dict[str, Any]) -> None:
        self.module, self.last = module, 0
        module.init(project=PROJECT, name=name, config=settings, embed=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.last = step
        self.module.log(dict(values), step=step)

    def results(self, values: Mapping[str, float]) -> None:
        self.module.log({f"results/{name}": value for name, value in values.items()}, self.last)

    def end(self, failed: bool) -> None:
        self.module.finish()


class _Mlflow:
    def __init__(self, module: Any, name: str, settings: dict[str, Any]) -> None:
        self.module = module
        module.set_experiment(PROJECT)
        module.start_run(run_name=name)
        module.log_params(settings)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.module.log_metrics(dict(values), step=step)

    def results(self, values: Mapping[str, float]) -> None:
        self.module.log_metrics({f"results/{name}": value for name, value in values.items()})

    def end(self, failed: bool) -> None:
        self.module.end_run("FAILED" if failed else "FINISHED")


def _flat(settings: Mapping[str, Any], front: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{front}{name}/")
        else:
            yield f"{front}{name}", value if isinstance(value, int | float | str) else str(value)
