"""Ratios, widths and keep masks."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from prunenet.models.masks import ratio_for_parameters, top_channels, width_at
from prunenet.runtime.choices import check_ratio


@pytest.mark.parametrize("d_ff", [37, 48, 1536, 11008])
@pytest.mark.parametrize("round_to", [1, 8, 32])
def test_widths_fall_as_the_ratio_rises_and_are_multiples(d_ff, round_to):
    ratios = np.linspace(0, 0.999, 200)
    widths = [width_at(d_ff, float(ratio), round_to) for ratio in ratios]
    assert widths[0] == d_ff
    assert widths == sorted(widths, reverse=True)
    assert all(round_to <= width <= d_ff for width in widths)
    assert all(width % round_to == 0 for width in widths if width != d_ff)
    assert all(
        abs(width - (1 - ratio) * d_ff) <= round_to / 2 + 1e-6 or width == round_to
        for width, ratio in zip(widths[1:], ratios[1:], strict=True)
    )


@pytest.mark.parametrize(("ratio", "width"), [(0.3, 1075), (0.2, 1229), (0.25, 1152), (0.999, 2)])
def test_widths_of_decimal_ratios_do_not_suffer_from_binary_fractions(ratio, width):
    assert width_at(1536, ratio, 1) == width


@pytest.mark.parametrize("ratio", [1.0, -0.1, 1.5, float("nan")])
def test_ratios_out_of_range_are_refused_with_their_value(ratio):
    with pytest.raises(ValueError, match=rf"`ratio` must be in \[0, 1\), got {ratio}"):
        check_ratio(ratio)


def test_rounding_that_could_remove_nothing_is_refused():
    with pytest.raises(ValueError, match="48 channels has no multiple of 64"):
        width_at(48, 0.5, 64)
    with pytest.raises(ValueError, match="got 0"):
        width_at(48, 0.5, 0)


def test_a_share_of_all_parameters_becomes_a_ratio_of_channels():
    assert ratio_for_parameters(0.1, 1000, [10, 10], [20, 20]) == pytest.approx(0.25)
    with pytest.raises(
        ValueError, match=r"cannot remove 50.0% of the parameters: the FFN channels hold 40.0%"
    ):
        ratio_for_parameters(0.5, 1000, [10, 10], [20, 20])
    with pytest.raises(ValueError, match="got 1"):
        ratio_for_parameters(1.0, 1000, [10], [20])


def test_the_highest_scores_stay_and_ties_go_to_the_lower_number():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[False, True, True, True], [True, True, True, False]])
    assert torch.equal(top_channels(scores, 3), expected)


def test_masks_of_falling_widths_nest_even_with_ties():
    scores = torch.randint(0, 5, (50,), generator=torch.Generator().manual_seed(0)).float()
    masks = [top_channels(scores, width) for width in range(50, 0, -1)]
    assert all(not (b & ~a).any() for a, b in pairwise(masks))


@pytest.mark.parametrize("width", [0, 5])
def test_widths_outside_the_layer_are_refused(width):
    with pytest.raises(ValueError, match=f"cannot keep {width}"):
        top_channels(torch.zeros(4), width)


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        top_channels(torch.tensor([1.0, float("nan")]), 1)
