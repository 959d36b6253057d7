"""Allocations as the share of every slot that stays: put under a budget, priced, made into masks
(docs/methods.md, section 13).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """Puts allocations under the budget: groups of heads and layers become whole numbers, and one
    shift of the channels' log-odds spends what is left, to the parameter.

    Args:
        game: of channels, heads and layers.
        shares: that are wanted, in [0, 1]; a layer goes below one half.
        ratio: share of the game's cost that is removed, in [0, 1).

    Returns:
        Shares of the same order, 0 in all slots of a layer that goes; so the cost is their sum.
        Where channels alone cannot meet the budget they are at their bound, and so is the cost.
    """
    budget, slots = (1 - check_ratio(ratio)) * game.total, _Slots(game)
    wanted = shares.double()
    whole = slots.whole(wanted)
    odds = torch.logit(wanted.clamp(_EDGE, 1 - _EDGE))

    def at(theta: Tensor) -> Tensor:
        moved = torch.maximum(torch.sigmoid(odds + theta), slots.least)
        return slots.left(wanted, torch.where(slots.settling, moved, whole))

    return at(_largest(len(shares), lambda theta: slots.cost(at(theta)) > budget))


def allocated(
    game: Game, offsets: Float[Tensor, "*n slots"], ratio: float
) -> Float[Tensor, "n slots"]:
    """The shares sigmoid(theta + offset), theta such that the budget is met, then `settled`.

    Groups of heads and layers only come back as the budget grows, and channels too but where a
    group or a layer does. Where no channels are left to settle the budget it is met from below.
    """
    rows = offsets.reshape(-1, len(game.slots)).double()
    budget, slots = (1 - ratio) * game.total, _Slots(game)
    settles = bool(slots.settling.any())

    def at(theta: Tensor) -> Tensor:
        wanted = torch.sigmoid(rows + theta)
        met = torch.maximum(wanted, slots.least) if settles else slots.whole(wanted)
        return slots.left(wanted, met)

    def fewest(theta: Tensor) -> Tensor:
        """What is left at least, once groups and layers are whole numbers."""
        wanted = torch.sigmoid(rows + theta)
        met = torch.where(slots.settling, slots.least, slots.whole(wanted))
        return slots.left(wanted, met)

    def over(theta: Tensor) -> Tensor:
        return (slots.cost(at(theta)) > budget) | (slots.cost(fewest(theta)) > budget)

    return settled(game, torch.sigmoid(rows + _largest(len(rows), over)), ratio)


def cost(game: Game, shares: Float[Tensor, "n slots"]) -> Float[Tensor, "n 1"]:
    """What stays of the game's cost, where slots of a layer that goes keep nothing."""
    return _Slots(game).cost(shares)


def _largest(count: int, over: Callable[[Tensor], Tensor]) -> Float[Tensor, "n 1"]:
    """The largest theta of each row that is not over the budget."""
    low, high = torch.full((count, 1), -_FAR).double(), torch.full((count, 1), _FAR).double()
    for _ in range(_BISECTIONS):
        theta = (low + high) / 2
        beyond = over(theta)
        low, high = torch.where(beyond, low, theta), torch.where(beyond, theta, high)
    return low


class _Slots:
    """What is asked of a game's slots at every step, as tensors of (slots,).

    Attributes:
        least: share that stays at least.
        settling: channels that cost something, which settle a budget.
    """

    def __init__(self, game: Game) -> None:
        slots = game.slots
        layer = {slot.layer: n for n, slot in enumerate(slots) if slot.structure == "layers"}
        self._layer = torch.tensor([layer.get(slot.layer, -1) for slot in slots])
        self._counts = torch.tensor([len(slot.units) for slot in slots]).double()
        self._costs = torch.tensor([slot.costs[-1] for slot in slots]).double()
        self._curved = [(n, slot) for n, slot in enumerate(slots) if slot.curved]
        channels = torch.tensor([slot.structure == "channels" for slot in slots])
        self.settling = channels & (self._costs > 0)
        self._free = channels & (self._costs == 0)
        self.least = torch.tensor([slot.least for slot in slots]) / self._counts

    def stay(self, shares: Float[Tensor, "n slots"]) -> Bool[Tensor, "n slots"]:
        """Which slots are in a layer that stays, the layer itself included."""
        shares = torch.maximum(shares, self.least)
        return (shares[:, self._layer] >= 0.5) | (self._layer < 0)

    def left(
        self, wanted: Float[Tensor, "n slots"], met: Float[Tensor, "n slots"]
    ) -> Float[Tensor, "n slots"]:
        """The shares that are met, and 0 in slots of a layer that goes by what is wanted."""
        if bool((self._layer < 0).all()):
            return met
        return torch.where(self.stay(wanted), met, 0)

    def whole(self, wanted: Float[Tensor, "n slots"]) -> Float[Tensor, "n slots"]:
        """The nearest whole numbers of units; channels that cost nothing stay."""
        nearest = torch.maximum((wanted * self._counts).round() / self._counts, self.least)
        return torch.where(self._free, 1, nearest)

    def cost(self, shares: Float[Tensor, "n slots"]) -> Float[Tensor, "n 1"]:
        """What stays, where slots of a layer that goes keep nothing."""
        each = shares * self._costs
        for number, slot in self._curved:
            each[:, number] = slot.cost(shares[:, number])
        return each.sum(1, keepdim=True)


