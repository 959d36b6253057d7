"""Cuts a model by its activations: which channels of each layer to keep, and what the kept ones
write in place of the others.

Measures each layer once (`moments`), chooses channels by greedy elimination (`eliminate`) or by
given scores, and refits the down matrix for them (`refit`), with its damping chosen across two
folds of the text. Memory holds the moments of one layer.

Of several processes (`prunenet.runtime.parallel`) each measures, orders and refits its own layers
in `cut_layers`, to the same bits. Not split: the hidden states' way through the layers, which all
walk, and `refit_sequentially`, where each layer is measured behind the one refitted before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.layers import down_linears
from prunenet.models.masks import top_channels
from prunenet.models.surgery import narrowed
from prunenet.refit.eliminate import eliminate, score_order
from prunenet.refit.folds import folds_of, pooled
from prunenet.refit.moments import LayerWalk, Moments, Target, paired_moments
from prunenet.refit.ridge import choose_damping, ridge
from prunenet.runtime import parallel
from prunenet.runtime.placement import derive, is_placed, present, shared_copy


@dataclass(frozen=True, slots=True)
class Cut:
    """One way to cut a model.

    Attributes:
        keep: (d_ff,) of each layer.
        downs: (d_model, kept) of each layer, refitted; None where the dense columns stay as they
            are.
        dampings: of each layer's refit; empty without one.
    """

    keep: list[Bool[Tensor, " _"]]
    downs: list[Float[Tensor, "_ __"]] | None
    dampings: tuple[float, ...] = ()

    def model(self, dense: PreTrainedModel) -> PreTrainedModel:
        """The narrow model; the dense one stays as it is."""
        narrow = narrowed(dense, self.keep)
        if self.downs is not None:
            for linear, weight in zip(down_linears(narrow), self.downs, strict=True):
                derive(linear, "weight", weight)
        return narrow

    def down(
        self, layer: int, dense: Float[Tensor, "d_model d_ff"]
    ) -> Float[Tensor, "d_model d_ff"]:
        """The layer's down matrix with zeros in the columns of dropped channels."""
        keep = self.keep[layer].to(dense.device)
        if self.downs is None:
            return dense * keep.to(dense)
        return torch.zeros_like(dense).index_copy_(
            1, keep.nonzero().flatten(), self.downs[layer].to(dense)
        )


@torch.no_grad()
def cut_layers(
    model: PreTrainedModel,
    blocks: Int[Tensor, "n tokens"],
    widths: Sequence[Sequence[int]],
    *,
    scores: Sequence[Float[Tensor, " _"]] | None = None,
    measured: float = 0.0,
    refit: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Cut]:
    """Cuts a model in several ways, measuring each layer once.

    Args:
        model: the dense model, in eval mode; not changed.
        blocks: token blocks; the refit is fitted on all, with a damping chosen across `folds_of`
            them.
        widths: for each way, the width of each layer.
        scores: of each layer's channels, higher stays; default the order of greedy elimination on
            these moments.
        measured: how much of the order is that of the channels' measured output energies, see
            `blended`.
        refit: whether the down matrices are refitted.
        progress: called with (layers done, layers in all).

    Raises:
        ValueError: blocks that the model cannot read, too few of them, or activations that are not
            finite.
    """
    downs = down_linears(model)
    walks = [LayerWalk(model, fold) for fold in folds_of(blocks)]
    found: dict[int, list[Tensor]] = {}
    for index, _ in zip(*walks, strict=True):
        if not parallel.is_owner(index):
            continue
        folds, down = (
            [_finite(walk.moments(index), index) for walk in walks],
            downs[index].weight.detach(),
        )
        second = pooled(folds)
        least = min(way[index] for way in widths)
        order = (
            _order(down, second, least)
            if scores is None
            else blended(scores[index], output_energy(down, second), measured)
        )
        damping, found[index] = None, []
        for way in widths:
            keep = top_channels(order, way[index])
            if not refit:
                found[index].append(keep)
                continue
            damping = damping or choose_damping(down, folds, keep)
            refitted = ridge(down, second, keep, damping=damping)
            found[index] += [
                keep,
                _put_by(model, refitted),
                torch.tensor(damping, dtype=torch.float64),
            ]
        if progress is not None:
            progress(index + 1, len(downs))
    layers = parallel.gather_from_owners(found, len(downs))
    if not refit:
        return [Cut(list(keep), None) for keep in zip(*layers, strict=True)]
    ways = [
        [layer[start : start + 3] for layer in layers] for start in range(0, 3 * len(widths), 3)
    ]
    return [_cut([(keep, weight, float(damping)) for keep, weight, damping in way]) for way in ways]


