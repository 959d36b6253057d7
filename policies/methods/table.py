"""The methods that PruneNet is compared with: one row each. To add one, write its file and add its
row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.layers import FFN
from prunenet.models.rotation import check_rotatable
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
    wanda_sp,
)
from prunenet.policies.methods.papers import (
    prunenet_published as published,
)
from prunenet.refit.moments import Energies

Needs = Literal["weights", "text", "gradients"]
Allocation = Literal["uniform", "global", "protected", "owl", "influence", "predictor", "evolution"]
Compensation = Literal["none", "mean_bias"]


@dataclass(frozen=True, slots=True)
class Method:
    """How to choose the FFN channels that stay, to merge them, or to make another model of equal
    size.

    Exactly one of `score`, `merge` and `rebuild` is given.

    Attributes:
        name: as in `METHODS`.
        needs: what it looks at besides the architecture; "gradients" are of the loss on text.
        source: where it was published.
        score: one score per channel of each layer, higher stays longer.
        merge: the FFN of each layer, narrowed to the given widths.
        with_heads: scores of channels and of groups of attention heads, where the method cuts both.
        rebuild: the model at a ratio, widths a multiple of `round_to`, where it is no matter of FFN
            channels; it has no more parameters than a cut at the ratio leaves. Raises
            UnsupportedArchitecture where `able` does.
        able: raises UnsupportedArchitecture for a model that `rebuild` cannot take.
        layer_score: the score of one layer, where the method is published as sequential (each layer
            measured behind the already cut ones); None otherwise.
        comparable: whether scores of different layers, and those of channels and groups, may be
            ranked together as they are.
        compensate: what the published method does about what it removed.
        allocation: the published one.
        protects: layers at both ends (first, last) that allocation "protected" leaves whole;
            "global" too, where that is the published one.
        searches: whether `score` searches at a size and takes it, as `ratio`: the one of the cut is
            meant.
    """

    name: str
    needs: Needs
    source: str
    score: Callable[[Evidence], list[Float[Tensor, " _"]]] | None = None
    merge: Callable[[Evidence, Sequence[int]], list[FFN]] | None = None
    with_heads: Callable[[Evidence], Scores] | None = None
    rebuild: Callable[[Evidence, float, int], PreTrainedModel] | None = None
    able: Callable[[PreTrainedModel], None] | None = None
    layer_score: Callable[[FFN, Energies], Float[Tensor, " _"]] | None = None
    comparable: bool = False
    compensate: Compensation = "none"
    allocation: Allocation = "uniform"
    protects: tuple[int, int] = (0, 0)
    searches: bool = False


_PRUNENET = "Sengupta et al., ICLR 2025, arXiv 2501.15296"
_LILA = "LILA, 2026, as in METHODS.md section 6; the distance is a reconstruction, see lila.py"
_SAAP_SOURCE = (
    "SAAP, Zheng et al., 2024, arXiv 2412.15127, as in METHODS.md section 8; mostly a"
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


def _saap(name: str, differs: str, **options: Any) -> Method:
    return Method(
        name,
        "gradients",
        f"{_SAAP_SOURCE}{differs}",
        partial(saap.scores, **options),
        with_heads=partial(saap.with_heads, **options),
        comparable=True,
        allocation="global",
        protects=(3, 2),
    )


_ADAPRUNER: dict[str, Any] = {
    "searches": True,
    "needs": "gradients",
    "allocation": "protected",
    "protects": adapruner.PROTECTS,
}
_TRIALS = 60  # as many as the searched allocations measure architectures
_ADAPRUNER_SOURCE = (
    "AdaPruner, AAAI 2025, arXiv 2503.06184, as in METHODS.md section 7; a reconstruction, see"
    " adapruner.py"
)
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
        compensate="mean_bias",
        allocation="global",
    ),
    _taylor("vector"),
    _taylor("element1"),
    _taylor("element2"),
    _taylor("mix"),
    _saap("saap", ""),
    _saap("saap_flipped", "; the sign of the stability term turned over", removes="stable"),
    _saap("saap_fusion", "; without the stability term", beta=0.0),
    Method(
        "adapruner",
        source=_ADAPRUNER_SOURCE,
        score=partial(adapruner.scores, trials=_TRIALS),
        **_ADAPRUNER,
    ),
    Method(
        "adapruner_random",
        source=f"{_ADAPRUNER_SOURCE}; the best of as many random draws, its control",
        score=partial(adapruner.scores, trials=_TRIALS, strategy="random", starts={}),
        **_ADAPRUNER,
    ),
    Method("slicegpt", "text", _SLICEGPT, rebuild=slicegpt.sliced_at, able=check_rotatable),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
