"""PruneNet learns once per model family which FFN channels of a language model matter, and cuts any
model of it to any size.

    policy = prunenet.Policy.from_pretrained("runs/llama")
    pruned = prunenet.prune(model, policy, ratio=0.3)
    pruned.save_pretrained("smaller")

Names are imported on first use, so that `import prunenet` is quick and applying a policy imports no
reinforcement learning. The environments are registered in Gymnasium where that is imported, before
or after.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunenet.checkpoints.load import load_model, load_tokenizer
    from prunenet.checkpoints.options import LoadOptions
    from prunenet.checkpoints.streaming import StreamedCheckpoint
    from prunenet.compare.comparison import compare
    from prunenet.compare.options import CalibrationTexts, CompareOptions, Scored
    from prunenet.evaluation.options import EvaluationOptions, SpeedOptions
    from prunenet.evaluation.side_by_side import evaluate
    from prunenet.models.architectures import UnsupportedArchitecture
    from prunenet.policies.apply import Pruned, prune
    from prunenet.policies.artifact import Policy, PolicyError
    from prunenet.policies.options import PruneOptions
    from prunenet.policies.stream import prune_streamed
    from prunenet.policies.training.recipe import PRESETS, Recipe
    from prunenet.policies.training.reports import Reports
    from prunenet.policies.training.train import train
    from prunenet.policies.training.vec_env import SB3VecEnv
    from prunenet.recover.options import RecoverText, Tuning
    from prunenet.recover.record import recover
    from prunenet.runtime.files import CheckpointError

_HOMES = {
    "load_model": "prunenet.checkpoints.load",
    "load_tokenizer": "prunenet.checkpoints.load",
    "LoadOptions": "prunenet.checkpoints.options",
    "StreamedCheckpoint": "prunenet.checkpoints.streaming",
    "compare": "prunenet.compare.comparison",
    "CalibrationTexts": "prunenet.compare.options",
    "CompareOptions": "prunenet.compare.options",
    "Scored": "prunenet.compare.options",
    "EvaluationOptions": "prunenet.evaluation.options",
    "SpeedOptions": "prunenet.evaluation.options",
    "evaluate": "prunenet.evaluation.side_by_side",
    "UnsupportedArchitecture": "prunenet.models.architectures",
    "Pruned": "prunenet.policies.apply",
    "prune": "prunenet.policies.apply",
    "Policy": "prunenet.policies.artifact",
    "PolicyError": "prunenet.policies.artifact",
    "PruneOptions": "prunenet.policies.options",
    "prune_streamed": "prunenet.policies.stream",
    "PRESETS": "prunenet.policies.training.recipe",
    "Recipe": "prunenet.policies.training.recipe",
    "Reports": "prunenet.policies.training.reports",
    "train": "prunenet.policies.training.train",
    "SB3VecEnv": "prunenet.policies.training.vec_env",
    "RecoverText": "prunenet.recover.options",
    "Tuning": "prunenet.recover.options",
    "recover": "prunenet.recover.record",
    "CheckpointError": "prunenet.runtime.files",
}
__all__ = [
    "PRESETS",
    "CalibrationTexts",
    "CheckpointError",
    "CompareOptions",
    "EvaluationOptions",
    "LoadOptions",
    "Policy",
    "PolicyError",
    "PruneOptions",
    "Pruned",
    "Recipe",
    "RecoverText",
    "Reports",
    "SB3VecEnv",
    "Scored",
    "SpeedOptions",
    "StreamedCheckpoint",
    "Tuning",
    "UnsupportedArchitecture",
    "compare",
    "evaluate",
    "load_model",
    "load_tokenizer",
    "prune",
    "prune_streamed",
    "recover",
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


import_module("prunenet.envs.registration").register_when_imported()
