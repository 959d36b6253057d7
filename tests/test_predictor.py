"""The accuracy predictor, on planted losses: it finds the optimum, beats random draws, ranks, and
continues after a kill.
"""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import Planted, optimum, room
from scipy.stats import spearmanr

from prunenet.policies.methods import (
    Budget,
    Prediction,
    Space,
    best_of_random,
    predictor_search,
    uniform,
)
from prunenet.policies.methods.widths.predictor import (
    LossPredictor,
    cross_validated,
    narrowed,
    rank_correlation,
)

pytest.importorskip("sklearn")
FEW = Prediction(samples=14, measured=4, rounds=2, candidates=300)


def pairs_of(
    budget: Budget, loss: Planted, count: int, seed: int = 0
) -> list[tuple[tuple[int, ...], float]]:
    return [
        (widths, loss(widths))
        for widths in Space.around(budget).draw(count, torch.Generator().manual_seed(seed))
    ]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_it_finds_the_planted_optimum(seed) -> None:
    budget = room(5, 48)
    loss = Planted(budget.d_ff, seed)
    best, value = optimum(budget, loss)
    found = predictor_search(budget, loss, space=Space.around(budget, span=1.0), seed=seed).best
    assert found.widths == best != uniform(budget)
    assert found.loss == pytest.approx(value)
    assert len(found.pairs) == 60


@pytest.mark.parametrize("seed", range(3))
def test_at_equal_evaluations_it_beats_uniform_and_the_best_random_draw(seed) -> None:
    budget = room(12, 1536)
    loss = Planted(budget.d_ff, seed)
    found = predictor_search(
        budget, loss, Prediction(samples=40, measured=5, rounds=2, candidates=1000), seed=seed
    )
    random = best_of_random(budget, loss, len(found.best.pairs), seed=seed)
    assert len(found.best.pairs) == len(random.pairs) == 51
    assert found.best.loss < 0.9 * random.loss < 0.9 * loss(uniform(budget))
    assert found.rank_correlation > 0.6


def test_every_architecture_spends_the_budget_exactly_and_is_measured_once() -> None:
    budget = room(7, 1536, round_to=16, floor=700)
    loss = Planted(budget.d_ff)
    found = predictor_search(budget, loss, replace(FEW, tied=4)).best
    assert loss.calls == [widths for widths, _ in found.pairs]
    assert len(set(loss.calls)) == len(loss.calls) == 1 + 14 + 2 * 4
    for widths in loss.calls:
        assert budget.cost(widths) == budget.parameters
        assert all(700 <= width <= 1536 and width % 16 == 0 for width in widths)


def test_the_best_predicted_candidates_are_the_ones_that_are_measured() -> None:
    budget = room(8, 1536)
    found = predictor_search(
        budget, Planted(budget.d_ff), Prediction(samples=24, measured=6, rounds=1, candidates=300)
    )
    learnt, chosen = found.best.pairs[:25], [widths for widths, _ in found.best.pairs[25:]]
    predictor = LossPredictor(learnt, budget.d_ff)
    others = found.space.draw(300, torch.Generator().manual_seed(1))
    assert float(predictor(chosen).max()) < float(np.quantile(predictor(others), 0.1))


@pytest.mark.long
def test_a_seed_repeats_the_search_and_another_one_takes_another_way() -> None:
    budget = room(8, 1536)
    one, same, other = (
        predictor_search(budget, Planted(budget.d_ff), seed=seed, options=FEW) for seed in (0, 0, 1)
    )
    assert one == same
    assert one.best.pairs != other.best.pairs


@pytest.mark.long
@pytest.mark.parametrize("after", [10, 17])
def test_a_killed_search_goes_on_to_the_same_result_without_measuring_twice(
    tmp_path, after
) -> None:
    budget = room(8, 1536)
    expected = predictor_search(budget, Planted(budget.d_ff), options=FEW)
    path, killed, second = (
        tmp_path / "pairs.jsonl",
        Planted(budget.d_ff, dies_after=after),
        Planted(budget.d_ff),
    )
    with pytest.raises(KeyboardInterrupt):
        predictor_search(budget, killed, path=path, options=FEW)
    assert predictor_search(budget, second, path=path, options=FEW) == expected
    assert killed.calls + second.calls == [widths for widths, _ in expected.best.pairs]
    assert len(killed.calls) == after


