"""AdaPruner: searches calibration data and importance metric together.

Source: "AdaPruner", AAAI 2025, arXiv 2503.06184; docs/methods.md, section 7. Documented: Bayesian
optimisation (tree-structured Parzen estimator) over a calibration-data subspace and an
importance-metric subspace; short or uninformative texts are filtered out first; a candidate's value
is measured on the pruned model with an evaluation set; importance is Taylor-based.

What differs. The two subspaces and the filter are [rec], our reconstruction; nothing measured with
them is the paper's number:
- data: windows of one length (shorter rests of blocks are dropped), less the fifth with the fewest
  distinct tokens; k-means of their mean last hidden states; variables are the weight of each
  cluster in [0, 1] and the number of the draw of 10 windows, of 16;
- metric: see `Metric`. Means are over a layer's slices and channels together, so that LLM-Pruner's
  four metrics and magnitude (L1) are points of the space. They are the first trials, on windows
  drawn evenly, so that the search cannot end worse than they do on its own objective. Layers are
  compared by the allocation alone;
- objective: log-perplexity of the masked model on blocks held back from the pool, nats per token.
  About 100 trials (a row of `prunenet compare`: 60, as its other searches);
- FFN channels only; no LoRA afterwards; the first 4 and the last 2 layers are left whole, as
  LLM-Pruner's.

Control: `strategy="random"` with `starts={}`, the best of as many independent draws from the same
space.

    options = AdaPrunerOptions(trials=50, log=Path("search.jsonl"))
    score = partial(adapruner.scores, ratio=0.2, options=options)
    method = replace(METHODS["adapruner"], score=score)
    narrow = pruned_model(evidence, method, 0.2)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import weights_sha256
from prunenet.evaluation.losses import next_token_loss
from prunenet.models.masks import top_channels
from prunenet.models.surgery import masking
from prunenet.policies.methods.evidence.gradients import Slice, channel_gradients
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.papers.calibration_pool import CalibrationPool
from prunenet.policies.methods.papers.tpe import (
    Choice,
    Log,
    Space,
    Span,
    Strategy,
    Trial,
    Value,
    best,
    search,
)
from prunenet.policies.methods.widths.allocation import Budget, protected
from prunenet.runtime.choices import check_fields
from prunenet.runtime.placement import home

PROTECTS = (4, 2)
DRAWS = 16
"""Draws of calibration windows to choose from, for each mixture of clusters."""

Reduction = Literal["sum", "mean", "max", "prod"]
"""How a channel's slices are combined."""
_BATCH = 4
_REDUCTIONS: dict[Reduction, Callable[[Tensor], Tensor]] = {
    "sum": lambda slices: slices.sum(0),
    "mean": lambda slices: slices.mean(0),
    "max": lambda slices: slices.amax(0),
    "prod": lambda slices: slices.prod(0),
}
METRICS: Space = {
    "lam": Span(0.0, 1.0),
    "a1": Span(0.0, 1.0),
    "a2": Span(0.0, 1.0),
    "b1": Span(0.0, 1.0),
    "b2": Span(0.0, 1.0),
    "p": Span(0.5, 2.0),
    "q": Span(0.0, 2.0),
    "reduce": Choice(get_args(Reduction)),
}
"""The metric subspace; `Metric` explains each name."""


