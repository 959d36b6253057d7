"""Configuration fields that hold widths: reading them, and making them state other widths.

A knob is named by a dotted path (`text_config.intermediate_size`). Its value is a number that is
proportional to the width of each of its groups, a list of such numbers, one a layer, or None, which
stands for a width that the code computes and is replaced by the width itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from prunenet.models.masks import width_at
from prunenet.runtime.choices import RoundTo

if TYPE_CHECKING:
    from prunenet.models.groups import Group

_NARROW = 512
"""Channels below which a multiple of 32 is more than 6 % of an FFN."""
_TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    *("top_k_experts", "experts_per_token", "num_selected_experts", "num_experts_per_topk"),
)


def field_of(config: Any, path: str) -> Any:
    """Returns the value at a dotted path of a configuration.

    Raises:
        AttributeError, KeyError: there is none.
    """
    for name in path.split("."):
        if isinstance(config, dict):
            config = config[name]
            continue
        if isinstance(config, list | tuple):
            config = config[int(name)]
            continue
        # transformers refuses to say a field that differs between layers; what it holds is global
        own = getattr(type(config), "attribute_map", {}).get(name, name)
        config = vars(config)[own] if own in vars(config) else getattr(config, name)
    return config


def set_field(config: Any, path: str, value: Any) -> None:
    """Sets the value at a dotted path of a configuration."""
    parent, _, name = path.rpartition(".")
    holder = field_of(config, parent) if parent else config
    if isinstance(holder, list | tuple):
        made = [value if place == int(name) else own for place, own in enumerate(holder)]
        set_field(config, parent, type(holder)(made))
    elif isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def top_k(config: Any) -> int | None:
    """Returns to how many routed experts a token goes; None where no field says it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in _TOP_K)
    return next((max(k) if isinstance(k, list) else k for k in found if k), None)


def top_k_field(config: Any) -> str | None:
    """Returns the dotted field of `top_k`; None where it is not one whole number."""
    text = config.get_text_config()
    name = next((name for name in _TOP_K if getattr(text, name, None)), None)
    if name is None or type(getattr(text, name)) is not int:
        return None
    return name if text is config else f"text_config.{name}"


def tied(groups: Sequence[Group]) -> list[list[Group]]:
    """Returns the groups that share one number, in one list each: those of a knob, or those of a
    layer where the knob is a list.
    """
    sets: dict[tuple[str, int | None], list[Group]] = {}
    for group in groups:
        layer = group.layer if group.listed else None
        sets.setdefault((group.pattern.knob, layer), []).append(group)
    return list(sets.values())


def restate(config: Any, dense: Sequence[Group], widths: Sequence[int]) -> None:
    """Makes a configuration state other widths, the greatest of each knob where they differ.

    Args:
        config: states the widths of `dense`; changed in place.
        dense: all groups of the model.
        widths: the new width of each, at least 1.

    Raises:
        ValueError: a knob cannot hold the number, as where it is a multiple of the width.
    """
    for groups in tied(dense):
        new = [widths[group.number] for group in groups]
        first = groups[0]
        path, old = first.pattern.knob, max(group.width for group in groups)
        value = field_of(config, path)
        if max(new) == old and value is not None:
            continue
        for companion, wanted in first.pattern.companions:
            set_field(config, companion, wanted)
        if isinstance(value, list | tuple):
            made = list(value)
            made[first.layer] = _scaled(path, made[first.layer], old, max(new))
            set_field(config, path, type(value)(made))
        else:
            whole = value is None or first.pattern.companions
            set_field(config, path, max(new) if whole else _scaled(path, value, old, max(new)))


def _scaled(path: str, value: int | float, old: int, new: int) -> int | float:
    exact = Fraction(value) * new / old
    if isinstance(value, float):
        return float(exact)
    if exact.denominator != 1:
        raise ValueError(
            f"{path} is {value} where a layer has {old} channels, and cannot state {new}: round"
            f" widths (`round_to`) to a multiple of {Fraction(value, old).denominator}"
        )
    return int(exact)


def rounding(groups: Sequence[Group], ratio: float) -> int:
    """Returns the multiple for "auto": 64 where that changes every width by less than 1 % of the
    group's channels; else 32, but 8 in experts where 32 changes more than that. 8 in FFNs narrower
    than 512, of which 32 would be too much.

    Blocks of quantised formats have 32 or 64 entries, and a width that is no multiple of them stays
    unquantised; kernels for experts want multiples of 16 bytes.

    Args:
        groups: of a model, one or more.
        ratio: share of channels removed, in [0, 1).
    """
    widths = {group.width for group in groups}
    if min(widths) < _NARROW:
        return 8

    def costs(step: int) -> float:
        return max(abs(width_at(w, ratio, step) - (1 - ratio) * w) / w for w in widths)

    if costs(64) < 0.01:
        return 64
    experts = any(group.expert is not None for group in groups)
    return 8 if experts and costs(32) >= 0.01 else 32


def step_of(groups: Sequence[Group], ratio: float, round_to: RoundTo) -> int:
    """Returns the multiple of widths that differ from layer to layer; "auto": see `rounding`, but
    32 at most, for 64 costs perplexity there and 32 does not (docs/results.md, "Rounding").
    """
    return min(rounding(groups, ratio), 32) if round_to == "auto" else round_to


def uniform_widths(
    groups: Sequence[Group],
    ratio: float,
    round_to: RoundTo,
    *,
    free: bool = False,
) -> list[int]:
    """Returns uniform widths: groups that share a number keep the same share of their channels.

    Groups that are free, and differ where the model has been cut before, get one width, which
    leaves all of them together that share.

    Args:
        groups: of a model, all of them.
        ratio: share of channels removed, in [0, 1).
        round_to: multiple to which the narrowest of the groups of a number is rounded; "auto": see
            `rounding`.
        free: whether each group may have a width of its own.

    Raises:
        ValueError: see `prunenet.models.masks.width_at`; or a free group has fewer channels.
    """
    if free:
        step = rounding(groups, ratio) if round_to == "auto" else round_to
        return _one_width([group.width for group in groups], ratio, step)
    widths = [0] * len(groups)
    for same in tied(groups):
        multiple = rounding(same, ratio) if round_to == "auto" else round_to
        least = min(group.width for group in same)
        shares = [Fraction(group.width, least) for group in same]
        units = (Fraction(group.step) / share for group, share in zip(same, shares, strict=True))
        step = math.lcm(
            multiple, *(unit.numerator for unit in units), *(share.denominator for share in shares)
        )
        width = width_at(least, ratio, step if step <= least else multiple)
        for group, share in zip(same, shares, strict=True):
            widths[group.number] = int(share * width)
    return widths


def _one_width(d_ff: Sequence[int], ratio: float, round_to: int) -> list[int]:
    mean = sum(d_ff) / len(d_ff)
    width = width_at(round(mean), ratio, round_to)
    if width > min(d_ff):
        raise ValueError(
            f"a layer has {min(d_ff)} channels, so {width} cannot be left in all of them: give"
            f" a `ratio` of {1 - min(d_ff) / mean:.2f} or more, or leave `widths` per-layer"
        )
    return [width] * len(d_ff)
