"""Saves and loads the state of an unfinished stage of training: one safetensors file.

The file is replaced in one step, read without executing code, and carries a sha256 of its content:
an altered state is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunenet.policies.artifact import PolicyError
from prunenet.runtime import parallel
from prunenet.runtime.files import make_folders, write_atomic
from prunenet.runtime.own_files import ContentError, check_layout, layout_of, packed, unpacked

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class Progress:
    """Says how far a stage has come.

    Attributes:
        updates: finished policy updates.
        best_reward: highest reward of the deterministic masks; mean over layers and ratios.
        best: the scorer's weights at that evaluation.
        history: (updates, reward of the deterministic masks) at each evaluation.
    """

    updates: int
    best_reward: float
    best: dict[str, Tensor]
    history: list[tuple[int, float]]

    def judged(self, value: float, weights: Mapping[str, Tensor]) -> None:
        """Enters an evaluation, and copies the weights where it is the best so far."""
        self.history.append((self.updates, value))
        if value > self.best_reward:
            self.best_reward = value
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}


def event_log(file: Path | None, done: int) -> SummaryWriter | None:
    """Opens the TensorBoard log of the first process, in the folder of a run's state.

    Args:
        file: of the state; None: there is no log.
        done: steps taken before; what was logged behind them is struck out.
    """
    if file is None or not parallel.is_first():
        return None
    from torch.utils.tensorboard import SummaryWriter

    make_folders(file.parent)
    return SummaryWriter(str(file.parent), purge_step=done + 1)


def save_state(
    path: Path,
    progress: Progress,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Mapping[str, Any],
) -> None:
    """Writes the state of a stage.

    Args:
        path: of the file.
        progress: how far the stage has come.
        policy, optimizer: in training.
        run: JSON values that identify the run (recipe, model, text); a resumed run must give the
            same.
    """
    tensors = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in progress.best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    facts = {
        "run": run,
        "updates": progress.updates,
        "best_reward": progress.best_reward,
        "history": progress.history,
    }
    # Copies: parameters that are one tensor in the policy are written once a name.
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    write_atomic(path, packed(copies, json.loads(json.dumps(facts))))


def load_state(
    path: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Mapping[str, Any],
    updates: int,
) -> Progress:
    """Loads a saved state into policy and optimizer.

    Args:
        path: of the file.
        policy, optimizer: as the run made them; both are changed.
        run: see `save_state`.
        updates: of the whole stage.

    Raises:
        PolicyError: the file is missing or damaged, or belongs to another run.
    """
    try:
        tensors, facts = unpacked(path, hashed=True)
        progress = _progress(facts, _under("best.", tensors), updates)
        check_run(path, facts["run"], json.loads(json.dumps(run)))
        weights, template = _under("policy.", tensors), policy.state_dict()
        check_layout(weights, layout_of(template))
        check_layout(progress.best, layout_of(_under("scorer.", template)))
        states = optimizer_states(optimizer, _under("optimizer.", tensors))
    except FileNotFoundError:
        raise PolicyError(
            f"nothing to resume: {path} does not exist; start a new run in another folder"
        ) from None
    except ContentError as error:
        raise PolicyError(
            f"{path} is damaged ({error}); start a new run in another folder"
        ) from None
    policy.load_state_dict(weights)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return progress


def check_run(
    path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any], inside: str = ""
) -> None:
    """Raises PolicyError where the state belongs to another run; `inside`: names of what the two
    are part of.
    """
    changed = sorted(key for key in saved.keys() | asked.keys() if saved.get(key) != asked.get(key))
    if changed:
        before, now = saved.get(key := changed[0]), asked.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            check_run(path, before, now, f"{inside}{key}: ")
        raise PolicyError(
            f"the run in {path.parent} was started with {inside}{key} {before!r}, not {now!r};"
            " resume it with the same settings, or give another folder"
        )


def _progress(facts: Mapping[str, Any], best: dict[str, Tensor], updates: int) -> Progress:
    """Builds the progress from the header's facts, each of which may be of any kind.

    Raises:
        ContentError: a fact is missing, of the wrong type, or out of range.
    """
    try:
        run, done, reward = facts["run"], facts["updates"], facts["best_reward"]
        at = [update for update, _ in facts["history"]]
        values = [float(value) for _, value in facts["history"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ContentError(f"its facts are incomplete: {error!r}"[:200]) from None
    whole = all(type(number) is int for number in (done, *at))
    if not isinstance(run, dict) or not whole or not isinstance(reward, float | int):
        raise ContentError("its facts are of the wrong types")
    if not 0 <= done <= updates or at[:1] != [0] or at != sorted(set(at)) or at[-1] > done:
        raise ContentError(f"updates {done}, evaluated at {at[:5]}, fit no stage of {updates}")
    if not all(map(math.isfinite, values)) or reward != max(values):
        raise ContentError(f"{reward} is not the best of its rewards")
    return Progress(done, float(reward), best, list(zip(at, values, strict=True)))


def optimizer_states(
    optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """Returns AdamW's state of each parameter that has one.

    Raises:
        ContentError: an entry does not fit its parameter.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {str(number): number for number in range(len(parameters))}
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        number, _, field = name.partition(".")
        if number not in numbers:
            raise ContentError(f"it has an optimizer entry {name[:80]!r}, for no parameter")
        states.setdefault(numbers[number], {})[field] = tensor
    for index, state in states.items():
        like = parameters[index]
        layout = dict.fromkeys(_MOMENTS, (like.dtype, tuple(like.shape)))
        check_layout(state, layout | {"step": (torch.float32, ())})
        if float(state["step"]) < 0 or bool((state["exp_avg_sq"] < 0).any()):
            raise ContentError(f"the optimizer's entry {index} is negative")
    return states


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
