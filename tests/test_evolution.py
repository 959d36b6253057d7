"""Evolution over widths, on planted losses: it finds the optimum, beats random draws, and continues
after a kill.
"""

import pytest
from planted import Planted, optimum, room

from prunenet.policies.methods import (
    Budget,
    Evolution,
    Screen,
    best_of_random,
    evolution_search,
    uniform,
)


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_planted_optimum(seed) -> None:
    budget = room(5, 48)
    loss = Planted(budget.d_ff, seed)
    best, value = optimum(budget, loss)
    found = evolution_search(budget, loss, Evolution(generations=80), seed=seed)
    assert found.widths == best != uniform(budget)
    assert found.loss == pytest.approx(value)
    assert len(found.pairs) <= 172


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("layers", "generations"), [(12, 24), (30, 54)])
def test_at_equal_evaluations_it_beats_uniform_and_the_best_random_draw(
    layers, generations, seed
) -> None:
    budget = room(layers, 1536)
    loss = Planted(budget.d_ff, seed)
    found = evolution_search(budget, loss, Evolution(generations=generations), seed=seed)
    random = best_of_random(budget, loss, len(found.pairs), seed=seed)
    assert len(found.pairs) == len(random.pairs) == 12 + 2 * generations
    assert found.loss < 0.9 * random.loss < 0.9 * loss(uniform(budget))


@pytest.mark.parametrize("round_to", [1, 8, 64])
def test_every_architecture_that_it_tries_spends_the_budget_exactly(round_to) -> None:
    budget = room(7, 1536, round_to=round_to, floor=700)
    found = evolution_search(budget, Planted(budget.d_ff), Evolution(generations=18))
    for widths, _ in found.pairs:
        assert budget.cost(widths) == budget.parameters
        assert all(700 <= width <= 1536 and width % round_to == 0 for width in widths)
    assert len(found.pairs) == len(dict(found.pairs)) == 48


def test_layers_and_costs_that_differ_stay_within_the_budget_by_less_than_one_step() -> None:
    budget = Budget((100, 64, 200, 96), (3, 5, 2, 4), 900, round_to=8)
    found = evolution_search(budget, Planted(budget.d_ff), Evolution(generations=10))
    for widths, _ in found.pairs:
        assert all(
            width % 8 == 0 or width == d_ff for width, d_ff in zip(widths, budget.d_ff, strict=True)
        )
        steps = [
            c * min(8 - w % 8, f - w)
            for c, w, f in zip(budget.costs, widths, budget.d_ff, strict=True)
            if w < f
        ]
        assert 0 <= 900 - budget.cost(widths) < min(steps)


def test_a_seed_repeats_the_search_and_another_one_takes_another_way() -> None:
    budget = room(8, 1536)
    one, same, other = (
        evolution_search(budget, Planted(budget.d_ff), Evolution(generations=8), seed=seed)
        for seed in (0, 0, 1)
    )
    assert one == same
    assert one.pairs != other.pairs


def test_it_is_never_worse_than_its_start_and_starts_where_it_is_told() -> None:
    budget = room(5, 48)
    best, value = optimum(budget, Planted(budget.d_ff))
    found = evolution_search(
        budget, Planted(budget.d_ff), Evolution(generations=6, initial=0), start=best
    )
    assert found.pairs[0][0] == tuple(best) == tuple(found.widths)
    assert found.loss == value
    assert len(found.pairs) == 13
    alone = evolution_search(budget, Planted(budget.d_ff), Evolution(generations=0, initial=0))
    assert alone.widths == uniform(budget)


def test_without_initial_draws_every_child_is_a_few_switches_from_the_parent() -> None:
    budget = room(10, 1536)
    found = evolution_search(
        budget, Planted(budget.d_ff), Evolution(generations=1, offspring=30, initial=0), step=64
    )
    for widths, _ in found.pairs[1:]:
        moved = [new - old for new, old in zip(widths, uniform(budget), strict=True)]
        assert 2 <= sum(change != 0 for change in moved) <= 6
        assert sum(abs(change) for change in moved) <= 2 * 3 * 8 * 64


@pytest.mark.parametrize("after", [1, 20, 37])
def test_a_killed_search_goes_on_to_the_same_result_without_measuring_twice(
    tmp_path, after
) -> None:
    budget = room(8, 1536)
    expected = evolution_search(budget, Planted(budget.d_ff), Evolution(generations=14))
    path, killed, second = (
        tmp_path / "pairs.jsonl",
        Planted(budget.d_ff, dies_after=after),
        Planted(budget.d_ff),
    )
    with pytest.raises(KeyboardInterrupt):
        evolution_search(budget, killed, Evolution(generations=14), path=path)
    assert evolution_search(budget, second, Evolution(generations=14), path=path) == expected
    assert len(killed.calls) == after
    assert killed.calls + second.calls == [widths for widths, _ in expected.pairs]


def test_screens_judge_all_children_first_and_only_survivors_in_full(tmp_path) -> None:
    budget = room(8, 1536)
    full, cheap, cheaper = (Planted(budget.d_ff, seed) for seed in (0, 1, 2))
    screens = Screen(cheaper, 6), Screen(cheap, 2)
    found = evolution_search(
        budget,
        full,
        Evolution(generations=5, offspring=10, screens=screens),
        path=tmp_path / "pairs.jsonl",
    )
    assert [len(loss.calls) for loss in (cheaper, cheap, full)] == [50, 30, 12 + 10]
    assert len(found.pairs) == 22
    for generation in range(5):
        survived = sorted(cheap.calls[6 * generation : 6 * generation + 6], key=cheap)[:2]
        assert set(full.calls[12 + 2 * generation :][:2]) == set(survived)
    again = [Planted(budget.d_ff, seed) for seed in (0, 1, 2)]
    screens = Screen(again[2], 6), Screen(again[1], 2)
    assert found == evolution_search(
        budget,
        again[0],
        Evolution(generations=5, offspring=10, screens=screens),
        path=tmp_path / "pairs.jsonl",
    )
    assert [loss.calls for loss in again] == [[], [], []]


def test_it_ends_early_where_nothing_is_left_to_try() -> None:
    budget = room(2, 24, 0.5)
    found = evolution_search(budget, Planted(budget.d_ff), Evolution(generations=50))
    assert len(found.pairs) < 5
    whole = room(3, 48, 0.0)
    assert evolution_search(whole, Planted(whole.d_ff)).widths == [48, 48, 48]


@pytest.mark.parametrize(
    "wrong",
    [{"generations": -1}, {"offspring": 0}, {"initial": -1}, {"screens": (Screen(sum, 0),)}],
)
def test_numbers_that_make_no_sense_are_an_error(wrong) -> None:
    with pytest.raises(ValueError, match="evolution takes 0 or more generations"):
        Evolution(**wrong)


@pytest.mark.parametrize("start", [[32, 32], [48, 48, 48], [24, 32, 32], [36, 28, 32]])
def test_a_start_that_does_not_spend_the_budget_is_an_error(start) -> None:
    with pytest.raises(ValueError, match="are no start: it takes 3 multiples of 8"):
        evolution_search(room(3, 48), Planted((48,) * 3), start=start)
