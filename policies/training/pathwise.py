"""Runs one stage of a training by the pathwise gradient: the divergence of the whole model is
differentiated through relaxed masks, down to the scorer (docs/methods.md, section 14).

Source: the mask is that of arXiv 2603.08065 (see `prunenet.policies.relaxed`). What differs: z is
the scorer's logit, standardised in its layer, and each layer has a share of its own, so that one
training can draw another ratio at every step.

Every random draw depends on the seed and on the number of the update alone. A run killed at any
moment and resumed therefore ends with the same policy, bit for bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.envs.sweep import draw_ratio
from prunenet.models.masks import width_at
from prunenet.policies.relaxed import RelaxedModel, budgeted, sharpened
from prunenet.policies.training.run import Stage, mode_reward
from prunenet.policies.training.state import Progress, event_log, load_state, save_state
from prunenet.policies.training.swept_widths import mean_shares
from prunenet.runtime.batches import batch_of
from prunenet.runtime.tracking import Track
from prunenet.text.calibration import CalibrationSet

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LARGEST = 0.5  # norm of a gradient, as stable-baselines3 clips it


def relaxed_masks(
    logits: Float[Tensor, "layers d_ff"], shares: Float[Tensor, " layers"], mu: float
) -> Float[Tensor, "layers d_ff"]:
    """Returns soft masks in [0, 1] in the order of the logits, whose mean in each layer is its
    share.

    Differentiable in both.

    Args:
        logits: standardised in each layer first.
        shares: in (0, 1).
        mu: see `prunenet.policies.relaxed.budgeted`.
    """
    spread = logits.std(-1, keepdim=True).clamp_min(1e-6)
    costs = torch.full_like(logits[0], 1 / logits.shape[-1])
    return budgeted((logits - logits.mean(-1, keepdim=True)) / spread, shares, costs, mu)


class PathwiseRun:
    """Trains the scorer on the divergence itself, keeps the best policy seen, saves the state.

    Args:
        stage: what is trained, and how; with subset "widths" the allocation is, else the scores.
        track: what trackers are told.
        blocks: of text. Gradients are taken on none that masks are judged on, if there are more.
    """

    def __init__(self, stage: Stage, track: Track, blocks: CalibrationSet) -> None:
        self.view, self.reward, self.recipe = stage.view, stage.reward, stage.recipe
        self.scorer = stage.scorer.to(stage.view.context.device)
        self.kept = nn.ModuleDict({"scorer": self.scorer})
        self.statistics = torch.stack(list(stage.view.statistics))
        self.file, self.identity = stage.saving.file, stage.saving.identity
        self.progress, self.track, self.blocks = stage.progress, track, blocks
        self.state = Progress(0, -math.inf, {}, [])
        rate = stage.recipe.learning_rate
        self.optimizer = torch.optim.AdamW(self.scorer.parameters(), lr=rate)

    def learn(
        self, model: PreTrainedModel | StreamedCheckpoint, resume: bool
    ) -> list[tuple[int, float]]:
        """Runs the whole stage, or what is left of it.

        Args:
            model: in training; in memory.
            resume: whether to continue from the saved state.

        Returns:
            (updates, reward) at each evaluation, the first before any update.

        Raises:
            PolicyError: as `load_state`.
            ValueError: a divergence or a reward is not finite.
        """
        assert isinstance(model, PreTrainedModel), "checked before"
        updates, judge = self.recipe.updates, self._relaxed(model)
        if resume and self.file is not None:
            self.state = load_state(self.file, self.kept, self.optimizer, self.identity, updates)
        log = event_log(self.file, self.state.updates)
        if not self.state.history:
            self._after_update({}, log)
        while self.state.updates < updates:
            lost = self._step(judge, self.state.updates)
            self.state.updates += 1
            self._after_update({"train/divergence": lost}, log)
        if log is not None:
            log.close()
        self.scorer.load_state_dict(self.state.best)
        return self.state.history

    def _relaxed(self, model: PreTrainedModel) -> RelaxedModel:
        judged, front = self.recipe.blocks, int(self.blocks.bos is not None)
        start = judged if len(self.blocks.ids) >= 2 * judged else 0
        ids = self.blocks.ids[start:, : self.recipe.tokens]
        return RelaxedModel(model, ids, unscored=front)

    def _step(self, judge: RelaxedModel, update: int) -> float:
        """Takes the gradient of the recipe's masks, each of a ratio and blocks of its own."""
        recipe = self.recipe
        for settings in self.optimizer.param_groups:
            settings["lr"] = recipe.learning_rate * (1 - update / recipe.updates)
        draws = np.random.default_rng([recipe.seed, update]).random(recipe.masks)
        self.optimizer.zero_grad()
        total = 0.0
        for number, draw in enumerate(draws):
            ratio = draw_ratio(recipe.ratio, float(draw))
            place = update * recipe.masks + number
            rows = batch_of(place, recipe.blocks, judge.count, recipe.seed)
            lost = judge.lost(self._masks(ratio, sharpened(update, recipe.updates)), rows)
            torch.autograd.backward(lost / recipe.masks)
            total += float(lost.detach()) / recipe.masks
        if not math.isfinite(total):
            raise ValueError(
                f"the divergence is {total} after {update} updates: the model's weights are"
                " damaged, or `learning_rate` is too large"
            )
        nn.utils.clip_grad_norm_(self.scorer.parameters(), _LARGEST)
        self.optimizer.step()
        return total

    def _masks(self, ratio: float, mu: float) -> Float[Tensor, " channels"]:
        """Masks of all groups of the model; those that are not played stay whole."""
        view, recipe = self.view, self.recipe
        widths = recipe.subset == "widths"
        with torch.set_grad_enabled(not widths):
            logits = self.scorer(self.statistics, view.context)
        if widths:
            first = torch.zeros(1, dtype=torch.long, device=logits.device)
            budget = torch.full((1,), (1 - ratio) * view.layers, device=logits.device)
            shares = mean_shares(self.scorer.offsets(view.context), first, budget)[0]
        else:
            share = width_at(view.d_ff, ratio, recipe.round_to) / view.d_ff
            shares = torch.full((view.layers,), share, device=logits.device)
        played = dict(zip(view.groups, relaxed_masks(logits, shares, mu), strict=True))
        whole = (torch.ones(width, device=logits.device) for width in view.widths)
        return torch.cat([played.get(number, ones) for number, ones in enumerate(whole)])

    def _after_update(self, values: dict[str, float], log: SummaryWriter | None) -> None:
        done, recipe = self.state.updates, self.recipe
        if done % recipe.evaluate_every == 0 or done == recipe.updates:
            values = values | {"prunenet/reward_of_mode": self._evaluate()}
        self.track.log(values, done)
        if log is not None:
            for name, value in values.items():
                log.add_scalar(name, value, done)
        if self.file is not None:
            save_state(self.file, self.state, self.kept, self.optimizer, self.identity)
        if self.progress is not None:
            self.progress(done, recipe.updates, self.state.best_reward)

    def _evaluate(self) -> float:
        value = mode_reward(self.scorer, self.view, self.reward, self.recipe)
        self.state.judged(value, self.scorer.state_dict())
        return value
