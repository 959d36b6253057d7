"""Applies a saved policy to a model at any ratio. Needs neither gymnasium nor stable-baselines3."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.identity import identify
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.regimes import most
from prunenet.checkpoints.save import save_pruned
from prunenet.evaluation.divergence import divergence
from prunenet.models.layers import count_parameters, ffn_widths, iter_ffns
from prunenet.models.masks import (
    check_ratio,
    ratio_for_parameters,
    top_channels,
    width_at,
    widths_for_budget,
)
from prunenet.policies.artifact import Policy, check_measured
from prunenet.refit.cut import Cut, cut_layers, refit_sequentially
from prunenet.refit.folds import held_back
from prunenet.runtime import parallel
from prunenet.text.calibration import CalibrationSet

AUTO_GAIN = 0.05
"""Widths "auto" takes per-layer ones, which stock loaders read only padded, for a predicted gain in
perplexity above this.
"""
WIDTHS = ("auto", "uniform", "per-layer")
CHANNELS = ("policy", "blend", "elimination")
MEASURED = 1 / 3
"""Share of the measured energies' ranks in "blend": the best of 1/5, 1/4, 1/3 and 2/5 on validation
texts.
"""
REFITS = ("off", "layerwise", "sequential")
_JUDGED = 8  # blocks on which uniform and per-layer widths are compared


@dataclass(frozen=True, slots=True)
class Pruned:
    """A narrow model and how it came about.

    Attributes:
        model: an ordinary transformers model. Parameters outside the FFNs are shared with the dense
            one.
        keep: (d_ff,) mask of each layer, over the dense model's channels.
        provenance: what is written beside the checkpoint.
    """

    model: PreTrainedModel
    keep: list[Bool[Tensor, " d_ff"]]
    provenance: Provenance

    def save_pretrained(
        self, out: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Path:
        """Writes an ordinary Hugging Face checkpoint, verified by reloading it; see
        `prunenet.checkpoints.save.save_pruned`.
        """
        return save_pruned(self.model, out, self.keep, self.provenance, tokenizer=tokenizer)


def prune(
    model: PreTrainedModel,
    policy: Policy | None = None,
    *,
    ratio: float | None = None,
    params: float | None = None,
    round_to: int = 8,
    widths: str = "auto",
    blocks: CalibrationSet | None = None,
    channels: str | None = None,
    refit: str | None = None,
    scores: Sequence[Float[Tensor, " _"]] | None = None,
    policy_name: str = "policy",
    progress: Callable[[str, int, int], None] | None = None,
) -> Pruned:
    """Cuts a model to a size, deterministically; the given model stays as it is.

    Args:
        model: a causal LM of a supported family.
        policy: says where to cut, and which channels stay. None: uniform widths, channels by
            elimination.
        ratio: share of FFN channels removed, in [0, 1).
        params: share of *all* parameters removed, in [0, 1), as nearly as rounded widths allow.
            Exactly one of the two is given.
        round_to: widths are multiples of this.
        widths: "uniform", "per-layer" (as the policy learned, as many channels in all) or "auto":
            per-layer where that is predicted to lower perplexity by more than 5 % (`AUTO_GAIN`).
        blocks: token blocks to measure activations on (see `prunenet.text.calibration`). None:
            weights alone, which a policy that reads moments cannot do.
        channels: "policy" (its scores, from weights and, where it reads moments, from blocks),
            "blend" (two thirds of their ranks and one of those by energies measured on blocks) or
            "elimination" (greedy, from activations: needs blocks). On self-written text elimination
            knows more about that text and less about others. Default: with blocks, the blend where
            a policy reads weights alone; else the policy where there is one.
        refit: "off", "layerwise" or "sequential" (behind the layers that are cut already) least
            squares of the down matrices on blocks. Default: layerwise where there are blocks.
        scores: `policy.scores(model, blocks)`, where the caller has them already.
        policy_name: recorded in the provenance.
        progress: called with (what is going on, layers done, layers in all).

    Raises:
        ValueError: neither or both of ratio and params, or one out of range; an unknown choice, or
            one that needs a policy or blocks that are not given.
        UnsupportedArchitecture: see `prunenet.models.architectures`.
    """
    channels, refit = check_choices(policy, blocks is not None, widths, channels, refit)
    ratio = check_size(model, ratio, params, round_to)
    ways = ways_to_cut(model, policy, ratio, widths, round_to)
    ranked = scores if channels != "elimination" else None
    if policy is not None and channels != "elimination" and ranked is None:
        ranked = policy.scores(model, blocks, progress=stage_of(progress, "scoring"))
    if blocks is None:
        assert policy is not None
        assert ranked is not None
        cuts = {
            name: Cut([top_channels(*pair) for pair in zip(ranked, way, strict=True)], None)
            for name, way in ways.items()
        }
        gain = policy.config.gain
    else:
        counted = stage_of(progress, "cutting")
        how_much = MEASURED if channels == "blend" else 0.0
        options: dict[str, Any] = {
            "scores": ranked,
            "measured": how_much,
            "refit": refit != "off",
            "progress": counted,
        }
        found = cut_layers(model, blocks.ids, list(ways.values()), **options)
        cuts = dict(zip(ways, found, strict=True))
        gain = _gain(model, cuts, blocks)
    chosen, gain = chosen_way(cuts, gain)
    cut = cuts[chosen]
    if refit == "sequential":
        assert blocks is not None
        cut = refit_sequentially(
            model, cut, blocks.ids, dense_targets=False, progress=stage_of(progress, "refitting")
        )
    narrow = cut.model(model)
    how: dict[str, Any] = {
        "widths": chosen,
        "predicted_gain": gain,
        "channels": channels,
        "refit": refit,
    }
    how |= {} if blocks is None else {"text": dict(blocks.source)}
    regime = _regime(policy, blocks)
    provenance = provenance_of(
        model, narrow, policy=policy, name=policy_name, regime=regime, ratio=ratio, how=how
    )
    return Pruned(narrow, cut.keep, provenance)


def provenance_of(
    dense: PreTrainedModel,
    narrow: PreTrainedModel,
    *,
    policy: Policy | None,
    name: str,
    **facts: Any,
) -> Provenance:
    """The record of a cut; `facts` are those that the policy and the models do not say."""
    return Provenance.of(
        dense,
        narrow,
        policy=name if policy is not None else "elimination",
        policy_sha256=None if policy is None else policy.sha256,
        seed=None if policy is None else policy.config.recipe.get("seed"),
        **facts,
        **base_of(dense),
    )


def check_choices(
    policy: Policy | None, measured: bool, widths: str, channels: str | None, refit: str | None
) -> tuple[str, str]:
    """The choices of channels and refit, defaults filled in; `measured`: whether there is text to
    measure activations on.

    Raises:
        ValueError: an unknown choice, or one that needs a policy or text where there is none.
    """
    by_default = "elimination" if policy is None else "policy" if policy.config.moments else "blend"
    channels = channels or (by_default if measured else "policy")
    refit = refit or ("layerwise" if measured else "off")
    given = (("widths", widths, WIDTHS), ("channels", channels, CHANNELS), ("refit", refit, REFITS))
    for name, value, allowed in given:
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; it is one of {', '.join(allowed)}")
    if policy is not None:
        check_measured(policy, measured)
    if not measured and (channels != "policy" or refit != "off"):
        raise ValueError(
            "blend, elimination and refit measure activations: give text (--moments self or data),"
            " or switch them off"
        )
    if policy is None and channels != "elimination":
        raise ValueError(
            "no policy to choose the channels; give one (--policy), or text to choose them by"
            " (--moments self)"
        )
    if policy is None and widths == "per-layer":
        raise ValueError(
            "no policy to say where to cut; give one (--policy), or say --widths uniform"
        )
    return channels, refit


def ways_to_cut(
    model: PreTrainedModel,
    policy: Policy | None,
    ratio: float,
    widths: str,
    round_to: int,
    offsets: list[float] | None = None,
) -> dict[str, list[int]]:
    """The widths to consider, by name; `offsets`: of the policy on this model, where they are known
    already.
    """
    uniform = [width_at(d_ff, ratio, round_to) for d_ff in ffn_widths(model)]
    if policy is None or widths == "uniform":
        return {"uniform": uniform}
    learned = widths_for_budget(
        ffn_widths(model), offsets or policy.offsets(model), ratio, round_to
    )
    if widths == "per-layer":
        return {"per-layer": learned}
    return (
        {"uniform": uniform} if learned == uniform else {"uniform": uniform, "per-layer": learned}
    )


def _gain(model: PreTrainedModel, cuts: dict[str, Cut], blocks: CalibrationSet) -> float | None:
    """By which share per-layer widths lower exp(KL), and so perplexity, on some of the blocks.

    Before the refit, which hides half of the gain on text of the same writing but not on others:
    SmolLM2-135M at 0.2, 7 % predicted so and 2 to 4 % refitted, where perplexity falls by 5 % on
    WikiText-2 validation and Penn Treebank.
    """
    if len(cuts) == 1:
        return None
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


def chosen_way(cuts: Collection[str], gain: float | None) -> tuple[str, float | None]:
    """Which cut, and the gain that decided; None where there was nothing to decide."""
    if len(cuts) == 1:
        return next(iter(cuts)), None
    return "per-layer" if gain is not None and gain > AUTO_GAIN else "uniform", gain


def _regime(policy: Policy | None, blocks: CalibrationSet | None) -> str:
    """What the whole way looked at, training included: the most that any step of it did."""
    seen = [policy.config.regime] if policy is not None else []
    return most([*seen, *([blocks.regime] if blocks is not None else [])])


def stage_of(
    progress: Callable[[str, int, int], None] | None, what: str
) -> Callable[[int, int], None] | None:
    """The callback of one stage."""
    return None if progress is None else lambda done, of: progress(what, done, of)


def resolve_ratio(model: PreTrainedModel, ratio: float | None, params: float | None) -> float:
    """The share of FFN channels to remove, from exactly one of the two ways to say it.

    Raises:
        ValueError: neither or both given, or out of range.
    """
    check_amount(ratio, params)
    if params is None:
        assert ratio is not None
        return ratio
    ffns = list(iter_ffns(model))
    total, _ = count_parameters(model)
    return ratio_for_parameters(
        params, total, [f.channel_parameters for f in ffns], [f.d_ff for f in ffns]
    )


def check_size(
    model: PreTrainedModel, ratio: float | None, params: float | None, round_to: int
) -> float:
    """`resolve_ratio`, and that every layer can be rounded to a multiple of `round_to`.

    Raises:
        ValueError: as `resolve_ratio` and `prunenet.models.masks.width_at`.
    """
    ratio = resolve_ratio(model, ratio, params)
    for d_ff in set(ffn_widths(model)):
        width_at(d_ff, ratio, round_to)
    return ratio


def check_amount(ratio: float | None, params: float | None) -> None:
    """Raises ValueError unless exactly one amount is given, in [0, 1)."""
    if (ratio is None) == (params is None):
        given = "neither" if ratio is None else "both"
        raise ValueError(
            "give one of --ratio (share of FFN channels) and --params (share of all parameters),"
            f" got {given}"
        )
    if ratio is not None:
        check_ratio(ratio)
    elif not 0 <= (params or 0) < 1:
        raise ValueError(f"share of parameters must be in [0, 1), got {params}")


def base_of(model: PreTrainedModel) -> dict[str, Any]:
    """Base model and revision, for `Provenance`."""
    source = model.config._name_or_path
    if source and Path(source).is_dir():
        name, revision = identify(source)
        return {"base_model": name, "revision": revision}
    return {
        "base_model": source or type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None) or "unknown",
    }
