"""Removes whole experts of a mixture: so many, or as many as pay best for a budget beside channels
(docs/methods.md, sections 13 and 19).

Engines read one number of experts and one width, so what is shared is a line of equal cost: for
each number of experts that can be left, the width that meets the budget. A few are tried, from all
experts at the width that channels alone need downwards, until they get worse. The least
KL(dense || cut) on text that chose nothing decides, behind the refit: it repairs what channels lose
and nothing of an expert that goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.provenance import How
from prunenet.evaluation.choices import Cuttable
from prunenet.evaluation.divergence import model_divergences, with_downs
from prunenet.models.anatomy import Anatomy
from prunenet.models.experts import Experts, rerouted
from prunenet.policies.artifact import Policy
from prunenet.policies.budget import ratio_of
from prunenet.policies.cuts import Progress, cuts_of, read_scores, stage_of
from prunenet.policies.experts import MixtureCost, expert_scores, keep_experts, line_of_cost
from prunenet.policies.options import ExpertsBy, PruneOptions
from prunenet.refit.cut import Cut
from prunenet.refit.folds import held_back
from prunenet.runtime.placement import check_together
from prunenet.text.calibration import CalibrationSet

TOKENS = 16
"""Tokens that reach an expert in the mean, below which the weights choose (aimer), and not reap."""
PATIENCE = 2
"""Numbers of experts in a row, worse than the best, behind which none is tried."""
_JUDGED = 8


@dataclass(frozen=True, slots=True)
class Removal:
    """Which experts go, and what is cut from the rest.

    Attributes:
        kept: mask of the experts of each layer.
        by: what chose them.
        size: of the channels of those that stay.
        ratio: share of the budget that was asked for, as that of the FFN channels; None where a
            number of experts was.
        tried: KL(dense || cut) in nats per token by the number of experts, the most first; empty
            where a number was asked for.
    """

    kept: Mapping[int, Tensor]
    by: ExpertsBy
    size: PruneOptions
    ratio: float | None = None
    tried: Mapping[int, float] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether all experts stay."""
        return all(bool(mask.all()) for mask in self.kept.values())

    @property
    def measured(self) -> bool:
        """Whether text had a say."""
        return self.by == "reap" or bool(self.tried)


def removal(
    model: PreTrainedModel,
    policy: Policy | None,
    asked: PruneOptions,
    blocks: CalibrationSet | None,
    progress: Progress | None,
) -> Removal:
    """Decides which experts go.

    Args:
        model: a mixture, on one device; not changed.
        policy, blocks, progress: as for `prunenet.policies.apply.prune`.
        asked: names a number of `experts`, or shares a budget with them.

    Raises:
        ValueError, UnsupportedArchitecture: as `prunenet.policies.apply.prune`.
    """
    if asked.experts is not None:
        by = asked.experts_by or "aimer"
        ids = None if blocks is None else blocks.ids
        return Removal(keep_experts(model, asked.experts, by, blocks=ids), by, asked)
    check_together(model, "removing experts")
    asked = asked.filled(policy, blocks is not None)
    assert blocks is not None, "PruneOptions.filled"
    return _shared(model, policy, asked, blocks, progress)


@torch.no_grad()
def _shared(
    model: PreTrainedModel,
    policy: Policy | None,
    asked: PruneOptions,
    blocks: CalibrationSet,
    progress: Progress | None,
) -> Removal:
    """The best place on the line of equal cost."""
    experts, ratio = Experts.of(model), ratio_of(model, asked)
    line = line_of_cost(model, asked, ratio)
    fit, judged = held_back(blocks.ids)
    reached = fit.numel() * experts.least / experts.count
    by = asked.experts_by or ("reap" if reached >= TOKENS else "aimer")
    scores = expert_scores(model, by, fit)
    kept = {
        left: {layer: experts.best(values, left) for layer, values in scores.items()}
        for left in line
    }
    text, front = blocks.rows(slice(len(fit))), int(blocks.bos is not None)
    rows = None
    if asked.parts and asked.channels != "elimination":
        assert policy is not None, "PruneOptions.filled"
        rows, _ = read_scores(model, policy, text, stage_of(progress, "scoring"))
    tried: dict[int, float] = {}
    for left, share in line.items():
        fewer = model if left == experts.count else rerouted(model, kept[left])
        way = with_downs(fewer, _cut(model, asked, text, rows, share, progress).down)
        tried[left] = float(model_divergences(model, [way], judged[:_JUDGED], unscored=front)[0])
        if min([*tried.values()][-PATIENCE:]) > min(tried.values()):
            break
    best = min(tried, key=tried.__getitem__)  # of equal ones the most experts
    size = replace(
        asked,
        ratio=line[best],
        params=None,
        active=None,
        widths="uniform",
        structures="channels",
        budget="params",
    )
    return Removal(kept[best], by, size, ratio, tried)


def _cut(
    model: PreTrainedModel,
    asked: PruneOptions,
    text: CalibrationSet,
    scores: Sequence[Tensor] | None,
    ratio: float,
    progress: Progress | None,
) -> Cut:
    """The cut of all experts to the width of one place on the line."""
    anatomy = Anatomy.of(model)
    if not ratio:
        return Cut([torch.ones(group.width, dtype=torch.bool) for group in anatomy.groups], None)
    way = {"uniform": anatomy.uniform_widths(ratio, asked.round_to)}
    refit = asked.refit != "off"
    (cuts,) = cuts_of(model, [way], asked.channels, refit, scores, text, progress)
    return cuts["uniform"]


def said_of(
    model: PreTrainedModel,
    narrow: PreTrainedModel,
    asked: PruneOptions,
    gone: Removal,
    blocks: CalibrationSet | None,
) -> How:
    """What the record says of experts that went.

    Args:
        model, narrow: before and after; shapes and configuration alone are read.
        asked: the options.
        gone: what was decided.
        blocks: the text, where there was some.
    """
    how = How(experts_by=gone.by)
    if not gone.whole or not gone.tried:
        how["experts"] = {str(n): m.nonzero().flatten().tolist() for n, m in gone.kept.items()}
    if blocks is not None and gone.measured:
        how["text"] = dict(blocks.source)
    if not gone.tried:
        return how
    before, after = (MixtureCost.of(made, asked.counts_active) for made in (model, narrow))
    given = [name.strip() for name in asked.structures.split(",")]
    return how | How(
        widths="refined",
        structures=",".join(name for name in get_args(Cuttable) if name in given),
        budget="active" if asked.counts_active else "params",
        reached=(before.total - after.total) / before.channels(before.count),
        tried={str(left): loss for left, loss in gone.tried.items()},
    )
