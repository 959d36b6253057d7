"""Measures how each expert is used on text: REAP's score (see docs/methods.md, section 19), and
router weights.

The score of an expert is the mean, over the tokens that are routed to it, of router weight times
the norm of its output, with the weights of a token's experts divided by their sum. What differs
from the paper: an expert that no token reaches scores 0, and goes first.

An expert's output is computed by the model's own code: its bank of experts is called once more,
with every token routed to one expert with weight 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.groups import Group
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
    sums: dict[int, Tensor] = {}

    def see(group: Group, call: BankCall | None) -> None:
        module = group.down.module
        if call is None:
            raise UnsupportedArchitecture(
                f"the experts of this family, {type(module).__name__}, are not called with tokens,"
                " indices and weights; choose them by weights (`experts_by` aimer)"
            )
        weights = call.weights / call.weights.sum(-1, keepdim=True)
        found = sums.setdefault(group.layer, torch.zeros(2, call.experts))
        for expert in range(call.experts):
            rows, places = (call.index == expert).nonzero(as_tuple=True)
            if len(rows) == 0:
                continue
            norms = call.through(module, expert, rows).float().norm(dim=-1)
            found[0, expert] += float((weights[rows, places].float() * norms).sum())
            found[1, expert] += len(rows)

    _seen(model, blocks, batch, see)
    return {layer: total / tokens.clamp_min(1) for layer, (total, tokens) in sums.items()}


@torch.no_grad()
def squared_weights(
    model: PreTrainedModel, blocks: Int[Tensor, "n tokens"], *, batch: int = 4
) -> dict[int, float]:
    """The mean squared router weight over the tokens of each group, by its number.

    1 in dense FFNs, and in banks that are not called with weights: there the router scales what
    goes in. Arguments and errors as `expert_use`.
    """
    groups = Anatomy.of(model).groups
    found = {group.number: 1.0 for group in groups}
    if all(group.expert is None for group in groups):
        return found
    sums: dict[int, Tensor] = {}

    def see(group: Group, call: BankCall | None) -> None:
        if call is None:
            return
        index, squares = call.index.flatten().cpu(), call.weights.flatten().double().square().cpu()
        total = sums.setdefault(
            group.number, torch.zeros(2, call.experts + 1, dtype=torch.float64)
        )  # the last one stands for no expert
        total[0].index_add_(0, index, squares)
        total[1].index_add_(0, index, torch.ones_like(squares))

    _seen(model, blocks, batch, see)
    for number, (total, tokens) in sums.items():
        means = (total / tokens.clamp_min(1)).tolist()[:-1]
        found |= {number + expert: mean for expert, mean in enumerate(means)}
    return found


@dataclass(frozen=True, slots=True)
class BankCall:
    """What a bank of experts is called with.

    Attributes:
        experts: number of the bank's experts.
        hidden: (tokens, d_model).
        index: (tokens, top-k) experts of each token.
        weights: (tokens, top-k) of the router.
    """

    experts: int
    hidden: Float[Tensor, "tokens d_model"]
    index: Int[Tensor, "tokens k"]
    weights: Float[Tensor, "tokens k"]

    def through(
        self, module: nn.Module, expert: int, rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows d_model"]:
        """What an expert alone writes at some tokens, with weight 1."""
        alone = torch.full_like(self.index[:1, :1], expert).expand(len(rows), 1)
        one = torch.ones_like(self.weights[:1, :1]).expand(len(rows), 1)
        out: Tensor = type(module).forward(module, self.hidden[rows], alone, one)
        return out.reshape(len(rows), -1)


def _seen(
    model: PreTrainedModel,
    blocks: Int[Tensor, "n tokens"],
    batch: int,
    see: Callable[[Group, BankCall | None], None],
) -> None:
    """Calls `see` with the first group of each bank, at each of its calls, and what it is called
    with: None where that is not tokens, indices and weights.
    """
    check_tokens(model, blocks)
    hooks = []
    for (module, _), groups in Anatomy.of(model).down_places().items():
        if groups[0].expert is None:
            continue

        def hook(
            _: nn.Module, args: Any, kwargs: Any, groups: Sequence[Group] = tuple(groups)
        ) -> None:
            see(groups[0], _call(len(groups), [*args, *kwargs.values()]))

        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        for part in torch.split(blocks.to(home(model)), batch):
            model(input_ids=part, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()


def _call(experts: int, given: Sequence[Any]) -> BankCall | None:
    tensors = [value for value in given if isinstance(value, Tensor)]
    if len(tensors) != 3 or tensors[1].shape != tensors[2].shape or tensors[1].dim() != 2:
        return None
    hidden, index, weights = tensors
    return BankCall(experts, hidden.reshape(-1, hidden.shape[-1]), index, weights)
