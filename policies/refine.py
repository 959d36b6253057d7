"""Refines a policy's allocation on calibration text: first on an interaction matrix, then by the
measured KL(dense || pruned), with a fixed number of forward passes (docs/methods.md, sections 12
and 13).

The search changes the policy's log-odds by smooth functions of the layer's place, a few cosines for
each structure. What is searched freely, slot by slot, fits the text that it is judged on and loses
on other text (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.evaluation.choices import Cost, Structure
from prunenet.evaluation.costs import unit_costs
from prunenet.evaluation.divergence import mask_divergences
from prunenet.evaluation.interaction import (
    Ablation,
    Interaction,
    interaction_folder,
    measure_interaction,
)
from prunenet.evaluation.latency import latency_table
from prunenet.evaluation.shares import (
    allocated,
    capped,
    cost,
    damages,
    layers_left,
    masks,
    shares_of,
)
from prunenet.evaluation.slots import Game, check_attention
from prunenet.evaluation.smooth import smooth_search
from prunenet.evaluation.units import Cut, Unit, check_cuttable, units_of
from prunenet.features.from_weights import layer_context
from prunenet.models.anatomy import Anatomy
from prunenet.models.heads import counting_layers
from prunenet.models.knobs import step_of
from prunenet.models.layers import Weights, decoder_layers, ffn_widths, structure, text_config
from prunenet.policies.artifact import Policy
from prunenet.policies.options import PruneOptions
from prunenet.refit.folds import folds_of, held_back
from prunenet.runtime.choices import check_fields
from prunenet.text.calibration import CalibrationSet

Progress = Callable[[int, int], None]
BINS, TOKENS, ROWS = 6, 128, 2
"""Of the matrix: bins of a layer's channels; tokens of a row; rows of each kind of text."""
PREDICTED, MEASURED = (20, 16), (8, 4)
"""Rounds of the search on the matrix and on the model, and candidates of each: 32 measured cuts."""
_JUDGED = 8
_Cut = tuple[list[Tensor], list[Tensor] | None, Tensor | None]
_MOST = 1 - 1e-9  # a ratio at which all goes that can
_START: dict[Structure, float] = {"heads": 1.0, "layers": 8.0}
"""Log-odds beside those of channels, which alone the policy knows: whole layers stay."""
_GONE, _DEEPEST = -60.0, 4
"""Log-odds of a layer or a layer's attention that goes, and how many are tried."""


