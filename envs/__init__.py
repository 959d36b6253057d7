"""Gymnasium environments in which a policy learns to prune: `prunenet/LayerwisePruning-v0`.

Importing this package registers the environment; `gymnasium.make("prunenet/LayerwisePruning-v0",
model=model)` makes it.

layerwise.py   one sweep over the layers at a time
vector.py      a batch of sweeps in step
sweep.py       the rules of a sweep, shared by both
rewards.py     rewards for the masks of one layer
divergence.py  the reward for the masks of a whole sweep
split.py       rewards computed by several processes
"""

if __name__ == "envs":
    raise ImportError(
        "import prunenet.envs; the top-level folder envs/ is its source, not a package of its own"
    )

import gymnasium

from prunenet.envs.layerwise import LayerwisePruningEnv
from prunenet.envs.rewards import Reward, SpectralReward
from prunenet.envs.vector import LayerwisePruningVectorEnv

ENV_ID = "prunenet/LayerwisePruning-v0"

if ENV_ID not in gymnasium.registry:
    gymnasium.register(
        id=ENV_ID,
        entry_point="prunenet.envs.layerwise:LayerwisePruningEnv",
        vector_entry_point="prunenet.envs.vector:LayerwisePruningVectorEnv",
    )

__all__ = ["ENV_ID", "LayerwisePruningEnv", "LayerwisePruningVectorEnv", "Reward", "SpectralReward"]
