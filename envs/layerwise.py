"""Implements the environment for one sweep at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from prunenet.envs.drawing import RENDER_MODES, drawn
from prunenet.envs.rewards import Reward, SpectralReward
from prunenet.envs.shared import (
    Named,
    check_render_mode,
    check_reset_options,
    check_reward,
    opened,
)
from prunenet.envs.sweep import PROGRESS, Sweep, View, draw_ratio
from prunenet.models.layers import Weights, iter_ffns, structure

Observation = dict[str, NDArray[Any]]
Info = dict[str, Any]
"""Options and information, as gymnasium declares them."""
BOUND = 4.0


def observation_space(view: View, *, channels: bool = True) -> spaces.Dict:
    """Returns the space of one observation.

    Args:
        view: statistics of the model.
        channels: whether observations hold the channel statistics, besides context and layer.
    """
    n_context = view.context.shape[1] + len(PROGRESS)
    parts: dict[str, spaces.Space[Any]] = {
        "context": spaces.Box(-BOUND, BOUND, (n_context,), np.float32),
        "layer": spaces.Discrete(view.layers),
    }
    if channels:
        parts["channels"] = spaces.Box(-BOUND, BOUND, (view.statistics[0].numel(),), np.float32)
    return spaces.Dict(parts)


class LayerwisePruningEnv(gymnasium.Env[Observation, NDArray[Any]]):
    """Prune a language model's FFN channels, layer by layer, at a target ratio.

    ## Description
    One episode is one sweep over the decoder layers of a causal language model, first to last. At
    each layer the agent observes statistics of the layer's FFN channels and chooses which channels
    stay. The model is read, never copied and never changed: after `close()` it is as it was. It
    stays on its device, where statistics and rewards are computed too.

    ## Action Space
    `MultiBinary(d_ff)`: the keep mask of the current layer, 1 where the channel stays. Every action
    is legal. Of a mask that keeps fewer than `min_width` channels the first dropped ones stay; of
    one that keeps so many that later layers could not keep `min_width` within the budget (plus
    `slack`) the last ones go. What was changed so costs reward.

    `action_masks()` and the information `action_mask` are for maskable trainers: two booleans a
    channel, whether it may go and whether it may stay; all are true unless the rules fix every one.

    ## Observation Space
    A `Dict`:

    | key | space | meaning |
    |---|---|---|
    | `channels` | `Box(-4, 4, (d_ff * n_stats,))` | statistics of each channel, row by row |
    | `context` | `Box(-4, 4, (n_context + 3,))` | statistics of the layer; position in the sweep |
    | `layer` | `Discrete(layers)` | number of the layer |

    `channels` is `prunenet.features.from_weights.channel_statistics`, to be reshaped to `(d_ff,
    n_stats)`; a `view` made with token blocks adds
    `prunenet.features.from_activations.moment_statistics`. `context` is
    `prunenet.features.from_weights.layer_context`, then `ratio`, `target` (the share of d_ff that
    spends the budget evenly over the layers left) and `budget_left` (the share not yet spent).

    ## Reward
    The sum of the terms of the `reward` object (`prunenet.envs.rewards`): layer terms at each step,
    sweep terms at the last one. By default the bounded spectral reward, 1 - KS distance of singular
    values, averaged over the FFN's matrices: in [0, 1] a step. At the last step the term
    `overdraft` subtracts what the sweep kept beyond its budget, as a share of d_ff; the term
    `clipped` subtracts the share of d_ff by which a mask had to be changed, and is 0 for others.

    ## Starting State
    The first layer with the whole budget, (1 - ratio) * layers * d_ff channels. With a range of
    ratios, each `reset` draws one.

    ## Episode End
    Terminated after the last layer; never truncated.

    ## Information
    `width` (channels kept in the layer just masked), `parameters_removed` (so far in this sweep),
    `ratio`, `budget_left` (in channels), `action_mask`, and `reward/<term>` for each term. `reset`
    gives `ratio`, `budget_left` and `action_mask`. `metadata["n_stats"]` is the number of
    statistics of a channel.

    ## Rendering
    "ansi" gives text, "rgb_array" an image: the width of every layer, bar by bar.

    ## Arguments
    * `model`: a causal LM of a supported family, in memory or streamed
      (`prunenet.checkpoints.streaming.StreamedCheckpoint`); its folder or hub id, with which the
      environment's `spec` can be written as JSON; or None, a tiny random one.
    * `reward`: an object with the methods of `prunenet.envs.rewards.Reward`; default
      `SpectralReward(model)`. Anything else is a `TypeError` at once.
    * `ratio`: share of FFN channels removed, in [0, 1), or a range `(low, high)`. Default 0.3.
    * `min_width`: fewest channels that a layer may keep, default 1.
    * `slack`: how far a sweep may overdraw its budget, as a share of one layer's d_ff, in [0, 1];
      default 0.25.
    * `view`: the statistics, if they have been computed already.
    * `render_mode`: "ansi", "rgb_array" or None.

    `reset(options={"ratio": r})` fixes the ratio of one sweep; an unknown option is a `ValueError`.

    ## Version History
    * v0: first version.
    """

    metadata: Info = {"render_modes": RENDER_MODES, "render_fps": 4}  # noqa: RUF012 (gymnasium's way)

    def __init__(
        self,
        model: Named = None,
        *,
        reward: Reward | None = None,
        ratio: float | Sequence[float] = 0.3,
        min_width: int = 1,
        slack: float = 0.25,
        view: View | None = None,
        render_mode: str | None = None,
    ) -> None:
        draw_ratio(ratio, 0.5)
        self.render_mode = check_render_mode(render_mode, RENDER_MODES)
        reward = None if reward is None else check_reward(reward)
        self.model = opened(model)
        self.ratio = ratio
        self._view = view or View.of(self.model)
        self._sweep = Sweep(
            self._view, reward or SpectralReward(self.model), min_width=min_width, slack=slack
        )
        self._sweep.budget_at(draw_ratio(ratio, 1.0))  # the highest one can be met
        every = channel_parameters(self.model)
        self._channel_parameters = [every[number] for number in self._view.groups]
        self._removed: int | None = None
        self.metadata = {**self.metadata, "n_stats": self._view.statistics[0].shape[1]}
        self.observation_space = observation_space(self._view)  # type: ignore[assignment]
        self.action_space = spaces.MultiBinary(self._view.d_ff)

    def reset(
        self, *, seed: int | None = None, options: Info | None = None
    ) -> tuple[Observation, Info]:
        """Starts a sweep; the class describes it."""
        super().reset(seed=seed)
        ratio = check_reset_options(options, "ratio").get("ratio", self.ratio)
        self._sweep.start(draw_ratio(ratio, float(self.np_random.random())))
        self._removed = 0
        return self._observe(), self._budget_info()

    def action_masks(self) -> NDArray[np.bool_]:
        """Returns whether each channel may go, and whether it may stay: (2 * d_ff,), as
        sb3-contrib's MaskablePPO asks for.
        """
        masks: NDArray[np.bool_] = action_masks(self._sweep)[0]
        return masks

    def render(self) -> Any:
        """Draws the widths of all layers; see the class."""
        return drawn_sweep(self._sweep, self.render_mode)

    def step(self, action: NDArray[Any]) -> tuple[Observation, float, bool, bool, Info]:
        """Plays the keep mask of the current layer; the class describes it.

        Raises:
            ValueError: not a mask of `action_space`; the sweep stays where it was.
            RuntimeError: there is no sweep, or it is over.
        """
        if self._removed is None or self._sweep.done:
            what = "there is no sweep" if self._removed is None else "the sweep is over"
            raise RuntimeError(f"{what}: call reset() before the next step()")
        keep = as_keep(action, self._sweep)
        if keep.ndim != 1:
            raise ValueError(
                f"a step plays one keep mask of {self._view.d_ff} entries, got shape"
                f" {tuple(keep.shape)}"
            )
        keep, layer = keep.unsqueeze(0), self._sweep.layer
        keep, reward, terms = play_legal(self._sweep, keep)
        width = int(keep.sum())
        self._removed += (self._view.d_ff - width) * self._channel_parameters[layer]
        info = {"width": width, "parameters_removed": self._removed, **self._budget_info()}
        info |= {f"reward/{name}": float(value) for name, value in terms.items()}
        return self._observe(), float(reward), self._sweep.done, False, info

    def _observe(self) -> Observation:
        layer = min(self._sweep.layer, self._view.layers - 1)
        return {
            "channels": self._view.statistics[layer].flatten().cpu().numpy().copy(),
            "context": self._sweep.context()[0].cpu().numpy(),
            "layer": np.int64(layer),  # type: ignore[dict-item]
        }

    def _budget_info(self) -> Info:
        return {
            "ratio": self._sweep.ratio,
            "budget_left": int(self._sweep.left),
            "action_mask": self.action_masks(),
        }


def play_legal(sweep: Sweep, keep: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Plays masks, changed to legal ones where they have to be (`Sweep.legal`).

    Returns:
        The masks played, the reward (masks,), and its terms, `overdraft` and `clipped` always.
    """
    legal = sweep.legal(keep)
    clipped = -(legal != keep).sum(1) / sweep.view.d_ff
    reward, terms = sweep.play(legal)
    terms.setdefault("overdraft", torch.zeros_like(clipped))
    return legal, reward + clipped, {**terms, "clipped": clipped}


