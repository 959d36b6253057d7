"""Cuts all layers of a model by its activations: chooses the channels that stay and refits them.

Measures each layer once (`prunenet.refit.moments`), chooses channels by greedy elimination
(`eliminate`) or by given scores, and refits the down matrix (`ridge`) with a damping chosen across
two folds of the text. Memory holds the moments of one layer.

Several processes (`prunenet.runtime.parallel`) share the layers in `cut_layers`: each measures,
orders and refits its own, with the same result bit for bit. Every process passes the hidden states
through all layers. `refit_sequentially` is not shared: there each layer is measured behind the
refitted one in front of it.
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
    """Holds the channels that stay in each layer, and the refitted down matrices.

    Attributes:
        keep: (d_ff,) mask of each layer.
        downs: (d_model, kept) refitted matrix of each layer; None without a refit.
        dampings: of each layer's refit; empty without one.
        groups: mask of each layer's groups of heads; None where heads stay whole.
    """

    keep: list[Bool[Tensor, " _"]]
    downs: list[Float[Tensor, "_ __"]] | None
    dampings: tuple[float, ...] = ()
    groups: list[Bool[Tensor, " _"]] | None = None

    def model(self, dense: PreTrainedModel) -> PreTrainedModel:
        """Makes the narrow model; the dense one stays as it is."""
        narrow = narrowed(dense, self.keep, self.groups)
        if self.downs is not None:
            for linear, weight in zip(down_linears(narrow), self.downs, strict=True):
                derive(linear, "weight", weight)
        return narrow

    def down(
        self, layer: int, dense: Float[Tensor, "d_model d_ff"]
    ) -> Float[Tensor, "d_model d_ff"]:
        """Returns a layer's down matrix with zeros in the columns of removed channels."""
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
    kinds: Int[Tensor, " n"] | None = None,
    scores: Sequence[Float[Tensor, " _"]] | None = None,
    measured: float = 0.0,
    refit: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Cut]:
    """Cuts a model to several sizes, measuring each layer once.

    Args:
        model: the dense model, in eval mode; not changed.
        blocks: token blocks. The refit is fitted on all of them, with a damping chosen across
            `folds_of` them, at the first size.
        widths: for each size, the width of each layer.
        kinds: of the blocks, see `folds_of`.
        scores: of each layer's channels, higher stays; default the order of greedy elimination on
            these moments.
        measured: share of the measured output energies in the order, in [0, 1]; see `blended`.
        refit: whether the down matrices are refitted.
        progress: called with (layers done, layers in all).

    Returns:
        One cut for each size.

    Raises:
        ValueError: blocks that the model cannot read, too few of them, or activations that are not
            finite.
    """
    downs = down_linears(model)
    walks = [LayerWalk(model, fold) for fold in folds_of(blocks, kinds)]
    # of each layer, one tensor for each size
    keeps: dict[int, list[Tensor]] = {}
    refitted: dict[int, list[Tensor]] = {}
    dampings: dict[int, list[Tensor]] = {}
    for index, _ in zip(*walks, strict=True):
        if not parallel.is_owner(index):
            continue
        folds = [walk.moments(index) for walk in walks]
        down, second = downs[index].weight.detach(), pooled(folds)
        sizes = [size[index] for size in widths]
        if scores is None:
            order = _order(down, second, min(sizes))
        else:
            order = blended(scores[index], output_energy(down, second), measured)
        keeps[index] = [top_channels(order, width) for width in sizes]
        if refit:
            damping = choose_damping(down, folds, keeps[index][0])
            solved = (ridge(down, second, keep, damping=damping) for keep in keeps[index])
            refitted[index] = [_stored(model, matrix) for matrix in solved]
            dampings[index] = [torch.tensor(damping, dtype=torch.float64)]
        if progress is not None:
            progress(index + 1, len(downs))
    masks = _by_size(keeps, len(downs))
    if not refit:
        return [Cut(mask, None) for mask in masks]
    matrices = _by_size(refitted, len(downs))
    chosen = tuple(float(damping) for damping in _by_size(dampings, len(downs))[0])
    return [Cut(mask, matrix, chosen) for mask, matrix in zip(masks, matrices, strict=True)]


def _by_size(found: dict[int, list[Tensor]], layers: int) -> list[list[Tensor]]:
    """Gathers the layers of all processes: one list of layers for each size."""
    gathered = parallel.gather_from_owners(found, layers)
    return [list(size) for size in zip(*gathered, strict=True)]


@torch.no_grad()
def refit_kept(
    model: PreTrainedModel,
    keep: Sequence[Bool[Tensor, " _"]],
    folds: Sequence[Sequence[Moments]],
) -> Cut:
    """Refits given channels from measured moments, as `cut_layers` does.

    Args:
        model: the dense model, in eval mode; not changed.
        keep: (d_ff,) mask of each layer.
        folds: of each layer, its moments on both of `folds_of` the blocks.
    """
    downs, dampings = [], []
    for linear, mask, parts in zip(down_linears(model), keep, folds, strict=True):
        with present(linear):
            weight = linear.weight.detach()
        dampings.append(choose_damping(weight, parts, mask))
        downs.append(_stored(model, ridge(weight, pooled(parts), mask, damping=dampings[-1])))
    return Cut(list(keep), downs, tuple(dampings))


