"""Gymnasium environments in which a policy learns to prune, registered by `import prunenet`.

    env = gymnasium.make("prunenet/LayerwisePruning-v0", model="path/or/hub-id", ratio=0.3)

Without `model` they play on a tiny random one, to try a trainer on.

registration.py  the ids, registered as soon as gymnasium is imported
layerwise.py     one sweep over the layers at a time
vector.py        a batch of sweeps in step
budget.py        one budget over channels, heads and layers: one episode, or many in step
sweep.py         the rules of a sweep, shared by the two
rewards.py       rewards for the masks of one layer
divergence.py    the reward for the masks of a whole sweep
split.py         rewards computed by several processes
shared.py        what all environments do alike: models by name, checks, masks of information
drawing.py       widths bar by bar, as text or as an image
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ == "envs":
    raise ImportError(
        "import prunenet.envs; the top-level folder envs/ is its source, not a package of its own"
    )

from prunenet.envs.registration import BUDGET_ENV_ID, ENV_ID, register_when_imported

if TYPE_CHECKING:
    from prunenet.envs.budget import BudgetPruningEnv, BudgetPruningVectorEnv
    from prunenet.envs.layerwise import LayerwisePruningEnv
    from prunenet.envs.rewards import Reward, SpectralReward
    from prunenet.envs.vector import LayerwisePruningVectorEnv

register_when_imported()

_HOMES = {
    "BudgetPruningEnv": "budget",
    "BudgetPruningVectorEnv": "budget",
    "LayerwisePruningEnv": "layerwise",
    "LayerwisePruningVectorEnv": "vector",
    "Reward": "rewards",
    "SpectralReward": "rewards",
}
__all__ = [
    "BUDGET_ENV_ID",
    "ENV_ID",
    "BudgetPruningEnv",
    "BudgetPruningVectorEnv",
    "LayerwisePruningEnv",
    "LayerwisePruningVectorEnv",
    "Reward",
    "SpectralReward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunenet.envs' has no attribute {name!r}")
    return getattr(import_module(f"prunenet.envs.{_HOMES[name]}"), name)
