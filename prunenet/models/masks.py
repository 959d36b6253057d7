"""Ratios, widths and keep masks. Pure functions.

Vocabulary: *ratio* is the share of FFN channels removed, in [0, 1); *width* the number of channels
left; *keep* a boolean mask of length d_ff, True where the channel stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunenet.runtime.choices import check_ratio

_FINE = 8
"""Multiple to which a budget over all layers is rounded, a layer."""


def width_at(d_ff: int, ratio: float, round_to: int = 8) -> int:
    """Channels left in a layer when `ratio` of them is removed.

    Rounded to the nearest multiple of `round_to` (half goes up), at least one multiple, at most
    d_ff. Monotone in ratio; ratio 0 gives d_ff itself.

    Args:
        d_ff: width before, at least 1.
        ratio: share removed, in [0, 1).
        round_to: multiple that the hardware likes, at least 1.

    Raises:
        ValueError: ratio or round_to out of range, or round_to above d_ff.
    """
    check_ratio(ratio)
    if round_to < 1:
        raise ValueError(f"widths can be rounded to a multiple of 1 or more, got {round_to}")
    if ratio == 0:
        return d_ff
    if round_to > d_ff:
        raise ValueError(
            f"a layer of {d_ff} channels has no multiple of {round_to} to be rounded to; give a"
            " smaller `round_to`"
        )
    multiples = _nearest((1 - ratio) * d_ff / round_to)
    return min(d_ff, max(multiples, 1) * round_to)


def _nearest(value: float) -> int:
    """The nearest whole number. 1e-9 keeps 0.7 * 1536 from falling under its own decimal value."""
    return math.floor(value + 0.5 + 1e-9)


def ratio_for_parameters(
    removed: float, total: int, channel_parameters: Sequence[float], widths: Sequence[int]
) -> float:
    """The uniform ratio of FFN channels that removes a share of *all* parameters.

    Args:
        removed: share of all parameters to remove, in [0, 1).
        total: parameters of the dense model.
        channel_parameters: parameters of one channel, for each layer.
        widths: channels of each layer of the dense model.

    Raises:
        ValueError: the share is out of range, or larger than what the FFNs hold.
    """
    if not 0 <= float(removed) < 1:
        raise ValueError(f"share of parameters must be in [0, 1), got {removed}")
    in_ffn = sum(c * w for c, w in zip(channel_parameters, widths, strict=True))
    ratio = removed * total / in_ffn
    if ratio >= 1:
        raise ValueError(
            f"cannot remove {removed:.1%} of the parameters: the FFN channels hold"
            f" {in_ffn / total:.1%} of them; ask for less"
        )
    return ratio


def top_channels(scores: Float[Tensor, "*batch d_ff"], width: int) -> Bool[Tensor, "*batch d_ff"]:
    """Keep mask of the `width` highest scores; ties go to the lower channel number, so masks nest
    as width falls.

    Raises:
        ValueError: width not in [1, d_ff], or a score is not a number.
    """
    d_ff = scores.shape[-1]
    if not 1 <= width <= d_ff:
        raise ValueError(
            f"a layer of {d_ff} channels cannot keep {width}; the width must be in [1, {d_ff}]"
        )
    if torch.isnan(scores).any():
        raise ValueError("scores contain NaN; the policy or the model's weights are damaged")
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, order[..., :width], True)


def check_keep(keep: Bool[Tensor, "*batch d_ff"], d_ff: int) -> None:
    """Raises ValueError unless every mask has d_ff entries and keeps at least one channel."""
    if keep.dtype != torch.bool or keep.shape[-1] != d_ff:
        raise ValueError(
            f"a keep mask for this layer has {d_ff} booleans, got {keep.shape[-1]} of {keep.dtype}"
        )
    if not bool(keep.any(-1).all()):
        raise ValueError("a keep mask must keep at least one channel, got one that keeps none")


def widths_for_budget(
    d_ff: list[int], offsets: list[float], ratio: float, round_to: int = 8
) -> list[int]:
    """Widths of all layers under one budget: as many channels in all as uniform widths of multiples
    of 8 keep at `ratio`, however coarsely the layers themselves are rounded.

    With multiples of 8 or less the number is met exactly where every d_ff is a multiple, and else
    from below by less than one multiple; with coarser ones it is the nearest multiple. Layer l
    keeps the share sigmoid(theta + offset_l) of its channels, rounded to multiples of `round_to`,
    with theta such that the budget is met. So equal offsets give uniform widths up to that nearest
    multiple, and no layer widens as the ratio rises: masks nest.

    Args:
        d_ff: width of each layer before.
        offsets: log-odds of each layer; only their differences matter. Higher keeps more.
        ratio: share of all channels removed, in [0, 1).
        round_to: widths are multiples of this (a whole layer may keep its odd rest); at least one
            multiple each.

    Raises:
        ValueError: see `width_at`; or an offset that is not finite.
    """
    budget = sum(width_at(width, ratio, round_to) for width in d_ff)
    if round_to > _FINE:
        fine = sum(width_at(width, ratio, _FINE) for width in d_ff)
        budget = max(_nearest(fine / round_to), len(d_ff)) * round_to
    if not all(math.isfinite(offset) for offset in offsets):
        raise ValueError(
            "layer offsets must be finite numbers; the policy or the model's weights are damaged"
        )
    if ratio == 0:
        return list(d_ff)
    steps: list[tuple[float, int, int]] = []
    for layer, (width, offset) in enumerate(zip(d_ff, offsets, strict=True)):
        for low in range(round_to, width, round_to):
            high = min(low + round_to, width)
            share = (low + high) / 2 / width
            steps.append((math.log(share / (1 - share)) - offset, layer, high))
    # Theta passes the middle of one step after the other; each widens one layer by one multiple.
    widths = [round_to] * len(d_ff)
    left = budget - sum(widths)
    for _, layer, high in sorted(steps):
        if left < high - widths[layer]:
            break
        left -= high - widths[layer]
        widths[layer] = high
    return widths
