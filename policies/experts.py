"""Removes whole experts of a mixture: REAP, AIMER, or at random (docs/methods.md, section 7).

Baselines: the same number of experts stays in every layer. What differs from the papers: where
experts fall into routing groups, each group keeps as many.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.experts import Experts, concentration, without_experts
from prunenet.policies.options import ExpertsBy
from prunenet.refit.expert_use import expert_use


def keep_experts(
    model: PreTrainedModel,
    left: int,
    by: ExpertsBy = "aimer",
    *,
    blocks: Tensor | None = None,
    seed: int = 0,
) -> dict[int, Tensor]:
    """Masks of the experts that stay, by layer.

    Args:
        model: a causal LM with experts; not changed.
        left: experts that stay in each layer.
        by: "aimer" reads weights alone, "reap" measures on text.
        blocks: (n, tokens) token ids for "reap".
        seed: of "random".

    Raises:
        ValueError: a number that a layer cannot be left with, or no blocks where they are needed.
        UnsupportedArchitecture: as `Experts.of`.
    """
    experts = Experts.of(model)
    experts.check(left)
    if by == "reap":
        if blocks is None:
            raise ValueError(
                "reap measures experts on text: give `blocks`, or choose them by aimer"
            )
        scores = expert_use(model, blocks)
    elif by == "aimer":
        scores = concentration(model)
    else:
        generator = torch.Generator().manual_seed(seed)
        scores = {layer: torch.rand(experts.count, generator=generator) for layer in experts.layers}
    return {layer: experts.best(values, left) for layer, values in scores.items()}


def prune_experts(
    model: PreTrainedModel,
    left: int,
    by: ExpertsBy = "aimer",
    *,
    blocks: Tensor | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A model with `left` experts in each layer; arguments and errors as `keep_experts`."""
    return without_experts(model, keep_experts(model, left, by, blocks=blocks, seed=seed))
