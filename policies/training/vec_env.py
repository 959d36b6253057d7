"""Adapts Gymnasium's batched environments to the vector interface of stable-baselines3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from prunenet.envs.layerwise import Info


class SB3VecEnv(VecEnv):
    """Plays one Gymnasium `VectorEnv`, of prunenet or another, as a stable-baselines3 `VecEnv`.

        vectors = gymnasium.make_vec("prunenet/LayerwisePruning-v0", num_envs=16,
                                     vectorization_mode="vector_entry_point")
        PPO("MultiInputPolicy", prunenet.SB3VecEnv(vectors)).learn(10_000)

    The masks of maskable trainers (sb3-contrib's MaskablePPO) are passed on.

    Args:
        env: starts the next episode in the same step (`AutoresetMode.SAME_STEP`).

    Attributes:
        infos: information of the last step, batched.

    Raises:
        ValueError: the environment restarts in another way.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError(
                "stable-baselines3 starts the next episode in the same step; make the environment"
                f" with autoreset mode SAME_STEP, not {env.metadata.get('autoreset_mode')}"
            )
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.render_mode = env.render_mode
        self.infos: Info = {}  # of the last step, as the environment gives them
        self._actions: NDArray[Any] | None = None
        self._paid, self._steps = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)

    def reset(self) -> Any:
        """Starts the next episodes and returns their first observations."""
        self._paid[:], self._steps[:] = 0, 0
        observation, _ = self.env.reset(seed=self._seeds[0], options=self._options[0])
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: NDArray[Any]) -> None:
        """Stores the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Plays the stored actions."""
        assert self._actions is not None, "step_wait() follows step_async()"
        observation, rewards, ended, cut, infos = self.env.step(self._actions)
        self.infos = infos
        self._paid += rewards
        self._steps += 1
        over = ended | cut
        listed: list[Info] = [{} for _ in range(self.num_envs)]
        for number in over.nonzero()[0]:
            listed[number] = {
                "episode": {"r": float(self._paid[number]), "l": int(self._steps[number])},
                "terminal_observation": _row(infos["final_obs"], int(number)),
                "TimeLimit.truncated": bool(cut[number] and not ended[number]),
            }
        self._paid[over], self._steps[over] = 0, 0
        return observation, rewards, over, listed

    def close(self) -> None:
        """Closes the environment; the model stays as it is."""
        self.env.close()

    def get_images(self) -> Sequence[Any]:
        """Returns one image an environment where `render_mode` is "rgb_array"."""
        return list(self.env.render() or ())

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Returns the one environment's attribute, once per row."""
        return [getattr(self.env, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the one environment."""
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Calls a method once and returns its result once per row; of action masks the rows."""
        result = getattr(self.env, method_name)(*args, **kwargs)
        return list(result) if method_name == "action_masks" else [result] * self._count(indices)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Returns False for every row: wrappers surround the whole batch."""
        return [False] * self._count(indices)

    def _count(self, indices: int | Sequence[int] | None) -> int:
        return self.num_envs if indices is None else len(np.atleast_1d(indices))


def _row(observations: Any, number: int) -> Any:
    if isinstance(observations, dict):
        return {key: value[number] for key, value in observations.items()}
    return observations[number]


def quiet() -> Logger:
    """A logger that writes nothing; stable-baselines3's own leaves an empty folder in the system's
    temporary one for every training.
    """
    return Logger(folder=None, output_formats=[])
