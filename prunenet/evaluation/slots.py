"""The rules of one budget over channels, heads and layers: slots, their costs, their damage
(docs/methods.md, sections 12 and 13).

A *slot* is one structure of one layer; its decision is how many of its units stay. Units go in a
fixed order, so that masks nest. Damage is a quadratic form over units, the cost a table: an episode
costs microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunenet.evaluation.choices import Cost as Cost
from prunenet.evaluation.interaction import Around, Interaction
from prunenet.evaluation.units import Structure, Unit
from prunenet.runtime.choices import check_ratio

PLACE: tuple[str, ...] = ("is_layer", "is_heads", "is_channels")
_KINDS: tuple[Structure, ...] = ("layers", "heads", "channels")


@dataclass(frozen=True, slots=True)
class Slot:
    """One structure of one layer.

    Attributes:
        structure: "channels", "heads" or "layers".
        layer: number of the decoder layer.
        units: columns of the matrix, in the order in which they go.
        costs: of what stays when 0, 1, ... of the units stay, rising; of a layer, what is in none
            of its other slots.
        least: fewest units that stay; of the next unit to go, a part may have to.
        whole: column of the unit that stands for all units at once (the attention sublayer), where
            there is one.
        curved: whether the cost of a share that stays bends at numbers of units, as time does; else
            it is in proportion.
    """

    structure: Structure
    layer: int
    units: tuple[int, ...]
    costs: tuple[float, ...]
    least: float
    whole: int | None = None
    curved: bool = False

    def cost(self, share: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Cost of what stays at a share of the units, in [0, 1]."""
        if not self.curved:
            return share * self.costs[-1]
        return _interpolated(share, np.linspace(0, 1, len(self.costs)), self.costs)

    def share(self, cost: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The inverse of `cost`."""
        if not self.curved:
            return cost / self.costs[-1] if self.costs[-1] else torch.ones_like(cost)
        return _interpolated(cost, self.costs, np.linspace(0, 1, len(self.costs)))

    def stays(self) -> Float[Tensor, " levels"]:
        """How many units stay at each decision: so many, and never fewer than the least."""
        return torch.arange(len(self.costs)).double().clamp_min(self.least)

    def prices(self) -> Float[Tensor, " levels"]:
        """Cost of what stays at each decision."""
        costs = torch.tensor(self.costs, dtype=torch.float64)
        below = int(self.least)
        if below < self.least:
            costs[: below + 1] = costs[below] + (self.least - below) * (
                costs[below + 1] - costs[below]
            )
        return costs


@dataclass(frozen=True, slots=True, eq=False)
class Game:
    """A model's slots and what their cuts cost.

    Attributes:
        slots: in the order of the decisions: layer by layer the layer itself, heads, channels.
        matrices: (domains, units, units) quadratic forms, one for each kind of text.
        features: (slots, n): the layer's context, then `PLACE`; in [-4, 4].
        length: decisions of an episode; those behind the last slot are empty.
        around: the cut model behind which the forms were measured; None where it is the dense one.
    """

    slots: tuple[Slot, ...]
    matrices: Float[Tensor, "domains units units"]
    features: Float[Tensor, "slots n"]
    length: int
    around: Around | None = None

    @classmethod
    def of(
        cls,
        parts: Sequence[Interaction],
        context: Float[Tensor, "layers n_context"],
        *,
        structures: Sequence[Structure] = ("channels", "heads"),
        costs: Sequence[float] | None = None,
        least: int = 1,
        counting: Sequence[int] = (),
    ) -> Game:
        """Makes the game of a measured model.

        Args:
            parts: one matrix a domain, all of the same units.
            context: of each layer, see `prunenet.features.from_weights.layer_context`.
            structures: that may be cut. "attention", beside "heads", lets the last group of heads
                of a layer go; "layers" lets whole layers go, except the last, with all that they
                hold.
            costs: of each unit; default its parameters. See
                `prunenet.evaluation.costs.unit_costs`.
            least: bins of channels that stay in every layer that stays, at least 1.
            counting: layers that keep a group of heads where "attention" may go, and so stay; see
                `prunenet.models.heads.counting_layers`.

        Raises:
            ValueError: no matrix, matrices of different units or behind different cuts, none of a
                structure's units, or attention without heads.
        """
        if not parts or any(part.units != parts[0].units for part in parts):
            raise ValueError("a game takes one interaction matrix or more, all of the same units")
        units = parts[0].units
        missing = {*structures} - {unit.structure for unit in units}
        if missing:
            raise ValueError(f"the interaction matrix has no {sorted(missing)[0]}: measure them")
        check_attention(structures)
        prices = [float(unit.parameters) for unit in units] if costs is None else list(costs)
        alone, around = torch.stack([part.kl for part in parts]).mean(0), Around.of(parts)
        if around is not None:
            # what is gone already goes first
            alone = alone.masked_fill(around.gone > 0.5, -1)
        slots = _slots(units, prices, alone, structures, least, counting)
        kinds = torch.eye(len(_KINDS))
        rows = [torch.cat((context[s.layer], kinds[_KINDS.index(s.structure)])) for s in slots]
        forms = torch.stack([part.quadratic for part in parts]).float()
        return cls(slots, forms, torch.stack(rows).float(), len(slots), around)

    def damages(self, gone: Float[Tensor, "n units"]) -> Float[Tensor, "domains n"]:
        """Predicted KL(dense || without these shares of the units), in nats per token."""
        away, around = gone, self.around
        if around is not None:
            away = gone - around.gone
        found = torch.einsum("nu,duv,nv->dn", away, self.matrices, away) / 2
        return found if around is None else found + around.pull @ away.T + around.kl[:, None]

    def slopes(self, gone: Float[Tensor, " units"]) -> Float[Tensor, "domains units"]:
        """What the next of each unit adds to those damages, per unit, to first order."""
        if self.around is None:
            return self.matrices @ gone
        return self.matrices @ (gone - self.around.gone) + self.around.pull

    def padded(self, length: int) -> Game:
        """The same game with empty decisions at the end, so that games of several models are of one
        length.
        """
        return replace(self, length=max(length, self.length))

    @property
    def levels(self) -> int:
        """Decisions at a slot, at most: 0 to all of its units."""
        return max(len(slot.costs) for slot in self.slots)

    @property
    def total(self) -> float:
        """Cost of all slots."""
        return sum(slot.costs[-1] for slot in self.slots)


def check_attention(structures: Sequence[Structure]) -> None:
    """Raises ValueError for attention without heads among structures."""
    if "attention" in structures and "heads" not in structures:
        raise ValueError("attention goes group by group: name heads among the structures too")


def _slots(
    units: Sequence[Unit],
    prices: Sequence[float],
    alone: Tensor,
    structures: Sequence[Structure],
    least: int,
    counting: Sequence[int],
) -> tuple[Slot, ...]:
    found: list[Slot] = []
    last, sublayers = max(unit.layer for unit in units), "attention" in structures
    numbered = [*enumerate(units)]
    for layer, rows in groupby(numbered, key=lambda pair: pair[1].layer):
        of: dict[str, list[int]] = {}
        for column, unit in rows:
            of.setdefault(unit.structure, []).append(column)
        inside: list[Slot] = []
        if "heads" in structures and "heads" in of:
            # the group that costs least alone goes first
            order = sorted(of["heads"], key=lambda column: float(alone[column]))
            goes = sublayers and layer not in counting
            whole = of["attention"][0] if goes else None
            keep = int(whole is None)
            made = Slot("heads", layer, tuple(order), _rising(of["heads"], prices), keep, whole)
            inside.append(replace(made, curved=_is_curved(of["heads"], units, prices)))
        if "channels" in structures:
            bins = of["channels"]
            made = Slot("channels", layer, tuple(bins), _rising(bins, prices), least)
            inside.append(replace(made, curved=_is_curved(bins, units, prices)))
        if "layers" in structures and layer != last:
            (column,) = of["layers"]
            rest = prices[column] - sum(slot.costs[-1] for slot in inside)
            stays = int(sublayers and layer in counting)
            found.append(Slot("layers", layer, (column,), (0.0, max(rest, 0.0)), stays))
        found += inside
    return tuple(found)


def _is_curved(columns: Sequence[int], units: Sequence[Unit], prices: Sequence[float]) -> bool:
    """Whether units of one slot differ in what they cost for their parameters."""
    each = [prices[column] / units[column].parameters for column in columns]
    return max(each) - min(each) > 1e-9 * max(each)


def _interpolated(at: Tensor, places: Any, values: Any) -> Tensor:
    return torch.from_numpy(np.interp(at.double().numpy(), places, values))


def _rising(order: Sequence[int], prices: Sequence[float]) -> tuple[float, ...]:
    """Costs of what stays when the last 0, 1, ... of the units stay."""
    return tuple(accumulate((prices[column] for column in reversed(order)), initial=0.0))


class Episodes:
    """A batch of episodes of one game, in step: all at the same slot, each with its own budget.

    Every decision is legal: it is moved to the nearest one from which the budget can be met. The
    last slot of channels takes what is left, to the parameter; without channels the budget is met
    from below.

    Args:
        game: see `Game`.
        count: episodes in the batch, at least 1.
        ratio: share of the game's total cost that is removed, in [0, 1).
        worst: whether the damage of an episode is that of its worst domain; else the mean.

    Attributes:
        slot: number of the slot to be decided.
        left: (count,) cost that may still be kept.
        kept: share of each unit that stays, (count, units).
        damage: (count,) so far, in nats per token.

    Raises:
        ValueError: the ratio is out of range, or more than the slots can give.
    """

    def __init__(self, game: Game, count: int, ratio: float, *, worst: bool = True) -> None:
        self.game, self.ratio = game, check_ratio(ratio)
        self._worst = worst
        self._bounds = _bounds(game)
        budget = round((1 - ratio) * game.total)
        if budget < self._bounds.least:
            raise ValueError(
                f"at ratio {ratio} the slots cannot keep the least that they must: at most"
                f" {1 - self._bounds.least / game.total:.3f} can go"
            )
        self.slot = 0
        self.budget = float(budget)
        self.left = torch.full((count,), self.budget, dtype=torch.float64)
        whole = torch.zeros(1, game.matrices.shape[1])
        self._kept = torch.ones(game.matrices.shape[1], count)
        self._pull = game.slopes(whole[0])[:, :, None].repeat(1, 1, count)
        self._damages = game.damages(whole).repeat(1, count)
        self.damage = torch.zeros(count)
        self._gone = torch.zeros(count, dtype=torch.bool)

    @property
    def kept(self) -> Float[Tensor, "count units"]:
        return self._kept.T

    @property
    def done(self) -> bool:
        return self.slot == self.game.length

    def target(self) -> Float[Tensor, " count"]:
        """Share of every slot left that spends the budget evenly, in [0, 1]."""
        room = self._bounds.room[min(self.slot, len(self.game.slots))]
        return (self.left / max(room, 1.0)).clamp(0, 1)

    def legal(self) -> Bool[Tensor, "count levels"]:
        """Which numbers of units may stay in the current slot; one at least."""
        levels = self.game.levels
        allowed = torch.zeros(len(self.left), levels, dtype=torch.bool)
        if self.slot >= len(self.game.slots):
            allowed[:, 0] = True
            return allowed
        costs, low, high = (row[self.slot] for row in self._bounds.tables)
        rest = self.left[:, None] - costs
        # what overdraws the budget is never as near as what leaves some of it
        over = low > rest + 1e-9 * self.game.total
        off = torch.where(over, torch.inf, (rest - high).clamp_min(0))
        allowed[:, : len(costs)] = off <= off.amin(1, keepdim=True)
        allowed[self._gone] = False
        allowed[self._gone, 0] = True
        return allowed

    def nearest(self, levels: Int[Tensor, " count"]) -> Int[Tensor, " count"]:
        """The legal numbers nearest to those asked for."""
        distance = (torch.arange(self.game.levels) - levels[:, None]).abs().double()
        return distance.masked_fill(~self.legal(), torch.inf).argmin(1)

    def play(self, levels: Int[Tensor, " count"]) -> Float[Tensor, " count"]:
        """Decides the current slot in every episode and moves to the next one.

        Args:
            levels: units that stay; the nearest legal number is taken.

        Returns:
            The damage added, in nats per token.
        """
        levels = self.nearest(levels)
        number, self.slot = self.slot, self.slot + 1
        if number >= len(self.game.slots):
            return torch.zeros_like(self.damage)
        slot = self.game.slots[number]
        if slot.structure == "layers":
            self._gone = levels == 0
            self.left = self.left - (levels > 0).double() * slot.costs[-1]
            columns, share = torch.tensor(slot.units), (levels == 0).float()[None]
        else:
            columns, share = self._cut(slot, levels, settled=number == self._bounds.settling)
        following = self.game.slots[self.slot :][:1]
        if any(other.layer != slot.layer for other in following):
            self._gone = torch.zeros_like(self._gone)
        before = self.damage
        self._add(columns, share)
        per = self._damages.amax(0) if self._worst else self._damages.mean(0)
        self.damage = per
        return per - before

    def _cut(self, slot: Slot, levels: Tensor, settled: bool) -> tuple[Tensor, Tensor]:
        """Columns of a slot and the shares of them that go; the budget pays for what stays."""
        count = len(slot.units)
        amount = count - slot.stays()[levels]
        if settled:
            share = slot.share(self.left).clamp(slot.least / count, 1)
            amount = torch.where(self._gone, float(count), count * (1 - share))
            spent = torch.where(self._gone, 0.0, slot.cost(share))
        else:
            spent = torch.where(self._gone, 0.0, slot.prices()[levels])
        self.left = self.left - spent
        share = (amount[None] - torch.arange(count)[:, None]).clamp(0, 1).float()
        columns = torch.tensor(slot.units)
        if slot.whole is not None:
            all_gone = (levels == 0)[None]
            share = torch.cat((share.masked_fill(all_gone, 0), all_gone.float()))
            columns = torch.cat((columns, torch.tensor([slot.whole])))
        # what a dropped layer held is gone with it, and priced by its own unit
        return columns, share.masked_fill(self._gone, 0)

    def _add(self, columns: Tensor, share: Tensor) -> None:
        """Removes shares, (columns, count), of units that were whole."""
        self._kept[columns] = 1 - share
        rows = self.game.matrices[:, columns]
        among = rows[:, :, columns] @ share
        self._damages += (share * (self._pull[:, columns] + among / 2)).sum(1)
        self._pull += rows.transpose(1, 2) @ share


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What the slots behind each decision can keep.

    Attributes:
        tables: for each slot, of each of its levels: its cost, and the least and the most that
            later slots can keep.
        room: cost of this slot and all later ones.
        least: of the whole game.
        settling: the slot of channels that takes what is left; None without channels.
    """

    tables: tuple[list[Tensor], list[Tensor], list[Tensor]]
    room: list[float]
    least: float
    settling: int | None


def _bounds(game: Game) -> _Bounds:
    slots = game.slots
    # a layer's channels come last, and the last layer stays
    settling = len(slots) - 1 if slots[-1].structure == "channels" else None
    # least[i], most[i]: of slot i and all later ones, given that its layer stays
    least, most = [0.0] * (len(slots) + 1), [0.0] * (len(slots) + 1)
    behind: Mapping[int, int] = {slot.layer: i + 1 for i, slot in enumerate(slots)}
    tables: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for i in reversed(range(len(slots))):
        slot, after = slots[i], behind[slots[i].layer]
        costs = slot.prices()
        low, high = torch.full_like(costs, least[i + 1]), torch.full_like(costs, most[i + 1])
        if slot.structure == "layers":
            low[0], high[0] = least[after], most[after]
        # fewer than the least are priced out of every budget
        low[: int(slot.least)] = torch.inf
        for table, row in zip(tables, (costs, low, high), strict=True):
            table.insert(0, row)
        least[i] = least[i + 1] + float(costs[int(slot.least)])
        most[i] = most[i + 1] + slot.costs[-1]
        if slot.structure == "layers" and not slot.least:
            least[i] = min(least[i + 1] + slot.costs[-1], least[after])
    return _Bounds(tables, most, least[0], settling)
