"""Refits attention's output matrix where a cut has removed heads: what heads give are to it what
channels are to a down matrix (docs/methods.md, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.heads import head_outputs
from prunenet.refit.cut import Cut, refit_matrix
from prunenet.refit.folds import folds_of
from prunenet.refit.moments import LayerWalk
from prunenet.runtime import parallel


@torch.no_grad()
def refit_heads(
    model: PreTrainedModel,
    cut: Cut,
    blocks: Int[Tensor, "n tokens"],
    *,
    kinds: Int[Tensor, " n"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Cut:
    """Refits attention's output matrix, as `cut_layers` does down matrices, in layers that lose
    some of their heads; those that lose all have none to refit.

    Args:
        model: the dense model, in eval mode; not changed.
        cut: with masks of heads, or without: then it stays as it is.
        blocks, kinds: as for `cut_layers`.
        progress: called with (layers done, layers in all).

    Raises:
        ValueError: as `cut_layers`.
    """
    if cut.groups is None:
        return cut
    outputs = head_outputs(model)
    walks = [LayerWalk(model, fold, groups=outputs) for fold in folds_of(blocks, kinds)]
    found: dict[int, list[Tensor]] = {}
    for index, _ in zip(*walks, strict=True):
        if not parallel.is_owner(index):
            continue
        units, out = cut.groups[index], outputs[index]
        found[index] = []
        if bool(units.any()) and not bool(units.all()):
            keep = units.repeat_interleave(out.width // len(units))
            folds = [walk.moments(index) for walk in walks]
            found[index] = [refit_matrix(model, out.down.tensor, keep, folds)[0]]
        if progress is not None:
            progress(index + 1, len(outputs))
    gathered = parallel.gather_from_owners(found, len(outputs))
    pairs = zip(outputs, gathered, strict=True)
    tensors = {out.down.name: tensor for out, own in pairs for tensor in own}
    return replace(cut, tensors={**cut.tensors, **tensors})
