"""The state of an unfinished training run: one safetensors file, replaced in one step, read without
executing code.
"""

from __future__ import annotations

import json
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


@dataclass(slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        updates: finished policy updates.
        best_reward: of the deterministic masks, the highest seen; mean over layers and ratios.
        best: the scorer's weights then.
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
    """Writes the run's state. `run` says which run this is (recipe, model); a resumed run must say
    the same.
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
    write_atomic(path, save(content, metadata={"prunenet": json.dumps(facts)}))


def load_state(
    path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, run: Mapping[str, Any]
) -> Progress:
    """Puts the saved state into policy and optimizer.

    Raises:
        PolicyError: the file is missing or damaged, or belongs to another run.
    """
    facts, tensors = _read(path)
    saved = facts["run"]
    asked = json.loads(json.dumps(run))
    changed = sorted(key for key in saved.keys() | asked.keys() if saved.get(key) != asked.get(key))
    if changed:
        key = changed[0]
        raise PolicyError(
            f"the run in {path.parent} was started with {key} {saved.get(key)!r}, not"
            f" {asked.get(key)!r}; resume it with the same settings, or give another --out"
        )
    policy.load_state_dict(_under("policy.", tensors))
    template = optimizer.state_dict()
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under("optimizer.", tensors).items():
        index, field = name.split(".", 1)
        states.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({**template, "state": states})
    history = [(int(update), float(reward)) for update, reward in facts["history"]]
    return Progress(facts["updates"], facts["best_reward"], _under("best.", tensors), history)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["prunenet"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise PolicyError(
            f"nothing to resume: {path} does not exist; start the run without --resume"
        ) from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise PolicyError(
            f"{path} is damaged ({error}); start the run anew with another --out"
        ) from None
    return facts, tensors


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
