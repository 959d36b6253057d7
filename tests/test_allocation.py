import math

import pytest
import torch
from families import D_FF, tiny_model, token_ids

from prunenet.models.architectures import architecture_for
from prunenet.models.layers import decoder_layers
from prunenet.models.masks import width_at
from prunenet.policies.methods import (
    Budget,
    Evidence,
    block_influence,
    by_influence,
    cut,
    global_sort,
    outlier_share,
    owl,
    protected,
    uniform,
)
from prunenet.policies.methods.widths.allocation import fitted
from prunenet.text.calibration import CalibrationSet


def budget(ratio: float, layers: int = 8, d_ff: int = 1536, **options) -> Budget:
    kept = layers * 10 * width_at(d_ff, ratio, options.get("round_to", 8))
    return Budget((d_ff,) * layers, (10,) * layers, kept, **options)


def rows(layers: int, d_ff: int = 1536, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(d_ff, generator=generator) + layer / 4 for layer in range(layers)]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("round_to", [1, 8, 64])
def test_every_allocation_spends_exactly_what_a_uniform_cut_leaves(ratio, round_to) -> None:
    room = budget(ratio, round_to=round_to)
    generator = torch.Generator().manual_seed(1)
    outliers = torch.rand(8, generator=generator).tolist()
    found = [
        uniform(room),
        global_sort(room, rows(8)),
        owl(room, outliers),
        by_influence(room, outliers),
    ]
    if ratio < 0.7:  # three whole layers of eight cost more than 30 %
        found += [protected(room, 2, 1), global_sort(room, rows(8), first=2, last=1)]
    for widths in found:
        assert room.cost(widths) == room.parameters
        assert all(0 < width <= 1536 and width % round_to == 0 for width in widths)


def test_the_budget_of_a_model_is_that_of_the_same_ratio_in_every_layer() -> None:
    room = Budget.of(tiny_model("llama", bias=True), 0.3)
    assert room.d_ff == (48, 48, 48)
    assert room.costs == (98, 98, 98)  # three slices of 32 and two biases
    assert room.parameters == 3 * 98 * 32
    assert uniform(room) == [32, 32, 32]