@torch.no_grad()
def refit_kept(
    model: PreTrainedModel,
    keep: Sequence[Bool[Tensor, " _"]],
    folds: Sequence[Sequence[Moments]],
) -> Cut:
    """What `cut_layers` makes of given channels, from moments that are there already.

    Args:
        model: the dense model, in eval mode; not changed.
        keep: (d_ff,) of each layer.
        folds: of each layer, its moments on both of `folds_of` the blocks.

    Raises:
        ValueError: activations that are not finite.
    """
    layers = []
    for index, (linear, mask, parts) in enumerate(
        zip(down_linears(model), keep, folds, strict=True)
    ):
        with present(linear):
            weight = linear.weight.detach()
        damping = choose_damping(weight, [_finite(part, index) for part in parts], mask)
        layers.append(
            (mask, _put_by(model, ridge(weight, pooled(parts), mask, damping=damping)), damping)
        )
    return _cut(layers)


def _cut(layers: Sequence[tuple[Tensor, Tensor, float]]) -> Cut:
    keep = [mask for mask, _, _ in layers]
    return Cut(
        keep, [weight for _, weight, _ in layers], tuple(damping for _, _, damping in layers)
    )


def _put_by(model: PreTrainedModel, down: Tensor) -> Tensor:
    """A refitted matrix waits on the CPU where the dense ones have no room on their device."""
    return down.cpu() if is_placed(model) else down


def _order(down: Tensor, second: Tensor, least: int) -> Tensor:
    return score_order(eliminate(down, second, least=least), down.shape[1])


def blended(
    scores: Float[Tensor, " d_ff"], energy: Float[Tensor, " d_ff"], share: float
) -> Float[Tensor, " d_ff"]:
    """(1 - share) of a channel's rank by scores and share of its rank by measured output energy;
    share 0: the scores.

    Ranks, because neither scale means anything to the other.
    """
    if share == 0:
        return scores
    by_scores, by_energy = (
        row.argsort(stable=True).argsort().double() for row in (scores.to(energy.device), energy)
    )
    return (1 - share) * by_scores + share * by_energy


def output_energy(
    down: Float[Tensor, "d_model d_ff"], second: Float[Tensor, "d_ff d_ff"]
) -> Float[Tensor, " d_ff"]:
    """E|W_:j h_j|^2 of each channel."""
    return second.diagonal() * down.to(second).square().sum(0)


