"""Lists the methods that PruneNet is compared with, one row each. To add one, write its file and
add its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.layers import FFN
from prunenet.models.rotation import check_rotatable
from prunenet.policies.experts import check_experts
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.evidence.structures import Scores
from prunenet.policies.methods.papers import (
    adapruner,
    flap,
    folding,
    lila,
    llm_pruner,
    magnitude,
    random_channels,
    saap,
    slicegpt,
    soft_masks,
    wanda_sp,
    whole_experts,
)
from prunenet.policies.methods.papers import (
    prunenet_published as published,
)
from prunenet.policies.methods.widths.evaluations import SearchedAllocation
from prunenet.policies.options import ExpertsBy
from prunenet.refit.moments import Energies

Needs = Literal["weights", "text", "gradients"]
"""What a method reads: weights alone, activations on text, or gradients of the loss on text."""
Allocation = Literal["uniform", "global", "protected", "owl", "influence", SearchedAllocation]
"""How the width of each layer is chosen."""
MethodRefit = Literal["off", "mean_bias"]
"""What a method does about the removed channels: nothing, or FLAP's mean-bias compensation."""


@dataclass(frozen=True, slots=True)
class Method:
    """Describes a way to choose FFN channels, to merge them, or to make a model of equal size.

    Exactly one of `score`, `merge` and `rebuild` is given.

    Attributes:
        name: as in `METHODS`.
        needs: what the method reads besides the architecture.
        source: where it was published.
        score: computes one score per channel of each layer from the evidence; higher stays longer.
        merge: makes the FFN of each layer, narrowed to the given widths.
        with_heads: scores channels and groups of attention heads, where the method cuts both.
        rebuild: makes the model at a ratio with widths a multiple of `round_to`, for a method that
            does not cut FFN channels. The model has no more parameters than a cut at the ratio.
        able: raises UnsupportedArchitecture or ValueError for a model that the method cannot take.
        layer_score: scores one layer, for a method published as sequential (each layer measured
            behind the already cut ones); None otherwise.
        comparable: whether scores of different layers, and those of channels and groups, may be
            ranked together as they are.
        refit: what the published method does about the removed channels.
        allocation: the published one.
        protects: layers at both ends (first, last) that allocation "protected" leaves whole;
            "global" too, where that is the published one.
        searches: whether `score` searches at one ratio, and takes it as `ratio`.
        shrinks: which parameters it removes, all ("total"), those that one token uses ("active"),
            or both, as whoever cuts channels.
    """

    name: str
    needs: Needs
    source: str
    score: Callable[..., list[Float[Tensor, " _"]]] | None = None
    merge: Callable[[Evidence, Sequence[int]], list[FFN]] | None = None
    with_heads: Callable[[Evidence], Scores] | None = None
    rebuild: Callable[[Evidence, float, int], PreTrainedModel] | None = None
    able: Callable[[PreTrainedModel], None] | None = None
    layer_score: Callable[[FFN, Energies], Float[Tensor, " _"]] | None = None
    comparable: bool = False
    refit: MethodRefit = "off"
    allocation: Allocation = "uniform"
    protects: tuple[int, int] = (0, 0)
    searches: bool = False
    shrinks: Literal["total", "active", "both"] = "both"


_PRUNENET = "Sengupta et al., ICLR 2025, arXiv 2501.15296"
_LILA = (
    "LILA, 2026, as in docs/methods.md, section 6; the distance is a reconstruction, see lila.py"
)
_SAAP_SOURCE = (
    "SAAP, Zheng et al., 2024, arXiv 2412.15127, as in docs/methods.md, section 8; mostly a"
    " reconstruction, see saap.py"
)


def _taylor(variant: llm_pruner.Variant) -> Method:
    return Method(
        f"llm_pruner_{variant}",
        "gradients",
        "Ma, Fang and Wang, NeurIPS 2023, arXiv 2305.11627",
        partial(llm_pruner.scores, variant=variant),
        with_heads=partial(llm_pruner.with_heads, variant=variant),
        comparable=True,
        allocation="protected",
        protects=(4, 2),
    )


def _saap(
    name: str, differs: str, *, beta: float = 0.5, removes: saap.Removes = "unstable"
) -> Method:
    return Method(
        name,
        "gradients",
        f"{_SAAP_SOURCE}{differs}",
        partial(saap.scores, beta=beta, removes=removes),
        with_heads=partial(saap.with_heads, beta=beta, removes=removes),
        comparable=True,
        allocation="global",
        protects=(3, 2),
    )


