"""PruneNet learns once per model family which FFN channels of a language model matter, and cuts any
model of it to any size.

    policy = prunenet.Policy.from_pretrained("runs/llama")
    pruned = prunenet.prune(model, policy, ratio=0.3)
    pruned.save_pretrained("smaller")

Names are imported on first use, so that `import prunenet` is quick and applying a policy imports no
reinforcement learning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunenet.checkpoints.load import load_model, load_tokenizer
    from prunenet.checkpoints.streaming import StreamedCheckpoint
    from prunenet.models.architectures import UnsupportedArchitecture
    from prunenet.policies.apply import Pruned, prune
    from prunenet.policies.artifact import Policy, PolicyError
    from prunenet.policies.stream import prune_streamed
    from prunenet.policies.training.recipe import PRESETS, Recipe
    from prunenet.policies.training.train import train
    from prunenet.runtime.files import CheckpointError

_HOMES = {
    "UnsupportedArchitecture": "prunenet.models.architectures",
    "CheckpointError": "prunenet.runtime.files",
    "load_model": "prunenet.checkpoints.load",
    "load_tokenizer": "prunenet.checkpoints.load",
    "Pruned": "prunenet.policies.apply",
    "prune": "prunenet.policies.apply",
    "Policy": "prunenet.policies.artifact",
    "PolicyError": "prunenet.policies.artifact",
    "PRESETS": "prunenet.policies.training.recipe",
    "Recipe": "prunenet.policies.training.recipe",
    "StreamedCheckpoint": "prunenet.checkpoints.streaming",
    "prune_streamed": "prunenet.policies.stream",
    "train": "prunenet.policies.training.train",
}
__all__ = [
    "PRESETS",
    "CheckpointError",
    "Policy",
    "PolicyError",
    "Pruned",
    "Recipe",
    "StreamedCheckpoint",
    "UnsupportedArchitecture",
    "load_model",
    "load_tokenizer",
    "prune",
    "prune_streamed",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # slow

        return version("prunenet")
    if name not in _HOMES:
        raise AttributeError(f"module 'prunenet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
