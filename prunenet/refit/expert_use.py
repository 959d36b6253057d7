"""Measures how much each expert writes on text: REAP's score (see docs/methods.md, section 7).

The score of an expert is the mean, over the tokens that are routed to it, of router weight times
the norm of its output, with the weights of a token's experts divided by their sum. What differs
from the paper: an expert that no token reaches scores 0, and goes first.

An expert's output is computed by the model's own code: its bank of experts is called once more,
with every token routed to one expert with weight 1.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.layers import check_tokens
from prunenet.runtime.placement import home


@torch.no_grad()
def expert_use(
    model: PreTrainedModel, blocks: Int[Tensor, "n tokens"], *, batch: int = 4
) -> dict[int, Float[Tensor, " experts"]]:
    """REAP's score of each expert, by layer.

    Args:
        model: in eval mode; not changed.
        blocks: token ids without padding.
        batch: blocks per forward pass.

    Raises:
        ValueError: blocks that the model cannot read.
        UnsupportedArchitecture: the family's experts are not called with tokens, indices and
            weights.
    """
    check_tokens(model, blocks)
    banks: dict[nn.Module, tuple[int, int]] = {}
    for group in Anatomy.of(model).groups:
        if group.expert is not None:
            banks[group.down.module] = (group.layer, group.expert + 1)
    sums = {layer: torch.zeros(2, count) for layer, count in banks.values()}
    hooks = [
        module.register_forward_pre_hook(_adding(sums[layer]), with_kwargs=True)
        for module, (layer, _) in banks.items()
    ]
    try:
        for part in torch.split(blocks.to(home(model)), batch):
            model(input_ids=part, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: total / tokens.clamp_min(1) for layer, (total, tokens) in sums.items()}


def _adding(sums: Float[Tensor, "2 experts"]) -> Any:
    """A hook that adds what a bank of experts is called with."""

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        tensors = [value for value in given if isinstance(value, Tensor)]
        if len(tensors) != 3 or tensors[1].shape != tensors[2].shape or tensors[1].dim() != 2:
            raise UnsupportedArchitecture(
                f"the experts of this family, {type(module).__name__}, are not called with tokens,"
                " indices and weights; choose them by weights (`experts_by` aimer)"
            )
        hidden, index, weights = tensors
        hidden = hidden.reshape(-1, hidden.shape[-1])
        weights = weights / weights.sum(-1, keepdim=True)
        for expert in range(sums.shape[1]):
            rows, places = (index == expert).nonzero(as_tuple=True)
            if len(rows) == 0:
                continue
            alone = torch.full_like(index[: len(rows), :1], expert)
            one = torch.ones_like(weights[: len(rows), :1])
            out = type(module).forward(module, hidden[rows], alone, one)
            norms = out.reshape(len(rows), -1).float().norm(dim=-1)
            sums[0, expert] += float((weights[rows, places].float() * norms).sum())
            sums[1, expert] += len(rows)

    return see
