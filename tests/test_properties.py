"""What is pure holds for all inputs: masks, widths, budgets, allocations, specs, slabs of tensors."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from prunenet.checkpoints import shards
from prunenet.compare.spec import REFITS, allocations, methods, parse
from prunenet.models.masks import (
    check_keep,
    ratio_for_parameters,
    top_channels,
    width_at,
    widths_for_budget,
)
from prunenet.policies.methods.widths.allocation import (
    Budget,
    fitted,
    global_sort,
    owl,
    protected,
    uniform,
)
from prunenet.policies.methods.widths.influence import by_influence

settings.register_profile(
    "properties",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("properties")

RATIOS = st.floats(0, 1, exclude_max=True)
WEIGHTS = st.floats(-5, 5)


@st.composite
def layers(draw) -> tuple[int, list[int]]:
    """A multiple, and widths of layers that have it."""
    round_to = draw(st.sampled_from((1, 2, 8)))
    return round_to, draw(st.lists(st.integers(round_to, 150), min_size=1, max_size=6))


COSTS = st.lists(st.integers(1, 9), min_size=6, max_size=6)


def budget_of(some: tuple[int, list[int]], costs: list[int], ratio: float) -> Budget:
    """Made in the test, not in the strategy: a type checker draws from `random`."""
    round_to, d_ff = some
    costs = costs[: len(d_ff)]
    kept = sum(c * width_at(w, ratio, round_to) for c, w in zip(costs, d_ff, strict=True))
    return Budget(tuple(d_ff), tuple(costs), kept, round_to)


def is_level(width: int, d_ff: int, round_to: int) -> bool:
    return 0 < width <= d_ff and (width % round_to == 0 or width == d_ff)


def assert_spends(budget: Budget, widths: list[int]) -> None:
    """Levels of each layer, within the budget, and no further step fits it."""
    left = budget.parameters - budget.cost(widths)
    assert left >= 0
    for d_ff, cost, width in zip(budget.d_ff, budget.costs, widths, strict=True):
        assert is_level(width, d_ff, budget.round_to)
        following = min((width // budget.round_to + 1) * budget.round_to, d_ff)
        assert width == d_ff or cost * (following - width) > left


@pytest.mark.long
@given(layers(), RATIOS, RATIOS)
def test_a_width_is_the_nearest_multiple_and_falls_with_the_ratio(some, first, second) -> None:
    round_to, widths = some
    for d_ff in widths:
        low, high = (width_at(d_ff, ratio, round_to) for ratio in sorted((first, second))[::-1])
        assert low <= high
        assert is_level(high, d_ff, round_to)
        wanted = (1 - min(first, second)) * d_ff
        clipped = high in (round_to, d_ff)
        assert clipped or abs(high - wanted) <= round_to / 2 + 1e-6
        assert width_at(d_ff, 0.0, round_to) == d_ff


@given(st.lists(WEIGHTS, min_size=1, max_size=40), st.data())
def test_top_channels_keep_the_highest_scores_and_nest(row, data) -> None:
    scores, width = torch.tensor(row), data.draw(st.integers(1, len(row)))
    keep = top_channels(scores, width)
    check_keep(keep, len(row))
    assert int(keep.sum()) == width
    assert width == len(row) or float(scores[keep].min()) >= float(scores[~keep].max())
    narrower = top_channels(scores, max(width - 1, 1))
    assert not bool((narrower & ~keep).any())


@given(layers(), RATIOS, RATIOS, st.data())
def test_widths_under_one_budget_spend_it_and_nest(some, first, second, data) -> None:
    round_to, d_ff = some
    offsets = data.draw(st.lists(WEIGHTS, min_size=len(d_ff), max_size=len(d_ff)))
    wide, narrow = (
        widths_for_budget(d_ff, offsets, ratio, round_to) for ratio in sorted((first, second))
    )
    for width, less, whole in zip(wide, narrow, d_ff, strict=True):
        assert is_level(width, whole, round_to)
        assert less <= width
    budget = sum(width_at(whole, min(first, second), round_to) for whole in d_ff)
    assert 0 <= budget - sum(wide) < round_to
    if all(whole % round_to == 0 for whole in d_ff):
        assert sum(wide) == budget


@given(st.floats(0, 0.9), st.integers(0, 10**6), layers(), COSTS)
def test_the_ratio_of_ffn_channels_removes_the_share_of_all_parameters(
    removed, rest, some, costs
) -> None:
    budget = budget_of(some, costs, 0.0)
    in_ffn = budget.cost(budget.d_ff)
    assume(removed * (in_ffn + rest) < in_ffn)
    ratio = ratio_for_parameters(removed, in_ffn + rest, list(budget.costs), list(budget.d_ff))
    assert math.isclose(ratio * in_ffn, removed * (in_ffn + rest), rel_tol=1e-9, abs_tol=1e-9)


@given(layers(), COSTS, RATIOS, st.data())
def test_every_allocation_spends_the_budget(some, costs, ratio, data) -> None:
    budget = budget_of(some, costs, ratio)
    count = len(budget.d_ff)
    numbers = data.draw(st.lists(st.floats(0, 100), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = [torch.rand(width, generator=generator) for width in budget.d_ff]
    assert_spends(budget, uniform(budget))
    assert_spends(budget, owl(budget, numbers))
    assert_spends(budget, by_influence(budget, numbers))
    assert_spends(budget, global_sort(budget, scores))
    assert_spends(budget, protected(budget, 0, 0))
    assert_spends(budget, fitted(budget, [2.5 * number for number in numbers]))


@given(st.sampled_from((1, 2, 8)), st.integers(1, 20), st.integers(1, 9), RATIOS)
def test_equal_layers_get_the_uniform_width(round_to, multiples, cost, ratio) -> None:
    budget = budget_of((round_to, [multiples * round_to] * 4), [cost] * 6, ratio)
    assert uniform(budget) == [width_at(multiples * round_to, ratio, round_to)] * 4


@given(layers(), COSTS, RATIOS)
def test_what_fits_a_budget_is_left_alone(some, costs, ratio) -> None:
    budget = budget_of(some, costs, ratio)
    widths = uniform(budget)
    assert fitted(budget, [float(width) for width in widths]) == widths


@given(
    st.sampled_from(methods()),
    st.sampled_from([None, "auto", *allocations()]),
    st.sampled_from(
        [None, "self", "random", "builtin", "seed:builtin", "ptb", "seed:a:b", "x+y/z"]
    ),
    st.booleans(),
    st.sampled_from([None, *REFITS]),
)
@settings(max_examples=300)
def test_the_name_of_a_spec_means_the_spec(method, allocation, moments, heads, refit) -> None:
    text = (
        method
        + (f":{allocation}" if allocation else "")
        + (f"@{moments}" if moments else "")
        + ("+heads" if heads else "")
        + (f"+{refit}" if refit else "")
    )
    try:
        spec = parse(text, ["ptb"])
    except ValueError as error:
        assert str(error).startswith(repr(text))  # noqa: PT017 (a refusal names the text)
        return
    assert parse(spec.name, ["ptb"]) == spec
    assert spec.heads == heads
    assert len(spec.name) <= len(text)


DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@given(
    st.dictionaries(
        st.text("abc.é", min_size=1, max_size=4), st.tuples(DTYPES, SHAPES), max_size=4
    ),
    st.integers(1, 64),
)
def test_tensors_are_read_and_written_slab_by_slab(folder, wanted, slab) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, (dtype, shape) in wanted.items()
    }
    path, copy = folder / "a.safetensors", folder / "b.safetensors"
    path.write_bytes(save(tensors, {"format": "pt"}))
    copy.unlink(missing_ok=True)
    with patch.object(shards, "SLAB", slab):
        stored = shards.read_header(path)
        assert stored.keys() == tensors.keys()
        for name, tensor in tensors.items():
            slabs = list(stored[name].slabs())
            row = max(math.prod(tensor.shape[1:]), 1) * tensor.dtype.itemsize
            assert all(piece.nbytes <= max(slab, row) for _, piece in slabs)
            assert [start for start, _ in slabs] == sorted({start for start, _ in slabs})
            whole = torch.cat([piece.reshape(-1) for _, piece in slabs] or [tensor.reshape(-1)])
            assert whole.equal(tensor.reshape(-1))
            assert stored[name].whole().equal(tensor)
        shards.write_shard(
            copy,
            tensors,
            lambda name: (piece for _, piece in shards.read_header(path)[name].slabs()),
        )
    assert copy.read_bytes() == path.read_bytes()
