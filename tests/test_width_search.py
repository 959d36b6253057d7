"""What searches over widths stand on: random architectures, what was measured, and KL(dense ||
pruned) of widths.
"""

import json

import pytest
import torch
from families import D_FF, LAYERS, tiny_model, token_ids
from planted import Planted, room

from prunenet.evaluation.divergence import divergence
from prunenet.models.masks import top_channels
from prunenet.policies.methods import (
    Budget,
    Evidence,
    Space,
    WidthDivergence,
    best_of_random,
    cut,
    uniform,
)
from prunenet.policies.methods.papers import magnitude
from prunenet.policies.methods.widths.evaluations import Evaluations
from prunenet.refit.cut import Cut, Refits
from prunenet.text.calibration import CalibrationSet

IDS = token_ids(6, 20)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Random architectures.


@pytest.mark.parametrize(
    ("ratio", "round_to", "step"), [(0.3, 8, 64), (0.3, 8, 8), (0.1, 64, None), (0.7, 1, None)]
)
def test_random_architectures_spend_the_budget_exactly_on_levels_but_for_one_layer(
    ratio, round_to, step
) -> None:
    budget = room(9, 1536, ratio, round_to=round_to)
    space = Space.around(budget, step=step)
    drawn = space.draw(300, generator())
    assert len(set(drawn)) > 250
    for widths in drawn:
        assert budget.cost(widths) == budget.parameters
        assert all(0 < width <= 1536 and width % round_to == 0 for width in widths)
        assert sum(width % space.step != 0 for width in widths) <= 1
    spread = torch.tensor(drawn).double().std(0)
    assert float(spread.min()) > 0.4 * float(spread.max()), "some layers hardly vary"


@pytest.mark.parametrize("seed", range(6))
def test_layers_and_costs_that_differ_spend_all_but_less_than_one_step(seed) -> None:
    d_ff = tuple(torch.randint(40, 300, (6,), generator=generator(seed)).tolist())
    costs = tuple(torch.randint(1, 9, (6,), generator=generator(seed)).tolist())
    budget = Budget(
        d_ff,
        costs,
        int(0.6 * sum(c * w for c, w in zip(costs, d_ff, strict=True))),
        round_to=8,
        floor=11,
    )
    for widths in Space.around(budget).draw(50, generator(seed)):
        assert all(
            width % 8 == 0 or width == full for width, full in zip(widths, d_ff, strict=True)
        )
        assert all(width >= min(16, full) for width, full in zip(widths, d_ff, strict=True))
        steps = [
            c * min(8 - w % 8, f - w) for c, w, f in zip(costs, widths, d_ff, strict=True) if w < f
        ]
        assert 0 <= budget.parameters - budget.cost(widths) < min(steps)


def test_tied_layers_differ_by_rounding_alone_and_a_seed_repeats_the_draws() -> None:
    space = Space.around(room(8, 1536), step=8)
    drawn = space.draw(20, generator(3), tied=4)
    assert drawn == space.draw(20, generator(3), tied=4) != space.draw(20, generator(4), tied=4)
    for widths in drawn:
        assert all(max(group) - min(group) <= 8 for group in (widths[:4], widths[4:]))
    assert any(abs(widths[0] - widths[4]) > 100 for widths in drawn)


def test_a_narrowed_space_stays_within_its_bounds_unless_they_cannot_spend_the_budget() -> None:
    space = Space.around(room(4, 1536), step=64)
    inner = space.narrowed([1280, 0, 0, 0], [1536, 1024, 1536, 1536])
    for widths in inner.draw(100, generator()):
        assert widths[0] >= 1280
        assert widths[1] <= 1024 + 64
    assert space.narrowed([0] * 4, [640] * 4) is space
    assert space.narrowed([1536] * 4, [1536] * 4) is space


def test_a_space_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(ValueError, match="span of widths must be in"):
        Space.around(room(3, 96), span=0.0)
    with pytest.raises(ValueError, match=r"multiples of 8, so levels cannot be 12 apart"):
        Space.around(room(3, 96), step=12)
    with pytest.raises(ValueError, match="remove less"):
        Space.around(room(3, 96, 0.5, floor=64))


