"""Accuracy predictor: boosted trees learn from some measured architectures which of many others to
measure.

Source: "accuracy predictor", ICASSP 2024, arXiv 2309.09507; METHODS.md section 9. As there:
architectures are drawn at random and measured, gradient-boosted trees learn the loss from the
vector of widths, feature importances narrow the space, thousands of random vectors are predicted,
the best few are measured, and the best measured one is the result.

What differs:
- FFN widths only (published: attention and FFN), one loss (published: two perplexities and MMLU in
  one predictor);
- [rec] every architecture spends the same budget, or the least pruned would win: a feature of total
  parameters is then constant and left out; targets are log losses;
- [rec] how importances narrow the space: layers that together carry 80 % of the importance keep the
  better half of their levels, by partial dependence; the others stay free;
- dozens of measurements (published: 525 + 18), so shallow trees on random subsets, and what was
  measured joins the training set for a second and third round; the rank correlation is that of
  five-fold cross-validation (published: one 7:3 split);
- the published tying of four adjacent layers in 400 of 525 samples is an option, off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from scipy.stats import rankdata  # type: ignore[import-untyped]

from prunenet.policies.methods.widths.allocation import Budget, uniform
from prunenet.policies.methods.widths.evaluations import (
    Evaluations,
    Evaluator,
    Searched,
    Widths,
    fresh,
)
from prunenet.policies.methods.widths.space import Space

_FOLDS = 5
_MATTER = 0.8  # share of the importance that the layers to be narrowed carry
_TIED_SHARE = 400 / 525

Pairs = Sequence[tuple[Widths, float]]


class LossPredictor:
    """Gradient-boosted trees from the widths of all layers to a loss; exact repetition gives exact
    repetition.

    They learn the logarithm of losses that are all positive, and are to be used on the range that
    they were trained on: trees do not extrapolate.

    Args:
        pairs: measured architectures with their losses, at least 2.
        d_ff: of each layer.
        seed: of the random subsets of rows and features.

    Attributes:
        importance: (layers,) share of the reduction of squared error that splits on the layer's
            width make; sum 1, or all 0 where the losses do not differ.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    def __init__(self, pairs: Pairs, d_ff: Sequence[int], *, seed: int = 0) -> None:
        config_context, regressor = _boosting()
        self._d_ff = np.array(d_ff, dtype=float)
        self._trees = regressor(
            n_estimators=100,
            max_depth=2,
            learning_rate=0.15,
            subsample=0.7,
            max_features=0.5,
            random_state=seed,
        )
        losses = np.array([loss for _, loss in pairs])
        targets = np.log(losses) if losses.min() > 0 else losses
        # scikit-learn's checks of every single tree take as long as the trees.
        with config_context(skip_parameter_validation=True, assume_finite=True):
            self._trees.fit(self._features([widths for widths, _ in pairs]), targets)
        self.importance: list[float] = self._trees.feature_importances_.tolist()

    def __call__(self, architectures: Sequence[Sequence[int]]) -> Float64[ndarray, " n"]:
        """Of each: its predicted loss, up to a monotone function."""
        return np.asarray(self._trees.predict(self._features(architectures)))

    def _features(self, architectures: Sequence[Sequence[int]]) -> Float64[ndarray, "n layers"]:
        shares: Float64[ndarray, "n layers"] = np.array(architectures, dtype=float)
        shares /= self._d_ff
        return shares


