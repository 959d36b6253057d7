"""Searches widths by an accuracy predictor: boosted trees trained on some evaluated architectures
choose which others to evaluate.

Source: "accuracy predictor", ICASSP 2024, arXiv 2309.09507; docs/methods.md, section 9. As there:
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
from prunenet.runtime.choices import check_fields

_FOLDS = 5
_MATTER = 0.8  # share of the importance that the layers to be narrowed carry
_TIED_SHARE = 400 / 525

Pairs = Sequence[tuple[Widths, float]]


class LossPredictor:
    """Predicts a loss from the widths of all layers by gradient-boosted trees; deterministic.

    Learns the logarithm where all losses are positive. Trees do not extrapolate: predict only
    within the range of the training widths.

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
        """Predicts the loss of each architecture, up to a monotone function."""
        return np.asarray(self._trees.predict(self._features(architectures)))

    def _features(self, architectures: Sequence[Sequence[int]]) -> Float64[ndarray, "n layers"]:
        shares: Float64[ndarray, "n layers"] = np.array(architectures, dtype=float)
        shares /= self._d_ff
        return shares


@dataclass(frozen=True, slots=True)
class PredictorSearch:
    """Holds the result of a search, and how good its predictor was.

    Attributes:
        best: the best architecture, and all that were evaluated.
        importance: of each layer's width for the loss, see `LossPredictor`; from all evaluations.
        rank_correlation: Spearman's, in [-1, 1], between losses of the random architectures and
            their predictions by five-fold cross-validation.
        samples: how many random architectures the correlation is measured on.
        space: in which the last candidates were drawn.
    """

    best: Searched
    importance: list[float]
    rank_correlation: float
    samples: int
    space: Space

    def as_dict(self) -> dict[str, object]:
        """Converts the result to JSON values, without the evaluated architectures."""
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
        """Makes a table of one row a layer: importance, widths searched, width found."""
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


@dataclass(frozen=True, slots=True)
class Prediction:
    """Holds the options of a search by an accuracy predictor.

    Attributes:
        samples: random architectures to learn from, 10 or more.
        measured: candidates evaluated in a round, those predicted best; 1 or more.
        rounds: of learning, predicting and evaluating, 1 (as published) or more.
        candidates: random architectures predicted in a round, at least `measured`.
        tied: how many adjacent layers share a draw in 400 of 525 samples (published: 4; 1 ties
            none).

    Raises:
        ValueError: a number out of range.
    """

    samples: int = 44
    measured: int = 5
    rounds: int = 3
    candidates: int = 2000
    tied: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        enough = self.samples >= 2 * _FOLDS and self.candidates >= self.measured
        if not enough or min(self.measured, self.rounds, self.tied) < 1:
            raise ValueError(
                f"the predictor takes {2 * _FOLDS} or more samples, 1 or more of measured, rounds"
                " and tied, and at least as many candidates as are measured, got"
                f" samples={self.samples}, measured={self.measured}, rounds={self.rounds},"
                f" tied={self.tied}, candidates={self.candidates}"
            )


def predictor_search(
    budget: Budget,
    evaluate: Evaluator,
    options: Prediction | None = None,
    *,
    space: Space | None = None,
    seed: int = 0,
    path: str | Path | None = None,
) -> PredictorSearch:
    """Returns the best of 1 + samples + rounds * measured architectures.

    They are the uniform one, random ones, and those that a predictor chose.

    Args:
        budget: spent by every architecture.
        evaluate: see `Evaluator`.
        options: default `Prediction()`.
        space: to search; default `Space.around(budget)`.
        seed: of the draws and of the trees.
        path: JSON-lines file of all evaluations, from which a killed search, started again,
            continues (see `Evaluations`).

    Raises:
        ValueError: a space with too few architectures to learn from, or as `Evaluations`.
        ImportError: scikit-learn is not installed.
    """
    options = options or Prediction()
    _boosting()  # fails before anything is evaluated
    space = space or Space.around(budget)
    generator = torch.Generator().manual_seed(seed)
    evaluations = Evaluations(evaluate, path)
    drawn = _samples(space, tuple(uniform(budget)), options, generator)
    evaluations(drawn)
    pairs = list(evaluations.pairs.items())
    correlation = cross_validated(pairs, budget.d_ff, seed=seed)
    inner = space
    for _ in range(options.rounds):
        predictor = LossPredictor(list(evaluations.pairs.items()), budget.d_ff, seed=seed)
        inner = narrowed(space, predictor, list(evaluations.pairs))
        new = fresh(inner, options.candidates, generator, evaluations.pairs)
        if not new:
            break
        order = np.argsort(predictor(new), kind="stable")
        evaluations([new[i] for i in order[: options.measured]])
    importance = LossPredictor(list(evaluations.pairs.items()), budget.d_ff, seed=seed).importance
    return PredictorSearch(evaluations.best(), importance, correlation, len(pairs), inner)


def cross_validated(pairs: Pairs, d_ff: Sequence[int], *, seed: int = 0) -> float:
    """Returns Spearman's rank correlation, in [-1, 1], between losses and held-out predictions.

    Args:
        pairs: evaluated architectures with their losses, at least 10; every fifth one is held out
            at a time.
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
    """Returns Spearman's rank correlation, in [-1, 1]; 0 where one of the two is constant."""
    a, b = (rankdata(row) - (len(row) + 1) / 2 for row in (first, second))
    norms = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / norms if norms > 0 else 0.0


def narrowed(space: Space, predictor: LossPredictor, measured: Sequence[Widths]) -> Space:
    """Narrows the space to the better half of the levels, by partial dependence.

    Only the layers that matter are narrowed: the fewest that carry 80 % of the importance.

    Args:
        space: the whole space.
        predictor: gives the importances and the effects of levels.
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
    space: Space, first: Widths, options: Prediction, generator: torch.Generator
) -> list[Widths]:
    """Draws random architectures to learn from, after the given one.

    Raises:
        ValueError: the space holds too few.
    """
    found, count = [first], options.samples
    if options.tied > 1:
        found += fresh(space, round(count * _TIED_SHARE), generator, found, tied=options.tied)
    found += fresh(space, count + 1 - len(found), generator, found)
    if len(found) < 2 * _FOLDS:
        raise ValueError(
            f"a predictor learns from {2 * _FOLDS} architectures or more, and only {len(found)}"
            f" were found in steps of {space.step}; give a wider space or a smaller step"
        )
    return found


def _boosting() -> tuple[Any, Any]:
    """Imports scikit-learn's `config_context` and its boosted trees, which takes seconds.

    Raises:
        ImportError: scikit-learn is not installed.
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
