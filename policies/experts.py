"""Removes whole experts of a mixture: REAP, AIMER, or at random (docs/methods.md, section 19).

Baselines: the same number of experts stays in every layer. What differs from the papers: where
experts fall into routing groups, each group keeps as many.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.experts import Experts, concentration
from prunenet.policies.options import ExpertsBy
from prunenet.refit.expert_use import check_readable, expert_use


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
    check_experts(model, by, left, measured=blocks is not None)
    experts = Experts.of(model)
    if by == "reap":
        assert blocks is not None, "check_experts"
        scores = expert_use(model, blocks)
    else:
        scores = scores_without_text(model, experts, by, seed)
    return {layer: experts.best(values, left) for layer, values in scores.items()}


def check_experts(
    model: PreTrainedModel, by: ExpertsBy, left: int | None = None, *, measured: bool = True
) -> None:
    """Checks that experts of a model can be removed, before anything is measured.

    Args:
        model: only shapes and configuration are read.
        by: see `keep_experts`.
        left: experts that stay in each layer, where that is known.
        measured: whether there is text to measure on.

    Raises:
        ValueError, UnsupportedArchitecture: as `keep_experts`.
    """
    experts = Experts.of(model)
    if left is not None:
        experts.check(left)
    if by != "reap":
        return
    check_readable(model)
    if not measured:
        raise ValueError("reap measures experts on text: give `blocks`, or choose them by aimer")


def scores_without_text(
    model: PreTrainedModel, experts: Experts, by: ExpertsBy, seed: int
) -> dict[int, Tensor]:
    """Scores of the experts of each layer from the weights, or drawn; the highest stay.

    Args:
        model: with experts.
        experts: of the model.
        by: "aimer" or "random".
        seed: of "random".
    """
    if by == "aimer":
        return concentration(model)
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.rand(experts.count, generator=generator) for layer in experts.layers}
