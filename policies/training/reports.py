"""What is told of a training while it runs, and to whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

from prunenet.runtime.tracking import Track, Tracker


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """Who is told of a training.

    Attributes:
        progress: called with (updates done, updates in all, best reward so far).
        callbacks: of stable-baselines3, of both stages; whatever they log goes into the run's
            TensorBoard log. On the first process alone.
        report_to: trackers that are told what that log is told, settings and results too, as one
            run; see `prunenet.runtime.tracking`.
    """

    progress: Callable[[int, int, float], None] | None = None
    callbacks: Sequence[BaseCallback] = ()
    report_to: Sequence[Tracker] = ()


class Tracked(BaseCallback):
    """Sends what stable-baselines3's logger writes to trackers too."""

    def __init__(self, track: Track) -> None:
        super().__init__()
        self._track = track

    def _on_training_start(self) -> None:
        if self._track.runs:
            self.logger.output_formats.append(_Writer(self._track))

    def _on_step(self) -> bool:
        return True


class _Writer(KVWriter):
    """A place to which stable-baselines3's logger writes."""

    def __init__(self, track: Track) -> None:
        self.track = track

    def write(
        self,
        key_values: dict[str, Any],
        key_excluded: dict[str, tuple[str, ...]],
        step: int = 0,
    ) -> None:
        self.track.log(key_values, step)

    def close(self) -> None:
        """Leaves the run open: another stage may follow."""
