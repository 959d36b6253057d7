"""Applies a saved policy to a model at any ratio. Needs neither gymnasium nor stable-baselines3.

One pipeline serves every way to prune with a policy: `decide` scores channels, allocates widths,
measures and refits. `prune` cuts a model in memory or placed by its decision; `prune_streamed`
(`prunenet.policies.stream`) cuts a checkpoint on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.identity import base_of
from prunenet.checkpoints.provenance import BlockStep, How, Provenance
from prunenet.checkpoints.regimes import most
from prunenet.checkpoints.save import save_pruned
from prunenet.checkpoints.sources import check_loaded
from prunenet.evaluation.divergence import divergence, model_divergences
from prunenet.models.anatomy import Anatomy
from prunenet.models.depth import without_layers
from prunenet.models.experts import without_experts
from prunenet.models.layers import Weights, count_parameters
from prunenet.policies.artifact import Policy
from prunenet.policies.budget import allocations as allocations
from prunenet.policies.budget import bytes_left as bytes_left
from prunenet.policies.budget import ratio_of as ratio_of
from prunenet.policies.cuts import Progress as Progress
from prunenet.policies.cuts import cuts_of, read_scores
from prunenet.policies.cuts import stage_of as stage_of
from prunenet.policies.mixture import removal, said_of
from prunenet.policies.options import PruneChoices, PruneOptions, options_of
from prunenet.policies.refine import Refined, refined_sizes
from prunenet.policies.repair import repaired
from prunenet.refit.cut import Cut
from prunenet.refit.folds import held_back
from prunenet.runtime import parallel
from prunenet.runtime.floats import dtype_name
from prunenet.runtime.products import with_fast_products
from prunenet.text.calibration import CalibrationSet

AUTO_GAIN = 0.05
"""Least predicted gain in perplexity for which widths "auto" are per-layer: stock loaders read such
checkpoints only padded.
"""
_JUDGED = 8  # blocks on which uniform and per-layer widths are compared


@dataclass(frozen=True, slots=True)
class Pruned:
    """A narrow model and how it came about.

    Attributes:
        model: an ordinary transformers model. Parameters outside the FFNs are shared with the dense
            one.
        keep: (d_ff,) mask of each layer, over the dense model's channels.
        provenance: what is written beside the checkpoint; names the layers that stay.
        groups: mask of each layer's groups of heads; None where heads stay whole.
    """

    model: PreTrainedModel
    keep: list[Bool[Tensor, " _"]]
    provenance: Provenance
    groups: list[Bool[Tensor, " groups"]] | None = None

    def save_pretrained(
        self, out: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Path:
        """Writes an ordinary Hugging Face checkpoint, verified by reloading it; see
        `prunenet.checkpoints.save.save_pruned`.
        """
        # heads might have been cut, and none was: the record then says nothing of them
        whole = all(bool(mask.all()) for mask in self.groups or ())
        groups = None if whole else self.groups
        return save_pruned(
            self.model, out, self.keep, self.provenance, tokenizer=tokenizer, groups=groups
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What is cut from a model.

    Attributes:
        cut: the channels kept and, where there was a refit, the down matrices.
        ratio: share of FFN channels asked to be removed.
        regime: what the whole way looked at, the policy's training included.
        how: the steps, for the provenance.
        layers: mask of the decoder layers that stay, of which the cut is; None where all do.
    """

    cut: Cut
    ratio: float
    regime: str
    how: How
    layers: Bool[Tensor, " layers"] | None = None


