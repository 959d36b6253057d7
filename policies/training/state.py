"""Saves and loads the state of an unfinished stage of training: one safetensors file.

The file is replaced in one step, read without executing code, and carries a sha256 of its content:
an altered state is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from prunenet.policies.artifact import PolicyError
from prunenet.runtime.files import write_atomic

_HEADER, _SHA256 = "prunenet", "sha256"
_ADAM = ("exp_avg", "exp_avg_sq", "step")


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
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(facts)
    write_atomic(
        path, save(content, metadata={_HEADER: text, _SHA256: _content_sha256(text, content)})
    )


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
    facts, tensors = _read(path)
    try:
        progress = _progress(facts, _under("best.", tensors), updates)
        saved = facts["run"]
        asked = json.loads(json.dumps(run))
        changed = sorted(k for k in saved.keys() | asked.keys() if saved.get(k) != asked.get(k))
        if not changed:
            weights = _under("policy.", tensors)
            _check_weights(policy, weights, progress.best)
            states = _optimizer_states(optimizer, _under("optimizer.", tensors))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from None
    if changed:
        key = changed[0]
        raise PolicyError(
            f"the run in {path.parent} was started with {key} {saved.get(key)!r}, not"
            f" {asked.get(key)!r}; resume it with the same settings, or give another folder"
        )
    policy.load_state_dict(weights)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return progress


def _progress(facts: Any, best: dict[str, Tensor], updates: int) -> Progress:
    """Builds the progress from facts of any kind; raises ValueError or TypeError."""
    if not isinstance(facts["run"], dict):
        raise TypeError("run is no object")
    done, reward = facts["updates"], facts["best_reward"]
    history = [(update, float(value)) for update, value in facts["history"]]
    at = [update for update, _ in history]
    if type(done) is not int or any(type(update) is not int for update in at):
        raise TypeError("updates are no whole numbers")
    if not (0 <= done <= updates) or at[:1] != [0] or at != sorted(set(at)) or at[-1] > done:
        raise ValueError(f"updates {done} and {at} do not fit a stage of {updates}")
    values = [value for _, value in history]
    if not all(map(math.isfinite, values)) or reward != max(values):
        raise ValueError(f"best reward {reward} is not the best of {values}")
    return Progress(done, float(reward), best, history)


def _check_weights(policy: nn.Module, saved: dict[str, Tensor], best: dict[str, Tensor]) -> None:
    """Raises ValueError unless names, shapes and dtypes are the policy's, and all are finite."""
    expected = policy.state_dict()
    for which, found in ((expected, saved), (_under("scorer.", expected), best)):
        if which.keys() != found.keys():
            raise ValueError(f"weights are named {sorted(found)}")
        for name, tensor in found.items():
            _check_tensor(name, tensor, which[name])


def _optimizer_states(
    optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """Returns the state of each parameter; raises ValueError where an entry does not fit AdamW."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        index, _, field = name.partition(".")
        states.setdefault(int(index), {})[field] = tensor
    for number, state in states.items():
        if not 0 <= number < len(parameters) or tuple(sorted(state)) != _ADAM:
            raise ValueError(f"optimizer entry {number} holds {sorted(state)}")
        _check_tensor(f"optimizer entry {number}", state["step"], torch.zeros(()))
        for field in ("exp_avg", "exp_avg_sq"):
            _check_tensor(f"optimizer entry {number}", state[field], parameters[number])
        if float(state["step"]) < 0 or bool((state["exp_avg_sq"] < 0).any()):
            raise ValueError(f"optimizer entry {number} is negative")
    return states


def _check_tensor(name: str, found: Tensor, like: Tensor) -> None:
    if (found.shape, found.dtype) != (like.shape, like.dtype):
        raise ValueError(f"{name} is {tuple(found.shape)} of {found.dtype}")
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name} is not finite")


def _content_sha256(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256 of a header's facts and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Reads facts and tensors whose checksum is right."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header[_SHA256] != _content_sha256(header[_HEADER], tensors):
            raise ValueError("its content has changed since it was written")
        return json.loads(header[_HEADER]), tensors
    except FileNotFoundError:
        raise PolicyError(
            f"nothing to resume: {path} does not exist; start a new run in another folder"
        ) from None
    except KeyError as error:
        raise _damaged(path, ValueError(f"no {error} in its header")) from None
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> PolicyError:
    reason = str(error).partition("\n")[0][:200]
    return PolicyError(f"{path} is damaged ({reason}); start a new run in another folder")


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