def _adapruner(name: str, differs: str, options: adapruner.AdaPrunerOptions) -> Method:
    return Method(
        name,
        "gradients",
        "AdaPruner, AAAI 2025, arXiv 2503.06184, as in docs/methods.md, section 7; a"
        f" reconstruction, see adapruner.py{differs}",
        partial(adapruner.scores, options=options),
        allocation="protected",
        protects=adapruner.PROTECTS,
        searches=True,
    )


def _whole_experts(name: str, source: str, by: ExpertsBy) -> Method:
    return Method(
        name,
        "text" if by == "reap" else "weights",
        source,
        rebuild=partial(whole_experts.fewer_experts, by=by),
        able=partial(check_experts, by=by),
        shrinks="total",
    )


_TRIALS = 60  # as many as the searched allocations measure architectures
_SLICEGPT = "Ashkboos et al., ICLR 2024, arXiv 2401.15024"
_ROWS = (
    Method(
        "random",
        "weights",
        "uniform draws",
        random_channels.scores,
        with_heads=random_channels.with_heads,
    ),
    Method(
        "magnitude",
        "weights",
        "product of the norms of a channel's slices",
        magnitude.scores,
        with_heads=magnitude.with_heads,
    ),
    Method(
        "magnitude_gate",
        "weights",
        "norm of the gate row",
        partial(magnitude.scores, matrix="gate"),
    ),
    Method("magnitude_up", "weights", "norm of the up row", partial(magnitude.scores, matrix="up")),
    Method(
        "magnitude_down",
        "weights",
        "norm of the down column",
        partial(magnitude.scores, matrix="down"),
    ),
    Method("lila", "weights", _LILA, lila.scores),
    Method("lila_two_sample", "weights", _LILA, partial(lila.scores, form="two_sample")),
    Method("folding", "weights", "Wang et al., ICLR 2025, arXiv 2502.10216", merge=folding.merge),
    Method(
        "prunenet_published",
        "weights",
        f"{_PRUNENET}: random start, all that its package does on a CPU",
        published.scores,
    ),
    Method(
        "prunenet_published_trained",
        "weights",
        f"{_PRUNENET}, trained in float32",
        partial(published.scores, train=True),
    ),
    Method(
        "wanda_sp",
        "text",
        "Sun et al., ICLR 2024, arXiv 2306.11695; structured in An et al., AAAI 2024, arXiv"
        " 2312.11983",
        wanda_sp.scores,
        layer_score=wanda_sp.layer_score,
    ),
    Method(
        "flap",
        "text",
        "An et al., AAAI 2024, arXiv 2312.11983",
        flap.scores,
        with_heads=flap.with_heads,
        comparable=True,
        refit="mean_bias",
        allocation="global",
    ),
    _taylor("vector"),
    _taylor("element1"),
    _taylor("element2"),
    _taylor("mix"),
    _saap("saap", ""),
    _saap("saap_flipped", "; the sign of the stability term turned over", removes="stable"),
    _saap("saap_fusion", "; without the stability term", beta=0.0),
    _adapruner("adapruner", "", adapruner.AdaPrunerOptions(trials=_TRIALS)),
    _adapruner(
        "adapruner_random",
        "; the best of as many random draws, its control",
        adapruner.AdaPrunerOptions(trials=_TRIALS, strategy="random", starts={}),
    ),
    Method(
        "soft_masks",
        "gradients",
        "DDP, Huang et al., 2026, arXiv 2603.08065, for FFN channels and a short training",
        soft_masks.scores,
        able=soft_masks.check_maskable,
        comparable=True,
        allocation="global",
        searches=True,
    ),
    Method("slicegpt", "text", _SLICEGPT, rebuild=slicegpt.sliced_at, able=check_rotatable),
    _whole_experts("reap", "REAP, as in docs/methods.md, section 19", "reap"),
    _whole_experts("aimer", "arXiv 2603.18492", "aimer"),
    _whole_experts("random_experts", "uniform draws", "random"),
    Method(
        "fewer_per_token",
        "weights",
        "each token passes through fewer experts, all of which stay",
        rebuild=whole_experts.routed_to_fewer,
        able=whole_experts.check_routed,
        shrinks="active",
    ),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
