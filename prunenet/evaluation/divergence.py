"""KL(dense || pruned) of next-token distributions: what a cut costs, measured against the model
itself (METHODS.md 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from prunenet.models.hooks import calling
from prunenet.models.layers import check_tokens, down_linears
from prunenet.runtime.placement import home, present

Downs = Callable[[int, Tensor], Tensor]
"""(layer, its dense down matrix (d_model, d_ff)) -> that of the cut layer, with zeros in the
columns of dropped channels.
"""

_BLOCKS = 4  # per forward pass


def divergence(model: PreTrainedModel, downs: Downs, blocks: Int[Tensor, "n tokens"]) -> float:
    """`divergences` of one way to cut."""
    return float(divergences(model, [downs], blocks)[0])


@torch.no_grad()
def divergences(
    model: PreTrainedModel, ways: Sequence[Downs], blocks: Int[Tensor, "n tokens"]
) -> Float[Tensor, " ways"]:
    """KL(dense || cut), in nats per token, of several ways to cut a model. The model is never
    changed.

    A channel is gone once its column of the down matrix is zero, so a cut is stated by down
    matrices alone.

    Args:
        model: the dense model.
        ways: each gives the down matrices of a cut model.
        blocks: token ids, without padding.

    Raises:
        ValueError: blocks that the model cannot read, or logits that are not finite.
    """
    check_tokens(model, blocks)
    linears = down_linears(model)
    total = torch.zeros(len(ways), device=home(model))
    for part in torch.split(blocks.to(total.device), _BLOCKS):
        expected = model(input_ids=part, use_cache=False).logits.float().log_softmax(-1)
        if not bool(torch.isfinite(expected).all()):
            raise ValueError(
                f"the model's logits are not finite: damaged weights, or {model.dtype} overflows"
            )
        for number, way in enumerate(ways):
            with calling(
                {linear: _cut(linear, layer, way) for layer, linear in enumerate(linears)}
            ):
                logits = model(input_ids=part, use_cache=False).logits
            total[number] += (expected.exp() * (expected - logits.float().log_softmax(-1))).sum()
    return total / blocks.numel()


def _cut(linear: nn.Linear, layer: int, way: Downs) -> Callable[[Tensor], Tensor]:
    """What the down linear of a cut layer computes."""

    def forward(h: Tensor) -> Tensor:
        with present(linear):
            return F.linear(h, way(layer, linear.weight.detach()), linear.bias)

    return forward