# What was measured.


def test_an_architecture_is_measured_once_and_what_was_asked_for_is_in_order(tmp_path) -> None:
    loss = Planted((96,) * 3)
    evaluations = Evaluations(loss, tmp_path / "new" / "pairs.jsonl")
    a, b, c = (64, 64, 64), (48, 64, 80), (96, 64, 32)
    assert evaluations([a, b, a]) == [loss(a), loss(b), loss(a)]
    loss.calls.clear()
    evaluations([b, c])
    assert loss.calls == [c]
    assert [widths for widths, _ in evaluations.best().pairs] == [a, b, c]
    again = Evaluations(loss, tmp_path / "new" / "pairs.jsonl")
    assert again([c]) == evaluations([c])
    assert list(again.pairs) == [c], "what others asked for is not this search's"
    assert loss.calls == [c]


def test_a_file_serves_several_evaluators_and_survives_a_cut_last_line(tmp_path) -> None:
    path, one, other = tmp_path / "pairs.jsonl", Planted((96,) * 3, 1), Planted((96,) * 3, 2)
    widths = (64, 64, 64)
    values = [Evaluations(loss, path)([widths]) for loss in (one, other)]
    assert values[0] != values[1]
    whole = path.read_text()
    path.write_text(whole + '{"evaluator": "planted 1", "wid')
    assert [Evaluations(loss, path)([widths]) for loss in (one, other)] == values
    assert len(one.calls) == len(other.calls) == 1
    Evaluations(one, path)([(48, 64, 80)])
    assert [json.loads(line)["evaluator"] for line in path.read_text().splitlines()] == [
        "planted 1",
        "planted 2",
        "planted 1",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        "[" * 99_999,
        '{"evaluator": "", "widths": 3, "loss": 1}',
        '{"widths": [1], "loss": 1}',
        '{"evaluator": "", "widths": [-8], "loss": 1}',
        '{"evaluator": "", "widths": [8.5], "loss": 1}',
        '{"evaluator": "", "widths": [16], "loss": NaN}',
        '{"evaluator": "", "widths": [16], "loss": "1"}',
    ],
)
def test_a_damaged_line_in_the_file_is_an_error_that_names_it(tmp_path, line) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"evaluator": "", "widths": [8], "loss": 1.5}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*pairs\.jsonl is no evaluated architecture"):
        Evaluations(lambda widths: 0.0, path)


def test_a_loss_that_is_not_a_number_is_an_error_and_is_not_written(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"loss of widths \[8, 16\] is nan"):
        Evaluations(lambda widths: float("nan"), tmp_path / "pairs.jsonl")([(8, 16)])
    assert not (tmp_path / "pairs.jsonl").exists()


def test_best_of_random_is_the_best_of_uniform_and_different_draws() -> None:
    budget, loss = room(6, 1536), Planted((1536,) * 6)
    found = best_of_random(budget, loss, 20, seed=1)
    assert len(set(loss.calls)) == len(loss.calls) == len(found.pairs) == 20
    assert loss.calls[0] == tuple(uniform(budget))
    assert found.loss == min(value for _, value in found.pairs) == loss(found.widths)
    assert best_of_random(budget, loss, 1).widths == uniform(budget)


# KL(dense || pruned).


def scores_of(model) -> list[torch.Tensor]:
    return magnitude.scores(Evidence(model))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_loss_of_widths_is_the_divergence_of_the_best_channels(family) -> None:
    model = tiny_model(family)
    scores, widths = scores_of(model), [16, 48, 23]
    keep = [top_channels(row, width) for row, width in zip(scores, widths, strict=True)]
    judge = WidthDivergence(model, IDS, scores)
    assert judge(widths) == pytest.approx(divergence(model, Cut(keep, None).down, IDS), rel=1e-6)
    assert abs(judge([D_FF] * LAYERS)) < 1e-6 < judge(widths)
    others = [[48, 8, 16], [24, 24, 24]]
    assert judge.many([widths, *others]) == [judge(widths), *(judge(other) for other in others)]