def action_masks(sweep: Sweep) -> NDArray[np.bool_]:
    """Returns (masks, 2 * d_ff): for each channel, whether it may go and whether it may stay."""
    may = np.ones((sweep.masks, sweep.view.d_ff, 2), dtype=np.bool_)
    may[..., 0] = sweep.min_width < sweep.view.d_ff
    return may.reshape(sweep.masks, -1)


def drawn_sweep(sweep: Sweep, mode: str | None, mask: int = 0) -> Any:
    """Returns the widths of one of the masks as `render_mode` says."""
    shares: list[float | None] = [float(keep[mask].float().mean()) for keep in sweep.kept]
    shares += [None] * (sweep.view.layers - len(shares))
    names = [f"layer {number}" for number in range(len(shares))]
    title = f"ratio {sweep.ratio:.2f}, {int(sweep.left[mask])} channels left"
    return drawn(mode, names, shares, title)


def channel_parameters(model: Weights) -> list[int]:
    """Returns the parameters of one channel, for each layer."""
    return [ffn.channel_parameters for ffn in iter_ffns(structure(model))]


def as_keep(action: Any, sweep: Sweep) -> Tensor:
    """Converts an action to booleans on the sweep's device.

    Raises:
        ValueError: another length, or entries other than 0 and 1.
    """
    array = np.asarray(action)
    if array.shape[-1:] != (sweep.view.d_ff,):
        raise ValueError(
            f"a keep mask for this model has {sweep.view.d_ff} entries, got shape {array.shape}"
        )
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise ValueError("a keep mask holds zeros and ones only")
    return torch.from_numpy(array.astype(np.bool_)).to(sweep.device)
