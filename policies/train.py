"""Trains a policy on one model: rollouts of whole sweeps, stable-baselines3's A2C or PPO, checkpoints, resume.

After Sengupta et al. (PruneNet), ICLR 2025, arXiv 2501.15296, section 3. What differs, and why, is METHODS.md 1.2:
deterministic application, the exact log-probability of the mask played, bounded rewards against a baseline, reward-to-go, many
masks of a layer per step, a scorer without widths, and a result that is never worse than its start on its own reward.

Every random draw depends on the seed and on the number of the update alone, so that a run killed at any moment and resumed
ends with the same policy, bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.calibration import Blocks, weights_sha256
from prunenet.envs.rewards import ReconstructionReward, Reward, SpectralReward
from prunenet.envs.sweep import View
from prunenet.envs.vector import LayerwisePruningVectorEnv
from prunenet.masks import top_channels, width_at
from prunenet.policies.actor_critic import KeepMaskPolicy, SweepRolloutBuffer
from prunenet.policies.artifact import Policy, PolicyConfig, PolicyError
from prunenet.policies.recipe import Recipe, as_json
from prunenet.policies.resume import Progress, load_state, save_state
from prunenet.policies.scorer import ChannelScorer
from prunenet.policies.vec_env import SweepVecEnv

STATE = Path("training") / "state.safetensors"


@dataclass(frozen=True, slots=True)
class Training:
    """What training gives.

    Attributes:
        policy: the best seen.
        history: (updates, mean reward per layer of the deterministic masks) at each evaluation, the first before any update.
    """

    policy: Policy
    history: list[tuple[int, float]]


def train(
    model: PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    blocks: Blocks | None = None,
    reward: Reward | None = None,
    regime: Literal["weights", "self", "data"] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Training:
    """Trains a policy.

    Args:
        model: stays on its device; read, never changed.
        recipe: default `PRESETS["default"]`.
        out: folder for the policy; `out/training` holds the run's state and its TensorBoard log. None keeps all in memory.
        resume: go on with the run in `out`.
        blocks: token blocks on which the reconstruction reward measures activations; see `prunenet.calibration`.
        reward: replaces the recipe's reward.
        regime: what a reward of your own looks at; needed with `reward` unless `blocks` say it.
        progress: called with (updates done, updates in all, best reward so far).

    Raises:
        PolicyError: nothing to resume, the run in `out` had other settings, or `out` is in use and `resume` is not set.
        ValueError: the recipe's reward needs blocks, and none are given; or a reward of your own comes without its regime.
        UnsupportedArchitecture: see `prunenet.architectures`.
    """
    recipe = recipe or Recipe()
    if reward is None and recipe.reward == "spectral":
        blocks = None  # it reads weights alone, and the record must say so
    if regime is None and reward is not None and blocks is None:
        raise ValueError("say which regime a reward of your own belongs to: regime='weights', 'self' or 'data'")
    config = PolicyConfig(
        hidden=recipe.hidden,
        prior=dict(recipe.prior),
        regime=regime or ("weights" if blocks is None else blocks.regime),
        text=None if blocks is None else dict(blocks.source),
        trained_on={"model": _name(model), "model_type": model.config.model_type, "weights": weights_sha256(model)},
        recipe=as_json(recipe) | {"reward": recipe.reward if reward is None else type(reward).__name__},
    )
    folder = None if out is None else check_run(Path(out), resume)
    run = _Run(View.of(model), reward or _reward(model, recipe, blocks), recipe, folder, progress, config)
    with _random_state_kept():
        policy = run.learn(model, resume)
    if folder is not None:
        policy.save_pretrained(folder)
    return Training(policy, run.state.history)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """stable-baselines3 seeds the global generators; the caller's are put back."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def _reward(model: PreTrainedModel, recipe: Recipe, blocks: Blocks | None) -> Reward:
    if recipe.reward == "spectral":
        return SpectralReward(model, distance=recipe.distance, matrices=recipe.matrices, form=recipe.form)
    if blocks is None:
        raise ValueError("the reconstruction reward measures activations: give token blocks (see prunenet.calibration)")
    return ReconstructionReward(model, blocks.ids)


def _name(model: PreTrainedModel) -> str:
    """The hub id, or the last part of a local path: where a folder lies is nobody else's business."""
    source = model.config._name_or_path or type(model).__name__
    return Path(source).resolve().name if Path(source).is_dir() else source


def unfinished(folder: Path) -> bool:
    """Whether the folder holds a run that can be resumed."""
    return (folder / STATE).exists()


def check_run(folder: Path, resume: bool) -> Path:
    """The folder, if a run can start there, or go on where `resume` asks for that. Creates nothing.

    Raises:
        PolicyError: the folder holds a policy or a run and `resume` is not set, or nothing to resume.
    """
    if resume and not unfinished(folder):
        raise PolicyError(f"nothing to resume in {folder}; start the run without --resume")
    if not resume and ((folder / "config.json").exists() or unfinished(folder)):
        raise PolicyError(f"{folder} holds a policy or an unfinished run; say --resume, or give another folder")
    return folder