def test_with_refits_the_loss_is_that_of_the_refitted_layers_at_the_level_below() -> None:
    model = tiny_model("llama")
    scores = scores_of(model)
    refits = Refits(model, IDS, scores=scores, levels=6)
    judge = WidthDivergence(model, IDS, refits=refits)
    keep = [top_channels(row, width) for row, width in zip(scores, [16, 48, 32], strict=True)]

    def refitted(layer: int, dense: torch.Tensor) -> torch.Tensor:
        return refits.down(layer, keep[layer], dense)

    assert judge([16, 48, 32]) == pytest.approx(divergence(model, refitted, IDS), rel=1e-6)
    assert judge([16, 48, 32]) == judge([23, 48, 39])
    assert judge([16, 16, 16]) < WidthDivergence(model, IDS, scores)([16, 16, 16])
    with pytest.raises(
        ValueError, match="below the narrowest refitted level; give a budget with floor=8"
    ):
        judge([7, 48, 32])


def test_the_key_tells_models_texts_rankings_and_refits_apart() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    scores = scores_of(model)
    refits = [Refits(model, ids, scores=scores, levels=6) for ids in (IDS, IDS[:3])]
    judges = [
        WidthDivergence(model, IDS, scores),
        WidthDivergence(model, IDS[:3], scores),
        WidthDivergence(model, IDS, [-row for row in scores]),
        WidthDivergence(other, IDS, scores),
        *(WidthDivergence(model, IDS, refits=fitted) for fitted in refits),
    ]
    assert len({judge.key for judge in judges}) == len(judges)
    assert WidthDivergence(tiny_model("llama"), IDS, scores).key == judges[0].key


def test_a_judge_that_is_given_the_wrong_things_says_so() -> None:
    model = tiny_model("llama")
    scores = scores_of(model)
    with pytest.raises(ValueError, match="either scores or refits, got neither"):
        WidthDivergence(model, IDS)
    with pytest.raises(ValueError, match="either scores or refits, got both"):
        WidthDivergence(model, IDS, scores, refits=Refits(model, IDS, levels=2))
    with pytest.raises(ValueError, match="one score a channel"):
        WidthDivergence(model, IDS, scores[:2])
    for widths in ([48, 48], [48, 48, 0], [48, 49, 48]):
        with pytest.raises(ValueError, match="do not fit layers"):
            WidthDivergence(model, IDS, scores)(widths)


# By name.


@pytest.mark.long
@pytest.mark.parametrize("how", ["predictor", "evolution"])
def test_searched_allocations_are_reached_by_name_and_are_no_worse_than_uniform(how) -> None:
    if how == "predictor":
        pytest.importorskip("sklearn")
    model = tiny_model("llama")
    evidence = Evidence(model, CalibrationSet(IDS, "data", {}))
    budget = Budget.of(model, 0.3)
    made = cut(evidence, "magnitude", 0.3, allocation=how)
    assert budget.cost(made.widths) == budget.parameters
    assert [int(mask.sum()) for mask in made.keep] == made.widths
    judge = WidthDivergence(model, IDS, scores_of(model))
    assert judge(made.widths) < judge(uniform(budget))
    assert cut(evidence, "magnitude", 0.3, allocation=how).widths == made.widths
    assert cut(evidence, "magnitude", 0.3, allocation=made.widths).keep[0].equal(made.keep[0])


def test_a_search_needs_text_and_scores() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="needs text"):
        cut(Evidence(model), "magnitude", 0.3, allocation="evolution")
    with pytest.raises(ValueError, match="folding has no scores"):
        cut(
            Evidence(model, CalibrationSet(IDS, "data", {})), "folding", 0.3, allocation="evolution"
        )


def test_refits_of_given_scores_keep_the_channels_that_these_rank_highest() -> None:
    model = tiny_model("opt")
    scores = [-row for row in scores_of(model)]
    refits = Refits(model, IDS, scores=scores, levels=6)
    torch.testing.assert_close(refits.scores, torch.stack(scores))
    dense = torch.ones(32, D_FF)
    keep = top_channels(scores[1], 16)
    assert (refits.down(1, keep, dense).abs().sum(0) > 0).equal(keep)
