"""Adapts the batched environment to the vector interface of stable-baselines3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from prunenet.envs.layerwise import Info
from prunenet.envs.vector import LayerwisePruningVectorEnv


class SweepVecEnv(VecEnv):
    """Wraps one `LayerwisePruningVectorEnv` as a stable-baselines3 `VecEnv`."""

    def __init__(self, env: LayerwisePruningVectorEnv) -> None:
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._actions: NDArray[Any] | None = None
        self._paid = np.zeros(self.num_envs)

    def reset(self) -> Any:
        """Starts the next sweeps and returns their first observations."""
        self._paid[:] = 0
        observation, _ = self.env.reset(seed=self._seeds[0], options=self._options[0])
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: NDArray[Any]) -> None:
        """Stores the masks for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Plays the stored masks."""
        assert self._actions is not None, "step_wait() follows step_async()"
        observation, rewards, ended, _, infos = self.env.step(self._actions)
        self._paid += rewards
        listed: list[Info] = [{} for _ in range(self.num_envs)]
        if ended.all():
            final = infos["final_obs"]
            for i, info in enumerate(listed):
                info["episode"] = {"r": float(self._paid[i]), "l": self.env.view.layers}
                info["terminal_observation"] = {key: value[i] for key, value in final.items()}
            self._paid[:] = 0
        return observation, rewards, ended, listed

    def close(self) -> None:
        """Closes the environment; the model stays as it is."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Returns the one environment's attribute, once per mask."""
        return [getattr(self.env, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the one environment."""
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Calls a method once and returns its result once per mask."""
        return [getattr(self.env, method_name)(*args, **kwargs)] * self._count(indices)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Returns False for every mask: wrappers surround the whole batch."""
        return [False] * self._count(indices)

    def _count(self, indices: int | Sequence[int] | None) -> int:
        return self.num_envs if indices is None else len(np.atleast_1d(indices))
