"""Cuts all groups of a model by their activations: chooses the channels that stay and refits them.

A group is an FFN or an expert. Measures each once (`prunenet.refit.moments`), chooses channels by
greedy elimination (`eliminate`) or by given scores, and refits the down matrix (`ridge`) with a
damping chosen across two folds of the text. Memory holds the moments of one layer. For experts that
too few tokens reach others stand in (`few_tokens`).

Several processes (`prunenet.runtime.parallel`) share the groups in `cut_layers`: each measures,
orders and refits its own, with the same result bit for bit. Every process passes the hidden states
through all layers. `refit_sequentially` is not shared: there each layer is measured behind the
refitted one in front of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.groups import Group
from prunenet.models.masks import top_channels
from prunenet.models.surgery import narrowed, set_downs
from prunenet.refit.eliminate import eliminate, score_order
from prunenet.refit.few_tokens import StandIns, few_tokens
from prunenet.refit.folds import folds_of, pooled
from prunenet.refit.moments import LayerWalk, Moments, Target, paired_moments
from prunenet.refit.ridge import choose_damping, ridge
from prunenet.runtime import parallel
from prunenet.runtime.placement import derive, is_placed, shared_copy


@dataclass(frozen=True, slots=True)
class BlockLoss:
    """What a trained FFN loses, see `prunenet.refit.blocks`.

    Attributes:
        before, after: E|F~ - F|^2 / E|F|^2 of the refit and of the training, on text of a kind that
            was not trained on; mean of both directions.
        strength: share of the way that was gone, in [0, 1]; 0: the refit stayed.
    """

    before: float
    after: float
    strength: float


@dataclass(frozen=True, slots=True)
class Cut:
    """Holds the channels that stay in each group, and the refitted down matrices.

    Attributes:
        keep: (d_ff,) mask of each group.
        downs: (d_model, kept) refitted matrix of each group; None without a refit.
        dampings: of each group's refit; empty without one.
        groups: mask of each layer's groups of heads; None where heads stay whole.
        few: numbers of the groups that too few tokens reached; see `prunenet.refit.few_tokens`.
        tensors: others of the narrow model that repairs have changed, by name.
        losses: of each group that was trained.
    """

    keep: list[Bool[Tensor, " _"]]
    downs: list[Float[Tensor, "_ __"]] | None
    dampings: tuple[float, ...] = ()
    groups: list[Bool[Tensor, " _"]] | None = None
    few: tuple[int, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Mapping[int, BlockLoss] = field(default_factory=dict)

    def model(self, dense: PreTrainedModel) -> PreTrainedModel:
        """Makes the narrow model; the dense one stays as it is."""
        narrow = narrowed(dense, self.keep, self.groups)
        if self.downs is not None:
            set_downs(Anatomy.of(narrow), self.downs)
        for name, tensor in self.tensors.items():
            path, _, own = name.rpartition(".")
            derive(narrow.get_submodule(path), own, tensor)
        return narrow

    def down(
        self, layer: int, dense: Float[Tensor, "d_model d_ff"]
    ) -> Float[Tensor, "d_model d_ff"]:
        """Returns a group's down matrix, as it is before any training, with zeros in the columns of
        removed channels.
        """
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
    """Cuts a model to several sizes, measuring each group once.

    Args:
        model: the dense model, in eval mode; not changed.
        blocks: token blocks. The refit is fitted on all of them, with a damping chosen across
            `folds_of` them, at the first size.
        widths: for each size, the width of each group.
        kinds: of the blocks, see `folds_of`.
        scores: of each group's channels, higher stays; default the order of greedy elimination on
            these moments.
        measured: share of the measured output energies in the order, in [0, 1]; see `blended`.
        refit: whether the down matrices are refitted.
        progress: called with (groups done, groups in all).

    Returns:
        One cut for each size.

    Raises:
        ValueError: blocks that the model cannot read, too few of them, or activations that are not
            finite.
    """
    anatomy = Anatomy.of(model)
    count = len(anatomy.groups)
    walks = [LayerWalk(model, fold) for fold in folds_of(blocks, kinds)]
    stand_ins = StandIns(walks)
    # of each group, one tensor for each size
    keeps: dict[int, list[Tensor]] = {}
    refitted: dict[int, list[Tensor]] = {}
    facts: dict[int, list[Tensor]] = {}
    for index, _ in zip(*walks, strict=True):
        if not parallel.is_owner(index):
            continue
        folds = [walk.moments(index) for walk in walks]
        group, down = anatomy.groups[index], anatomy.ffn(index).down
        few = few_tokens(group, [fold.tokens for fold in folds])
        if few:
            folds = stand_ins.of(group, anatomy.ffn(index))
        second, sizes = pooled(folds), [size[index] for size in widths]
        if scores is None:
            order = _order(down, second, min(sizes))
        else:
            order = blended(scores[index], output_energy(down, second), measured)
        keeps[index] = [top_channels(order, width) for width in sizes]
        damping = choose_damping(down, folds, keeps[index][0]) if refit else 0.0
        if refit:
            solved = (ridge(down, second, keep, damping=damping) for keep in keeps[index])
            refitted[index] = [_stored(model, matrix) for matrix in solved]
        facts[index] = [torch.tensor([damping, few], dtype=torch.float64)]
        if progress is not None:
            progress(index + 1, count)
    masks = _by_size(keeps, count)
    dampings, few_of = torch.stack(_by_size(facts, count)[0]).T.tolist()
    starved = tuple(number for number, few in enumerate(few_of) if few)
    if not refit:
        return [Cut(mask, None, few=starved) for mask in masks]
    matrices = _by_size(refitted, count)
    return [
        Cut(mask, matrix, tuple(dampings), few=starved)
        for mask, matrix in zip(masks, matrices, strict=True)
    ]


def _by_size(found: dict[int, list[Tensor]], count: int) -> list[list[Tensor]]:
    """Gathers the groups of all processes: one list of groups for each size."""
    gathered = parallel.gather_from_owners(found, count)
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
        keep: (d_ff,) mask of each group.
        folds: of each group, its moments on both of `folds_of` the blocks.
    """
    found = [
        refit_matrix(model, ffn.down, mask, parts)
        for ffn, mask, parts in zip(Anatomy.of(model).ffns(), keep, folds, strict=True)
    ]
    return Cut(list(keep), [down for down, _ in found], tuple(damping for _, damping in found))


