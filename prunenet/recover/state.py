"""The state of an unfinished recovery on disk: what is learned and its optimiser in one file, the
best state seen in another.

Both are replaced in one step, read without executing code, and carry a sha256. A kill between the
two writes is harmless: the best state is judged by its own file, and steps that are taken again
find the same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from prunenet.policies.artifact import PolicyError
from prunenet.policies.training.state import check_run, optimizer_states
from prunenet.runtime.files import write_atomic
from prunenet.runtime.json_files import Count, JsonError, convert
from prunenet.runtime.own_files import ContentError, check_layout, layout_of, packed, unpacked

STATE = "state.safetensors"
"""File of an unfinished run, in its folder."""
BEST = "best.safetensors"
"""The best state that it has seen, beside it."""
_PATIENCE = 20  # times the seconds of a write until the next one: a twentieth of a run at most


class _Facts(TypedDict):
    """Of the state's file."""

    run: dict[str, Any]
    steps: Count
    history: list[tuple[Count, float]]


class _BestFacts(TypedDict):
    """Of the best state's file."""

    run: dict[str, Any]
    step: Count
    loss: float


@dataclass(frozen=True, slots=True, eq=False)
class Best:
    """The best state seen.

    Attributes:
        step: after which it was seen.
        loss: on the blocks held back, nats per token.
        learned: what was learned then, or its average; on the CPU.
    """

    step: int
    loss: float
    learned: list[Tensor]


@dataclass(slots=True, eq=False)
class State:
    """How far a training has come.

    Attributes:
        learned: parameters that are trained.
        average: their moving average; empty without one.
        optimizer: AdamW of `learned`.
        steps: taken.
        history: (steps, loss on the blocks held back) at each evaluation.
        best: None while the start is the best state.
    """

    learned: Sequence[nn.Parameter]
    average: list[Tensor]
    optimizer: torch.optim.Optimizer
    steps: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    best: Best | None = None


class Files:
    """The two files of a run.

    Args:
        folder: where they are.
        run: JSON values that identify the run (settings, models, text); a resumed run must give
            the same.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder, self.run = folder, json.loads(json.dumps(run))
        self._written: Best | None = None
        self._due = -math.inf

    def save(self, state: State, *, now: bool = False) -> None:
        """Writes both files, the best state only where it is another one than before.

        Does nothing where the last write is so recent that writing would take more than a twentieth
        of the time, unless it must be `now`.
        """
        start = time.monotonic()
        if start < self._due and not now:
            return
        best = state.best
        if best is not None and best is not self._written:
            facts = {"run": self.run, "step": best.step, "loss": best.loss}
            write_atomic(self.folder / BEST, packed(_numbered("best", best.learned), facts))
            self._written = best
        tensors = _numbered("learned", state.learned) | _numbered("average", state.average)
        for index, values in state.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        known = {"run": self.run, "steps": state.steps, "history": state.history}
        write_atomic(self.folder / STATE, packed(tensors, known))
        end = time.monotonic()
        self._due = end + _PATIENCE * (end - start)

    def load(self, state: State, steps: int) -> None:
        """Takes over what the files hold.

        Args:
            state: as the run made it; it is changed.
            steps: of the whole run.

        Raises:
            PolicyError: a file is missing or damaged, or belongs to another run.
        """
        path = self.folder / STATE
        try:
            tensors, facts = unpacked(path, hashed=True)
            known: _Facts = convert(facts, _Facts)
            check_run(path, known["run"], self.run)
            _check_history(known, steps)
            like = _numbered("learned", state.learned) | _numbered("average", state.average)
            moments = {name: t for name, t in tensors.items() if name.startswith("optimizer.")}
            check_layout({n: t for n, t in tensors.items() if n not in moments}, layout_of(like))
            cut = {name.removeprefix("optimizer."): t for name, t in moments.items()}
            found = optimizer_states(state.optimizer, cut)
            path = self.folder / BEST
            state.best = self._best(state)
            values = [loss for _, loss in known["history"]]
            if state.best is None and min(values) < values[0]:
                raise ContentError("it is missing, and a best state was seen")
        except FileNotFoundError as error:
            raise PolicyError(
                f"nothing to resume: {error.filename} does not exist; start a new run in another"
                " folder"
            ) from None
        except (ContentError, JsonError) as error:
            raise PolicyError(
                f"{path} is damaged ({error}); start a new run in another folder"
            ) from None
        with torch.no_grad():
            for name, own in like.items():
                own.copy_(tensors[name])
        state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": found})
        state.steps, state.history = known["steps"], [(at, loss) for at, loss in known["history"]]

    def _best(self, state: State) -> Best | None:
        """What the best state's file holds; None where there is none yet."""
        path = self.folder / BEST
        if not path.exists():
            return None
        tensors, facts = unpacked(path, hashed=True)
        known: _BestFacts = convert(facts, _BestFacts)
        check_run(path, known["run"], self.run)
        check_layout(tensors, layout_of(_numbered("best", state.learned)))
        learned = [tensors[name] for name in _numbered("best", state.learned)]
        self._written = Best(known["step"], known["loss"], learned)
        return self._written


def remove_state(folder: Path) -> None:
    """Removes the files of a run that is over."""
    for name in (BEST, STATE):  # a kill in between leaves a run that can go on
        (folder / name).unlink(missing_ok=True)


def _numbered(kind: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{number}": tensor.detach() for number, tensor in enumerate(tensors)}


def _check_history(facts: _Facts, steps: int) -> None:
    """Raises ContentError for steps and evaluations that no run has."""
    at = [step for step, _ in facts["history"]]
    if not 0 <= facts["steps"] <= steps or at[:1] != [0] or at != sorted(set(at)):
        raise ContentError(f"steps {facts['steps']}, evaluated at {at[:5]}, fit no run of {steps}")
    if at[-1] > facts["steps"]:
        raise ContentError(f"it was evaluated at {at[-1]} and has taken {facts['steps']} steps")
