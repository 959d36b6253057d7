"""Trains one allocation policy over the interaction matrices of many models and texts
(docs/methods.md, sections 12 and 13).

The environment is `prunenet/BudgetPruning-v0`, the trainer stable-baselines3's A2C. The policy
reads weights alone: a slot's features give its log-odds, and one theta for the budget that is left
gives the mean of the number of units that stay. Returns are the damage still to come, compared with
the mean over episodes of the same game, ratio and slot.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from prunenet.envs.budget import BudgetPruningVectorEnv
from prunenet.envs.sweep import PROGRESS
from prunenet.evaluation.shares import allocated, capped, check_cap, damages
from prunenet.evaluation.slots import Game
from prunenet.policies.scorer import SlotAllocator
from prunenet.policies.training.actor_critic import SweepRolloutBuffer
from prunenet.policies.training.swept_widths import mean_shares
from prunenet.policies.training.vec_env import SB3VecEnv, quiet
from prunenet.runtime.choices import check_fields, check_ratio
from prunenet.text.calibration import check_seed


@dataclass(frozen=True, slots=True)
class AllocatorRecipe:
    """How an allocation policy is trained.

    Attributes:
        updates: gradient steps, each after one batch of episodes of one game.
        episodes: of a batch, at least 2.
        ratio: range (low, high) of ratios; each batch draws one.
        learning_rate: of AdamW, falling linearly to 0.
        spread: standard deviation of a decision, as a share of the slot's units.
        evaluate_every: updates between evaluations; the best policy seen is the result.
        evaluate_at: ratios of those evaluations.
        worst: whether a game's worst domain counts, or the mean.
        cap: see `prunenet.evaluation.shares.capped`; None sets none.
        seed: of every random draw.

    Raises:
        ValueError: a number out of range.
    """

    updates: int = 200
    episodes: int = 64
    ratio: tuple[float, float] = (0.1, 0.6)
    learning_rate: float = 1e-2
    spread: float = 0.12
    evaluate_every: int = 10
    evaluate_at: tuple[float, ...] = (0.2, 0.3, 0.5)
    worst: bool = True
    cap: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_seed(self.seed)
        check_cap(self.cap)
        for ratio in (*self.ratio, *self.evaluate_at):
            check_ratio(ratio)
        if not self.evaluate_at or not 0 < self.spread < math.inf:
            raise ValueError(
                "training takes 1 ratio or more to evaluate at and a spread above 0, got"
                f" {self.evaluate_at} and {self.spread}"
            )
        if min(self.updates, self.evaluate_every) < 1 or self.episodes < 2:
            raise ValueError(
                "training takes 1 or more updates between evaluations and 2 or more episodes, got"
                f" {self.updates}, {self.evaluate_every} and {self.episodes}"
            )
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"learning_rate must be above 0 and at most 1, got {self.learning_rate}"
            )


@dataclass(frozen=True, slots=True)
class TrainedAllocator:
    """The best allocator seen, and (updates, its mean log damage) at each evaluation."""

    allocator: SlotAllocator
    history: list[tuple[int, float]]


def train_allocator(
    games: Sequence[Game],
    start: SlotAllocator,
    recipe: AllocatorRecipe | None = None,
    *,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainedAllocator:
    """Trains an allocation policy on games in turn.

    Args:
        games: of one or more models and texts; their features have the same columns.
        start: copied; an untrained one, or one to continue from.
        recipe: see `AllocatorRecipe`.
        progress: called with (updates done, updates in all, mean log damage so far).

    Returns:
        The allocator with the lowest mean log damage over games and ratios.
    """
    recipe = recipe or AllocatorRecipe()
    vectors = BudgetPruningVectorEnv(
        None,
        recipe.episodes,
        games=games,
        ratio=recipe.ratio,
        worst=recipe.worst,
        cap=recipe.cap,
    )
    length = max(game.length for game in games)
    env = SB3VecEnv(vectors)
    env.seed(recipe.seed)
    state = torch.get_rng_state()
    try:
        algorithm = A2C(
            SlotPolicy,
            env,
            learning_rate=lambda left: recipe.learning_rate * left,
            n_steps=length,
            gamma=1.0,
            gae_lambda=1.0,
            ent_coef=0.0,
            vf_coef=0.0,
            use_rms_prop=False,
            rollout_buffer_class=SweepRolloutBuffer,
            rollout_buffer_kwargs={"baseline": "group"},
            policy_kwargs={
                "games": [game.padded(length) for game in games],
                "start": start,
                "spread": recipe.spread,
                "optimizer_class": torch.optim.AdamW,
            },
            seed=recipe.seed,
        )
        algorithm.set_logger(quiet())
        watch = _Watch(games, recipe, length, progress)
        algorithm.learn(recipe.updates * length * recipe.episodes, callback=watch)
    finally:
        torch.set_rng_state(state)
    return TrainedAllocator(watch.best, watch.history)


@torch.no_grad()
def mean_log_damage(
    allocator: SlotAllocator,
    games: Sequence[Game],
    ratios: Sequence[float],
    *,
    worst: bool = True,
    cap: float | None = None,
) -> float:
    """Mean log of the predicted damage of the allocations that a policy gives, over games and
    ratios: games count alike, however large their damages are.
    """
    found = [
        damages(
            game, allocated(capped(game, ratio, cap), allocator(game.features), ratio), worst=worst
        )
        for game in games
        for ratio in ratios
    ]
    return float(torch.cat(found).clamp_min(1e-12).log().mean())


class _Watch(BaseCallback):
    """Evaluates the deterministic allocations and keeps the best policy."""

    def __init__(
        self,
        games: Sequence[Game],
        recipe: AllocatorRecipe,
        length: int,
        progress: Callable[[int, int, float], None] | None,
    ) -> None:
        super().__init__()
        self._games, self._recipe, self._progress = games, recipe, progress
        self._steps = length * recipe.episodes
        self.history: list[tuple[int, float]] = []
        self.best: SlotAllocator

    def _on_rollout_start(self) -> None:
        self._evaluate()

    def _on_training_end(self) -> None:
        self._evaluate()

    def _on_step(self) -> bool:
        return True

    def _evaluate(self) -> None:
        updates, recipe = self.model.num_timesteps // self._steps, self._recipe
        if updates % recipe.evaluate_every and updates != recipe.updates:
            return
        policy = self.model.policy
        assert isinstance(policy, SlotPolicy)
        value = mean_log_damage(
            policy.allocator,
            self._games,
            recipe.evaluate_at,
            worst=recipe.worst,
            cap=recipe.cap,
        )
        if not self.history or value < min(known for _, known in self.history):
            self.best = copy.deepcopy(policy.allocator).requires_grad_(False)
        self.history.append((updates, value))
        self.logger.record("prunenet/mean_log_damage", value)
        if self._progress is not None:
            self._progress(updates, recipe.updates, min(known for _, known in self.history))


class SlotPolicy(ActorCriticPolicy):
    """Draws how many units of a slot stay: a normal density around the mean share, over the legal
    numbers.

    Args:
        observation_space, action_space, lr_schedule: see stable-baselines3.
        games: in the order of the environment's.
        start: copied and trained.
        spread: see `AllocatorRecipe`.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete[Any],
        lr_schedule: Any,
        *,
        games: Sequence[Game],
        start: SlotAllocator,
        spread: float,
        **kwargs: Any,
    ) -> None:
        # Modules can be set only once torch has initialised this one: see `_build`.
        self._made: Callable[[], SlotAllocator] = lambda: copy.deepcopy(start)
        self._games, self._spread = games, spread
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.allocator = self._made().requires_grad_(True)
        options = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(self.allocator.parameters(), **options)

    def get_distribution(self, obs: Any) -> Any:
        """Returns the distribution over the legal numbers of units, one row an observation."""
        # A batch is of one game: episodes are played in step.
        game = self._games[int(obs["game"].flatten()[0])]
        slot = obs["slot"].long().flatten().clamp(max=len(game.slots) - 1)
        ratio, left = (
            obs["context"][:, -len(PROGRESS) + PROGRESS.index(name)].double()
            for name in ("ratio", "budget_left")
        )
        offsets = self.allocator(game.features).double()
        costs = torch.tensor([s.costs[-1] for s in game.slots], dtype=torch.float64) / game.total
        shares = mean_shares(offsets, slot, ((1 - ratio) * left).clamp_min(1e-6), costs)
        count = torch.tensor([len(s.units) for s in game.slots])[slot]
        mean = (shares.gather(1, slot[:, None]).squeeze(1) * count)[:, None]
        spread = (self._spread * count).clamp_min(0.5)[:, None]
        allowed = obs["action_mask"].bool()
        density = -0.5 * ((torch.arange(allowed.shape[1]) - mean) / spread) ** 2
        return torch.distributions.Categorical(
            logits=density.masked_fill(~allowed, -1e9), validate_args=False
        )

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Returns actions, values (zeros) and log-probabilities, (n,)."""
        drawn = self.get_distribution(obs)
        actions = drawn.logits.argmax(1) if deterministic else drawn.sample()
        return actions, self.predict_values(obs), drawn.log_prob(actions)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self.forward(observation, deterministic)[0]

    def predict_values(self, obs: Any) -> Tensor:
        """Returns zeros, (n, 1): there is no critic."""
        return torch.zeros(len(obs["slot"]), 1)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns values, log-probabilities and entropies of drawn actions."""
        drawn = self.get_distribution(obs)
        return self.predict_values(obs), drawn.log_prob(actions.flatten()), drawn.entropy()
