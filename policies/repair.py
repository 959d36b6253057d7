"""Repairs a cut behind the refit of its down matrices: attention that lost heads, and what `refit`
asks for beside.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.refit.blocks import train_blocks
from prunenet.refit.cut import Cut, refit_sequentially
from prunenet.refit.heads import refit_heads


def repaired(
    model: PreTrainedModel,
    cut: Cut,
    refit: str | None,
    blocks: Int[Tensor, "n tokens"],
    kinds: Int[Tensor, " n"] | None,
    *,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Cut:
    """Repairs a cut.

    Args:
        model: the dense model; not changed.
        cut: down matrices refitted layer by layer, or without a refit.
        refit: see `prunenet.policies.options.PruneOptions`.
        blocks, kinds: the text, as for `prunenet.refit.cut.cut_layers`.
        folder: see `prunenet.refit.blocks.train_blocks`.
        progress: called with (groups done, groups in all).

    Returns:
        The cut itself for "off"; for "layerwise" where no heads are cut.

    Raises:
        ValueError, UnsupportedArchitecture: as `refit_sequentially` and `train_blocks`.
    """
    if refit == "sequential":
        return refit_sequentially(
            model, cut, blocks, kinds=kinds, dense_targets=False, progress=progress
        )
    if refit != "off":
        cut = refit_heads(model, cut, blocks, kinds=kinds, progress=progress)
    if refit == "blocks":
        return train_blocks(model, cut, blocks, kinds=kinds, folder=folder, progress=progress)
    return cut