@dataclass(frozen=True, slots=True)
class Metric:
    """Scores channel j by S_j = Reduce over slices of (1 - lam) v_j / mean v + lam e_j / mean e.

    v = |sum(a1 w g - a2 w^2 G / 2)| and e = sum |b1 sgn(w g) |w|^p |g|^q - b2 w^2 G / 2|, each over
    the weights of a slice; g the gradient, G the mean squared gradient of a sequence (see
    `gradients.Slice`).

    Attributes:
        lam, a1, a2, b1, b2: in [0, 1].
        p: in [0.5, 2].
        q: in [0, 2].
        reduce: how slices are combined.
    """

    lam: float = 0.0
    a1: float = 0.0
    a2: float = 0.0
    b1: float = 0.0
    b2: float = 0.0
    p: float = 1.0
    q: float = 1.0
    reduce: Reduction = "sum"

    def layer_scores(self, slices: Sequence[Slice]) -> Float[Tensor, " d_ff"]:
        """Scores the channels of one layer; a term whose mean is 0 counts as 0."""
        vectors, elements = [], []
        for part in slices:
            linear, square = part.weight * part.first, part.weight.square() * part.second / 2
            vectors.append((self.a1 * linear - self.a2 * square).sum(1).abs())
            powers = linear.sign() * part.weight.abs().pow(self.p) * part.first.abs().pow(self.q)
            elements.append((self.b1 * powers - self.b2 * square).abs().sum(1))
        vector, element = (_over_mean(torch.stack(terms).double()) for terms in (vectors, elements))
        return _REDUCTIONS[self.reduce]((1 - self.lam) * vector + self.lam * element)