@dataclass(frozen=True, slots=True)
class PredictorSearch:
    """What the search found, and how good its predictor was.

    Attributes:
        best: the best architecture measured, and all that were.
        importance: of each layer's width for the loss, see `LossPredictor`; of all pairs measured.
        rank_correlation: Spearman's, in [-1, 1], between the losses of the random architectures and
            what predictors say that have not seen them (five-fold cross-validation).
        samples: how many random architectures it is of.
        space: in which the last candidates were drawn.
    """

    best: Searched
    importance: list[float]
    rank_correlation: float
    samples: int
    space: Space

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the architectures measured are left out, see
        `prunenet.policies.methods.widths.evaluations`.
        """
        return {
            "widths": self.best.widths,
            "loss": self.best.loss,
            "evaluations": len(self.best.pairs),
            "rank_correlation": self.rank_correlation,
            "samples": self.samples,
            "importance": self.importance,
            "low": list(self.space.low),
            "high": list(self.space.high),
        }

    def markdown(self) -> str:
        """One row a layer: its importance, the widths that stayed in the search, and the width
        found.
        """
        rows = zip(self.importance, self.space.low, self.space.high, self.best.widths, strict=True)
        table = "\n".join(
            f"| {layer} | {share:.3f} | {low} to {high} | {width} |"
            for layer, (share, low, high, width) in enumerate(rows)
        )
        return (
            f"Rank correlation {self.rank_correlation:.3f} on {self.samples} held-out"
            f" architectures; loss {self.best.loss:.4g} after {len(self.best.pairs)}"
            " evaluations.\n\n| layer | importance | searched | width"
            f" |\n|---|---|---|---|\n{table}\n"
        )


def predictor_search(
    budget: Budget,
    evaluate: Evaluator,
    *,
    samples: int = 44,
    measured: int = 5,
    rounds: int = 3,
    candidates: int = 2000,
    tied: int = 1,
    space: Space | None = None,
    seed: int = 0,
    path: str | Path | None = None,
) -> PredictorSearch:
    """The best of 1 + samples + rounds * measured architectures: uniform, random ones, and those
    that a predictor chose.

    Args:
        budget: spent by every architecture.
        evaluate: see `Evaluator`.
        samples: random architectures to learn from, 10 or more.
        measured: candidates measured in a round, those predicted best; 1 or more.
        rounds: of learning, predicting and measuring, 1 (as published) or more.
        candidates: random architectures predicted in a round, at least `measured`.
        tied: so many adjacent layers share a draw in 400 of 525 samples (published: 4; 1 ties
            none).
        space: to search; default `Space.around(budget)`.
        seed: of the draws and of the trees.
        path: JSON-lines file of the pairs; a killed search, started again, goes on (see
            `Evaluations`).

    Raises:
        ValueError: a number out of range, a space with too few architectures to learn from, or as
            `Evaluations`.
        ImportError: scikit-learn is not installed.
    """
    if samples < 2 * _FOLDS or min(measured, rounds, tied) < 1 or candidates < measured:
        raise ValueError(
            f"the predictor takes {2 * _FOLDS} or more samples, 1 or more of measured, rounds and"
            f" tied, and at least as many candidates as are measured, got {samples=}, {measured=},"
            f" {rounds=}, {tied=}, {candidates=}"
        )
    _boosting()  # where it is missing, said before anything is measured
    space = space or Space.around(budget)
    generator = torch.Generator().manual_seed(seed)
    evaluations = Evaluations(evaluate, path)
    drawn = _samples(space, tuple(uniform(budget)), samples, tied, generator)
    evaluations(drawn)
    pairs = list(evaluations.pairs.items())
    correlation = cross_validated(pairs, budget.d_ff, seed=seed)
    inner = space
    for _ in range(rounds):
        predictor = LossPredictor(list(evaluations.pairs.items()), budget.d_ff, seed=seed)
        inner = narrowed(space, predictor, list(evaluations.pairs))
        new = fresh(inner, candidates, generator, evaluations.pairs)
        if not new:
            break
        evaluations([new[i] for i in np.argsort(predictor(new), kind="stable")[:measured]])
    importance = LossPredictor(list(evaluations.pairs.items()), budget.d_ff, seed=seed).importance
    return PredictorSearch(evaluations.best(), importance, correlation, len(pairs), inner)


def cross_validated(pairs: Pairs, d_ff: Sequence[int], *, seed: int = 0) -> float:
    """Spearman's rank correlation between losses and the predictions of predictors that have not
    seen them, in [-1, 1].

    Args:
        pairs: measured architectures with their losses, at least 10; every fifth one is held out at
            a time.
        d_ff, seed: see `LossPredictor`.

    Returns:
        0 where the losses, or the predictions, do not differ.
    """
    predicted = np.zeros(len(pairs))
    for fold in range(_FOLDS):
        held = range(fold, len(pairs), _FOLDS)
        seen = [pair for number, pair in enumerate(pairs) if number % _FOLDS != fold]
        predicted[held] = LossPredictor(seen, d_ff, seed=seed)(
            [pairs[number][0] for number in held]
        )
    return rank_correlation(predicted.tolist(), [loss for _, loss in pairs])


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, in [-1, 1]; 0 where one of the two is constant."""
    a, b = (rankdata(row) - (len(row) + 1) / 2 for row in (first, second))
    norms = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / norms if norms > 0 else 0.0


def narrowed(space: Space, predictor: LossPredictor, measured: Sequence[Widths]) -> Space:
    """The space with, in the layers that matter, only the levels between the best ones by partial
    dependence.

    Args:
        space: all that may be searched.
        predictor: its importances say which layers matter: the fewest that carry 80 %.
        measured: architectures over which the effect of a layer's width is averaged.

    Returns:
        The space itself where the levels that are left cannot spend the budget.
    """
    low, high = list(space.low), list(space.high)
    carried = 0.0
    for layer in np.argsort(-np.array(predictor.importance), kind="stable").tolist():
        if carried >= _MATTER or predictor.importance[layer] == 0:
            break
        carried += predictor.importance[layer]
        levels = [*range(space.low[layer], space.high[layer], space.step), space.high[layer]]
        changed = [[*row[:layer], level, *row[layer + 1 :]] for level in levels for row in measured]
        effect = predictor(changed).reshape(len(levels), len(measured)).mean(1)
        good = [
            level for level, loss in zip(levels, effect, strict=True) if loss <= np.median(effect)
        ]
        low[layer], high[layer] = min(good), max(good)
    return space.narrowed(low, high)


def _samples(
    space: Space, first: Widths, count: int, tied: int, generator: torch.Generator
) -> list[Widths]:
    """The given architecture and so many random ones.

    Raises:
        ValueError: there are not enough to learn from.
    """
    found = [first]
    if tied > 1:
        found += fresh(space, round(count * _TIED_SHARE), generator, found, tied=tied)
    found += fresh(space, count + 1 - len(found), generator, found)
    if len(found) < 2 * _FOLDS:
        raise ValueError(
            f"a predictor learns from {2 * _FOLDS} architectures or more, and only {len(found)}"
            f" were found in steps of {space.step}; give a wider space or a smaller step"
        )
    return found


def _boosting() -> tuple[Any, Any]:
    """scikit-learn's `config_context` and its boosted trees; loading them takes seconds, so only
    where they are used.
    """
    try:
        from sklearn import config_context  # type: ignore[import-untyped]
        from sklearn.ensemble import GradientBoostingRegressor  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError(
            "the accuracy predictor needs scikit-learn, which is not installed: pip install"
            " 'prunenet[search]'"
        ) from None
    return config_context, GradientBoostingRegressor