def prune(
    model: PreTrainedModel,
    policy: Policy | None = None,
    options: PruneOptions | None = None,
    *,
    blocks: CalibrationSet | None = None,
    scores: Sequence[Float[Tensor, " _"]] | None = None,
    policy_name: str = "policy",
    folder: Path | None = None,
    progress: Progress | None = None,
    **choices: Unpack[PruneChoices],
) -> Pruned:
    """Cuts a model to a size, deterministically; the given model stays as it is.

    Args:
        model: a causal LM of a supported family.
        policy: scores channels and allocates widths. None: uniform widths, channels by elimination.
        options: how much to cut, and how; or its fields by name, as in `ratio=0.3`.
        blocks: calibration set to measure activations on (see `prunenet.text.calibration`). None:
            weights alone, which a policy that reads moments cannot do.
        scores: `policy.scores(model, blocks)`, where the caller has them already.
        policy_name: recorded in the provenance.
        folder: with `refit` blocks, where trained blocks are kept, so that a call that was killed
            goes on; the caller removes it. None: in memory alone.
        progress: see `Progress`.

    Raises:
        TypeError: the name of a model or of a policy in place of it.
        ValueError: see `PruneOptions`; or a choice that needs a policy or text where there is none.
        UnsupportedArchitecture: see `prunenet.models.architectures`.
    """
    check_loaded(model=model, policy=policy)
    asked = options_of(options, choices)
    if asked.experts is not None or asked.shares_experts:
        return _without_experts(model, policy, asked, blocks, policy_name, folder, progress)
    (decision,) = decide(
        model, policy, [asked], blocks=blocks, scores=scores, folder=folder, progress=progress
    )
    return pruned_by(model, decision, policy, policy_name)


def _without_experts(
    model: PreTrainedModel,
    policy: Policy | None,
    asked: PruneOptions,
    blocks: CalibrationSet | None,
    policy_name: str,
    folder: Path | None,
    progress: Progress | None,
) -> Pruned:
    """`prune` of a model from which whole experts are removed first."""
    gone = removal(model, policy, asked, blocks, progress)
    fewer = model if gone.whole else without_experts(model, gone.kept)
    read = blocks.regime if blocks is not None and gone.measured else "weights"
    if gone.size.ratio == 0:
        whole = [torch.ones(group.width, dtype=torch.bool) for group in Anatomy.of(fewer).groups]
        decision = Decision(Cut(whole, None), 0.0, read, How(widths="uniform"))
    else:
        (decision,) = decide(
            fewer, policy, [gone.size], blocks=blocks, folder=folder, progress=progress
        )
    ratio = decision.ratio if gone.ratio is None else gone.ratio
    decision = replace(decision, regime=most([decision.regime, read]), ratio=ratio)
    made = pruned_by(fewer, decision, policy, policy_name, whole=model)
    how: How = {**made.provenance.how, **said_of(model, made.model, asked, gone, blocks)}
    story = replace(made.provenance, how=how)
    if gone.size.ratio == 0:  # no channels were chosen
        story = replace(story, policy=gone.by, policy_sha256=None)
    return replace(made, provenance=story)


