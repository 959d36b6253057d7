"""Names beside a picture of a comparison can be read."""

import itertools

import pytest

pytest.importorskip("matplotlib")

from prunenet.compare.figures import _GAP, _apart


@pytest.mark.parametrize(
    "heights",
    [
        [0.5],
        [0.1, 0.4, 0.9],
        [0.5, 0.5, 0.5, 0.501],
        [0.97, 0.98, 0.99, 1.0],
        [0.0, *[1.0] * 20],
        [0.3] * 40,
    ],
)
def test_names_stand_apart_in_order_and_beside_their_panel(heights):
    found = _apart(heights)
    gap = min(_GAP, 1 / len(heights))
    assert len(found) == len(heights)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(found))
    assert found[-1] <= 1 + 1e-9
    assert found[0] >= -gap - 1e-9


def test_names_with_room_stay_at_their_height():
    assert _apart([0.1, 0.4, 0.9]) == [0.1, 0.4, 0.9]
