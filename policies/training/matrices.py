"""Learns where to cut over the interaction matrices of several models (docs/methods.md, sections 12
and 13): thousands of episodes of `prunenet/BudgetPruning-v0` in place of forward passes.

What is learned on one matrix is about its text; a smooth function of the layer's place and spectra,
learned over several, holds on models that it has not seen (docs/results.md).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from prunenet.checkpoints.regimes import most
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.evaluation.interaction import Ablation, interaction_folder, measure_interaction
from prunenet.evaluation.shares import allocated, damages
from prunenet.evaluation.slots import PLACE, Game
from prunenet.evaluation.units import ffns_of
from prunenet.features.from_weights import CONTEXT, layer_context
from prunenet.models.anatomy import Anatomy
from prunenet.models.layers import ffn_widths, structure
from prunenet.policies.artifact import Policy
from prunenet.policies.scorer import SlotAllocator
from prunenet.policies.training.slots import AllocatorRecipe, train_allocator
from prunenet.policies.training.train import check_trainable, identity_of
from prunenet.refit.folds import folds_of
from prunenet.text.calibration import CalibrationSet

BINS, ROWS = 6, 2
"""Bins of a layer's channels; rows of each kind of text that a matrix is measured on."""
_GAIN_AT = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A model as widths are learned on it.

    Attributes:
        identity: what a policy records of it.
        game: slots are the layers' channels, in the order of a policy's scores.
        regime: what its matrix looked at.
    """

    identity: Mapping[str, str]
    game: Game
    regime: str

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        blocks: CalibrationSet,
        policy: Policy,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Measured:
        """Measures a model's matrix, which is kept on disk; a killed measurement goes on.

        Args:
            model: in memory; of a type whose layers each have one FFN.
            blocks: of which the first rows of either kind of text are read.
            policy: scores the channels, from weights alone.
            progress: called with (units ablated, in all).

        Raises:
            ValueError: a policy that reads activations, or blocks that the model cannot read.
            UnsupportedArchitecture: a layer has experts, several FFNs or none.
        """
        check_measurable(model)
        scores = policy.scores(model)
        kinds = folds_of(blocks.ids, blocks.kinds)
        rows = min(ROWS, *map(len, kinds))
        asked = Ablation(
            bins=min(BINS, *ffn_widths(model)),
            structures=("channels",),
            unscored=int(blocks.bos is not None),
            batch=rows,
        )
        text = torch.cat([kind[:rows] for kind in kinds])
        parts = measure_interaction(
            model, text, scores, asked, cache=interaction_folder(), progress=progress
        )
        game = Game.of(parts, layer_context(model).cpu(), structures=("channels",))
        return cls(identity_of(model), game, blocks.regime)


def check_measurable(model: PreTrainedModel | StreamedCheckpoint) -> None:
    """Raises as `Measured.of` for a model whose matrix cannot be measured; reads no weight."""
    check_trainable(model)
    ffns_of(Anatomy.of(structure(model)))


def allocator(policy: Policy | None, seed: int) -> SlotAllocator:
    """An allocator that gives channels a policy's log-odds, or an untrained one."""
    names = [name.removeprefix("is_") for name in PLACE]
    made = SlotAllocator(CONTEXT, names, generator=torch.Generator().manual_seed(seed))
    if policy is not None:
        made.heads["channels"].load_state_dict(policy.scorer.widths.state_dict())
    return made


def train_widths(
    policy: Policy,
    measured: Sequence[Measured],
    recipe: AllocatorRecipe | None = None,
    *,
    anew: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> Policy:
    """A policy with the given one's channels and widths that are learned over many models.

    Args:
        policy: stays as it is; its channels are those of the games.
        measured: one model or more, which count alike.
        recipe: how.
        anew: whether widths are learned from nothing, and not from the policy's own.
        progress: as for `train_allocator`.

    Raises:
        ValueError: no models.
    """
    if not measured:
        raise ValueError("widths are learned on one model or more, got none")
    recipe, games = recipe or AllocatorRecipe(), [one.game for one in measured]
    start = allocator(None if anew else policy, recipe.seed)
    learned = train_allocator(games, start, recipe, progress=progress).allocator
    scorer = copy.deepcopy(policy.scorer)
    scorer.widths.load_state_dict(learned.heads["channels"].state_dict())
    where: dict[str, Any] = {"models": [dict(one.identity) for one in measured], "anew": anew}
    config = replace(
        policy.config,
        gain=_gain(learned, games),
        regime=most([policy.config.regime, *(one.regime for one in measured)]),
        recipe={**policy.config.recipe, "where": {**where, "matrices": asdict(recipe)}},
    )
    return Policy(scorer, config)


@torch.no_grad()
def _gain(learned: SlotAllocator, games: Sequence[Game]) -> float:
    """The share by which the matrices say that exp(KL) falls from uniform widths, in the mean."""
    found = []
    for game in games:
        offsets = learned(game.features)
        rows = torch.stack([torch.zeros_like(offsets), offsets])
        even, own = damages(game, allocated(game, rows, _GAIN_AT)).tolist()
        found.append(even - own)
    return 1 - math.exp(-sum(found) / len(found))