STARTS: Mapping[str, Metric] = {
    "llm_pruner_vector": Metric(a1=1.0),
    "llm_pruner_element1": Metric(lam=1.0, b1=1.0),
    "llm_pruner_element2": Metric(lam=1.0, b2=1.0),
    "llm_pruner_mix": Metric(lam=1.0, b1=1.0, b2=1.0),
    "magnitude": Metric(lam=1.0, b1=1.0, q=0.0),
}
"""Known metrics as points of the space: they give the same order of the channels of a layer.

Magnitude is the L1 norm of a channel's weights that have a gradient (all weights, except behind a
ReLU that is never active).
"""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Holds the result of a search.

    Attributes:
        trials: all, in order; the starting points first.
        best: the trial of the lowest objective; of equal ones the first.
        scores: of each layer's channels, by the best metric on the best windows.
        keep: (d_ff,) mask of each layer, as measured by the objective.
    """

    trials: list[Trial]
    best: Trial
    scores: list[Float[Tensor, " _"]]
    keep: list[Bool[Tensor, " _"]]


def as_llm_pruner(budget: Budget) -> list[int]:
    """Leaves the first 4 and the last 2 layers whole and cuts the others by the same share."""
    return protected(budget, *PROTECTS)


@dataclass(frozen=True, slots=True)
class AdaPrunerOptions:
    """Holds the options of AdaPruner's search.

    Attributes:
        trials: including the starting points.
        strategy: "tpe", or "random" for the control.
        starts: metrics that are tried first.
        sequences: calibration windows of a candidate, 1 or more.
        tokens, clusters: see `CalibrationPool.of`.
        held_tokens: most tokens held back, in whole blocks: at least one block, at most a fifth.
        widths: the allocation of the cut.
        round_to: widths are multiples of this.
        log: file of JSON lines from which a killed search continues; None keeps trials in memory.
    """

    trials: int = 100
    strategy: Strategy = "tpe"
    starts: Mapping[str, Metric] = field(default_factory=lambda: STARTS)
    sequences: int = 10
    tokens: int = 64
    clusters: int = 8
    held_tokens: int = 1024
    widths: Callable[[Budget], Sequence[int]] = as_llm_pruner
    round_to: int = 8
    log: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)


def scores(
    evidence: Evidence, *, ratio: float = 0.3, options: AdaPrunerOptions | None = None
) -> list[Float[Tensor, " _"]]:
    """Scores each channel by the best metric on the best windows; arguments as for `searched`."""
    return searched(evidence, ratio=ratio, options=options).scores


def searched(
    evidence: Evidence,
    *,
    ratio: float = 0.3,
    options: AdaPrunerOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """Searches for the calibration windows and the metric whose cut is best on held-back text.

    A trial takes one backward pass for each sequence and one forward pass over the held-back
    blocks.

    Args:
        evidence: its last blocks are held back, the others are the pool; its seed starts every
            draw.
        ratio: at which candidates are cut, in [0, 1).
        options: default `AdaPrunerOptions()`.
        progress: called with (trials done, trials in all).

    Raises:
        ValueError: no text, fewer than two blocks, a number out of range, or widths that do not
            fit; or as `prunenet.policies.methods.papers.tpe.search`.
    """
    options = options or AdaPrunerOptions()
    if options.sequences < 1 or len(evidence.ids) < 2:
        raise ValueError(
            "AdaPruner calibrates on 1 sequence or more and checks on other text: give 2 blocks or"
            f" more, got {options.sequences} sequences and {len(evidence.ids)} blocks"
        )
    blocks, window = evidence.ids.shape
    held = evidence.ids[-max(1, min(blocks // 5, options.held_tokens // window)) :]
    pool = CalibrationPool.of(
        evidence.model,
        evidence.ids[: -len(held)],
        evidence.generator(),
        tokens=options.tokens,
        clusters=options.clusters,
        bos=evidence.bos,
    )
    budget = Budget.of(evidence.model, ratio, round_to=options.round_to)
    wanted = list(options.widths(budget))
    even = {f"cluster_{i}": float(size / pool.sizes.max()) for i, size in enumerate(pool.sizes)}

    def made(params: Mapping[str, Value]) -> tuple[list[Tensor], list[Tensor]]:
        return _candidate(evidence.model, pool, params, options.sequences, wanted)

    front = int(evidence.bos is not None)

    found = search(
        lambda params: masked_loss(evidence.model, made(params)[1], held, unscored=front),
        {**METRICS, **{name: Span(0.0, 1.0) for name in even}, "draw": Choice(tuple(range(DRAWS)))},
        options.trials,
        seed=evidence.seed,
        strategy=options.strategy,
        starts=[
            {name: getattr(metric, name) for name in METRICS} | even | {"draw": 0}
            for metric in options.starts.values()
        ],
        log=None if options.log is None else _log(evidence, ratio, options, wanted),
        progress=progress,
    )
    best_scores, keep = made(best(found).params)
    return Found(found, best(found), best_scores, keep)


@torch.no_grad()
def masked_loss(
    model: PreTrainedModel,
    keep: Sequence[Bool[Tensor, " _"]],
    ids: Int[Tensor, "n tokens"],
    *,
    unscored: int = 0,
) -> float:
    """Returns the log-perplexity, in nats per token, of a model without the removed channels.

    Args:
        model: the dense one; left as it was.
        keep: (d_ff,) mask of each layer.
        ids: token blocks of 2 tokens or more.
        unscored: as for `prunenet.evaluation.losses.next_token_loss`.
    """
    with masking(model, keep):
        parts = torch.split(ids.to(home(model)), _BATCH)
        losses = (float(next_token_loss(model, part, unscored=unscored)) for part in parts)
        return sum(loss * len(part) for loss, part in zip(losses, parts, strict=True)) / len(ids)


def _candidate(
    model: PreTrainedModel,
    pool: CalibrationPool,
    params: Mapping[str, Value],
    sequences: int,
    widths: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the scores and keep masks of one point of the space."""
    weights = [float(params[f"cluster_{i}"]) for i in range(pool.clusters)]
    generator = torch.Generator().manual_seed(int(params["draw"]))
    metric = Metric(**{name: params[name] for name in METRICS})  # type: ignore[arg-type]
    layers = channel_gradients(model, pool.drawn(weights, sequences, generator))
    found = [metric.layer_scores(slices) for slices in layers]
    return found, [top_channels(row, width) for row, width in zip(found, widths, strict=True)]


def _over_mean(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)


def _log(evidence: Evidence, ratio: float, options: AdaPrunerOptions, widths: list[int]) -> Log:
    """Names the log with all that the objective depends on, such as the model and the text."""
    assert options.log is not None
    settings = {
        "model": weights_sha256(evidence.model),
        "text": hashlib.sha256(evidence.ids.cpu().contiguous().numpy().tobytes()).hexdigest(),
        "ratio": ratio,
        "sequences": options.sequences,
        "tokens": options.tokens,
        "widths": widths,
    }
    return Log(options.log, settings)