def _stored(model: PreTrainedModel, down: Tensor) -> Tensor:
    """Moves a refitted matrix to the CPU where the model's weights do not fit their device."""
    return down.cpu() if is_placed(model) else down


def _order(down: Tensor, second: Tensor, least: int) -> Tensor:
    return score_order(eliminate(down, second, least=least), down.shape[1])


def blended(
    scores: Float[Tensor, " d_ff"], energy: Float[Tensor, " d_ff"], share: float
) -> Float[Tensor, " d_ff"]:
    """Averages each channel's rank by scores and its rank by measured output energy.

    Ranks, because scores and energies have no common scale.

    Args:
        scores: higher stays.
        energy: see `output_energy`.
        share: weight of the energies' ranks, in [0, 1].

    Returns:
        (1 - share) * rank + share * rank; the scores themselves at share 0, and for a layer without
        energy.
    """
    if share == 0 or not bool(energy.any()):
        return scores
    by_scores, by_energy = (
        row.argsort(stable=True).argsort().double() for row in (scores.to(energy.device), energy)
    )
    return (1 - share) * by_scores + share * by_energy


def output_energy(
    down: Float[Tensor, "d_model d_ff"], second: Float[Tensor, "d_ff d_ff"]
) -> Float[Tensor, " d_ff"]:
    """Returns E|W_:j h_j|^2 of each channel j."""
    return second.diagonal() * down.to(second).square().sum(0)


class Refits:
    """Holds every layer's refitted down matrix at evenly spaced widths.

    A search over widths looks refits up here in place of solving for each. Memory holds about
    `levels` / 2 times the down matrices, in their dtype.

    Args:
        model: the dense model; not changed.
        blocks: token blocks to fit on.
        scores: of each layer's channels, higher stays; default the order of greedy elimination on
            these moments.
        levels: widths of each layer, evenly spaced: the largest number up to this that divides
            d_ff.
        damping: of every refit, see `prunenet.refit.ridge`; not chosen for each layer, as
            `cut_layers` does.
        progress: called with (layers done, layers in all).

    Attributes:
        step: channels between two widths.
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
            second, down = walk.moments(index).second, downs[index].weight.detach()
            orders.append(_order(down, second, self.step) if scores is None else scores[index])
            keeps = {
                width: top_channels(orders[-1], width)
                for width in range(self.step, d_ff, self.step)
            }
            solved = {
                width: ridge(down, second, keep, damping=damping) for width, keep in keeps.items()
            }
            self._found.append({width: _stored(model, matrix) for width, matrix in solved.items()})
            if progress is not None:
                progress(index + 1, len(downs))
        self.scores = torch.stack(orders).float()

    def down(
        self, layer: int, keep: Bool[Tensor, " _"], dense: Float[Tensor, "d_model d_ff"]
    ) -> Float[Tensor, "d_model d_ff"]:
        """Returns a layer's refitted down matrix, with zeros in the columns of removed channels.

        Args:
            layer: number of the layer.
            keep: the channels that `scores` ranks highest.
            dense: the dense matrix, returned where all channels stay.

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
    kinds: Int[Tensor, " n"] | None = None,
    dense_targets: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Cut:
    """Refits the channels of a cut, each layer behind the cut and refitted layers in front of it
    (docs/methods.md, section 5).

    Args:
        model: the dense model; not changed.
        cut: the channels to keep.
        blocks, kinds: as for `cut_layers`.
        dense_targets: whether a layer is fitted to what the dense model's layer writes at the same
            tokens; otherwise to what its own dense weights would write behind the pruned layers.
        progress: called with (layers done, layers in all).

    Raises:
        ValueError: as `cut_layers`.
    """
    pruned = shared_copy(model)
    linears, dense = down_linears(pruned), down_linears(model)
    walks = [
        (LayerWalk(model, fold), LayerWalk(pruned, fold, changing=True))
        for fold in folds_of(blocks, kinds)
    ]
    downs: list[Tensor] = []
    dampings: list[float] = []
    for index, *_ in zip(*(walk for pair in walks for walk in pair), strict=True):
        measured = [_measured(*pair, index, dense_targets) for pair in walks]
        folds = [moments for moments, _ in measured]
        targets = [target for _, target in measured if target is not None]
        keep, weight = cut.keep[index], dense[index].weight.detach()
        damping = choose_damping(weight, folds, keep, targets=targets or None)
        cross = pooled(folds, [target.cross for target in targets]) if targets else None
        refitted = ridge(weight, pooled(folds), keep, damping=damping, cross=cross)
        downs.append(_stored(model, refitted))
        dampings.append(damping)
        if index > 0:  # every walk has passed that layer: its zeroed matrix is no longer needed
            linears[index - 1].weight = dense[index - 1].weight
        narrow = Cut(cut.keep, downs).down(index, weight)
        linears[index].weight = nn.Parameter(narrow, requires_grad=False)
        if progress is not None:
            progress(index + 1, len(dense))
    return Cut(list(cut.keep), downs, tuple(dampings))


def _measured(
    dense: LayerWalk, pruned: LayerWalk, index: int, dense_targets: bool
) -> tuple[Moments, Target | None]:
    return paired_moments(dense, pruned, index) if dense_targets else (pruned.moments(index), None)
