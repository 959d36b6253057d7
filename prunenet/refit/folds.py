"""Folds of the text: what is fitted on one is judged on the other (docs/methods.md, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:  # for annotations alone: this floor's modules do not import each other
    from prunenet.refit.moments import Moments


def held_back(
    blocks: Int[Tensor, "n tokens"], share: float = 0.2
) -> tuple[Int[Tensor, "fit tokens"], Int[Tensor, "held tokens"]]:
    """Splits blocks into those to fit on and those, at least one, to judge on.

    Args:
        blocks: token ids.
        share: of the blocks to judge on, taken from the end.

    Raises:
        ValueError: fewer than two blocks.
    """
    if len(blocks) < 2:
        raise ValueError(
            "a refit needs text to fit on and other text to check on: give 2 blocks or more, got"
            f" {len(blocks)}"
        )
    held = max(1, round(share * len(blocks)))
    return blocks[:-held], blocks[-held:]


def folds_of(
    blocks: Int[Tensor, "n tokens"], kinds: Int[Tensor, " n"] | None = None
) -> tuple[Int[Tensor, "first tokens"], Int[Tensor, "second tokens"]]:
    """Splits blocks into two folds: the kinds of writing where there are several, else every second
    block and the others.

    Args:
        blocks: (n, tokens).
        kinds: (n,) integers, see `prunenet.text.calibration.CalibrationSet`; even ones make the
            first fold. None: all are of one kind.

    Raises:
        ValueError: fewer than two blocks.
    """
    held_back(blocks)
    if kinds is None or bool((kinds % 2 == kinds[0] % 2).all()):
        kinds = torch.arange(len(blocks))
    second = (kinds % 2).bool().to(blocks.device)
    return blocks[~second], blocks[second]


def pooled(
    folds: Sequence[Moments], matrices: Sequence[Float[Tensor, "d_ff d_ff"]] | None = None
) -> Float[Tensor, "d_ff d_ff"]:
    """Averages matrices of several folds, weighted by their tokens.

    Args:
        folds: moments of each fold.
        matrices: one mean over tokens of each fold; default its second moments.
    """
    tokens = sum(fold.tokens for fold in folds)
    parts = [fold.second for fold in folds] if matrices is None else matrices
    whole = torch.zeros_like(parts[0])
    for fold, part in zip(folds, parts, strict=True):
        whole.add_(part, alpha=fold.tokens / tokens)
    return whole
