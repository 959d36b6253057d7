"""The methods that PruneNet is compared with: one row each. To add one, write its file and add its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from prunenet.layers import FFN
from prunenet.moments import Moments
from prunenet.policies.methods import flap, folding, lila, llm_pruner, magnitude, published, random_channels, wanda_sp
from prunenet.policies.methods.evidence import Evidence

Needs = Literal["weights", "text", "gradients"]
Allocation = Literal["uniform", "global", "protected", "owl"]
Compensation = Literal["none", "mean_bias"]


@dataclass(frozen=True, slots=True)
class Method:
    """How to choose the FFN channels that stay, or how to merge them. Exactly one of `score` and `merge` is given.

    Attributes:
        name: as in `METHODS`.
        needs: what it looks at besides the architecture; "gradients" are of the loss on text.
        source: where it was published.
        score: one score per channel of each layer, higher stays longer.
        merge: the FFN of each layer, narrowed to the given widths.
        layer_score: the score of one layer, where the method is published as sequential (each layer measured behind the already
            cut ones); None otherwise.
        comparable: whether scores of different layers may be ranked together as they are.
        compensate: what the published method does about what it removed.
        allocation: the published one.
        protects: layers at both ends (first, last) that allocation "protected" leaves whole.
    """

    name: str
    needs: Needs
    source: str
    score: Callable[[Evidence], list[Float[Tensor, " _"]]] | None = None
    merge: Callable[[Evidence, Sequence[int]], list[FFN]] | None = None
    layer_score: Callable[[FFN, Moments], Float[Tensor, " _"]] | None = None
    comparable: bool = False
    compensate: Compensation = "none"
    allocation: Allocation = "uniform"
    protects: tuple[int, int] = (0, 0)


_PRUNENET = "Sengupta et al., ICLR 2025, arXiv 2501.15296"
_LILA = "LILA, 2026, as in METHODS.md section 6; the distance is a reconstruction, see lila.py"
_TAYLOR: dict[str, Any] = {
    "needs": "gradients",
    "source": "Ma, Fang and Wang, NeurIPS 2023, arXiv 2305.11627",
    "comparable": True,
    "allocation": "protected",
    "protects": (4, 2),
}
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
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
