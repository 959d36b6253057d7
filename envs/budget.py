"""Implements one budget over channels, heads and layers as an environment: one episode at a time,
or many in step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.envs.drawing import RENDER_MODES, drawn
from prunenet.envs.shared import (
    Named,
    check_render_mode,
    check_reset_options,
    counted_envs,
    opened,
    whole_number,
    with_masks,
)
from prunenet.envs.sweep import PROGRESS, check_ratios, draw_ratio
from prunenet.evaluation.choices import Cost
from prunenet.evaluation.costs import unit_costs
from prunenet.evaluation.interaction import Ablation, measure_interaction
from prunenet.evaluation.latency import latency_table
from prunenet.evaluation.shares import capped, check_cap
from prunenet.evaluation.slots import Episodes, Game, check_attention
from prunenet.evaluation.units import Structure, check_cuttable, units_of
from prunenet.features.from_weights import layer_context
from prunenet.models.heads import counting_layers
from prunenet.models.layers import iter_ffns, text_config
from prunenet.runtime.choices import check_choice
from prunenet.text.random_tokens import random_blocks

Info = dict[str, Any]
Observation = dict[str, NDArray[Any]]
_BOUND = 4.0
_DEFAULT: tuple[Structure, ...] = ("channels", "heads")


def game_of(
    model: Named = None,
    blocks: Int[Tensor, "n tokens"] | None = None,
    *,
    structures: Sequence[Structure] = _DEFAULT,
    cost: Cost = "params",
    bins: int = 6,
) -> Game:
    """Measures a model's interaction matrix and makes its game.

    Args:
        model: in memory, its folder or hub id, or None, the tiny one.
        blocks: token ids, one domain; default 4 blocks of 32 random tokens, which suit a trial.
        structures: see `Game.of`.
        cost: what the budget counts.
        bins: of a layer's channels, which go in the order of the products of their norms.

    Raises:
        ValueError: a streamed model, an unknown cost or one that the structures do not have, or see
            `measure_interaction` and `Game.of`.
        UnsupportedArchitecture: heads, or layers, of this family cannot be cut.
    """
    check_choice("cost", cost, Cost)
    model = opened(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError("ablations need the model in memory, and this one is streamed: load it")
    check_cuttable(model, structures)
    check_attention(structures)
    units = units_of(model, bins, structures)
    table = latency_table(model) if cost == "latency" else None
    costs = unit_costs(units, model.config, cost, table=table)
    if not any(costs):
        raise ValueError(
            f"{', '.join(structures)} cost nothing by {cost!r}; name others (`structures`), or"
            " another `cost`"
        )
    if blocks is None:
        blocks = random_blocks(model, 4, 32, torch.Generator().manual_seed(0))
    scores = []
    for ffn in iter_ffns(model):
        norms = ffn.up.float().norm(dim=1) * ffn.down.float().norm(dim=0)
        scores.append(norms if ffn.gate is None else norms * ffn.gate.float().norm(dim=1))
    parts = measure_interaction(
        model, blocks, scores, Ablation(bins=bins, structures=structures, batch=len(blocks))
    )
    counting = counting_layers(text_config(model))
    context = layer_context(model).cpu()
    return Game.of(parts, context, structures=structures, costs=costs, counting=counting)


def _games(model: Named, games: Game | Sequence[Game] | None, options: Info) -> list[Game]:
    """The games given, or that of the model.

    Raises:
        ValueError: none, or a model and its options beside games; or as `game_of`.
        TypeError: something that is no game.
    """
    if games is None:
        return [game_of(model, **options)]
    found = [games] if isinstance(games, Game) else list(games)
    if not found or model is not None or options:
        beside = ["model"] * (model is not None) + sorted(options)
        given = f"{', '.join(beside)} beside them" if beside else "none"
        raise ValueError(f"`games` are one or more measured games, and no model, got {given}")
    for game in found:
        if not isinstance(game, Game):
            raise TypeError(f"`games` are of `game_of` or `Game.of`, got a {type(game).__name__}")
    return found


def _started(episodes: Episodes | None) -> Episodes:
    """The episodes. Raises RuntimeError where there are none yet."""
    if episodes is None:
        raise RuntimeError("there is no episode: call reset() first")
    return episodes


class _Rules:
    """What both environments share: games, ratios, spaces and observations."""

    def __init__(
        self,
        model: Named,
        games: Game | Sequence[Game] | None,
        ratio: float | Sequence[float],
        worst: bool,
        cap: float | None,
        options: Info,
    ) -> None:
        check_ratios(ratio)
        check_cap(cap)
        found = _games(model, games, options)
        self.length = max(game.length for game in found)
        self.games = [game.padded(self.length) for game in found]
        self.ratio, self._worst, self._cap = ratio, worst, cap
        for number in range(len(found)):
            for bound in check_ratios(ratio):
                self._begun(number, bound, 1)
        n_features = self.games[0].features.shape[1] + len(PROGRESS)
        levels = max(game.levels for game in self.games)
        self.observation_space = spaces.Dict(
            {
                "context": spaces.Box(-_BOUND, _BOUND, (n_features,), np.float32),
                "slot": spaces.Discrete(self.length),
                "game": spaces.Discrete(len(self.games)),
                "action_mask": spaces.MultiBinary(levels),
            }
        )
        self.action_space = spaces.Discrete(levels)

    def start(self, count: int, generator: np.random.Generator, options: Any) -> Episodes:
        """Begins episodes of a drawn game at a drawn ratio; options fix either."""
        known = check_reset_options(options, "ratio", "game")
        number = whole_number(known.get("game", int(generator.integers(len(self.games)))))
        if not 0 <= number < len(self.games):
            raise ValueError(f"there are games 0 to {len(self.games) - 1}, got {number}")
        ratio = draw_ratio(known.get("ratio", self.ratio), float(generator.random()))
        self.game = number
        return self._begun(number, ratio, count)

    def _begun(self, number: int, ratio: float, count: int) -> Episodes:
        game = capped(self.games[number], ratio, self._cap)
        return Episodes(game, count, ratio, worst=self._worst)

    def observe(self, episodes: Episodes) -> Observation:
        game, slot = episodes.game, min(episodes.slot, self.length - 1)
        row = game.features[min(slot, len(game.slots) - 1)]
        progress = torch.stack(
            (
                torch.full_like(episodes.left, episodes.ratio),
                episodes.target(),
                (episodes.left / episodes.budget).clamp(0, 1),
            ),
            dim=1,
        )
        context = torch.cat((row.expand(len(progress), -1), progress.float()), 1)
        return {
            "context": context.clamp(-_BOUND, _BOUND).numpy(),
            "slot": np.full(len(progress), slot, dtype=np.int64),
            "game": np.full(len(progress), self.game, dtype=np.int64),
            "action_mask": self.masks(episodes).astype(np.int8),
        }

    def masks(self, episodes: Episodes) -> NDArray[np.bool_]:
        """(count, levels) of the action space."""
        legal = np.zeros((len(episodes.left), int(self.action_space.n)), dtype=np.bool_)
        legal[:, : episodes.game.levels] = episodes.legal().numpy()
        return legal

    def info(self, episodes: Episodes) -> Info:
        """Arrays of one entry an episode."""
        count = len(episodes.left)
        return {
            "ratio": np.full(count, episodes.ratio),
            "game": np.full(count, self.game),
            "budget_left": episodes.left.numpy().copy(),
            "damage": episodes.damage.numpy().copy(),
            "action_mask": self.masks(episodes),
        }


def _drawn(episodes: Episodes, mode: str | None, number: int = 0) -> Any:
    """Draws the share of each slot that stays."""
    game, kept = episodes.game, episodes.kept[number]
    names, shares = [], []
    for place, slot in enumerate(game.slots):
        stays = float(kept[list(slot.units)].mean())
        if slot.whole is not None:
            stays *= float(kept[slot.whole])
        names.append(f"{slot.structure} {slot.layer}")
        shares.append(stays if place < episodes.slot else None)
    title = f"ratio {episodes.ratio:.2f}, damage {float(episodes.damage[number]):.4f}"
    return drawn(mode, names, shares, title)


class BudgetPruningEnv(gymnasium.Env[Observation, np.int64]):
    """Spend one budget on a language model's channels, heads and layers, at microseconds a step.

    ## Description
    One episode decides, layer by layer, how much of each structure stays: a *slot* is one structure
    of one layer, its units go in a fixed order. The damage of all decisions together is predicted
    by a quadratic form that was measured once (`prunenet.evaluation.interaction`), so that no step
    runs the model. Games of many texts and models may be played in turn.

    ## Action Space
    `Discrete(levels)`: how many units of the slot stay. Every action is legal: the nearest number
    is played from which the budget can be met; `action_masks()` and the information `action_mask`
    say which these are. The last slot of channels takes what is left of the budget, whatever is
    chosen: in parameters the target is met exactly (with "layers", from below by less than what
    the last layer holds).

    ## Observation Space
    A `Dict`:

    | key | space | meaning |
    |---|---|---|
    | `context` | `Box(-4, 4, (n_context + 6,))` | statistics of the layer; structure; progress |
    | `slot` | `Discrete(slots)` | number of the slot |
    | `game` | `Discrete(games)` | number of the game |
    | `action_mask` | `MultiBinary(levels)` | which numbers of units may stay |

    `context` holds `prunenet.features.from_weights.layer_context`, then
    `prunenet.evaluation.slots.PLACE`, then `ratio`, `target` (the share of every slot left that
    spends the budget evenly) and `budget_left` (the share not yet spent).

    ## Reward
    Minus the damage that the decision adds, in nats per token: over an episode, minus the predicted
    KL(dense || pruned), of the worst domain of the text or in the mean.

    ## Starting State
    The first slot, with the whole budget: (1 - ratio) of the cost of all slots. Each `reset` draws
    a game, and a ratio where a range is given.

    ## Episode End
    Terminated after the last slot (of the longest game); never truncated.

    ## Information
    `ratio`, `game`, `budget_left` (in the unit of the cost), `damage` (so far, in nats per token)
    and `action_mask`.

    ## Rendering
    "ansi" gives text, "rgb_array" an image: the share of every slot that stays, bar by bar.

    ## Arguments
    * `model`: a causal LM in memory, its folder or hub id, or None: a tiny random one. Its matrix
      is measured on random tokens (`game_of`).
    * `games`: one or more games that were measured already, on better text; then no model.
    * `structures`, `cost`, `bins`: of the game of `model`, see `game_of`.
    * `ratio`: share of the cost removed, in [0, 1), or a range `(low, high)`. Default 0.3.
    * `worst`: whether the worst domain counts, or the mean. Default True.
    * `cap`: no slot gives more than so many times the ratio, at least 1. Default None: no cap.
    * `render_mode`: "ansi", "rgb_array" or None.

    `reset(options={"ratio": r, "game": n})` fixes either.

    ## Version History
    * v0: first version.
    """

    metadata: Info = {"render_modes": RENDER_MODES, "render_fps": 8}  # noqa: RUF012 (gymnasium's way)

    def __init__(
        self,
        model: Named = None,
        *,
        games: Game | Sequence[Game] | None = None,
        ratio: float | Sequence[float] = 0.3,
        worst: bool = True,
        cap: float | None = None,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        self.render_mode = check_render_mode(render_mode, RENDER_MODES)
        self._rules = _Rules(model, games, ratio, worst, cap, options)
        self.observation_space = self._rules.observation_space  # type: ignore[assignment]
        self.action_space = self._rules.action_space
        self._levels = int(self._rules.action_space.n)
        self._episodes: Episodes | None = None

    def reset(
        self, *, seed: int | None = None, options: Info | None = None
    ) -> tuple[Observation, Info]:
        """Starts an episode; the class describes it."""
        super().reset(seed=seed)
        self._episodes = self._rules.start(1, self.np_random, options)
        return self._observe(self._episodes), self._info(self._episodes)

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, Info]:
        """Decides how many units of the slot stay; the class describes it.

        Raises:
            RuntimeError: there is no episode, or it is over.
            ValueError: not an action of `action_space`.
        """
        episodes = self._episodes
        if episodes is None or episodes.done:
            raise RuntimeError("the episode is over: call reset() before the next step()")
        level = whole_number(action)
        if not 0 <= level < self._levels:
            raise ValueError(f"an action is in [0, {self._levels}), got {action}")
        reward = -float(episodes.play(torch.tensor([level])))
        return self._observe(episodes), reward, episodes.done, False, self._info(episodes)

    def action_masks(self) -> NDArray[np.bool_]:
        """Returns which numbers of units may stay, (levels,)."""
        masks: NDArray[np.bool_] = self._rules.masks(_started(self._episodes))[0]
        return masks

    def render(self) -> Any:
        """Draws what stays of every slot; see the class."""
        return None if self._episodes is None else _drawn(self._episodes, self.render_mode)

    def _observe(self, episodes: Episodes) -> Observation:
        seen = self._rules.observe(episodes)
        return {key: value[0] for key, value in seen.items()}

    def _info(self, episodes: Episodes) -> Info:
        found = {key: value[0] for key, value in self._rules.info(episodes).items()}
        return {k: v if isinstance(v, np.ndarray) else v.item() for k, v in found.items()}


class BudgetPruningVectorEnv(VectorEnv[Observation, NDArray[Any], NDArray[Any]]):
    """Plays `num_envs` episodes of `BudgetPruningEnv` in step: one game and one ratio at a time.

    All episodes end together and the next ones start in the same call (`AutoresetMode.SAME_STEP`).

    Args:
        model, games, ratio, worst, cap, render_mode, options: as for `BudgetPruningEnv`.
        num_envs: episodes at a time, at least 1.
    """

    metadata: Info = {  # noqa: RUF012 (as gymnasium declares it)
        "render_modes": RENDER_MODES,
        "render_fps": 8,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        model: Named = None,
        num_envs: int = 1,
        *,
        games: Game | Sequence[Game] | None = None,
        ratio: float | Sequence[float] = 0.3,
        worst: bool = True,
        cap: float | None = None,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        num_envs = counted_envs(num_envs)
        self.render_mode = check_render_mode(render_mode, RENDER_MODES)
        self._rules = _Rules(model, games, ratio, worst, cap, options)
        self.num_envs = num_envs
        self.single_observation_space = self._rules.observation_space
        self.single_action_space = self._rules.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._episodes: Episodes | None = None

    @property
    def episodes(self) -> Episodes:
        """Those that are played now. Raises RuntimeError before the first `reset`."""
        return _started(self._episodes)

    def reset(
        self, *, seed: int | None = None, options: Info | None = None
    ) -> tuple[Observation, Info]:
        """Starts all episodes; options as for `BudgetPruningEnv`."""
        super().reset(seed=seed)
        self._episodes = self._rules.start(self.num_envs, self.np_random, options)
        infos = with_masks(self._rules.info(self.episodes), self.num_envs)
        return self._rules.observe(self.episodes), infos

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], Info]:
        """Plays one decision in each episode.

        Args:
            actions: (num_envs,) numbers of units.

        Raises:
            ValueError: not actions of `action_space`.
        """
        levels, most = np.asarray(actions), int(self._rules.action_space.n)
        whole = levels.shape == (self.num_envs,) and levels.dtype.kind in "iub"
        if not whole or levels.min() < 0 or levels.max() >= most:
            raise ValueError(f"actions are {self.num_envs} numbers in [0, {most}), got {actions}")
        reward = -self.episodes.play(torch.from_numpy(levels.astype(np.int64))).double().numpy()
        final: Info = {}
        done = self.episodes.done
        if done:
            final["final_obs"] = self._rules.observe(self.episodes)
            final["final_info"] = self._rules.info(self.episodes)
            self._episodes = self._rules.start(self.num_envs, self.np_random, None)
        infos = with_masks(self._rules.info(self.episodes) | final, self.num_envs)
        ended = np.full(self.num_envs, done)
        return self._rules.observe(self.episodes), reward, ended, np.zeros_like(ended), infos

    def action_masks(self) -> NDArray[np.bool_]:
        """Returns (num_envs, levels); see `BudgetPruningEnv.action_masks`."""
        return self._rules.masks(self.episodes)

    def render(self) -> tuple[Any, ...] | None:
        """Draws every episode; see `BudgetPruningEnv`."""
        if self.render_mode is None:
            return None
        numbers = range(self.num_envs)
        return tuple(_drawn(self.episodes, self.render_mode, number) for number in numbers)
