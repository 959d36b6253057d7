"""Measures how each expert is used on text: REAP's score (see docs/methods.md, section 19), and
router weights.

The score of an expert is the mean, over the tokens that are routed to it, of router weight times
the norm of its output, with the weights of a token's experts divided by their sum. What differs
from the paper: an expert that no token reaches scores 0, and goes first.

An expert's output is computed by the model's own code: its bank of experts is called once more,
with every token routed to one expert with weight 1.

Where the router scales the input of an expert and not its output (Llama 4), the score is the mean
norm of what the expert writes for the scaled input. Nothing is divided by a sum there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.experts import takes
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
        UnsupportedArchitecture: as `check_readable`.
    """
    check_tokens(model, blocks)
    check_readable(model)
    sums = {bank[0].layer: torch.zeros(2, len(bank)) for bank in _banks(model)}

    def see(bank: Sequence[Group], given: Sequence[Tensor]) -> None:
        module, found = bank[0].down.module, sums[bank[0].layer]
        if len(given) == 1:
            _add_scaled(module, given[0], found)
        else:
            hidden, index, weights = given
            _add_routed(module, hidden, index, weights, found)

    _see_calls(model, blocks, batch, see)
    return {layer: total / tokens.clamp_min(1) for layer, (total, tokens) in sums.items()}


@torch.no_grad()
def squared_weights(
    model: PreTrainedModel, blocks: Int[Tensor, "n tokens"], *, batch: int = 4
) -> list[float]:
    """The mean squared router weight of each group over its tokens.

    1 in dense FFNs, and in banks that are not called with tokens, indices and weights: the router
    scales what goes in there. Other arguments and errors as `expert_use`.
    """
    found = [1.0] * len(Anatomy.of(model).groups)
    if not (banks := _banks(model)):
        return found
    # the entry behind the last expert stands for none
    sums = {bank[0].number: torch.zeros(2, len(bank) + 1, dtype=torch.float64) for bank in banks}

    def see(bank: Sequence[Group], given: Sequence[Tensor]) -> None:
        if len(given) == 3:
            index, squares = given[1].flatten().cpu(), given[2].flatten().cpu().double().square()
            sums[bank[0].number][0].index_add_(0, index, squares)
            sums[bank[0].number][1].index_add_(0, index, torch.ones_like(squares))

    check_tokens(model, blocks)
    _see_calls(model, blocks, batch, see)
    for bank in banks:
        total, tokens = sums[bank[0].number]
        for group in bank:
            assert group.expert is not None
            if tokens.any():
                found[group.number] = float(total[group.expert] / tokens[group.expert].clamp_min(1))
    return found


def _banks(model: PreTrainedModel) -> list[list[Group]]:
    """The groups of each bank of experts."""
    places = Anatomy.of(model).down_places().values()
    return [groups for groups in places if groups[0].expert is not None]


def _see_calls(
    model: PreTrainedModel,
    blocks: Tensor,
    batch: int,
    see: Callable[[Sequence[Group], Sequence[Tensor]], None],
) -> None:
    """Runs the model; `see` is called with a bank and what it is called with."""

    def hook(bank: Sequence[Group], module: nn.Module, args: Any, kwargs: Any) -> None:
        call = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        see(bank, [*call.arguments.values()][1:])

    hooks = [
        bank[0].down.module.register_forward_pre_hook(partial(hook, bank), with_kwargs=True)
        for bank in _banks(model)
    ]
    try:
        for part in torch.split(blocks.to(home(model)), batch):
            model(input_ids=part, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()


def check_readable(model: PreTrainedModel) -> None:
    """Checks that the use of a model's experts can be measured; runs nothing.

    Raises:
        UnsupportedArchitecture: the family's experts are called neither with tokens, indices and
            weights, nor with one scaled copy of all tokens for each expert.
    """
    for group in Anatomy.of(model).groups:
        if group.expert is not None and len(takes(group.down.module)) not in (1, 3):
            raise UnsupportedArchitecture(
                f"what the router of a {type(model).__name__} gives its experts is not known"
                f" ({type(group.down.module).__name__} takes"
                f" {', '.join(takes(group.down.module))}); choose experts by weights (aimer)"
            )


def written_alone(
    bank: nn.Module,
    hidden: Float[Tensor, "rows d_model"],
    index: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    expert: int,
) -> Tensor:
    """What one expert writes for some tokens, with weight 1; `index` and `weights`: of the bank's
    own call, for their dtypes and devices.
    """
    alone = torch.full_like(index[:1, :1], expert).expand(len(hidden), 1)
    one = torch.ones_like(weights[:1, :1]).expand(len(hidden), 1)
    out: Tensor = type(bank).forward(bank, hidden, alone, one)
    return out


def routes(bank: nn.Module) -> bool:
    """Whether a bank of experts is called with tokens, indices and weights."""
    return len(takes(bank)) == 3


def _add_scaled(module: nn.Module, hidden: Tensor, sums: Float[Tensor, "2 experts"]) -> None:
    """Adds what is written for all tokens, once for each expert; tokens that the router does not
    send to it are zero there.
    """
    experts = sums.shape[1]
    out = type(module).forward(module, hidden).reshape(experts, -1, hidden.shape[-1])
    routed = hidden.reshape(out.shape).any(-1)
    sums[0] += (out.float().norm(dim=-1) * routed).sum(-1).cpu()
    sums[1] += routed.sum(-1).cpu()


def _add_routed(
    module: nn.Module,
    hidden: Tensor,
    index: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    sums: Float[Tensor, "2 experts"],
) -> None:
    """Adds, of each expert, the weighted norm of what it writes for the tokens sent to it."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    weights = weights / weights.sum(-1, keepdim=True)
    for expert in range(sums.shape[1]):
        rows, places = (index == expert).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        out = written_alone(module, hidden[rows], index, weights, expert)
        norms = out.reshape(len(rows), -1).float().norm(dim=-1)
        sums[0, expert] += float((weights[rows, places].float() * norms).sum())
        sums[1, expert] += len(rows)
