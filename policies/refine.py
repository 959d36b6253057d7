"""Refines a policy's allocation on calibration text: first on an interaction matrix, then by the
measured KL(dense || pruned), with a fixed number of forward passes (docs/methods.md, sections 12
and 13).

The search changes the policy's log-odds by smooth functions of the layer's place
(`prunenet.evaluation.smooth`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.evaluation.divergence import mask_divergences
from prunenet.evaluation.interaction import Ablation, interaction_folder, measure_interaction
from prunenet.evaluation.shares import allocated, capped, damages, masks
from prunenet.evaluation.slots import Game
from prunenet.evaluation.smooth import smooth_search
from prunenet.evaluation.units import Cut, Structure
from prunenet.features.from_weights import layer_context
from prunenet.models.anatomy import Anatomy
from prunenet.models.heads import attentions
from prunenet.models.knobs import step_of
from prunenet.models.layers import Weights, iter_ffns
from prunenet.policies.artifact import Policy
from prunenet.policies.options import PruneOptions
from prunenet.refit.folds import folds_of, held_back
from prunenet.text.calibration import CalibrationSet

Progress = Callable[[int, int], None]
BINS, TOKENS, ROWS = 6, 128, 2
"""Of the matrix: bins of a layer's channels; tokens of a row; rows of each kind of text."""
PREDICTED, MEASURED = (20, 16), (8, 4)
"""Rounds of the search on the matrix and on the model, and candidates of each: 32 measured cuts."""
_JUDGED = 8
_Cut = tuple[list[Tensor], list[Tensor] | None]
_HEADS_START = 1.0  # log-odds of heads beside channels: the policy knows channels alone


@dataclass(frozen=True, slots=True)
class Refined:
    """An allocation.

    Attributes:
        keep: (d_ff,) mask of each layer.
        groups: mask of each layer's groups of heads; None where heads stay whole.
        start, end: measured KL of the start and of the result, in nats per token.
    """

    keep: list[Bool[Tensor, " _"]]
    groups: list[Bool[Tensor, " _"]] | None
    start: float
    end: float

    @property
    def way(self) -> dict[str, list[int]]:
        """The widths, by name, as `prunenet.policies.apply.allocations` gives them."""
        return {"refined": [int(mask.sum()) for mask in self.keep]}


@torch.no_grad()
def refine(
    model: PreTrainedModel,
    blocks: CalibrationSet,
    scores: Sequence[Float[Tensor, " _"]],
    offsets: Sequence[float],
    ratio: float,
    *,
    structures: Sequence[Structure] = ("channels",),
    round_to: int = 8,
    cap: float | None = None,
    refreshed: bool = False,
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
        ratio: as many parameters go as that share of the FFN channels has, in [0, 1).
        structures: "channels", and "heads" where groups of heads go too.
        round_to: widths are multiples of this.
        cap: see `prunenet.evaluation.shares.capped`; None sets none.
        refreshed: whether the matrix is measured once more, behind the best cut that the first one
            knows, and searched again. It takes as many forward passes as the first.
        progress: called with (parts ablated, in all), of each matrix.

    Raises:
        ValueError: a cap out of range, blocks that the model cannot read, or logits that are not
            finite.
        UnsupportedArchitecture: heads of this family cannot be cut.
    """
    front = int(blocks.bos is not None)
    ffns = list(iter_ffns(model))
    known = _game(model, blocks, scores, structures, progress)
    share = ratio * sum(ffn.channel_parameters * ffn.d_ff for ffn in ffns) / known.total
    game = capped(known, share, cap)
    judged = held_back(blocks.ids)[1][:_JUDGED]

    def cuts(rows: Tensor) -> list[_Cut]:
        return [masks(game, row, scores, round_to) for row in allocated(game, rows, share)]

    def predicted(rows: Tensor) -> Tensor:
        return damages(game, allocated(game, rows, share))

    def measured(rows: Tensor) -> Tensor:
        return mask_divergences(model, cuts(rows), judged, unscored=front).cpu()

    start = torch.tensor(
        [offsets[s.layer] if s.structure == "channels" else _HEADS_START for s in game.slots]
    ).double()
    near, _ = smooth_search(game, start, predicted, PREDICTED)
    if refreshed:
        again = _game(model, blocks, scores, structures, progress, cuts(near[None])[0])
        # groups of heads keep the order that the dense model gave them
        game = replace(again, slots=game.slots)
        near, _ = smooth_search(game, near, predicted, PREDICTED)
    first = measured(torch.stack((start, near)))
    best = near if first[1] < first[0] else start
    best, end = smooth_search(game, best, measured, MEASURED, known=float(first.min()))
    keep, groups = cuts(best[None])[0]
    return Refined(keep, groups, float(first[0]), end)


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
        both: tuple[Structure, ...] = ("channels", "heads")
        found[number] = refine(
            model,
            blocks,
            scores,
            policy.offsets(model),
            ratios[number],
            structures=both[:1] if size.structures == "channels" else both,
            round_to=step_of(Anatomy.of(model).groups, ratios[number], size.round_to),
            progress=progress,
        )
    return found


def _game(
    model: PreTrainedModel,
    blocks: CalibrationSet,
    scores: Sequence[Tensor],
    structures: Sequence[Structure],
    progress: Progress | None,
    behind: Cut | None = None,
) -> Game:
    """The matrices of the first rows of either kind of the text, as one game of two domains."""
    if "heads" in structures:
        attentions(model)  # refuses families whose heads cannot be cut
    kinds = [fold[:ROWS, :TOKENS] for fold in folds_of(blocks.ids, blocks.kinds)]
    rows = min(map(len, kinds))
    parts = measure_interaction(
        model,
        torch.cat([kind[:rows] for kind in kinds]),
        scores,
        Ablation(
            bins=min(BINS, *(len(row) for row in scores)),
            structures=structures,
            unscored=int(blocks.bos is not None),
            batch=rows,
            behind=behind,
        ),
        cache=interaction_folder(),
        progress=progress,
    )
    return Game.of(parts, layer_context(model).cpu(), structures=structures)