@pytest.mark.parametrize("seed", range(20))
def test_widths_and_costs_that_differ_are_fitted_from_below_by_less_than_one_step(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    d_ff = tuple(torch.randint(20, 300, (6,), generator=generator).tolist())
    costs = tuple(torch.randint(1, 9, (6,), generator=generator).tolist())
    parameters = int(0.6 * sum(c * w for c, w in zip(costs, d_ff, strict=True)))
    room = Budget(d_ff, costs, parameters, round_to=8, floor=11)
    widths = fitted(room, (400 * torch.rand(6, generator=generator) - 50).tolist())
    assert all(width % 8 == 0 or width == full for width, full in zip(widths, d_ff, strict=True))
    assert all(width >= min(16, full) for width, full in zip(widths, d_ff, strict=True))
    steps = [
        c * min(8 - w % 8, f - w) for c, w, f in zip(costs, widths, d_ff, strict=True) if w < f
    ]
    assert 0 <= parameters - room.cost(widths) < min(steps)


def test_fitted_leaves_widths_that_fit_alone_and_rounds_to_the_nearest() -> None:
    room = Budget((100,) * 3, (1,) * 3, 120, round_to=8)
    assert fitted(room, [40.0, 56.0, 24.0]) == [40, 56, 24]
    assert fitted(room, [43, 53.5, 23.5]) == [40, 56, 24]


def test_a_global_sort_without_rounding_keeps_the_highest_scores_of_all_layers() -> None:
    scores = rows(5, 40)
    room = Budget((40,) * 5, (7,) * 5, 7 * 90, round_to=1)
    threshold = torch.cat(scores).sort(descending=True).values[89]
    assert global_sort(room, scores) == [int((row >= threshold).sum()) for row in scores]


def test_a_global_sort_leaves_every_layer_its_floor() -> None:
    scores = [torch.arange(64.0) + 100 * layer for layer in range(3)]
    room = Budget((64,) * 3, (1,) * 3, 96, round_to=8, floor=10)
    assert global_sort(room, scores) == [16, 16, 64]


def test_a_global_sort_with_whole_layers_ranks_the_others_alone() -> None:
    scores = rows(5, 40)
    room = Budget((40,) * 5, (7,) * 5, 7 * 150, round_to=1)
    threshold = torch.cat(scores[1:-1]).sort(descending=True).values[69]
    inner = [int((row >= threshold).sum()) for row in scores[1:-1]]
    assert global_sort(room, scores, first=1, last=1) == [40, *inner, 40]
    with pytest.raises(ValueError, match="protect fewer layers or remove less"):
        global_sort(room, scores, first=2, last=2)


def test_protected_layers_stay_whole_and_the_others_share_the_cut() -> None:
    widths = protected(budget(0.3, 30), 4, 2)
    assert widths[:4] + widths[-2:] == [1536] * 6
    inner = widths[4:-2]
    assert sum(inner) == 30 * 1072 - 6 * 1536
    assert max(inner) - min(inner) <= 8


def test_protection_that_cannot_be_paid_for_is_an_error() -> None:
    with pytest.raises(ValueError, match="protect fewer layers or remove less"):
        protected(budget(0.5, 8), 3, 2)
    with pytest.raises(ValueError, match="protect fewer layers or remove less"):
        protected(budget(0.1, 3), 4, 2)


def test_floors_above_the_budget_are_an_error() -> None:
    with pytest.raises(ValueError, match="remove less"):
        uniform(budget(0.9, floor=800))


@pytest.mark.parametrize(
    ("scores", "message"),
    [([torch.zeros(5)], "one score"), ([torch.full((48,), torch.nan)], "NaN")],
)
def test_scores_that_cannot_be_sorted_are_an_error(scores, message) -> None:
    with pytest.raises(ValueError, match=message):
        global_sort(Budget((48,), (1,), 24), scores)


def test_owl_keeps_more_where_outliers_are_by_hand() -> None:
    # Offsets 0, 0.16, 0.08 less their mean 0.08, around a share of 0.7.
    room = Budget((1000,) * 3, (1,) * 3, 2100, round_to=1)
    assert owl(room, [1.0, 5.0, 3.0]) == [620, 780, 700]
    assert owl(room, [2.0, 2.0, 2.0]) == [700, 700, 700]
    assert owl(room, [1.0, 5.0, 3.0], lam=0.0) == [700, 700, 700]


def test_owl_gives_the_rest_of_whole_layers_to_the_others() -> None:
    room = Budget((1000,) * 3, (1,) * 3, 2850, round_to=1)
    widths = owl(room, [1.0, 5.0, 3.0])
    assert sum(widths) == 2850
    assert widths[1] == 1000
    assert widths[0] < widths[2] <= 1000


def test_the_outlier_share_by_hand() -> None:
    # Scores 1 2 | 3 4 and 20: mean 6, so 20 is above 3 * 6 and nothing above 5 * 6.
    weights = [torch.tensor([[1.0, -1.0], [3.0, 2.0]]), torch.tensor([[-10.0]])]
    norms = [torch.tensor([1.0, 2.0]), torch.tensor([2.0])]
    assert outlier_share(weights, norms, m=3.0) == pytest.approx(20.0)
    assert outlier_share(weights, norms) == 0.0


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi3"])
def test_input_norms_are_those_of_every_linear_of_a_layer_over_all_tokens(model_type) -> None:
    model = tiny_model(model_type)
    ids = token_ids(7, 11)
    measured = Evidence(model, CalibrationSet(ids, "data", {})).input_norms
    seen: dict[torch.nn.Module, torch.Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda module, inputs: seen.update({module: inputs[0].detach()})
        )
        for m in decoder_layers(model).modules()
        if isinstance(m, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    assert {linear for layer in measured for linear, _ in layer} == set(seen)
    for layer in measured:
        for linear, norm in layer:
            torch.testing.assert_close(norm, seen[linear].reshape(77, -1).norm(dim=0))
    assert D_FF in {len(norm) for _, norm in measured[0]}


def test_layers_of_low_influence_lose_more_by_hand() -> None:
    # Weights 1/2, 1/4, 1/4 of three layers at a ratio of 0.3: 0.45, 0.225, 0.225 are removed.
    room = Budget((1000,) * 3, (1,) * 3, 2100, round_to=1)
    assert by_influence(room, [0.0, math.log(2), math.log(2)], temperature=1.0) == [550, 775, 775]
    assert by_influence(room, [0.0, 0.5 * math.log(2), 0.5 * math.log(2)], temperature=0.5) == [
        550,
        775,
        775,
    ]
    assert by_influence(room, [0.7, 0.7, 0.7]) == [700, 700, 700]


def test_what_a_layer_of_low_influence_cannot_give_is_taken_from_the_others() -> None:
    room = Budget((1000,) * 3, (1,) * 3, 1200, round_to=8)
    widths = by_influence(room, [0.0, 1.0, 1.0], temperature=0.2)
    assert widths[0] == 8
    assert sum(widths) == 1200
    assert abs(widths[1] - widths[2]) <= 8


def test_removed_parameters_count_where_layers_cost_differently() -> None:
    # Shares of 0.3 and 0.15, as 2 to 1, remove 9 * 300 + 150 of 10000 parameters.
    room = Budget((1000, 1000), (9, 1), 7150, round_to=1)
    assert by_influence(room, [0.0, math.log(2)], temperature=1.0) == [700, 850]


@pytest.mark.parametrize(
    ("influence", "temperature"),
    [([0.1], 0.1), ([0.1, math.nan, 0.2], 0.1), ([0.1, 0.2, 0.3], 0.0)],
)
def test_influences_that_allocate_nothing_are_an_error(influence, temperature) -> None:
    with pytest.raises(ValueError, match=r"influence|temperature"):
        by_influence(Budget((48,) * 3, (1,) * 3, 72), influence, temperature=temperature)


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi3"])
def test_block_influence_compares_what_enters_and_leaves_a_layer(model_type) -> None:
    model, ids = tiny_model(model_type), token_ids(6, 11)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    found = block_influence(model, ids)
    # The last of the states is behind the final norm.
    for layer in range(2):
        a, b = states[layer].double(), states[layer + 1].double()
        expected = (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
        assert found[layer] == pytest.approx(float(expected), abs=1e-6)
    assert len(found) == 3
    down = decoder_layers(model)[2].get_submodule(architecture_for(model.config).down)
    out = decoder_layers(model)[2].get_submodule(architecture_for(model.config).attention_out)
    for linear in (down, out):
        for parameter in linear.parameters():
            parameter.data.zero_()
    assert block_influence(model, ids)[2] == pytest.approx(0.0, abs=1e-6), (
        "a layer that writes nothing"
    )


def test_the_influence_of_the_text_cuts_any_method() -> None:
    model = tiny_model("llama")
    evidence = Evidence(model, CalibrationSet(token_ids(4, 10), "data", {}))
    made = cut(evidence, "magnitude", 0.5, allocation="influence")
    assert made.widths == by_influence(Budget.of(model, 0.5), block_influence(model, evidence.ids))
    assert made.widths != uniform(Budget.of(model, 0.5))
    with pytest.raises(ValueError, match="blocks=None"):
        cut(Evidence(model), "magnitude", 0.5, allocation="influence")
