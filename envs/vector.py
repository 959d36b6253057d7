"""Implements the environment for a batch of masks: one model in memory, one reward call a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from prunenet.envs.drawing import RENDER_MODES
from prunenet.envs.layerwise import (
    Info,
    Observation,
    action_masks,
    as_keep,
    channel_parameters,
    drawn_sweep,
    observation_space,
    play_legal,
)
from prunenet.envs.rewards import Reward, SpectralReward
from prunenet.envs.shared import (
    Named,
    check_render_mode,
    check_reset_options,
    check_reward,
    counted_envs,
    opened,
    whole_number,
    with_masks,
)
from prunenet.envs.sweep import Sweep, View, draw_ratio


class LayerwisePruningVectorEnv(VectorEnv[Observation, NDArray[Any], NDArray[Any]]):
    """Plays `num_envs` sweeps of `LayerwisePruningEnv` in step, at the same layer and ratio.

    Spaces, reward and rules are those of `prunenet.envs.layerwise.LayerwisePruningEnv`, batched.
    All sweeps end together and the next ones start in the same call (`AutoresetMode.SAME_STEP`:
    `infos["final_obs"]` and `infos["final_info"]` hold the last observations and what is known of
    the sweeps that ended). As Gymnasium's own vector environments do, information `key` comes with
    `_key`, booleans of the environments that it is of. The ratio of sweep n depends only on the
    seed and on n, so that a run can be resumed at any sweep: `reset(options={"sweep": n})`.

    Args:
        model, reward, ratio, min_width, slack, view, render_mode: as for `LayerwisePruningEnv`.
        num_envs: masks a step, at least 1.
        channels: whether observations hold the channel statistics; not needed by a trainer that
            holds `view` itself.
    """

    metadata: Info = {  # noqa: RUF012 (as gymnasium declares it)
        "render_modes": RENDER_MODES,
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        model: Named = None,
        num_envs: int = 1,
        *,
        reward: Reward | None = None,
        ratio: float | Sequence[float] = 0.3,
        min_width: int = 1,
        slack: float = 0.25,
        view: View | None = None,
        channels: bool = True,
        render_mode: str | None = None,
    ) -> None:
        num_envs = counted_envs(num_envs)
        draw_ratio(ratio, 0.5)
        self.render_mode = check_render_mode(render_mode, RENDER_MODES)
        reward = None if reward is None else check_reward(reward)
        self.model = opened(model)
        self.ratio = ratio
        self.num_envs = num_envs
        self.view = view or View.of(self.model)
        every = channel_parameters(self.model)
        self._channel_parameters = [every[number] for number in self.view.groups]
        self._number = 0
        self._seed: int | None = None
        self._removed: NDArray[np.int64] | None = None
        self._channels = channels
        self._sweep = Sweep(
            self.view,
            reward or SpectralReward(self.model),
            num_envs,
            min_width=min_width,
            slack=slack,
        )
        self._sweep.budget_at(draw_ratio(ratio, 1.0))  # the highest one can be met
        self.metadata = {**self.metadata, "n_stats": self.view.statistics[0].shape[1]}
        self.single_observation_space = observation_space(self.view, channels=channels)
        self.single_action_space = spaces.MultiBinary(self.view.d_ff)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: Info | None = None
    ) -> tuple[Observation, Info]:
        """Starts all sweeps.

        Args:
            seed: counts sweeps from 0 again; drawn at the first reset where it is None.
            options: `ratio` of this sweep; `sweep`, the number to count from.
        """
        super().reset(seed=seed)
        options = dict(check_reset_options(options, "ratio", "sweep"))
        if seed is not None:
            self._seed, self._number = seed, 0
        elif self._seed is None:
            self._seed = int(self.np_random.integers(2**31))
        self._number = whole_number(options.get("sweep", self._number))
        if self._number < 0:
            raise ValueError(f"sweeps are counted from 0, got {self._number}")
        self._start(options)
        return self._observe(), with_masks(self._budget_info(), self.num_envs)

    def action_masks(self) -> NDArray[np.bool_]:
        """Returns (num_envs, 2 * d_ff); see `LayerwisePruningEnv.action_masks`."""
        return action_masks(self._sweep)

    def render(self) -> tuple[Any, ...] | None:
        """Draws the widths of every sweep; see `LayerwisePruningEnv`."""
        if self.render_mode is None:
            return None
        masks = range(self.num_envs)
        return tuple(drawn_sweep(self._sweep, self.render_mode, mask) for mask in masks)

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], Info]:
        """Plays one keep mask in each sweep.

        Args:
            actions: (num_envs, d_ff) of zeros and ones.

        Raises:
            ValueError: not masks of `action_space`; all sweeps stay where they were.
            RuntimeError: there are no sweeps yet.
        """
        if self._removed is None:
            raise RuntimeError("there is no sweep: call reset() before the next step()")
        keep = as_keep(actions, self._sweep)
        if keep.shape != (self.num_envs, self.view.d_ff):
            raise ValueError(
                f"actions must have shape {(self.num_envs, self.view.d_ff)}, got"
                f" {tuple(keep.shape)}"
            )
        layer = self._sweep.layer
        keep, reward, terms = play_legal(self._sweep, keep)
        width, done = keep.sum(1).cpu().numpy(), self._sweep.done
        self._removed += (self.view.d_ff - width) * self._channel_parameters[layer]
        infos: Info = {"width": width, "parameters_removed": self._removed.copy()}
        infos |= {f"reward/{name}": value.cpu().numpy() for name, value in terms.items()}
        final: Info = {}
        if done:
            last = infos | self._budget_info()
            final = {"final_obs": self._observe(), "final_info": last}
            self._start({})
        infos = with_masks({**infos, **self._budget_info(), **final}, self.num_envs)
        ended = np.full(self.num_envs, done)
        return self._observe(), reward.double().cpu().numpy(), ended, np.zeros_like(ended), infos

    def _start(self, options: Info) -> None:
        assert self._seed is not None, "reset"
        uniform = float(np.random.default_rng([self._seed, self._number]).random())
        self._number += 1
        self._removed = np.zeros(self.num_envs, dtype=np.int64)
        self._sweep.start(draw_ratio(options.get("ratio", self.ratio), uniform))

    def _observe(self) -> Observation:
        layer = min(self._sweep.layer, self.view.layers - 1)
        observation: Observation = {
            "context": self._sweep.context().cpu().numpy(),
            "layer": np.full(self.num_envs, layer, dtype=np.int64),
        }
        if self._channels:
            channels = self.view.statistics[layer].flatten().cpu().numpy()
            observation["channels"] = np.tile(channels, (self.num_envs, 1))
        return observation

    def _budget_info(self) -> Info:
        return {
            "ratio": np.full(self.num_envs, self._sweep.ratio),
            "budget_left": self._sweep.left.cpu().numpy().copy(),
            "action_mask": self.action_masks(),
        }
