"""Puts FFN channels and groups of attention heads (`prunenet.models.heads`) under one budget.

The budget is that of FFN channels alone: what a cut of the same ratio in every FFN would leave of
*all* parameters. Groups are chosen first and channels fill the rest, so that all cuts at one ratio
are of equal size, from below to less than one rounding step of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.heads import attentions
from prunenet.policies.methods.widths.allocation import Budget


@dataclass(frozen=True, slots=True)
class Scores:
    """Holds one score for each structure of each layer; higher stays longer.

    Attributes:
        channels: (d_ff,) of each layer.
        groups: (groups,) of each layer.
    """

    channels: list[Float[Tensor, " _"]]
    groups: list[Float[Tensor, " _"]]


@dataclass(frozen=True, slots=True)
class StructurePool:
    """Holds the parameters that channels and groups may take together.

    Attributes:
        ffn: the budget of a cut of channels alone.
        groups: how many each layer of the dense model has.
        costs: parameters of one group of each layer.
    """

    ffn: Budget
    groups: tuple[int, ...]
    costs: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, ffn: Budget) -> StructurePool:
        """Reads the groups of a model.

        Raises:
            UnsupportedArchitecture: heads of this family cannot be cut.
            ValueError: a layer has none.
        """
        found = attentions(model)
        if without := [a.index for a in found if not a.groups]:
            raise ValueError(
                f"methods score heads where every layer has some, and layers {without} have none;"
                " cut FFN channels alone"
            )
        return cls(ffn, tuple(a.groups for a in found), tuple(a.group_parameters for a in found))

    @property
    def parameters(self) -> int:
        """Most parameters that all channels and groups that stay may have."""
        return self.ffn.parameters + self.cost(self.groups)

    def cost(self, counts: Sequence[int]) -> int:
        """Returns the parameters of so many groups of each layer."""
        return sum(cost * count for cost, count in zip(self.costs, counts, strict=True))

    def rest(self, counts: Sequence[int]) -> Budget:
        """Returns the budget that so many groups leave to channels, at most all of them."""
        return replace(
            self.ffn,
            parameters=min(self.parameters - self.cost(counts), self.ffn.cost(self.ffn.d_ff)),
        )


def shared(pool: StructurePool, *, first: int = 0, last: int = 0) -> list[int]:
    """Chooses the same share of groups as of channels in every layer.

    As LLM-Pruner does (arXiv 2305.11627). Rounds to whole groups, at least one each; channels make
    up for the rounding.

    Args:
        pool: of all layers.
        first, last: how many layers at each end are left whole.

    Returns:
        Groups left in each layer.
    """
    layers = range(len(pool.groups))
    inner = range(first, len(pool.groups) - last)
    d_ff = pool.ffn.d_ff
    room = pool.cost([pool.groups[i] if i in inner else 0 for i in layers])
    room += pool.ffn.cost([d_ff[i] if i in inner else 0 for i in layers])
    removed = pool.ffn.cost(d_ff) - pool.ffn.parameters
    share = 1 - removed / room if room else 1.0
    least = pool.ffn.cost([pool.ffn.least(i) if i in inner else d_ff[i] for i in layers])

    def counts(more: int) -> list[int]:
        near = [int(share * count + 0.5 + 1e-9) + more for count in pool.groups]
        return [
            min(max(n, 1), count) if i in inner else count
            for i, (n, count) in enumerate(zip(near, pool.groups, strict=True))
        ]

    more = 0
    while (
        counts(more) != list(pool.groups)
        and pool.cost(pool.groups) - pool.cost(counts(more)) > removed
    ):
        more += 1
    while pool.rest(counts(more)).parameters < least and counts(more - 1) != counts(more):
        more -= 1
    return counts(more)


def ranked(pool: StructurePool, scores: Scores, *, first: int = 0, last: int = 0) -> list[int]:
    """Chooses groups by one ranking of all channels and groups.

    As FLAP does (arXiv 2312.11983, section 4.2): the best structures stay as long as their
    parameters fit the budget.

    Args:
        pool: its floor of channels, and one group, stay in every layer first.
        scores: on one scale.
        first, last: how many layers at each end are left whole.

    Returns:
        Groups left in each layer.

    Raises:
        ValueError: not one score a structure, one that is not a number, or floors and whole layers
            that exceed the budget.
    """
    found = [[len(row) for row in rows] for rows in (scores.channels, scores.groups)]
    wanted = [list(pool.ffn.d_ff), list(pool.groups)]
    if found != wanted:
        raise ValueError(
            f"one ranking needs one score a channel and a group, got {found} of {wanted}"
        )
    inner = range(first, len(pool.groups) - last)
    parts, costs = [], []
    for layer, (channels, groups) in enumerate(zip(scores.channels, scores.groups, strict=True)):
        floors = (pool.ffn.least(layer), 1)
        for row, floor, cost in zip(
            (channels, groups), floors, (pool.ffn.costs[layer], pool.costs[layer]), strict=True
        ):
            values = row.detach().double().cpu().clone()
            values[values.topk(floor if layer in inner else len(values)).indices] = torch.inf
            parts.append(values)
            costs.append(torch.full((len(values),), cost))
    values, prices = torch.cat(parts), torch.cat(costs)
    if bool(values.isnan().any()):
        raise ValueError("scores contain NaN; the model's weights or activations are damaged")
    if int(prices[values.isinf()].sum()) > pool.parameters:
        raise ValueError(
            f"what every layer must keep, with the first {first} and the last {last} layers whole,"
            f" is more than the {pool.parameters:,} parameters that may stay; remove less"
        )
    order = values.argsort(descending=True, stable=True)
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[order[prices[order].cumsum(0) <= pool.parameters]] = True
    pieces = torch.split(kept, [len(part) for part in parts])
    return [int(piece.sum()) for piece in pieces[1::2]]