@with_fast_products
@torch.no_grad()
def decide(
    model: Weights,
    policy: Policy | None,
    sizes: Sequence[PruneOptions],
    *,
    blocks: CalibrationSet | None = None,
    scores: Sequence[Float[Tensor, " _"]] | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> list[Decision]:
    """Scores channels once, allocates widths for every size, measures each layer once, and refits.

    Args:
        model: in memory, placed, or streamed (without blocks).
        policy, blocks, scores, folder, progress: as for `prune`.
        sizes: differ in ratio, params, round_to and widths alone.

    Returns:
        One decision a size.

    Raises:
        ValueError, UnsupportedArchitecture: as `prune`.
    """
    sizes = [size.filled(policy, blocks is not None) for size in sizes]
    (channels,) = {size.channels for size in sizes}
    ratios = [ratio_of(model, size) for size in sizes]
    offsets: list[float] | None = None
    if channels == "elimination":
        scores = None
    elif scores is None:
        assert policy is not None
        scores, offsets = read_scores(model, policy, blocks, stage_of(progress, "scoring"))
    advance = stage_of(progress, "ablating")
    refined = refined_sizes(model, policy, sizes, ratios, blocks, scores, advance)
    given = _Given(model, policy, blocks, scores, offsets, folder, progress)
    rivals = {
        number: _own_allocation(size)
        for number, size in enumerate(sizes)
        if refined[number] is not None and size.budget == "params"
    }
    # In one pass over the layers; the first has the damping that it has alone.
    found = _decided(
        given,
        [*rivals.values(), *sizes],
        [*(ratios[number] for number in rivals), *ratios],
        [*(None for _ in rivals), *refined],
    )
    made = found[len(rivals) :]
    for number, own in zip(rivals, found, strict=False):
        made[number] = _better(given, sizes[number], made[number], own)
    return made


@dataclass(frozen=True, slots=True)
class _Given:
    """What all sizes of one call of `decide` share; see there."""

    model: Weights
    policy: Policy | None
    blocks: CalibrationSet | None
    scores: Sequence[Float[Tensor, " _"]] | None
    offsets: list[float] | None
    folder: Path | None
    progress: Progress | None


def _decided(
    given: _Given,
    sizes: Sequence[PruneOptions],
    ratios: Sequence[float],
    refined: Sequence[Refined | None],
) -> list[Decision]:
    """The decisions of sizes whose refined allocations are known."""
    if any(found is not None and found.layers is not None for found in refined):
        return [_behind_layers(given, *each) for each in zip(sizes, ratios, refined, strict=True)]
    model = given.model
    ways = [
        allocations(model, given.policy, ratio, size, given.offsets) if found is None else found.way
        for size, ratio, found in zip(sizes, ratios, refined, strict=True)
    ]
    ((channels, refit),) = {(size.channels, size.refit != "off") for size in sizes}
    cuts = cuts_of(model, ways, channels, refit, given.scores, given.blocks, given.progress)
    settle = partial(_settled, given)
    return [settle(*each) for each in zip(sizes, ratios, cuts, refined, strict=True)]


def _behind_layers(
    given: _Given, size: PruneOptions, ratio: float, found: Refined | None
) -> Decision:
    """The decision of one size, all that is measured being measured behind the layers that go."""
    if found is None or found.layers is None:
        return _decided(given, [size], [ratio], [found])[0]
    assert isinstance(given.model, PreTrainedModel), "a streamed checkpoint measures nothing"
    assert given.scores is not None, "PruneOptions.filled"
    fewer = without_layers(given.model, found.layers)
    rows = zip(given.scores, found.layers.tolist(), strict=True)
    given = replace(given, model=fewer, scores=[row for row, stays in rows if stays])
    (decision,) = _decided(given, [size], [ratio], [found.behind_layers()])
    return replace(decision, layers=found.layers)


def _own_allocation(size: PruneOptions) -> PruneOptions:
    """The same size by the policy's own allocation of channels; none of its FFNs is trained yet."""
    refit = "layerwise" if size.refit == "blocks" else size.refit
    return replace(size, widths="per-layer", structures="channels", refit=refit)


def _better(given: _Given, size: PruneOptions, made: Decision, own: Decision) -> Decision:
    """The refined decision, or the policy's own allocation of as many channels where its KL is
    lower behind the refit, on blocks that the search has not judged by.

    The search measures before the refit, which repairs channels well and heads little: on
    SmolLM2-135M it let heads go and lost 21 % of perplexity (docs/log.md, 2026-11-29).
    """
    model, blocks = given.model, given.blocks
    assert isinstance(model, PreTrainedModel), "a streamed checkpoint measures nothing"
    assert blocks is not None, "PruneOptions.filled"
    held, front = held_back(blocks.ids)[1], int(blocks.bos is not None)
    judged = held[_JUDGED : 2 * _JUDGED] if len(held) > _JUDGED else held
    ways = [partial(_narrow_of, model, way) for way in (made, own)]
    refined, other = model_divergences(model, ways, judged, unscored=front).tolist()
    if refined <= other:
        return made
    size = replace(_own_allocation(size), refit=size.refit)
    return own if size.refit != "blocks" else _decided(given, [size], [own.ratio], [None])[0]


@contextmanager
def _narrow_of(model: PreTrainedModel, decision: Decision) -> Iterator[PreTrainedModel]:
    """The narrow model of a decision; the given one stays as it is."""
    base = model if decision.layers is None else without_layers(model, decision.layers)
    yield decision.cut.model(base)


def _settled(
    given: _Given,
    size: PruneOptions,
    ratio: float,
    cuts: dict[str, Cut],
    kept: Refined | None,
) -> Decision:
    """The decision of one size: the better of its cuts, repaired."""
    model, policy, blocks = given.model, given.policy, given.blocks
    trained = None if policy is None else policy.config.gain
    gain = trained if blocks is None else _gain(model, cuts, blocks)
    chosen, gain = chosen_allocation(cuts, gain)
    cut = cuts[chosen] if kept is None else replace(cuts[chosen], groups=kept.groups)
    if blocks is not None:
        assert isinstance(model, PreTrainedModel), "a streamed checkpoint measures nothing"
        shown = stage_of(given.progress, "refitting")
        ids, kinds = blocks.ids, blocks.kinds
        cut = repaired(model, cut, size.refit, ids, kinds, folder=given.folder, progress=shown)
    how = How(widths=chosen, predicted_gain=gain, channels=size.channels, refit=size.refit)
    if size.round_to != "auto":
        how["round_to"] = size.round_to
    if kept is not None and not size.exact:
        how |= How(structures=",".join(size.parts), budget=size.budget, reached=kept.reached)
        how |= How(of_all=True) if size.of_all else How()
    if cut.losses:
        how["blocks"] = {
            str(number): BlockStep(before=loss.before, after=loss.after, strength=loss.strength)
            for number, loss in cut.losses.items()
        }
    if blocks is not None:
        how["text"] = dict(blocks.source)
    if cut.few:
        how["few_tokens"] = len(cut.few)
    return Decision(cut, ratio, _regime(policy, blocks), how)


def pruned_by(
    model: PreTrainedModel,
    decision: Decision,
    policy: Policy | None,
    policy_name: str,
    whole: PreTrainedModel | None = None,
) -> Pruned:
    """The narrow model of a decision, with its provenance; `whole` is the model before experts
    were removed from it.
    """
    whole = model if whole is None else whole
    base = model if decision.layers is None else without_layers(model, decision.layers)
    narrow = decision.cut.model(base)
    provenance = provenance_of(base, narrow, decision, policy, policy_name, base_of(whole))
    if decision.layers is not None:
        left = tuple(decision.layers.nonzero().flatten().tolist())
        provenance = replace(provenance, dense_layers=len(decision.layers), layers=left)
    total, body = count_parameters(whole)
    provenance = replace(provenance, parameters_before=total, non_embedding_before=body)
    return Pruned(narrow, decision.cut.keep, provenance, decision.cut.groups)


def provenance_of(
    dense: PreTrainedModel,
    narrow: PreTrainedModel,
    decision: Decision,
    policy: Policy | None,
    policy_name: str,
    origin: dict[str, str],
) -> Provenance:
    """The provenance of a narrow model; of both models only shapes and configuration are read.

    Args:
        origin: of the dense model, see `prunenet.checkpoints.identity.base_of`.
    """
    return Provenance.of(
        dense,
        narrow,
        policy="elimination" if policy is None else policy_name,
        policy_sha256=None if policy is None else policy.sha256,
        seed=None if policy is None else policy.config.recipe.get("seed"),
        regime=decision.regime,
        ratio=decision.ratio,
        how={"dtype": dtype_name(dense.dtype), **decision.how},
        **origin,
    )


def chosen_allocation(names: Mapping[str, object], gain: float | None) -> tuple[str, float | None]:
    """Which allocation, and the gain that decided; None where there was nothing to decide."""
    if len(names) == 1:
        return next(iter(names)), None
    return "per-layer" if gain is not None and gain > AUTO_GAIN else "uniform", gain


def _gain(model: Weights, cuts: dict[str, Cut], blocks: CalibrationSet) -> float | None:
    """By which share per-layer widths lower exp(KL), and so perplexity, on some of the blocks.

    Before the refit, which hides half of the gain on text of the same writing but not on others:
    SmolLM2-135M at 0.2, 7 % predicted so and 2 to 4 % refitted, where perplexity falls by 5 % on
    WikiText-2 validation and Penn Treebank.
    """
    if len(cuts) == 1:
        return None
    assert isinstance(model, PreTrainedModel)
    judged, front = held_back(blocks.ids)[1][:_JUDGED], int(blocks.bos is not None)
    own = [number for number in range(len(cuts)) if parallel.is_owner(number)]
    downs = [Cut(cut.keep, None).down for cut in cuts.values()]
    losses = {
        number: [torch.tensor(divergence(model, downs[number], judged, unscored=front)).double()]
        for number in own
    }
    loss = dict(
        zip(
            cuts,
            (float(value) for (value,) in parallel.gather_from_owners(losses, len(cuts))),
            strict=True,
        )
    )
    return 1 - math.exp(loss["per-layer"] - loss["uniform"])


def _regime(policy: Policy | None, blocks: CalibrationSet | None) -> str:
    """What the whole way looked at, training included: the most that any step of it did."""
    seen = [policy.config.regime] if policy is not None else []
    return most([*seen, *([blocks.regime] if blocks is not None else [])])
