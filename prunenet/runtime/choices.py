"""Checks options: names among the choices of a Literal type, shares in range, Python's numbers."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

RoundTo = int | Literal["auto"]
"""A multiple that widths are rounded to, or the rule of `prunenet.models.knobs.rounding`."""
ROUND_TO: RoundTo = 8
"""What widths are rounded to where a user says nothing."""


def check_choice(what: str, given: object, choices: Any) -> None:
    """Checks that a name is one of the choices.

    Args:
        what: names the choice in the message.
        given: the name.
        choices: a Literal type.

    Raises:
        ValueError: the name is not one of the choices, which the message lists.
    """
    allowed = get_args(choices)
    if given not in allowed:
        raise ValueError(f"unknown {what} {given!r}; it is one of {', '.join(allowed)}")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, of Python or numpy."""
    return isinstance(value, Integral)


def own_numbers(options: Any) -> None:
    """Replaces numpy's numbers in a frozen dataclass, and in its tuples, by Python's, which JSON
    can hold.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        own = tuple(map(_own, value)) if type(value) is tuple else _own(value)
        object.__setattr__(options, field.name, own)


def _own(value: Any) -> Any:
    foreign = isinstance(value, Real) and not isinstance(value, (int, float))
    if not foreign:
        return value
    return int(value) if is_whole(value) else float(value)


def check_ratio(ratio: float) -> float:
    """Returns the ratio.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= float(ratio) < 1:
        raise ValueError(f"`ratio` must be in [0, 1), got {ratio}")
    return float(ratio)
