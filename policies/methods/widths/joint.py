"""Searches allocations on an interaction matrix: the controls of a learned policy, at equal numbers
of evaluations (docs/methods.md, sections 12 and 13).

All of them fit the text that the matrix was measured on. What they are worth on other text and
other models is what a policy trained over many matrices is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from prunenet.evaluation.shares import allocated, damages, settled
from prunenet.evaluation.slots import Game
from prunenet.runtime.choices import check_choice

JointSearch = Literal["uniform", "random", "greedy", "dynamic", "evolution"]
"""How an allocation is found."""
_STEPS = 400  # of the budget, in dynamic programming
_SPREAD = 0.7  # of random log-odds


def search_shares(
    game: Game, ratio: float, search: JointSearch, *, evaluations: int = 300, seed: int = 0
) -> Float[Tensor, " slots"]:
    """Returns the share of every slot that stays, under the budget.

    Args:
        game: of channels and heads.
        ratio: share of the game's cost removed, in [0, 1).
        search: "uniform"; "random", the best of so many; "greedy", by least damage added for each
            cost saved; "dynamic", exact for damages that add up, which they do not; "evolution".
        evaluations: allocations that random search and evolution may price, at least 1.
        seed: of the draws.

    Raises:
        ValueError: an unknown search, or fewer than one evaluation.
    """
    check_choice("search", search, JointSearch)
    if evaluations < 1:
        raise ValueError(f"a search prices 1 allocation or more, got {evaluations}")
    searches: dict[str, Callable[[], Tensor]] = {
        "uniform": lambda: allocated(game, torch.zeros(len(game.slots)), ratio)[0],
        "random": lambda: _random(game, ratio, evaluations, seed),
        "greedy": lambda: _greedy(game, ratio),
        "dynamic": lambda: _dynamic(game, ratio),
        "evolution": lambda: _evolved(game, ratio, evaluations, seed),
    }
    assert searches.keys() == {*get_args(JointSearch)}
    return searches[search]()


def _random(game: Game, ratio: float, evaluations: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    offsets = _SPREAD * torch.randn(evaluations, len(game.slots), generator=generator)
    offsets[0] = 0
    shares = allocated(game, offsets, ratio)
    return shares[damages(game, shares).argmin()]


def _greedy(game: Game, ratio: float) -> Tensor:
    """Takes unit after unit until the budget is met: the one that adds the least damage to that of
    the units gone, for each cost that it saves.
    """
    form = game.matrices.mean(0)
    stay = [len(slot.units) for slot in game.slots]
    gone, spent = torch.zeros(len(form)), game.total
    prices = [slot.prices().tolist() for slot in game.slots]
    while spent > (1 - ratio) * game.total:
        pull = game.slopes(gone).mean(0)
        best, price = -1, float("inf")
        for number, slot in enumerate(game.slots):
            if slot.structure == "layers" or stay[number] <= slot.least:
                continue
            unit = slot.units[len(slot.units) - stay[number]]
            part = min(stay[number] - slot.least, 1.0)
            saved = prices[number][stay[number]] - prices[number][stay[number] - 1]
            added = part * float(pull[unit] + part * form[unit, unit] / 2) / max(saved, 1e-9)
            if added < price:
                best, price = number, added
        if best < 0:
            break  # all that may go is gone, and settling meets the rest
        slot = game.slots[best]
        part = min(stay[best] - slot.least, 1.0)
        gone[slot.units[len(slot.units) - stay[best]]] = part
        spent -= prices[best][stay[best]] - prices[best][stay[best] - 1]
        stay[best] -= 1
    return _of_levels(game, stay, ratio)


def _dynamic(game: Game, ratio: float) -> Tensor:
    """Minimises the sum of what each slot's cut costs alone, over budgets in steps. Behind a cut,
    what the slot's difference from it costs alone.
    """
    form, step = game.matrices.mean(0), game.total / _STEPS
    base, pull = torch.zeros(len(form)), torch.zeros(len(form))
    if game.around is not None:
        base, pull = game.around.gone, game.around.pull.mean(0)
    budget = int((1 - ratio) * _STEPS)
    best = torch.full((budget + 1,), torch.inf)
    best[0] = 0
    chosen: list[Tensor] = []
    for slot in game.slots:
        level = torch.full((budget + 1,), -1)
        table = torch.full((budget + 1,), torch.inf)
        columns = torch.tensor(slot.units)
        stays, prices = slot.stays(), slot.prices().tolist()
        for stay in range(int(slot.least), len(slot.units) + 1):
            gone = (len(columns) - stays[stay] - torch.arange(len(columns))).clamp(0, 1)
            away = gone.float() - base[columns]
            price = float(away @ form[columns][:, columns] @ away / 2 + pull[columns] @ away)
            need = round(prices[stay] / step)
            if need > budget:
                break
            moved = torch.full_like(table, torch.inf)
            moved[need:] = best[: budget + 1 - need] + price
            level = torch.where(moved < table, stay, level)
            table = torch.minimum(table, moved)
        best = table
        chosen.append(level)
    place = int(best.argmin())
    levels: list[int] = []
    for slot, level in zip(reversed(game.slots), reversed(chosen), strict=True):
        levels.insert(0, int(level[place]))
        place -= round(float(slot.prices()[levels[0]]) / step)
    return _of_levels(game, levels, ratio)


def _of_levels(game: Game, levels: Sequence[int], ratio: float) -> Tensor:
    """Shares of whole units, put under the budget."""
    shares = [level / len(slot.units) for level, slot in zip(levels, game.slots, strict=True)]
    return settled(game, torch.tensor([shares]), ratio)[0]


def _evolved(game: Game, ratio: float, evaluations: int, seed: int, children: int = 10) -> Tensor:
    """Changes the log-odds of some slots at a time; a child that is no worse is the next parent."""
    generator = torch.Generator().manual_seed(seed)
    parent = torch.zeros(len(game.slots), dtype=torch.float64)
    shares = allocated(game, parent, ratio)
    least, best = float(damages(game, shares)), shares[0]
    for _ in range(max((evaluations - 1) // children, 0)):
        size = (children, len(game.slots))
        few = torch.rand(size, generator=generator) < 4 / len(game.slots)
        brood = parent + few * torch.randn(size, generator=generator)
        shares = allocated(game, brood, ratio)
        found = damages(game, shares)
        if float(found.min()) <= least:
            first = int(found.argmin())
            parent, least, best = brood[first], float(found[first]), shares[first]
    return best
