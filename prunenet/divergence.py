"""KL(dense || pruned) of next-token distributions: what a cut costs, measured against the model itself (METHODS.md 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from prunenet.layers import check_tokens, down_linears

Downs = Callable[[int, Tensor], Tensor]
"""(layer, its dense down matrix (d_model, d_ff)) -> that of the cut layer, with zeros in the columns of dropped channels."""

_BLOCKS = 4  # per forward pass


def divergence(model: PreTrainedModel, downs: Downs, blocks: Int[Tensor, "n tokens"]) -> float:
    """`divergences` of one way to cut."""
    return float(divergences(model, [downs], blocks)[0])


@torch.no_grad()
def divergences(model: PreTrainedModel, ways: Sequence[Downs], blocks: Int[Tensor, "n tokens"]) -> Float[Tensor, " ways"]:
    """KL(dense || cut), in nats per token, of several ways to cut a model. The model is never changed.

    A channel is gone once its column of the down matrix is zero, so a cut is stated by down matrices alone.

    Args:
        model: the dense model.
        ways: each gives the down matrices of a cut model.
        blocks: token ids, without padding.

    Raises:
        ValueError: blocks that the model cannot read, or logits that are not finite.
    """
    check_tokens(model, blocks)
    linears = down_linears(model)
    found = {module: name for name, module in model.named_modules()}
    dense = {f"{found[linear]}.weight": linear.weight.detach() for linear in linears}
    total = torch.zeros(len(ways), device=model.device)
    for part in torch.split(blocks.to(model.device), _BLOCKS):
        expected = model(input_ids=part, use_cache=False).logits.float().log_softmax(-1)
        if not bool(torch.isfinite(expected).all()):
            raise ValueError(f"the model's logits are not finite: damaged weights, or {model.dtype} overflows")
        for number, way in enumerate(ways):
            cut = {name: way(layer, weight) for layer, (name, weight) in enumerate(dense.items())}
            logits = functional_call(model, cut, kwargs={"input_ids": part, "use_cache": False}).logits
            total[number] += (expected.exp() * (expected - logits.float().log_softmax(-1))).sum()
    return total / blocks.numel()
