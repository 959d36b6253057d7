"""Holds every choice that shapes a policy in one frozen record, and names presets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prunenet.envs.sweep import draw_ratio
from prunenet.policies.training.choices import (
    Algorithm,
    Baseline,
    Features,
    GradientName,
    RewardName,
    Subset,
)
from prunenet.runtime.choices import check_fields, check_ratio
from prunenet.spectra.choices import Distance, Form, Matrix, Spectrum
from prunenet.text.calibration import check_seed

MOMENT_PRIOR: Mapping[str, float] = {"moment_write": 1.0}
"""Start of a policy that reads moments: the order of Wanda-sp.

No other of its statistics earns more `reconstruction` on other text (means over 20 tiny random
models: 0.956; moment_fluctuation 0.955, moment_unique 0.951; after a refit all 0.968).
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Says how a policy is trained.

    Equal recipes, models, texts, software and threads give equal policies.

    Attributes:
        reward: "spectral" (`prunenet.envs.rewards.SpectralReward`, weights only), "reconstruction"
            (`ReconstructionReward`) or "divergence" (`prunenet.envs.divergence.DivergenceReward`),
            both on token blocks.
        gradient: "reinforce" plays masks by `algorithm`; "pathwise"
            (`prunenet.policies.training.pathwise`) differentiates the divergence through relaxed
            masks, and its reward is "divergence". It reads `ratio`, `updates`, `learning_rate`,
            `subset` ("widths", or else the scores), `round_to`, `blocks` and `tokens`, and `masks`,
            which are here forward and backward passes of an update.
        features: what the scorer reads. "weights": statistics of the weights; the policy is applied
            from weights alone, whatever its reward read. "moments": besides those, statistics of
            activations (`prunenet.features.from_activations`), which applying the policy needs too.
        distance, matrices, form, spectrum: of the spectral reward.
        ratio: range (low, high) of ratios; each sweep draws one. Equal bounds fix it.
        updates: sweeps, each followed by one policy update.
        masks: masks of the same layer judged together in one step.
        algorithm: stable-baselines3's "a2c" (one gradient step a sweep) or "ppo" (`epochs` clipped
            steps).
        epochs: gradient steps of "ppo" after each sweep.
        learning_rate: of AdamW, falling linearly to 0.
        gamma: discount from layer to layer, in [0, 1]. Layer rewards do not depend on earlier
            masks, so 0 has the least variance.
        baseline: what returns are compared with: "group", "value" or "none"
            (`prunenet.policies.training.actor_critic`).
        subset: "fixed" or "bernoulli" (`prunenet.policies.training.subset`) train the channels'
            scores at uniform widths; "widths" (`prunenet.policies.training.swept_widths`) trains
            the allocation, with the channels in the order of their scores.
        round_to: widths are multiples of this.
        blocks, tokens: how many blocks, and how many tokens of each, the divergence reward reads
            for each mask.
        entropy: weight of the entropy bonus.
        hidden: widths of the scorer's hidden layers.
        prior: weights of the closed-form score that the scorer starts from; with moments, an empty
            one means `MOMENT_PRIOR`.
        evaluate_every: updates between evaluations of the deterministic masks; the best policy seen
            is the result.
        evaluate_at: ratios of those evaluations.
        seed: of every random draw.
        allocation: recipe of a second stage, such as `PRESETS["widths"]`, which learns the layers'
            widths for the scores of the first one. None leaves widths uniform.
    """

    reward: RewardName = "reconstruction"
    gradient: GradientName = "reinforce"
    features: Features = "weights"
    distance: Distance = "ks"
    matrices: tuple[Matrix, ...] = ("gate", "up", "down")
    form: Form = "bounded"
    spectrum: Spectrum = "auto"
    ratio: tuple[float, float] = (0.1, 0.6)
    updates: int = 40
    masks: int = 16
    algorithm: Algorithm = "a2c"
    epochs: int = 4
    learning_rate: float = 1e-2
    gamma: float = 0.0
    baseline: Baseline = "group"
    subset: Subset = "fixed"
    round_to: int = 1
    blocks: int = 4
    tokens: int = 128
    entropy: float = 0.0
    hidden: tuple[int, ...] = (32, 32)
    prior: Mapping[str, float] = field(default_factory=dict)
    evaluate_every: int = 5
    evaluate_at: tuple[float, ...] = (0.2, 0.4)
    seed: int = 0
    allocation: Recipe | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown name or a number out of range."""
        check_fields(self)
        if self.allocation is not None and self.allocation.allocation is not None:
            raise ValueError("a training has two stages at most: an allocation has none of its own")
        draw_ratio(self.ratio, 0.5)
        for ratio in self.evaluate_at:
            check_ratio(ratio)
        check_seed(self.seed)
        if not self.evaluate_at or min(self.hidden, default=1) < 1:
            raise ValueError(
                "a policy is evaluated at one ratio or more, and has layers of one unit or more,"
                f" got evaluate_at={self.evaluate_at} and hidden={self.hidden}"
            )
        if not 0 <= self.entropy < math.inf:
            raise ValueError(f"entropy must be 0 or more and finite, got {self.entropy}")
        if self.entropy and self.subset == "fixed":
            raise ValueError(
                "an entropy bonus needs subset 'bernoulli': the entropy of fixed-width masks is"
                " approximate"
            )
        for name in (
            "updates",
            "masks",
            "epochs",
            "evaluate_every",
            "round_to",
            "blocks",
            "tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.gradient == "pathwise" and self.reward != "divergence":
            raise ValueError(
                "the pathwise gradient is that of the divergence, got reward"
                f" {self.reward!r}; take reward 'divergence', or gradient 'reinforce'"
            )
        if self.gradient == "reinforce" and self.baseline == "group" and self.masks < 2:
            raise ValueError(
                "the group baseline compares masks of one layer: take 2 masks or more, or baseline"
                " 'none'"
            )
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"learning_rate must be above 0 and at most 1, got {self.learning_rate}"
            )


