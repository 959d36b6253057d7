"""Runs a searched allocation by name: the accuracy predictor or evolution, with modest budgets,
judged by KL(dense || pruned).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.widths.allocation import Budget
from prunenet.policies.methods.widths.evaluations import SearchedAllocation
from prunenet.policies.methods.widths.evolution import evolution_search
from prunenet.policies.methods.widths.predictor import predictor_search
from prunenet.policies.methods.widths.width_divergence import WidthDivergence

_TOKENS = 1024


def searched_widths(
    evidence: Evidence,
    budget: Budget,
    scores: Sequence[Float[Tensor, " _"]],
    how: SearchedAllocation,
    *,
    path: str | Path | None = None,
) -> list[int]:
    """Returns the best widths of about 60 architectures, for one ranking of channels.

    Architectures are judged without refit or bias, on the first 1024 tokens of the evidence's text
    (whole blocks, at least one). Channels are ranked by the scores of the dense model, even where
    the method scores a layer behind the cut ones. For other text, refitted layers or more
    evaluations, call `predictor_search` or `evolution_search` with your own `WidthDivergence`.

    Args:
        evidence: its model, text and seed.
        budget: of all layers.
        scores: (d_ff,) of each layer, higher stays longer.
        how: see `prunenet.policies.methods.widths.predictor` and
            `prunenet.policies.methods.widths.evolution`.
        path: JSON-lines file from which a killed search continues.

    Raises:
        ValueError: there is no text; see also the two searches.
        ImportError: "predictor" without scikit-learn.
    """
    judge = WidthDivergence(
        evidence.model,
        evidence.ids[: max(1, _TOKENS // evidence.ids.shape[1])],
        scores,
        unscored=int(evidence.bos is not None),
    )
    if how == "predictor":
        return predictor_search(budget, judge, seed=evidence.seed, path=path).best.widths
    return evolution_search(budget, judge, seed=evidence.seed, path=path).widths
