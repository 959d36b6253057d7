"""Runs one stage of a training: a stable-baselines3 algorithm, its saved states, the best policy
seen.

Every random draw depends only on the seed and the number of the update. A run killed at any moment
and resumed therefore ends with the same policy, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from prunenet.envs.rewards import Reward
from prunenet.envs.sweep import View
from prunenet.envs.vector import LayerwisePruningVectorEnv
from prunenet.models.layers import Weights
from prunenet.models.masks import top_channels, width_at, widths_for_budget
from prunenet.policies.scorer import ChannelScorer
from prunenet.policies.training.actor_critic import (
    KeepMaskPolicy,
    MaskModel,
    SweepRolloutBuffer,
)
from prunenet.policies.training.recipe import Recipe, as_json
from prunenet.policies.training.state import Progress, load_state, save_state
from prunenet.policies.training.vec_env import SB3VecEnv, quiet
from prunenet.runtime.files import make_folders


@dataclass(frozen=True, slots=True)
class Saving:
    """Says where a run saves its state, and which run it is.

    Attributes:
        file: of the state, in a folder of its own beside the TensorBoard log; None keeps all in
            memory.
        identity: JSON values that a resumed run must give alike.
    """

    file: Path | None
    identity: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """One stage of a training: what is trained, on what, and how.

    Attributes:
        view: of the model in training.
        scorer: trained in place; afterwards it has the best weights seen.
        reward: by which deterministic masks are judged, see `prunenet.envs.rewards`.
        recipe: of this stage.
        saving: where the state is saved.
        progress: called with (updates done, updates in all, best reward so far).
    """

    view: View
    scorer: ChannelScorer
    reward: Reward
    recipe: Recipe
    saving: Saving
    progress: Callable[[int, int, float], None] | None


def _algorithm(
    env: SB3VecEnv, view: View, scorer: ChannelScorer, recipe: Recipe, folder: Path | None
) -> OnPolicyAlgorithm:
    """Makes either algorithm with the same policy, buffer and optimiser."""
    generator = torch.Generator().manual_seed(recipe.seed)
    masks = MaskModel(view, scorer, recipe.subset, generator, recipe.round_to)
    if recipe.algorithm == "a2c":
        algorithm: Callable[..., OnPolicyAlgorithm] = partial(A2C, use_rms_prop=False)
    else:
        batch = view.layers * recipe.masks
        algorithm = partial(PPO, n_epochs=recipe.epochs, batch_size=batch)
    made = algorithm(
        KeepMaskPolicy,
        env,
        learning_rate=lambda remaining: recipe.learning_rate * remaining,
        n_steps=view.layers,
        gamma=recipe.gamma,
        gae_lambda=1.0,
        ent_coef=recipe.entropy,
        vf_coef=0.5 if recipe.baseline == "value" else 0.0,
        rollout_buffer_class=SweepRolloutBuffer,
        rollout_buffer_kwargs={"baseline": recipe.baseline},
        normalize_advantage=False,
        policy_kwargs={"masks": masks, "optimizer_class": torch.optim.AdamW},
        tensorboard_log=None if folder is None else str(folder),
        seed=recipe.seed,
        device=view.context.device,
    )
    if folder is None:
        made.set_logger(quiet())
    return made


class Run(BaseCallback):
    """Seeds each update, evaluates the deterministic masks, keeps the best policy, saves the state.

    Args:
        stage: what is trained, and how.
        callbacks: of stable-baselines3, called behind this one.
    """

    model: OnPolicyAlgorithm

    def __init__(self, stage: Stage, callbacks: Sequence[BaseCallback] = ()) -> None:
        super().__init__()
        self._callbacks = callbacks
        self.view, self.reward, self.recipe = stage.view, stage.reward, stage.recipe
        self.scorer = stage.scorer.to(stage.view.context.device)
        self.file, self.identity = stage.saving.file, stage.saving.identity
        self.progress = stage.progress
        self.state = Progress(0, -math.inf, {}, [])

    def learn(self, model: Weights, resume: bool) -> list[tuple[int, float]]:
        """Runs the whole stage, or what is left of it.

        Args:
            model: the model in training.
            resume: whether to continue from the saved state.

        Returns:
            (updates, reward) at each evaluation, the first before any update.

        Raises:
            PolicyError: as `load_state`.
            ValueError: a reward is not finite.
        """
        view, recipe = self.view, self.recipe
        env = SB3VecEnv(
            LayerwisePruningVectorEnv(
                model,
                recipe.masks,
                reward=self.reward,
                ratio=recipe.ratio,
                view=view,
                channels=False,
            )
        )
        if self.file is not None:
            make_folders(self.file.parent)
        log = None if self.file is None else self.file.parent
        algorithm = _algorithm(env, view, self.scorer, recipe, log)
        if resume and self.file is not None:
            self.restore(algorithm, self.file)
            env.set_options({"sweep": self.state.updates})
        left = (recipe.updates - self.state.updates) * view.layers * recipe.masks
        algorithm.learn(
            left,
            callback=[self, *self._callbacks],
            log_interval=1,
            tb_log_name="run",
            reset_num_timesteps=not resume,
        )
        env.close()
        self.scorer.load_state_dict(self.state.best)
        return self.state.history

    def restore(self, algorithm: OnPolicyAlgorithm, path: Path) -> None:
        """Loads the saved state. Raises PolicyError as `load_state`."""
        policy, updates = algorithm.policy, self.recipe.updates
        self.state = load_state(path, policy, policy.optimizer, self.identity, updates)
        algorithm.num_timesteps = self.state.updates * self.view.layers * self.recipe.masks

    def _on_training_start(self) -> None:
        shown = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in as_json(self.recipe).items()
        }
        table = HParam(shown, {"prunenet/reward_of_mode": 0.0})
        self.logger.record("hparams", table, exclude=("stdout", "log", "json", "csv"))

    def _on_rollout_start(self) -> None:
        self._after_update()
        seed = np.random.SeedSequence([self.recipe.seed, self.state.updates]).generate_state(2)
        self._policy.generator.manual_seed(int(seed[0]))
        # stable-baselines3 shuffles its buffer with numpy's global generator.
        np.random.seed(int(seed[1]))

    def _on_rollout_end(self) -> None:
        self._drop_critic()

    def _on_training_end(self) -> None:
        self._after_update()
        self._drop_critic()
        self.logger.dump(self.model.num_timesteps)
        self.logger.close()

    def _on_step(self) -> bool:
        env = self.training_env
        assert isinstance(env, SB3VecEnv)
        layer = (self.model.num_timesteps // env.num_envs - 1) % self.view.layers
        self.logger.record(f"widths/layer_{layer:02}", float(env.infos["width"].mean()))
        for name, value in env.infos.items():
            if name.startswith("reward/"):
                self.logger.record_mean(name, float(value.mean()))
        return True

    def _drop_critic(self) -> None:
        """Where there is none, what stable-baselines3 computes of it means nothing."""
        if self.recipe.baseline == "value":
            return
        for name in ("train/explained_variance", "train/value_loss"):
            self.logger.name_to_value.pop(name, None)
            self.logger.name_to_excluded.pop(name, None)

    @property
    def _policy(self) -> KeepMaskPolicy:
        assert isinstance(self.model.policy, KeepMaskPolicy)
        return self.model.policy

    def _after_update(self) -> None:
        updates = self.model.num_timesteps // (self.view.layers * self.recipe.masks)
        if self.state.history and updates == self.state.updates:
            return
        self.state.updates = updates
        if updates % self.recipe.evaluate_every == 0 or updates == self.recipe.updates:
            self._evaluate()
        if self.file is not None:
            save_state(self.file, self.state, self._policy, self._policy.optimizer, self.identity)
        if self.progress is not None:
            self.progress(updates, self.recipe.updates, self.state.best_reward)

    def _evaluate(self) -> None:
        scorer = self._policy.scorer
        value = mode_reward(scorer, self.view, self.reward, self.recipe)
        if not math.isfinite(value):
            raise ValueError(
                f"the reward is {value} after {self.state.updates} updates: the model's weights are"
                " damaged, or the reward is"
            )
        self.state.judged(value, scorer.state_dict())
        self.logger.record("prunenet/reward_of_mode", value)


@torch.no_grad()
def mode_reward(scorer: ChannelScorer, view: View, reward: Reward, recipe: Recipe) -> float:
    """Returns the reward of the masks that pruning with this policy would take.

    Layer terms are averaged over layers and sweep terms added; then over `recipe.evaluate_at`.
    """
    scores = scorer(torch.stack(list(view.statistics)), view.context)
    offsets = scorer.offsets(view.context).tolist()
    widths = [_widths(view, offsets, ratio, recipe) for ratio in recipe.evaluate_at]
    keep = [
        torch.stack([top_channels(row, at[layer]) for at in widths])
        for layer, row in enumerate(scores)
    ]
    layers: list[Tensor] = [
        term
        for layer, masks in enumerate(keep)
        for term in view.layer_terms(reward, layer, masks).values()
    ]
    layers = [term / view.layers for term in layers]
    return float(torch.stack([*layers, *view.sweep_terms(reward, keep).values()]).sum(0).mean())


def _widths(view: View, offsets: Sequence[float], ratio: float, recipe: Recipe) -> list[int]:
    if recipe.subset == "widths":
        return widths_for_budget([view.d_ff] * view.layers, list(offsets), ratio, recipe.round_to)
    return [width_at(view.d_ff, ratio, recipe.round_to)] * view.layers
