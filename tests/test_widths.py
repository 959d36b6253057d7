"""Where to cut: budgets, the width head, and the distribution over widths."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from prunenet.models.knobs import rounding, step_of
from prunenet.models.masks import width_at, widths_for_budget
from prunenet.policies.scorer import WidthHead
from prunenet.policies.training.swept_widths import SweptWidths, mean_shares


def test_equal_offsets_are_uniform_widths():
    for ratio in (0.0, 0.1, 0.25, 0.5, 0.9):
        assert widths_for_budget([64] * 5, [0.3] * 5, ratio) == [width_at(64, ratio)] * 5


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.3, 0.5, 0.77])
def test_the_budget_of_channels_is_met_exactly_whatever_the_offsets(ratio):
    offsets = [3.0, -2.0, 0.0, 40.0, -40.0, 0.5]
    widths = widths_for_budget([128] * 6, offsets, ratio)
    assert sum(widths) == 6 * width_at(128, ratio)
    assert all(width % 8 == 0 and 8 <= width <= 128 for width in widths)


def test_no_layer_widens_as_the_ratio_rises():
    offsets = torch.randn(7, generator=torch.Generator().manual_seed(1)).mul(2).tolist()
    rows = [widths_for_budget([96] * 7, offsets, ratio / 50) for ratio in range(50)]
    for wide, narrow in itertools.pairwise(rows):
        assert all(a >= b for a, b in zip(wide, narrow, strict=True))


def test_a_higher_offset_keeps_more_and_an_odd_rest_is_a_last_small_step():
    widths = widths_for_budget([100, 100, 100], [-1.0, 0.0, 1.0], 0.4)
    assert widths[0] < widths[1] < widths[2]
    budget = 3 * width_at(100, 0.4)
    assert budget - 8 < sum(widths) <= budget
    assert widths_for_budget([100, 100], [5.0, -5.0], 0.1)[0] == 100


def test_an_offset_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        widths_for_budget([64, 64], [0.0, float("nan")], 0.3)


def test_an_untrained_head_says_uniform_and_offsets_are_centred():
    head = WidthHead(["a", "b"], generator=torch.Generator().manual_seed(0))
    context = torch.randn(6, 2)
    assert torch.equal(head(context), torch.zeros(6))
    torch.nn.init.ones_(head.out.weight)
    offsets = head(context).detach()
    assert abs(float(offsets.sum())) < 1e-5
    assert float(offsets.std()) > 0.01


@pytest.mark.parametrize("multiple", [16, 32, 64])
def test_coarse_multiples_spend_the_budget_of_fine_ones_to_within_half_a_multiple(multiple):
    offsets, whole = [-1.0, 0.0, 0.3, 2.0, -0.2], [512] * 5
    for ratio in (0.1, 0.2, 0.3, 0.45, 0.9):
        widths = widths_for_budget(whole, offsets, ratio, multiple)
        assert all(width % multiple == 0 and width > 0 for width in widths)
        fine = sum(widths_for_budget(whole, offsets, ratio))
        assert abs(sum(widths) - fine) <= multiple / 2 or set(widths) == {multiple}


@pytest.mark.parametrize(
    ("width", "ratio", "expert", "multiple"),
    [
        (1536, 0.3, None, 64),  # 1075 -> 1088
        (1536, 0.15625, None, 32),  # 1296: 1280 is too far
        (1536, 0.15625, 0, 8),  # 1280 moves an expert by more than 1 %
        (768, 0.25, 0, 64),
        (256, 0.3, None, 8),  # a narrow FFN would lose up to 6 % by chance
    ],
)
def test_automatic_multiples_are_as_coarse_as_the_width_bears(width, ratio, expert, multiple):
    groups = [SimpleNamespace(width=width, expert=expert)]
    assert rounding(groups, ratio) == multiple
    assert step_of(groups, ratio, "auto") == min(multiple, 32)
    assert step_of(groups, ratio, 24) == 24


def test_mean_shares_meet_each_sweep_s_budget_over_the_layers_left():
    offsets = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    layer, budget = torch.tensor([0, 1, 3]), torch.tensor([2.0, 1.7, 0.4], dtype=torch.float64)
    shares = mean_shares(offsets, layer, budget)
    for row, (first, total) in enumerate(zip(layer.tolist(), budget.tolist(), strict=True)):
        assert float(shares[row, first:].sum()) == pytest.approx(total, abs=1e-8)


def test_the_gradient_of_the_shares_is_that_of_finite_differences():
    layer, budget = torch.tensor([0, 1]), torch.tensor([2.1, 1.2], dtype=torch.float64)
    offsets = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    (mean_shares(offsets, layer, budget) * weights).sum().backward()
    for index in range(3):
        values = []
        for step in (1e-5, -1e-5):
            moved = offsets.detach().clone()
            moved[index] += step
            values.append((mean_shares(moved, layer, budget) * weights).sum())
        assert float(offsets.grad[index]) == pytest.approx(
            float(values[0] - values[1]) / 2e-5, abs=1e-6
        )


def swept(left, layer, offsets=(0.5, -0.5, 0.0), spread=0.2):
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    return SweptWidths(
        logits,
        torch.tensor(offsets),
        torch.tensor(layer),
        torch.tensor(left),
        round_to=2,
        spread=spread,
    )


def all_masks(distribution):
    """Every mask that the first row could play: the best channels of each width."""
    order = distribution._logits[distribution._layer[0]].argsort(descending=True)
    masks = torch.zeros(9, 16, dtype=torch.bool)
    for multiple in range(9):
        masks[multiple, order[: 2 * multiple]] = True
    return masks[1:]


def test_probabilities_of_all_masks_add_up_to_one():
    for left, layer in ((30, 0), (20, 1), (9, 2)):
        masks = all_masks(swept([left], [layer]))
        distribution = swept([left] * 8, [layer] * 8)
        assert float(distribution.log_prob(masks).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_a_mask_that_is_never_played_has_no_probability():
    distribution = swept([30], [0])
    worst_first = ~distribution.mode()
    assert float(distribution.log_prob(worst_first)) == -torch.inf


def test_samples_follow_the_stated_probabilities():
    draws = 4000
    distribution = swept([30] * draws, [0] * draws)
    played = distribution.sample(torch.Generator().manual_seed(0)).sum(1)
    masks = all_masks(distribution)
    chances = swept([30] * 8, [0] * 8).log_prob(masks).exp()
    seen = torch.stack([(played == int(mask.sum())).float().mean() for mask in masks])
    assert float((seen - chances).abs().max()) < 0.03


def test_a_whole_sweep_spends_its_budget_and_stays_inside_the_rules():
    generator = torch.Generator().manual_seed(5)
    for budget in (8, 22, 30, 44):
        left = torch.full((20,), budget)
        for layer in range(3):
            width = swept(left.tolist(), [layer] * 20).sample(generator).sum(1)
            assert bool((width >= 2).all())
            left = left - width
            assert bool((left >= 2 * (2 - layer)).all())
        assert bool((left < 2).all())


def test_the_gradient_raises_the_width_of_a_layer_that_is_rewarded_for_it():
    offsets = torch.zeros(3, requires_grad=True)
    logits = torch.randn(3, 64)
    wide = SweptWidths(logits, offsets, torch.tensor([0, 0]), torch.tensor([96, 96]), round_to=2)
    keep = torch.zeros(2, 64, dtype=torch.bool)
    keep[0, logits[0].argsort(descending=True)[:38]] = True
    keep[1, logits[0].argsort(descending=True)[:26]] = True
    (wide.log_prob(keep) * torch.tensor([1.0, -1.0])).sum().backward()
    assert offsets.grad[0] > 0
    assert offsets.grad[1] < 0