def refit_matrix(
    model: PreTrainedModel,
    weight: Float[Tensor, "d_model d_in"],
    keep: Bool[Tensor, " d_in"],
    folds: Sequence[Moments],
) -> tuple[Float[Tensor, "d_model kept"], float]:
    """Refits an output matrix for the inputs that stay.

    Args:
        model: whose matrix it is.
        weight: of the dense model.
        keep: mask of its inputs.
        folds: moments of its inputs on both of `folds_of` the text.

    Returns:
        The matrix, and the damping that was chosen for it.
    """
    damping = choose_damping(weight, folds, keep)
    return _stored(model, ridge(weight, pooled(folds), keep, damping=damping)), damping


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
        anatomy = Anatomy.of(model)
        widths = set(anatomy.widths)
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
            second, down = walk.moments(index).second, anatomy.ffn(index).down
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
                progress(index + 1, len(anatomy.groups))
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
    pruned, dense = Anatomy.of(shared_copy(model)), Anatomy.of(model)
    walks = [
        (LayerWalk(model, fold), LayerWalk(pruned.model, fold, changing=True))
        for fold in folds_of(blocks, kinds)
    ]
    downs: list[Tensor] = []
    dampings: list[float] = []
    few: list[int] = []
    written, stand_ins = _Written(), StandIns([walk for _, walk in walks])
    for index, *_ in zip(*(walk for pair in walks for walk in pair), strict=True):
        measured = [_measured(*pair, index, dense_targets) for pair in walks]
        folds = [moments for moments, _ in measured]
        targets = [target for _, target in measured if target is not None]
        keep, ffn = cut.keep[index], dense.ffn(index)
        if few_tokens(dense.groups[index], [fold.tokens for fold in folds]):
            folds = stand_ins.of(pruned.groups[index], ffn)
            few.append(index)
        damping = choose_damping(ffn.down, folds, keep, targets=targets or None)
        cross = pooled(folds, [target.cross for target in targets]) if targets else None
        refitted = ridge(ffn.down, pooled(folds), keep, damping=damping, cross=cross)
        downs.append(_stored(model, refitted))
        dampings.append(damping)
        narrow = Cut(cut.keep, downs).down(index, ffn.down)
        written.write(pruned.groups[index], dense.groups[index], narrow)
        if progress is not None:
            progress(index + 1, len(dense.groups))
    return Cut(list(cut.keep), downs, tuple(dampings), few=tuple(few))


class _Written:
    """Gives the current layer of a copied model down matrices of its own; when the next layer gets
    its own, every walk has passed that layer and it shares the dense ones again.
    """

    def __init__(self) -> None:
        self._layer = -1
        self._undo: dict[tuple[nn.Module, str], nn.Parameter] = {}

    def write(self, group: Group, dense: Group, down: Float[Tensor, "d_model d_ff"]) -> None:
        if group.layer != self._layer:
            for place, parameter in self._undo.items():
                setattr(*place, parameter)
            self._layer, self._undo = group.layer, {}
        where, own = group.down, getattr(dense.down.module, dense.down.attribute)
        place = (where.module, where.attribute)
        if place not in self._undo:
            self._undo[place] = own
            setattr(*place, nn.Parameter(own.detach().clone(), requires_grad=False))
        where.tensor.copy_(where.laid(down))


def _measured(
    dense: LayerWalk, pruned: LayerWalk, index: int, dense_targets: bool
) -> tuple[Moments, Target | None]:
    return paired_moments(dense, pruned, index) if dense_targets else (pruned.moments(index), None)