def _algorithm(env: SweepVecEnv, view: View, scorer: ChannelScorer, recipe: Recipe, folder: Path | None) -> OnPolicyAlgorithm:
    """Both algorithms with the same policy, buffer and optimiser."""
    shared: dict[str, Any] = {
        "learning_rate": lambda remaining: recipe.learning_rate * remaining,
        "n_steps": view.layers,
        "gamma": recipe.gamma,
        "gae_lambda": 1.0,
        "ent_coef": recipe.entropy,
        "vf_coef": 0.5 if recipe.baseline == "value" else 0.0,
        "rollout_buffer_class": SweepRolloutBuffer,
        "rollout_buffer_kwargs": {"baseline": recipe.baseline},
        "normalize_advantage": False,
        "policy_kwargs": {
            "view": view,
            "scorer": scorer,
            "subset": recipe.subset,
            "generator": torch.Generator().manual_seed(recipe.seed),
            "optimizer_class": torch.optim.AdamW,
        },
        "tensorboard_log": None if folder is None else str(folder / "training"),
        "seed": recipe.seed,
        "device": view.context.device,
    }
    if recipe.algorithm == "a2c":
        return A2C(KeepMaskPolicy, env, use_rms_prop=False, **shared)
    return PPO(KeepMaskPolicy, env, n_epochs=recipe.epochs, batch_size=view.layers * recipe.masks, **shared)


class _Run(BaseCallback):
    """Seeds each update, evaluates the deterministic masks, keeps the best policy, saves the state."""

    model: OnPolicyAlgorithm

    def __init__(
        self,
        view: View,
        reward: Reward,
        recipe: Recipe,
        folder: Path | None,
        progress: Callable[[int, int, float], None] | None,
        config: PolicyConfig,
    ) -> None:
        super().__init__()
        self.view = view
        self.reward = reward
        self.recipe = recipe
        self.folder = folder
        self.progress = progress
        self.config = config
        self.identity = {"recipe": config.recipe, "trained_on": config.trained_on, "text": config.text}
        self.state = Progress(0, -float("inf"), {}, [])

    def learn(self, model: PreTrainedModel, resume: bool) -> Policy:
        """The whole run, or what is left of it; returns the best policy seen."""
        view, recipe = self.view, self.recipe
        scorer = Policy.untrained(self.config, seed=recipe.seed).scorer.to(view.context.device)
        env = SweepVecEnv(
            LayerwisePruningVectorEnv(model, recipe.masks, reward=self.reward, ratio=recipe.ratio, view=view, channels=False)
        )
        if self.folder is not None:
            (self.folder / STATE).parent.mkdir(parents=True, exist_ok=True)
        algorithm = _algorithm(env, view, scorer, recipe, self.folder)
        if resume and self.folder is not None:
            self.restore(algorithm, self.folder / STATE)
            env.set_options({"sweep": self.state.updates})
        left = (recipe.updates - self.state.updates) * view.layers * recipe.masks
        algorithm.learn(left, callback=self, log_interval=1, tb_log_name="run", reset_num_timesteps=not resume)
        env.close()
        scorer.load_state_dict(self.state.best)
        return Policy(scorer.cpu(), self.config)

    def restore(self, algorithm: OnPolicyAlgorithm, path: Path) -> None:
        """Continues where the state was saved."""
        self.state = load_state(path, algorithm.policy, algorithm.policy.optimizer, self.identity)
        algorithm.num_timesteps = self.state.updates * self.view.layers * self.recipe.masks

    def _on_rollout_start(self) -> None:
        self._after_update()
        seed = np.random.SeedSequence([self.recipe.seed, self.state.updates]).generate_state(2)
        self._policy.generator.manual_seed(int(seed[0]))
        np.random.seed(int(seed[1]))  # stable-baselines3 shuffles its buffer with numpy's global generator.

    def _on_training_end(self) -> None:
        self._after_update()
        self.logger.dump(self.model.num_timesteps)
        self.logger.close()

    def _on_step(self) -> bool:
        return True

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
        if self.folder is not None:
            save_state(self.folder / STATE, self.state, self._policy, self._policy.optimizer, self.identity)
        if self.progress is not None:
            self.progress(updates, self.recipe.updates, self.state.best_reward)

    def _evaluate(self) -> None:
        scorer = self._policy.scorer
        value = mode_reward(scorer, self.view, self.reward, self.recipe.evaluate_at)
        self.state.history.append((self.state.updates, value))
        self.logger.record("prunenet/reward_of_mode", value)
        if value > self.state.best_reward:
            self.state.best_reward = value
            self.state.best = {name: tensor.detach().cpu().clone() for name, tensor in scorer.state_dict().items()}


@torch.no_grad()
def mode_reward(scorer: ChannelScorer, view: View, reward: Reward, ratios: Sequence[float]) -> float:
    """Reward per layer of the masks that `apply` would play, averaged over ratios."""
    scores = scorer(torch.stack(list(view.statistics)), view.context)
    widths = [width_at(view.d_ff, ratio, 1) for ratio in ratios]
    keep = [torch.stack([top_channels(row, width) for width in widths]) for row in scores]
    terms: list[Tensor] = [term for layer, masks in enumerate(keep) for term in reward.layer(layer, masks).values()]
    terms += reward.sweep(keep).values()
    return float(torch.stack(terms).sum(0).mean()) / view.layers