def as_json(recipe: Recipe) -> dict[str, Any]:
    """Converts one stage of a recipe to JSON values, as a saved policy's configuration holds it.

    `spectrum` is left out where it is "auto" and `gradient` where it is "reinforce", as in records
    from before they existed: their runs can be resumed.
    """
    fields: dict[str, Any] = json.loads(json.dumps(asdict(replace(recipe, allocation=None))))
    del fields["allocation"]
    if recipe.spectrum == "auto":
        del fields["spectrum"]
    if recipe.gradient == "reinforce":
        del fields["gradient"]
    return fields


PRESETS: dict[str, Recipe] = {
    # Pays for what survives of each layer's output on text that the model wrote itself; applied
    # from weights alone.
    "default": Recipe(),
    # The second stage of a training, after the channels' scores. Layers depend on each other here,
    # so the whole sweep's reward is every layer's return (gamma 1).
    "widths": Recipe(
        reward="divergence",
        subset="widths",
        round_to=8,
        ratio=(0.2, 0.4),
        updates=12,
        masks=8,
        gamma=1.0,
        learning_rate=3e-2,
        evaluate_every=2,
        evaluate_at=(0.3,),
    ),
    # Weights only, in training too. Its reward does not track quality (docs/log.md): for
    # comparison.
    "spectral": Recipe(reward="spectral", updates=20, masks=8),
    # arXiv 2501.15296, section 3 and appendix. Differs from the published code where that is wrong
    # (docs/methods.md, section 1.2): exact log-probability, a return that is reward-to-go,
    # gradients clipped before the step, a scorer that fits any width.
    "paper": Recipe(
        reward="spectral",
        distance="ks",
        matrices=("gate",),
        form="inverse",
        ratio=(0.3, 0.3),
        updates=20,
        masks=1,
        learning_rate=1e-3,
        gamma=0.99,
        baseline="none",
        subset="bernoulli",
        hidden=(),
        evaluate_every=5,
        evaluate_at=(0.3,),
    ),
    # The scores by the gradient of the divergence through relaxed masks, on the same text.
    "pathwise": Recipe(
        reward="divergence", gradient="pathwise", updates=160, masks=1, evaluate_every=20
    ),
}


def recipe_for(preset: str, changes: Mapping[str, Any]) -> Recipe:
    """Returns a preset with some fields changed.

    Raises:
        ValueError: unknown preset, or a value out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; presets: {', '.join(PRESETS)}")
    return replace(PRESETS[preset], **changes)


def widths_recipe(seed: int) -> Recipe:
    """Returns the preset "widths" at a seed."""
    return replace(PRESETS["widths"], seed=seed)