@dataclass(frozen=True, slots=True)
class Refined:
    """An allocation.

    Attributes:
        keep: (d_ff,) mask of each layer.
        groups: mask of each layer's groups of heads; None where heads stay whole.
        start, end: measured KL of the start and of the result, in nats per token.
        reached: the ratio that the masks reach.
        layers: mask of the layers that stay; None where all do. Masks of the others mean nothing.
    """

    keep: list[Bool[Tensor, " _"]]
    groups: list[Bool[Tensor, " _"]] | None
    start: float
    end: float
    reached: float
    layers: Bool[Tensor, " layers"] | None = None

    def behind_layers(self) -> Refined:
        """The same of the model without the layers that go."""
        if self.layers is None:
            return self
        left = self.layers.nonzero().flatten().tolist()
        groups = None if self.groups is None else [self.groups[layer] for layer in left]
        return replace(self, keep=[self.keep[layer] for layer in left], groups=groups, layers=None)

    @property
    def way(self) -> dict[str, list[int]]:
        """The widths, by name, as `prunenet.policies.apply.allocations` gives them."""
        return {"refined": [int(mask.sum()) for mask in self.keep]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refining:
    """What may go, and how it is searched.

    Attributes:
        structures: any of "channels", "heads" (groups of them), beside these "attention" (the last
            group of a layer too), and "layers" (whole ones). Channels meet the budget to a multiple
            of `round_to`; the others alone meet it from below.
        budget: what is saved.
        of_all: whether the ratio is a share of what all layers cost.
        round_to: widths are multiples of this.
        cap: see `prunenet.evaluation.shares.capped`; None sets none.
        refreshed: whether the matrix is measured once more, behind the best cut that the first one
            knows, and searched again; not where layers may go. It takes as many forward passes as
            the first.

    Raises:
        ValueError: no layers go from what is `refreshed`, and no attention without heads.
    """

    structures: Sequence[Structure] = ("channels",)
    budget: Cost = "params"
    of_all: bool = False
    round_to: int = 8
    cap: float | None = None
    refreshed: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.refreshed and "layers" in self.structures:
            raise ValueError("no matrix is measured behind layers that go: leave `refreshed` out")
        check_attention(self.structures)


@torch.no_grad()
def refine(
    model: PreTrainedModel,
    blocks: CalibrationSet,
    scores: Sequence[Float[Tensor, " _"]],
    offsets: Sequence[float],
    ratio: float,
    options: Refining = Refining(),
    *,
    progress: Progress | None = None,
) -> Refined:
    """Refines a policy's allocation.

    The matrix is measured on the first rows of either kind of the text and kept on disk; cuts are
    measured on the last blocks.

    Args:
        model: a causal LM in memory.
        blocks: 2 or more.
        scores: of each layer's channels.
        offsets: the policy's log-odds of each layer's channels.
        ratio: as much of the budget goes as that share of the FFN channels costs, in [0, 1); of all
            layers, where channels cost nothing.
        options: what may go, and how it is searched.
        progress: called with (parts ablated, in all), of each matrix.

    Raises:
        ValueError: a cap out of range, blocks that the model cannot read, logits that are not
            finite, or structures that hold less of the budget than is to go.
        UnsupportedArchitecture: heads, or layers, of this family cannot be cut.
    """
    front, priced = int(blocks.bos is not None), _priced(model, options)
    share, whole = _share(model, ratio, options, priced), priced.whole
    known = _game(model, blocks, scores, options, priced, progress)
    game = capped(known, share, options.cap)
    judged = held_back(blocks.ids)[1][:_JUDGED]

    def cuts(rows: Tensor) -> list[_Cut]:
        found = allocated(game, rows, share)
        step = options.round_to
        return [(*masks(game, row, scores, step), layers_left(game, row)) for row in found]

    def predicted(rows: Tensor) -> Tensor:
        return damages(game, allocated(game, rows, share))

    def measured(rows: Tensor) -> Tensor:
        return mask_divergences(model, cuts(rows), judged, unscored=front).cpu()

    starts = _starts(game, offsets, share)
    near, _ = smooth_search(game, starts[int(predicted(starts).argmin())], predicted, PREDICTED)
    if options.refreshed:
        behind = cuts(near[None])[0][:2]
        again = _game(model, blocks, scores, options, priced, progress, behind)
        # groups of heads keep the order that the dense model gave them
        game = replace(again, slots=game.slots)
        near, _ = smooth_search(game, near, predicted, PREDICTED)
    rows = torch.cat((starts, near[None]))
    first = measured(rows)
    least = rows[int(first.argmin())]
    best, end = smooth_search(game, least, measured, MEASURED, known=float(first.min()))
    return _refined(game, cuts(best[None])[0], whole, (float(first[0]), end))


def _refined(game: Game, cut: _Cut, whole: float, kl: tuple[float, float]) -> Refined:
    """The result: masks, and the share of the budget, `whole`, that goes by them."""
    keep, groups, layers = cut
    left = float(cost(game, shares_of(game, keep, groups, layers)[None]))
    reached = (game.total - left) / whole
    dropped = None if layers is None or bool(layers.all()) else layers
    return Refined(keep, groups, *kl, reached=reached, layers=dropped)


def refined_sizes(
    model: Weights,
    policy: Policy | None,
    sizes: Sequence[PruneOptions],
    ratios: Sequence[float],
    blocks: CalibrationSet | None,
    scores: Sequence[Float[Tensor, " _"]] | None,
    progress: Progress | None,
) -> list[Refined | None]:
    """The refined allocation of each size that asks for one; None for the others.

    Args:
        model, blocks, scores, progress: as for `refine`.
        policy: allocates the start.
        sizes: filled in (`PruneOptions.filled`), which refuses what is missing here.
        ratios: of each size.
    """
    found: list[Refined | None] = [None] * len(sizes)
    for number, size in enumerate(sizes):
        if size.widths != "refined":
            continue
        assert policy is not None, "PruneOptions.filled"
        assert blocks is not None, "PruneOptions.filled"
        assert scores is not None, "PruneOptions.filled"
        assert isinstance(model, PreTrainedModel), "a streamed checkpoint measures nothing"
        found[number] = refine(
            model,
            blocks,
            scores,
            policy.offsets(model),
            ratios[number],
            _refining(model, size, ratios[number]),
            progress=progress,
        )
    return found


def check_refined(model: Weights, size: PruneOptions, ratio: float) -> None:
    """Raises as `refine` where shapes alone say that a size which asks for refined widths cannot be
    reached, so that no text is written for it.
    """
    if size.widths == "refined" and not size.shares_experts and isinstance(model, PreTrainedModel):
        options = _refining(model, size, ratio)
        _share(model, ratio, options, _priced(model, options))


def _refining(model: Weights, size: PruneOptions, ratio: float) -> Refining:
    return Refining(
        structures=size.parts,
        budget=size.budget,
        of_all=size.of_all,
        round_to=step_of(Anatomy.of(structure(model)).groups, ratio, size.round_to),
    )


@dataclass(frozen=True, slots=True)
class _Priced:
    """What the parts of a model cost.

    Attributes:
        units: that may go.
        bins: of a layer's channels.
        costs: of each unit.
        whole: what a ratio is a share of.
    """

    units: tuple[Unit, ...]
    bins: int
    costs: list[float]
    whole: float


def _priced(model: PreTrainedModel, options: Refining) -> _Priced:
    """Raises as `refine` for structures that this family cannot lose."""
    structures, budget = options.structures, options.budget
    check_cuttable(model, structures)
    table = latency_table(model) if budget == "latency" else None
    bins = min(BINS, *ffn_widths(model))
    every = units_of(model, bins)
    prices = dict(
        zip(every, unit_costs(every, text_config(model), budget, table=table), strict=True)
    )
    of: Structure = "layers" if options.of_all or budget == "kv-bytes" else "channels"
    whole = sum(price for unit, price in prices.items() if unit.structure == of)
    units = tuple(unit for unit in every if unit.structure in structures)
    return _Priced(units, bins, [prices[unit] for unit in units], whole)


def _game(
    model: PreTrainedModel,
    blocks: CalibrationSet,
    scores: Sequence[Tensor],
    options: Refining,
    priced: _Priced,
    progress: Progress | None,
    behind: Cut | None = None,
) -> Game:
    """The matrices of the first rows of either kind of the text, as one game of two domains."""
    kinds = [fold[:ROWS, :TOKENS] for fold in folds_of(blocks.ids, blocks.kinds)]
    rows = min(map(len, kinds))
    parts = measure_interaction(
        model,
        torch.cat([kind[:rows] for kind in kinds]),
        scores,
        Ablation(
            bins=priced.bins,
            structures=options.structures,
            unscored=int(blocks.bos is not None),
            batch=rows,
            behind=behind,
        ),
        cache=interaction_folder(),
        progress=progress,
    )
    return _game_of(model, parts, layer_context(model).cpu(), options, priced)


def _game_of(
    model: PreTrainedModel,
    parts: Sequence[Interaction],
    context: Tensor,
    options: Refining,
    priced: _Priced,
) -> Game:
    counting = counting_layers(text_config(model))
    structures, costs = options.structures, priced.costs
    return Game.of(parts, context, structures=structures, costs=costs, counting=counting)


def _share(model: PreTrainedModel, ratio: float, options: Refining, priced: _Priced) -> float:
    """The share of the game's cost that goes; shapes alone are read.

    Raises:
        ValueError: the game's slots hold less than that.
    """
    count = len(priced.units)
    nothing = Interaction(priced.units, torch.zeros(count, count), torch.zeros(count), 1)
    context = torch.zeros(len(decoder_layers(model)), 1)
    game = _game_of(model, [nothing], context, options, priced)
    gone, whole = ratio * priced.whole, priced.whole
    holds = game.total - float(cost(game, allocated(game, torch.zeros(len(game.slots)), _MOST)))
    if game.total == 0 or gone > holds * (1 + 1e-6):
        said = holds / whole if whole else 0.0
        raise ValueError(
            f"at most {said:.1%} of the budget {options.budget!r} can go from these structures, got"
            f" a `ratio` of {ratio}; ask for less, or name more `structures`"
        )
    return gone / game.total


def _starts(game: Game, offsets: Sequence[float], share: float) -> Float[Tensor, "starts slots"]:
    """Log-odds to start from: the policy's with every layer whole; then, where layers or their
    attention can go, with one after the other gone, each the one that the matrix predicts to cost
    least.
    """
    start = torch.tensor(
        [offsets[s.layer] if s.structure == "channels" else _START[s.structure] for s in game.slots]
    ).double()
    layers = [n for n, slot in enumerate(game.slots) if slot.structure == "layers"]
    alone = game.matrices.diagonal(dim1=1, dim2=2).mean(0)
    for place, n in enumerate(sorted(layers, key=lambda n: float(alone[game.slots[n].units[0]]))):
        start[n] += place / len(layers)  # who goes first where nothing else is left
    can_go = [n for n in layers if not game.slots[n].least]
    can_go += [n for n, slot in enumerate(game.slots) if slot.whole is not None]
    found = [start]
    exact = any(slot.structure == "channels" and slot.costs[-1] for slot in game.slots)
    for _ in range(min(_DEEPEST, len(can_go))):
        rows = torch.stack([found[-1].index_fill(0, torch.tensor(n), _GONE) for n in can_go])
        shares = allocated(game, rows, share)
        price = damages(game, shares)
        price[(rows == found[-1]).all(1)] = torch.inf
        # more must not go than is asked, unless no layer can stay that is not chosen to go
        now = allocated(game, found[-1][None], share)[0]
        if exact and all(now[n] > 0 or found[-1][n] == _GONE for n in layers):
            short = cost(game, shares)[:, 0] < (1 - share) * game.total * (1 - 1e-6)
            price[short] = torch.inf
        if not bool(price.isfinite().any()):
            break
        found.append(rows[int(price.argmin())])
    return torch.stack(found)