def test_importance_is_a_share_and_points_at_the_sensitive_layers() -> None:
    budget = room(10, 1536)
    predictor = LossPredictor(pairs_of(budget, Planted(budget.d_ff), 150), budget.d_ff)
    assert sum(predictor.importance) == pytest.approx(1)
    assert set(np.argsort(predictor.importance)[-3:].tolist()) == {0, 8, 9}


@pytest.mark.long
def test_the_rank_correlation_is_spearmans_and_that_of_unseen_architectures() -> None:
    budget, draws = room(10, 1536), np.random.default_rng(0)
    first, second = draws.integers(0, 9, 30).astype(float).tolist(), draws.normal(size=30).tolist()
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) == 0
    pairs = pairs_of(budget, Planted(budget.d_ff), 100)
    assert cross_validated(pairs, budget.d_ff) > 0.8
    # Losses without any relation to the widths: a predictor that sees them fits them, one that does
    # not cannot.
    noise = [
        (widths, float(value))
        for (widths, _), value in zip(pairs, draws.normal(size=100), strict=True)
    ]
    fitted = LossPredictor(noise, budget.d_ff)([widths for widths, _ in noise])
    assert rank_correlation(fitted.tolist(), [value for _, value in noise]) > 0.8
    assert abs(cross_validated(noise, budget.d_ff)) < 0.3


def test_narrowing_keeps_the_sensitive_layers_wide_and_the_others_free() -> None:
    budget = room(10, 1536)
    space = Space.around(budget)
    pairs = pairs_of(budget, Planted(budget.d_ff), 120)
    inner = narrowed(space, LossPredictor(pairs, budget.d_ff), [widths for widths, _ in pairs])
    assert inner.low[0] > space.low[0]
    assert inner.high[0] == space.high[0]
    assert sum(low == old for low, old in zip(inner.low, space.low, strict=True)) >= 4
    assert all(
        a <= b and b <= d for a, b, d in zip(inner.low, inner.high, budget.d_ff, strict=True)
    )


@pytest.mark.long
def test_losses_that_do_not_differ_or_are_not_positive_are_no_obstacle() -> None:
    budget = room(6, 96)
    flat = predictor_search(budget, lambda widths: 1.0, options=FEW)
    assert flat.rank_correlation == 0
    assert sum(flat.importance) == 0
    assert flat.best.widths == uniform(budget)
    loss = Planted(budget.d_ff)
    shifted = predictor_search(budget, lambda widths: loss(widths) - 5, options=FEW)
    assert shifted.best.loss < loss(uniform(budget)) - 5


def test_the_result_has_a_json_and_a_markdown_form() -> None:
    budget = room(6, 96)
    found = predictor_search(budget, Planted(budget.d_ff), options=FEW)
    facts = json.loads(json.dumps(found.as_dict()))
    assert facts["widths"] == found.best.widths
    assert facts["evaluations"] == len(found.best.pairs)
    assert len(facts["importance"]) == 6
    lines = found.markdown().splitlines()
    assert f"{found.rank_correlation:.3f} on 15 held-out" in lines[0]
    assert lines[-6:] == [
        f"| {i} | {found.importance[i]:.3f} | {found.space.low[i]} to {found.space.high[i]} | {found.best.widths[i]} |"
        for i in range(6)
    ]


@pytest.mark.parametrize(
    "wrong", [{"samples": 9}, {"measured": 0}, {"rounds": 0}, {"tied": 0}, {"candidates": 4}]
)
def test_numbers_that_make_no_sense_are_an_error(wrong) -> None:
    with pytest.raises(ValueError, match="the predictor takes 10 or more samples"):
        Prediction(**wrong)


def test_a_space_with_too_few_architectures_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"only \d were found in steps of 8"):
        predictor_search(room(2, 24, 0.5), Planted((24, 24)))


def test_without_scikit_learn_it_says_what_to_install_before_anything_is_measured(
    monkeypatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    loss = Planted((96,) * 6)
    with pytest.raises(ImportError, match=r"pip install 'prunenet\[search\]'"):
        predictor_search(room(6, 96), loss)
    assert loss.calls == []
