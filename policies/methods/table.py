"""The methods that PruneNet is compared with: one row each. To add one, write its file and add its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.layers import FFN
from prunenet.moments import Moments
from prunenet.policies.methods import (
    adapruner,
    flap,
    folding,
    lila,
    llm_pruner,
    magnitude,
    published,
    random_channels,
    saap,
    slicegpt,
    wanda_sp,
)
from prunenet.policies.methods.evidence import Evidence
from prunenet.rotation import check_rotatable

Needs = Literal["weights", "text", "gradients"]
Allocation = Literal["uniform", "global", "protected", "owl", "influence", "predictor", "evolution"]
Compensation = Literal["none", "mean_bias"]


@dataclass(frozen=True, slots=True)
class Method:
    """How to choose the FFN channels that stay, to merge them, or to make another model of equal size.

    Exactly one of `score`, `merge` and `rebuild` is given.

    Attributes:
        name: as in `METHODS`.
        needs: what it looks at besides the architecture; "gradients" are of the loss on text.
        source: where it was published.
        score: one score per channel of each layer, higher stays longer.
        merge: the FFN of each layer, narrowed to the given widths.
        rebuild: the model at a ratio, widths a multiple of `round_to`, where it is no matter of FFN channels; it has no more
            parameters than a cut at the ratio leaves. Raises UnsupportedArchitecture where `able` does.
        able: raises UnsupportedArchitecture for a model that `rebuild` cannot take.
        layer_score: the score of one layer, where the method is published as sequential (each layer measured behind the already
            cut ones); None otherwise.
        comparable: whether scores of different layers may be ranked together as they are.
        compensate: what the published method does about what it removed.
        allocation: the published one.
        protects: layers at both ends (first, last) that allocation "protected" leaves whole; "global" too, where that is the
            published one.
        searches: whether `score` searches at a size and takes it, as `ratio`: the one of the cut is meant.
    """

    name: str
    needs: Needs
    source: str
    score: Callable[[Evidence], list[Float[Tensor, " _"]]] | None = None
    merge: Callable[[Evidence, Sequence[int]], list[FFN]] | None = None
    rebuild: Callable[[Evidence, float, int], PreTrainedModel] | None = None
    able: Callable[[PreTrainedModel], None] | None = None
    layer_score: Callable[[FFN, Moments], Float[Tensor, " _"]] | None = None
    comparable: bool = False
    compensate: Compensation = "none"
    allocation: Allocation = "uniform"
    protects: tuple[int, int] = (0, 0)
    searches: bool = False


_PRUNENET = "Sengupta et al., ICLR 2025, arXiv 2501.15296"
_LILA = "LILA, 2026, as in METHODS.md section 6; the distance is a reconstruction, see lila.py"
_TAYLOR: dict[str, Any] = {
    "needs": "gradients",
    "source": "Ma, Fang and Wang, NeurIPS 2023, arXiv 2305.11627",
    "comparable": True,
    "allocation": "protected",
    "protects": (4, 2),
}
_SAAP: dict[str, Any] = {
    "needs": "gradients",
    "comparable": True,
    "allocation": "global",
    "protects": (3, 2),
}
_SAAP_SOURCE = "SAAP, Zheng et al., 2024, arXiv 2412.15127, as in METHODS.md section 8; mostly a reconstruction, see saap.py"
_ADAPRUNER: dict[str, Any] = {
    "searches": True,
    "needs": "gradients",
    "allocation": "protected",
    "protects": adapruner.PROTECTS,
}
_ADAPRUNER_SOURCE = "AdaPruner, AAAI 2025, arXiv 2503.06184, as in METHODS.md section 7; a reconstruction, see adapruner.py"
_SLICEGPT = "Ashkboos et al., ICLR 2024, arXiv 2401.15024"
_ROWS = (
    Method("random", "weights", "uniform draws", random_channels.scores),
    Method("magnitude", "weights", "product of the norms of a channel's slices", magnitude.scores),
    Method("magnitude_gate", "weights", "norm of the gate row", partial(magnitude.scores, matrix="gate")),
    Method("magnitude_up", "weights", "norm of the up row", partial(magnitude.scores, matrix="up")),
    Method("magnitude_down", "weights", "norm of the down column", partial(magnitude.scores, matrix="down")),
    Method("lila", "weights", _LILA, lila.scores),
    Method("lila_two_sample", "weights", _LILA, partial(lila.scores, form="two_sample")),
    Method("folding", "weights", "Wang et al., ICLR 2025, arXiv 2502.10216", merge=folding.merge),
    Method("prunenet_published", "weights", f"{_PRUNENET}: random start, all that its package does on a CPU", published.scores),
    Method("prunenet_published_trained", "weights", f"{_PRUNENET}, trained in float32", partial(published.scores, train=True)),
    Method(
        "wanda_sp",
        "text",
        "Sun et al., ICLR 2024, arXiv 2306.11695; structured in An et al., AAAI 2024, arXiv 2312.11983",
        wanda_sp.scores,
        layer_score=wanda_sp.layer_score,
    ),
    Method(
        "flap",
        "text",
        "An et al., AAAI 2024, arXiv 2312.11983",
        flap.scores,
        comparable=True,
        compensate="mean_bias",
        allocation="global",
    ),
    Method("llm_pruner_vector", score=partial(llm_pruner.scores, variant="vector"), **_TAYLOR),
    Method("llm_pruner_element1", score=partial(llm_pruner.scores, variant="element1"), **_TAYLOR),
    Method("llm_pruner_element2", score=partial(llm_pruner.scores, variant="element2"), **_TAYLOR),
    Method("llm_pruner_mix", score=partial(llm_pruner.scores, variant="mix"), **_TAYLOR),
    Method("saap", source=_SAAP_SOURCE, score=saap.scores, **_SAAP),
    Method(
        "saap_flipped",
        source=f"{_SAAP_SOURCE}; the sign of the stability term turned over",
        score=partial(saap.scores, removes="stable"),
        **_SAAP,
    ),
    Method("saap_fusion", source=f"{_SAAP_SOURCE}; without the stability term", score=partial(saap.scores, beta=0.0), **_SAAP),
    Method("adapruner", source=_ADAPRUNER_SOURCE, score=adapruner.scores, **_ADAPRUNER),
    Method(
        "adapruner_random",
        source=f"{_ADAPRUNER_SOURCE}; the best of as many random draws, its control",
        score=partial(adapruner.scores, strategy="random", starts={}),
        **_ADAPRUNER,
    ),
    Method("slicegpt", "text", _SLICEGPT, rebuild=slicegpt.sliced_at, able=check_rotatable),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
