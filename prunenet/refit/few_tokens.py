"""Says when too few tokens reach a group for its activations to be known, and what stands in.

A router may send an expert any number of tokens. With damping lam a refit of d_ff channels has at
most d_ff / (1 + lam) degrees of freedom: the sum of s / (s + lam) over the eigenvalues s of the
normalised second moments, whose sum is d_ff, is largest where all are 1. With fewer tokens than
that, at the strongest damping that is tried, a fold of the text fits anything.

Such an expert is measured on all tokens of its layer, as if the router had sent them. Where its
bank cannot be told so, or no token passes the layer, numbers from weights stand in.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunenet.models.groups import FFN, Group
from prunenet.models.hooks import calling
from prunenet.refit.expert_use import routes, written_alone
from prunenet.refit.moments import LayerWalk, Moments
from prunenet.refit.ridge import DAMPINGS


def least_tokens(d_ff: int) -> int:
    """Tokens of each fold below which an expert's own do not count: a quarter of its channels."""
    return math.ceil(d_ff / (1 + max(DAMPINGS)))


def few_tokens(group: Group, tokens: Iterable[int]) -> bool:
    """Whether too few tokens of a fold reach an expert, or none a dense FFN: others have all of the
    text, however little that is.

    Args:
        group: the expert or FFN.
        tokens: of each fold.
    """
    least = 1 if group.expert is None else least_tokens(group.width)
    return any(count < least for count in tokens)


class StandIns:
    """What stands in for the moments of groups that too few tokens reach, layer by layer.

    Args:
        walks: over the folds of the text, at the same layer.
    """

    def __init__(self, walks: Sequence[LayerWalk]) -> None:
        self._walks = walks
        self._found: dict[int, list[Moments]] = {}

    def of(self, group: Group, ffn: FFN) -> list[Moments]:
        """Moments of a group of the current layer, one for each walk.

        Raises:
            ValueError: the activations are not finite.
        """
        if group.expert is None or not routes(group.down.module):
            return [from_weights(ffn)] * len(self._walks)
        if group.number not in self._found:
            few = [
                other
                for other in self._walks[0].groups(group.layer)
                if other.down.module is group.down.module
                and few_tokens(other, (walk.reached[other.number] for walk in self._walks))
            ]
            rows = [moments_of_all(walk, few) for walk in self._walks]
            self._found = {other.number: [row[other.number] for row in rows] for other in few}
        return self._found.pop(group.number)


@torch.no_grad()
def moments_of_all(walk: LayerWalk, experts: Sequence[Group]) -> dict[int, Moments]:
    """Moments of experts of one bank of the current layer, by number, over all tokens of the layer.

    Args:
        walk: at that layer.
        experts: of a bank that is called with tokens, indices and weights.

    Raises:
        ValueError: the activations are not finite.
    """
    bank = experts[0].down.module
    numbers = [group.expert for group in experts if group.expert is not None]
    with calling({bank: partial(_through_each, bank, numbers)}):
        return walk.all_moments(experts)


def _through_each(bank: nn.Module, experts: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
    """Sends all tokens through each of some experts in place of those that they are routed to."""
    call = inspect.signature(type(bank).forward).bind(bank, *args, **kwargs)
    _, hidden, index, weights = call.arguments.values()
    for expert in experts:
        out = written_alone(bank, hidden.reshape(-1, hidden.shape[-1]), index, weights, expert)
    return out.reshape(*hidden.shape[:-1], -1)


def from_weights(ffn: FFN) -> Moments:
    """Moments of unrelated channels, each with the energy that its input weights give it.

    With them elimination ranks channels by |g|^2 |u|^2 |d|^2, and a refit changes nothing.
    """
    rows: list[Tensor] = [ffn.up] if ffn.gate is None else [ffn.gate, ffn.up]
    energies = torch.stack([row.float().square().sum(1) for row in rows]).prod(0)
    return Moments(torch.diag(energies), torch.zeros_like(energies), 1)
