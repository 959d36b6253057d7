"""Searches allocations on an interaction matrix: the controls of a learned policy, at equal numbers
of evaluations (docs/methods.md, sections 12 and 13).

All of them fit the text that the matrix was measured on. What they are worth on other text and
other models is what a policy trained over many matrices is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from prunenet.evaluation.shares import allocated, damages, settled
from prunenet.evaluation.slots import Game
from prunenet.evaluation.smooth import smooth_search
from prunenet.policies.methods.widths.allocation import outlier_shares
from prunenet.policies.methods.widths.influence import influence_shares
from prunenet.policies.methods.widths.predictor import LossPredictor
from prunenet.runtime.choices import check_choice

JointSearch = Literal[
    "uniform",
    "random",
    "greedy",
    "dynamic",
    "evolution",
    "predictor",
    "smooth",
    "owl",
    "influence",
]
"""How an allocation is found."""
_STEPS = 400  # of the budget, in dynamic programming
_SPREAD = 0.7  # of random log-odds
_CANDIDATES, _ROUNDS = 2000, 3  # of the accuracy predictor
_EDGE = 1e-3  # of a share


def search_shares(
    game: Game,
    ratio: float,
    search: JointSearch,
    *,
    evaluations: int = 300,
    seed: int = 0,
    start: Float[Tensor, " slots"] | None = None,
    layers: Sequence[float] | None = None,
) -> Float[Tensor, " slots"]:
    """Returns the share of every slot that stays, under the budget.

    A cap on what a slot gives is the game's: see `prunenet.evaluation.shares.capped`.

    Args:
        game: of channels and heads.
        ratio: share of the game's cost removed, in [0, 1).
        search: "uniform"; "random", the best of so many; "greedy", by least damage added for each
            cost saved; "dynamic", exact for damages that add up, which they do not; "evolution";
            "predictor", boosted trees trained on draws choose which others to price (as
            `prunenet.policies.methods.widths.predictor`, without narrowing); "smooth", cosines of
            the layer's place; "owl" and "influence", from `layers` alone: a layer's structures all
            keep the share that the method gives it.
        evaluations: allocations that "random", "evolution", "predictor" and "smooth" may price, at
            least 1.
        seed: of the draws.
        start: log-odds of the first allocation that these four price; default equal ones.
        layers: of each layer, its `outlier_share` or its `block_influence`.

    Raises:
        ValueError: an unknown search, fewer than one evaluation, or not one finite figure a layer.
        ImportError: "predictor" without scikit-learn.
    """
    check_choice("search", search, JointSearch)
    if evaluations < 1:
        raise ValueError(f"a search prices 1 allocation or more, got {evaluations}")
    count = len({slot.layer for slot in game.slots})
    if search in ("owl", "influence") and len(layers or ()) != count:
        raise ValueError(f"{search} needs one figure for each of {count} layers, got {layers}")
    first = torch.zeros(len(game.slots)) if start is None else start
    priced = _Priced(game, ratio, evaluations, torch.Generator().manual_seed(seed), first.double())
    searches: dict[str, Callable[[], Tensor]] = {
        "uniform": lambda: allocated(game, torch.zeros(len(game.slots)), ratio)[0],
        "random": lambda: _random(priced),
        "greedy": lambda: _greedy(game, ratio),
        "dynamic": lambda: _dynamic(game, ratio),
        "evolution": lambda: _evolved(priced),
        "predictor": lambda: _predicted(priced, seed),
        "smooth": lambda: _smooth(priced, seed),
        "owl": lambda: _by_layer(game, ratio, outlier_shares(1 - ratio, layers or ())),
        "influence": lambda: _by_influence(game, ratio, layers or ()),
    }
    assert searches.keys() == {*get_args(JointSearch)}
    return searches[search]()


class _Priced(NamedTuple):
    """What a search that prices allocations is given."""

    game: Game
    ratio: float
    evaluations: int
    generator: torch.Generator
    start: Tensor

    def drawn(self, count: int) -> Float[Tensor, "count slots"]:
        """Log-odds around the start."""
        size = (count, len(self.game.slots))
        return self.start + (_SPREAD * torch.randn(size, generator=self.generator)).double()

    def shares(self, offsets: Tensor) -> Float[Tensor, "n slots"]:
        return allocated(self.game, offsets, self.ratio)


def _random(priced: _Priced) -> Tensor:
    offsets = priced.drawn(priced.evaluations)
    offsets[0] = priced.start
    shares = priced.shares(offsets)
    return shares[damages(priced.game, shares).argmin()]


def _evolved(priced: _Priced) -> Tensor:
    """Changes the log-odds of some slots at a time; a child that is no worse is the next parent."""
    generator, game, parent = priced.generator, priced.game, priced.start
    shares = priced.shares(parent)
    least, best = float(damages(game, shares)), shares[0]
    left = priced.evaluations - 1
    children = min(10, max(left // 4, 1))
    for _ in range(left // children):
        size = (children, len(game.slots))
        few = torch.rand(size, generator=generator) < 4 / len(game.slots)
        brood = parent + few * torch.randn(size, generator=generator)
        shares = priced.shares(brood)
        found = damages(game, shares)
        if float(found.min()) <= least:
            first = int(found.argmin())
            parent, least, best = brood[first], float(found[first]), shares[first]
    return best


def _predicted(priced: _Priced, seed: int) -> Tensor:
    """Three quarters of the evaluations are draws, and trees choose the others in a few rounds."""
    game, chosen = priced.game, priced.evaluations // 4
    costs = torch.tensor([slot.costs[-1] for slot in game.slots]).double()

    def kept(shares: Tensor) -> list[tuple[int, ...]]:
        return [tuple(row) for row in (shares * costs).round().long().tolist()]

    offsets = priced.drawn(priced.evaluations - chosen)
    offsets[0] = priced.start
    shares = priced.shares(offsets)
    found = damages(game, shares)
    for number in range(min(_ROUNDS, chosen)):
        rounds = min(_ROUNDS, chosen)
        count = chosen * (number + 1) // rounds - chosen * number // rounds
        pairs = [*zip(kept(shares), found.tolist(), strict=True)]
        trees = LossPredictor(pairs, costs.long().tolist(), seed=seed)
        candidates = priced.shares(priced.drawn(_CANDIDATES))
        order = torch.from_numpy(trees(kept(candidates))).argsort(stable=True)
        candidates = candidates[order[:count]]
        shares = torch.cat((shares, candidates))
        found = torch.cat((found, damages(game, candidates)))
    return shares[found.argmin()]


def _smooth(priced: _Priced, seed: int) -> Tensor:
    left = priced.evaluations - 1
    candidates = min(16, max(2, int(left**0.5) // 2 * 2))
    budget = (left // candidates, candidates)

    def evaluate(rows: Tensor) -> Tensor:
        return damages(priced.game, priced.shares(rows))

    best, _ = smooth_search(priced.game, priced.start, evaluate, budget, seed=seed)
    return priced.shares(best)[0]


def _by_influence(game: Game, ratio: float, influence: Sequence[float]) -> Tensor:
    whole: dict[int, float] = {}
    for slot in game.slots:
        whole[slot.layer] = whole.get(slot.layer, 0.0) + slot.costs[-1]
    removed = influence_shares([*whole.values()], ratio * game.total, influence)
    return _by_layer(game, ratio, 1 - removed)


def _by_layer(game: Game, ratio: float, kept: Float[Tensor, " layers"]) -> Tensor:
    """All structures of a layer keep the same share, as far as the budget allows."""
    numbers = sorted({slot.layer for slot in game.slots})
    each = kept[[numbers.index(slot.layer) for slot in game.slots]]
    return allocated(game, torch.logit(each.clamp(_EDGE, 1 - _EDGE)), ratio)[0]


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
