"""Allocations as the share of every slot that stays: put under a budget, priced, made into masks
(docs/methods.md, section 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunenet.evaluation.slots import Game, Slot
from prunenet.models.masks import top_channels
from prunenet.runtime.choices import check_ratio

_BISECTIONS, _FAR, _EDGE = 40, 20.0, 1e-6


def check_cap(cap: float | None) -> None:
    """Raises ValueError where a cap is below 1."""
    if cap is not None and not cap >= 1:
        raise ValueError(f"`cap` is a number of times the ratio, at least 1, or None, got {cap}")


def capped(game: Game, ratio: float, cap: float | None = 1.5, *, guarded: int = 0) -> Game:
    """The same game in which no slot gives much more than the others, so that what is searched on
    one text empties no layer.

    Args:
        game: see `Game`; whole layers may go as before.
        ratio: share of the game's cost that is to be removed, in [0, 1).
        cap: a slot gives at most so many times the share that channels would give if heads stayed
            whole, at least 1; groups of heads as many whole ones as that allows. None sets no cap.
        guarded: layers at either end that stay whole.

    Raises:
        ValueError: a number out of range, or what may go does not make up the ratio.
    """
    check_cap(cap)
    if guarded < 0:
        raise ValueError(f"`guarded` counts layers, 0 or more, got {guarded}")
    if cap is None and not guarded:
        return game
    channels = sum(slot.costs[-1] for slot in game.slots if slot.structure == "channels")
    alone = check_ratio(ratio) * game.total / (channels or game.total)
    most = 1.0 if cap is None else min(cap * alone, 1.0)
    last, least = max(slot.layer for slot in game.slots), 0.0
    slots: list[Slot] = []
    for slot in game.slots:
        count, stays = len(slot.units), slot.least
        if slot.structure != "layers":
            stays = max(stays, (1 - most) * count)
            if min(slot.layer, last - slot.layer) < guarded:
                stays = count
            if slot.structure == "heads":
                stays = ceil(stays - _EDGE)
            least += slot.costs[-1] * stays / count
        slots.append(replace(slot, least=stays))
    droppable = any(slot.structure == "layers" for slot in slots)
    if least > (1 - ratio) * game.total + _EDGE and not droppable:
        raise ValueError(
            f"at ratio {ratio} a cap of {cap} and {guarded} guarded layers at either end leave too"
            f" little to remove: {1 - least / game.total:.3f} of the cost; raise the cap or guard"
            " fewer"
        )
    return replace(game, slots=tuple(slots))


def settled(game: Game, shares: Float[Tensor, "n slots"], ratio: float) -> Float[Tensor, "n slots"]:
    """Puts allocations under the budget: groups of heads become whole numbers, and one shift of the
    channels' log-odds spends what is left, to the parameter.

    Args:
        game: of channels and heads; whole layers stay.
        shares: that are wanted, in [0, 1].
        ratio: share of the game's cost that is removed, in [0, 1).

    Returns:
        Shares of the same order. Where channels alone cannot meet the budget they are at their
        bound, and so is the cost.
    """
    budget = (1 - check_ratio(ratio)) * game.total
    counts = torch.tensor([len(slot.units) for slot in game.slots]).double()
    least = torch.tensor([slot.least for slot in game.slots]) / counts
    costs = torch.tensor([slot.costs[-1] for slot in game.slots]).double()
    bins = torch.tensor([slot.structure == "channels" for slot in game.slots])
    wanted = shares.double()
    whole = torch.maximum((wanted * counts).round() / counts, least)
    whole[:, [slot.structure == "layers" for slot in game.slots]] = 1
    odds = torch.logit(wanted.clamp(_EDGE, 1 - _EDGE))
    low, high = torch.full((len(wanted), 1), -_FAR).double(), torch.full((len(wanted), 1), _FAR)
    high = high.double()

    def at(theta: Tensor) -> Tensor:
        return torch.where(bins, torch.maximum(torch.sigmoid(odds + theta), least), whole)

    for _ in range(_BISECTIONS):
        theta = (low + high) / 2
        over = (at(theta) * costs).sum(1, keepdim=True) > budget
        low, high = torch.where(over, low, theta), torch.where(over, theta, high)
    return at(low)


def allocated(
    game: Game, offsets: Float[Tensor, "*n slots"], ratio: float
) -> Float[Tensor, "n slots"]:
    """The shares sigmoid(theta + offset), theta such that the budget is met, then `settled`.

    Groups of heads only come back as the budget grows, and channels too but where a group does.
    """
    rows = offsets.reshape(-1, len(game.slots)).double()
    costs = torch.tensor([slot.costs[-1] for slot in game.slots]).double()
    low, high = torch.full((len(rows), 1), -_FAR), torch.full((len(rows), 1), _FAR)
    low, high = low.double(), high.double()
    for _ in range(_BISECTIONS):
        theta = (low + high) / 2
        over = (torch.sigmoid(rows + theta) * costs).sum(1, keepdim=True) > (1 - ratio) * game.total
        low, high = torch.where(over, low, theta), torch.where(over, theta, high)
    return settled(game, torch.sigmoid(rows + low), ratio)


def damages(
    game: Game, shares: Float[Tensor, "n slots"], *, worst: bool = True
) -> Float[Tensor, " n"]:
    """Predicted KL(dense || pruned) of allocations, in nats per token: of the worst domain, or in
    the mean.
    """
    gone = torch.zeros(len(shares), game.matrices.shape[1])
    for number, slot in enumerate(game.slots):
        count, columns = len(slot.units), torch.tensor(slot.units)
        amount = count * (1 - shares[:, number : number + 1])
        part = (amount - torch.arange(count)).clamp(0, 1).float()
        if slot.whole is not None:
            all_gone = shares[:, number] <= _EDGE
            part[all_gone] = 0
            gone[:, slot.whole] = all_gone.float()
        gone[:, columns] = part
    each = game.damages(gone)
    return each.amax(0) if worst else each.mean(0)


def masks(
    game: Game,
    shares: Float[Tensor, " slots"],
    scores: Sequence[Float[Tensor, " _"]],
    round_to: int = 8,
) -> tuple[list[Bool[Tensor, " d_ff"]], list[Bool[Tensor, " groups"]] | None]:
    """Makes an allocation into keep masks: of each layer's channels, and of its groups of heads.

    Widths are rounded to multiples so that their sum is that of the shares, from below.

    Args:
        game: of channels, and of heads if they are cut; no attention sublayer goes.
        shares: see `settled`.
        scores: of each layer's channels, those that the matrix was measured with.
        round_to: widths are multiples of this.

    Returns:
        Masks of channels; masks of groups, None where the game has none.
    """
    by = {
        (slot.structure, slot.layer): (slot, float(share))
        for slot, share in zip(game.slots, shares, strict=True)
    }
    wanted = [by["channels", layer][1] * len(row) for layer, row in enumerate(scores)]
    steps = [max(int(width / round_to), 1) for width in wanted]
    spare = int(sum(wanted) / round_to + 1e-6) - sum(steps)
    order = sorted(range(len(wanted)), key=lambda i: steps[i] - wanted[i] / round_to)
    for layer in order[: max(spare, 0)]:
        steps[layer] += 1
    keep = [
        top_channels(row, min(step * round_to, len(row)))
        for row, step in zip(scores, steps, strict=True)
    ]
    if not any(slot.structure == "heads" for slot in game.slots):
        return keep, None
    groups = []
    for layer in range(len(scores)):
        slot, share = by["heads", layer]
        mask, first = torch.zeros(len(slot.units), dtype=torch.bool), min(slot.units)
        stay = round(share * len(slot.units))
        mask[[column - first for column in slot.units[len(slot.units) - stay :]]] = True
        groups.append(mask)
    return keep, groups