def damages(
    game: Game, shares: Float[Tensor, "n slots"], *, worst: bool = True
) -> Float[Tensor, " n"]:
    """Predicted KL(dense || pruned) of allocations, in nats per token: of the worst domain, or in
    the mean.
    """
    gone = torch.zeros(len(shares), game.matrices.shape[1])
    stays = _Slots(game).stay(shares)
    for number, slot in enumerate(game.slots):
        count, columns = len(slot.units), torch.tensor(slot.units)
        amount = count * (1 - shares[:, number : number + 1])
        part = (amount - torch.arange(count)).clamp(0, 1).float()
        if slot.whole is not None:
            all_gone = shares[:, number] <= _EDGE
            part[all_gone] = 0
            gone[:, slot.whole] = (all_gone & stays[:, number]).float()
        if slot.structure != "layers":  # what a layer that goes held is priced by its own unit
            part = part * stays[:, number : number + 1]
        gone[:, columns] = part
    each = game.damages(gone)
    return each.amax(0) if worst else each.mean(0)


def layers_left(game: Game, shares: Float[Tensor, " slots"]) -> Bool[Tensor, " layers"] | None:
    """Mask of the layers that stay; None where the game lets none go."""
    if not any(slot.structure == "layers" for slot in game.slots):
        return None
    # the last layer has no slot to go
    mask = torch.ones(2 + max(s.layer for s in game.slots if s.structure == "layers")).bool()
    for slot, share in zip(game.slots, shares.tolist(), strict=True):
        if slot.structure == "layers":
            mask[slot.layer] = share >= 0.5
    return mask


def masks(
    game: Game,
    shares: Float[Tensor, " slots"],
    scores: Sequence[Float[Tensor, " _"]],
    round_to: int = 8,
) -> tuple[list[Bool[Tensor, " d_ff"]], list[Bool[Tensor, " groups"]] | None]:
    """Makes an allocation into keep masks: of each layer's channels, and of its groups of heads.

    Widths are rounded to multiples so that their sum is that of the shares, from below.

    Args:
        game: of channels, and of heads and layers if they are cut.
        shares: see `settled`.
        scores: of each layer's channels, those that the matrix was measured with.
        round_to: widths are multiples of this.

    Returns:
        Masks of channels; masks of groups, None where the game has none, and empty in a layer
        without any. Those of a layer that goes keep all.
    """
    by = {
        (slot.structure, slot.layer): (slot, float(share))
        for slot, share in zip(game.slots, shares, strict=True)
    }
    left = layers_left(game, shares)
    cut = [n for n in range(len(scores)) if (left is None or left[n]) and ("channels", n) in by]
    wanted = {n: by["channels", n][1] * len(scores[n]) for n in cut}
    keep = [torch.ones(len(row), dtype=torch.bool) for row in scores]
    for layer, width in _rounded(wanted, round_to).items():
        keep[layer] = top_channels(scores[layer], min(width, len(scores[layer])))
    if not any(slot.structure == "heads" for slot in game.slots):
        return keep, None
    groups = []
    for layer in range(len(scores)):
        if ("heads", layer) not in by:
            groups.append(torch.zeros(0, dtype=torch.bool))
            continue
        slot, share = by["heads", layer]
        mask, first = torch.zeros(len(slot.units), dtype=torch.bool), min(slot.units)
        stay = round((share if left is None or left[layer] else 1) * len(slot.units))
        mask[[column - first for column in slot.units[len(slot.units) - stay :]]] = True
        groups.append(mask)
    return keep, groups


def shares_of(
    game: Game,
    keep: Sequence[Bool[Tensor, " _"]],
    groups: Sequence[Bool[Tensor, " _"]] | None,
    layers: Bool[Tensor, " layers"] | None,
) -> Float[Tensor, " slots"]:
    """The inverse of `masks` and `layers_left`: shares that stay, 0 in layers that go."""
    found = []
    for slot in game.slots:
        own = keep if slot.structure == "channels" else groups
        stays = layers is None or bool(layers[slot.layer])
        part = 1.0 if slot.structure == "layers" or own is None else own[slot.layer].double().mean()
        found.append(float(part) * stays)
    return torch.tensor(found, dtype=torch.float64)


def _rounded(wanted: Mapping[int, float], round_to: int) -> dict[int, int]:
    """Widths by layer, multiples whose sum is that of the wanted ones, from below."""
    steps = {layer: max(int(width / round_to), 1) for layer, width in wanted.items()}
    spare = int(sum(wanted.values()) / round_to + 1e-6) - sum(steps.values())
    order = sorted(wanted, key=lambda layer: steps[layer] - wanted[layer] / round_to)
    for layer in order[: max(spare, 0)]:
        steps[layer] += 1
    return {layer: step * round_to for layer, step in steps.items()}
