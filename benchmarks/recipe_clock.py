"""What `scale.py` and `speed.py` share: times inside a training, and of the cut that follows it."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from _common import Clock, Line, job
from floors import RATIO, speeds
from torch import device as torch_device
from transformers import PreTrainedModel

from prunenet.compare.machine import synchronise
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy
from prunenet.policies.training.recipe import Recipe

SAVE = "save, reload and compare"


def masks_of(recipe: Recipe) -> int:
    """Masks that a training judges in each layer, after the evaluation of the untrained policy:
    those sampled, and one at each evaluation.
    """
    return recipe.updates * recipe.masks + -(-recipe.updates // recipe.evaluate_every)


@contextmanager
def timing(
    where: Any,
    name: str,
    part: str,
    into: dict[str, float],
    clock: Callable[[], float],
) -> Iterator[None]:
    """Adds the seconds of each call of `where.name` to `into[part]`, inside the block."""
    original = getattr(where, name)

    def timed(*given: Any, **named: Any) -> Any:
        start = clock()
        result = original(*given, **named)
        into[part] = into.get(part, 0.0) + clock() - start
        return result

    with patch.object(where, name, timed):
        yield


def now(device: str) -> float:
    """Seconds of the wall clock, once the device has done its work."""
    synchronise(torch_device(device))
    return time.perf_counter()


def cost_clock(device: str) -> Callable[[], float]:
    """Seconds of all threads together on a CPU, of the wall clock on a GPU."""
    return time.process_time if device == "cpu" else partial(now, device)


def pruned_and_saved(
    clock: Clock,
    model: PreTrainedModel,
    policy: Policy,
    ticks: Callable[[], float],
    scratch: Path | None = None,
) -> tuple[int, dict[str, float]]:
    """Prunes to uniform widths and saves, a phase of the clock each.

    Returns:
        Bytes of the checkpoint, and the machine's rates (`floors.speeds`).
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "pruned"
        with clock.phase("prune"):
            pruned = prune(model, policy, ratio=RATIO, widths="uniform")
        with clock.phase(SAVE):
            pruned.save_pretrained(out)
        saved = sum(path.stat().st_size for path in out.iterdir())
        return saved, speeds(str(clock.device), Path(folder), ticks)


def in_a_process(name: str, layers: int) -> Line:
    """Runs one job afresh with this script's arguments, so that memory of a job is not the next
    one's.
    """
    shown, result = job([sys.executable, *sys.argv, "--job", name, str(layers)])
    print(f"{name}, {layers} layers", *shown, sep="\n  ", flush=True)
    return result
