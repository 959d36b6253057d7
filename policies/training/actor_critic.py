"""Wraps the scorer and the distribution over keep masks as a stable-baselines3 policy with its
rollout buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from prunenet.envs.sweep import PROGRESS, View
from prunenet.policies.scorer import ChannelScorer
from prunenet.policies.training.choices import Baseline, Subset
from prunenet.policies.training.subset import Bernoulli, FixedWidth
from prunenet.policies.training.swept_widths import SweptWidths


@dataclass(frozen=True, slots=True, eq=False)
class MaskModel:
    """Holds what `KeepMaskPolicy` draws masks from.

    Attributes:
        view: statistics and context of the model in training.
        scorer: the network that is trained.
        subset: "fixed" (exact width), "bernoulli" (expected width) or "widths" (the best channels
            of a drawn width).
        generator: draws the masks.
        round_to: drawn widths are multiples of this.
    """

    view: View
    scorer: ChannelScorer
    subset: Subset
    generator: torch.Generator
    round_to: int = 1


class KeepMaskPolicy(ActorCriticPolicy):
    """Scores channels and draws keep masks (actor); predicts returns from the context (critic).

    The actor is a `ChannelScorer` with a distribution over keep masks, the critic a small
    perceptron. Channel statistics are held once, in the view; observations carry only the layer's
    number and the context. Masks of the same layer and width share one pass of the scorer and one
    solved offset.

    Args:
        observation_space, action_space, lr_schedule, use_sde: see stable-baselines3.
        masks: the scorer and the distribution.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.MultiBinary,
        lr_schedule: Any,
        *,
        masks: MaskModel,
        use_sde: bool = False,
        **kwargs: Any,
    ) -> None:
        # Modules can be set only once torch has initialised this one: see `_build`.
        self._masks = masks
        self.round_to, self.generator = masks.round_to, masks.generator
        super().__init__(observation_space, action_space, lr_schedule, use_sde=use_sde, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.view, self.scorer = self._masks.view, self._masks.scorer
        self.subset = self._masks.subset
        self.statistics = torch.stack(list(self.view.statistics))
        n_context = self.view.context.shape[1] + len(PROGRESS)
        self.critic = nn.Sequential(nn.Linear(n_context, 32), nn.Tanh(), nn.Linear(32, 1))
        options = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(self.parameters(), **options)

    def get_distribution(self, obs: Any) -> Any:
        """Returns the distribution over keep masks, one row per observation."""
        if self.subset == "widths":
            return self._swept(obs)
        target = obs["context"][:, -len(PROGRESS) + PROGRESS.index("target")]
        width = (target * self.view.d_ff).round().long()
        cases, rows = torch.unique(
            torch.stack((obs["layer"].long().flatten(), width), 1), dim=0, return_inverse=True
        )
        logits = self.scorer(self.statistics[cases[:, 0]], self.view.context[cases[:, 0]])
        kind = FixedWidth if self.subset == "fixed" else Bernoulli
        return kind(logits, cases[:, 1], rows)

    def _swept(self, obs: Any) -> SweptWidths:
        total = self.view.layers * self.view.d_ff
        ratio, left = (
            obs["context"][:, -len(PROGRESS) + PROGRESS.index(name)]
            for name in ("ratio", "budget_left")
        )
        budget = ((1 - ratio.double()) * total).round()
        with torch.no_grad():
            logits = self.scorer(self.statistics, self.view.context)
        offsets = self.scorer.offsets(self.view.context)
        remaining = (left.double() * budget).round().long()
        return SweptWidths(
            logits, offsets, obs["layer"].long().flatten(), remaining, round_to=self.round_to
        )

    def predict_values(self, obs: Any) -> Tensor:
        """Predicts the return of each observation, (n, 1)."""
        return self.critic(obs["context"])  # type: ignore[no-any-return]

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Returns masks (n, d_ff) as int8, values (n, 1) and exact log-probabilities (n,)."""
        distribution = self.get_distribution(obs)
        keep = distribution.mode() if deterministic else distribution.sample(self.generator)
        return keep.to(torch.int8), self.predict_values(obs), distribution.log_prob(keep)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self.forward(observation, deterministic)[0]

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns values, exact log-probabilities and entropies of sampled masks."""
        distribution = self.get_distribution(obs)
        return (
            self.predict_values(obs),
            distribution.log_prob(actions.bool()),
            distribution.entropy(),
        )


class SweepRolloutBuffer(DictRolloutBuffer):
    """Holds one whole sweep of each environment and computes advantages.

    The return of a mask is the discounted reward-to-go, where the published code takes
    gamma^layer * reward (docs/methods.md, section 1.2, items 3 and 4).

    Args:
        baseline: "group" subtracts the mean over the masks of the same layer in the same step and
            divides by their standard deviation; "value" subtracts the critic's prediction (lambda
            1); "none" takes returns as they are.
    """

    def __init__(self, *args: Any, baseline: Baseline = "group", **kwargs: Any) -> None:
        self.baseline = baseline
        super().__init__(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values: Tensor, dones: NDArray[Any]) -> None:
        """Fills `returns` and `advantages`, both (layers, masks).

        A rollout ends with the sweep, so that nothing is bootstrapped.
        """
        assert bool(np.all(dones)), "a rollout is one sweep"
        total = np.zeros(self.n_envs)
        for step in reversed(range(self.buffer_size)):
            total = self.rewards[step] + self.gamma * total
            self.returns[step] = total
        if self.baseline == "value":
            self.advantages[:] = self.returns - self.values
            return
        self.advantages[:] = self.returns
        if self.baseline == "group":
            self.advantages -= self.returns.mean(1, keepdims=True)
            self.advantages /= self.returns.std(1, keepdims=True) + 1e-8