class Refits:
    """Every layer's channels in an order, and its refitted down matrix at evenly spaced widths.

    What a search over widths looks up in place of a solve. Holds about `levels` / 2 times the down
    matrices, in their dtype.

    Args:
        model: the dense model; not changed.
        blocks: token blocks to fit on.
        scores: of each layer's channels, higher stays; default the order of greedy elimination on
            these moments.
        levels: widths of each layer, evenly spaced: the largest number up to this that divides
            d_ff.
        damping: of every refit, see `prunenet.refit.ridge`; `cut_layers` chooses it for each layer,
            which a search can do without.
        progress: called with (layers done, layers in all).

    Attributes:
        step: between two widths, in channels.
        scores: (layers, d_ff), higher stays longer.

    Raises:
        ValueError: layers of different widths, or activations that are not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Int[Tensor, "n tokens"],
        *,
        scores: Sequence[Float[Tensor, " _"]] | None = None,
        levels: int = 24,
        damping: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        downs = down_linears(model)
        widths = {linear.in_features for linear in downs}
        if len(widths) > 1:
            raise ValueError(
                f"layers of widths {sorted(widths)} have no levels in common; take the dense model"
            )
        d_ff = widths.pop()
        self.step = d_ff // max(n for n in range(1, levels + 1) if d_ff % n == 0)
        self._found: list[dict[int, Tensor]] = []
        orders = []
        walk = LayerWalk(model, blocks)
        for index in walk:
            second, down = _finite(walk.moments(index), index).second, downs[index].weight.detach()
            orders.append(_order(down, second, self.step) if scores is None else scores[index])
            keeps = {
                width: top_channels(orders[-1], width)
                for width in range(self.step, d_ff, self.step)
            }
            solved = {
                width: ridge(down, second, keep, damping=damping) for width, keep in keeps.items()
            }
            self._found.append({width: _put_by(model, matrix) for width, matrix in solved.items()})
            if progress is not None:
                progress(index + 1, len(downs))
        self.scores = torch.stack(orders).float()

    def down(
        self, layer: int, keep: Bool[Tensor, " _"], dense: Float[Tensor, "d_model d_ff"]
    ) -> Float[Tensor, "d_model d_ff"]:
        """The layer's refitted down matrix for channels that `scores` ranks highest, with zeros in
        the other columns.

        Raises:
            KeyError: the mask's width is not a multiple of `step`.
        """
        width = int(keep.sum())
        if width == dense.shape[1]:
            return dense
        kept = keep.to(dense.device).nonzero().flatten()
        return torch.zeros_like(dense).index_copy_(1, kept, self._found[layer][width].to(dense))


@torch.no_grad()
def refit_sequentially(
    model: PreTrainedModel,
    cut: Cut,
    blocks: Int[Tensor, "n tokens"],
    *,
    dense_targets: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Cut:
    """The same channels, each layer refitted behind the layers that are cut and refitted already
    (METHODS.md 5).

    Args:
        model: the dense model; not changed.
        cut: the channels to keep.
        blocks: as for `cut_layers`.
        dense_targets: whether a layer is to write what the dense model's layer writes at the same
            tokens; else what its own dense weights would write behind the pruned layers.
        progress: called with (layers done, layers in all).

    Raises:
        ValueError: as `cut_layers`.
    """
    pruned = shared_copy(model)
    linears, dense = down_linears(pruned), down_linears(model)
    walks = [
        (LayerWalk(model, fold), LayerWalk(pruned, fold, changing=True))
        for fold in folds_of(blocks)
    ]
    layers: list[tuple[Tensor, Tensor, float]] = []
    for index, *_ in zip(*(walk for pair in walks for walk in pair), strict=True):
        measured = [_measured(*pair, index, dense_targets) for pair in walks]
        folds, targets = (
            [_finite(moments, index) for moments, _ in measured],
            [t for _, t in measured if t is not None],
        )
        keep, weight = cut.keep[index], dense[index].weight.detach()
        damping = choose_damping(weight, folds, keep, targets=targets or None)
        cross = pooled(folds, [target.cross for target in targets]) if targets else None
        refitted = ridge(weight, pooled(folds), keep, damping=damping, cross=cross)
        layers.append((keep, _put_by(model, refitted), damping))
        if index > 0:  # which all walks have passed
            linears[index - 1].weight = dense[index - 1].weight
        linears[index].weight = nn.Parameter(_cut(layers).down(index, weight), requires_grad=False)
        if progress is not None:
            progress(index + 1, len(dense))
    return _cut(layers)


def _measured(
    dense: LayerWalk, pruned: LayerWalk, index: int, dense_targets: bool
) -> tuple[Moments, Target | None]:
    return paired_moments(dense, pruned, index) if dense_targets else (pruned.moments(index), None)


def _finite(moments: Moments, index: int) -> Moments:
    if not bool(torch.isfinite(moments.second).all()):
        raise ValueError(
            f"the activations of layer {index} are not finite: the weights are damaged, or their"
            " dtype overflows"
        )
    return moments
