"""Checks options: names among the choices of a Literal type, shares in range, Python's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import repeat
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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


def as_python(value: Any) -> Any:
    """Python's number in place of numpy's or torch's, and a tuple in place of a list, a range or an
    array of one dimension; any other value as it is.
    """
    axes = getattr(value, "ndim", None)
    if axes == 0:
        return value.item()
    return tuple(map(as_python, value)) if axes == 1 or type(value) in _LISTS else value


def check_fields(options: Any) -> None:
    """Converts the values of a frozen dataclass by `as_python`, and checks each by its annotation.

    Raises:
        ValueError: a value is not what the annotation of its field says.
    """
    schema: Any = type(options)
    for name, kind in _annotations(schema).items():
        value = as_python(getattr(options, name))
        if not _fits(value, kind):
            raise ValueError(f"`{name}` must be {_in_words(kind)}, got {value!r}")
        object.__setattr__(options, name, value)


@cache
def _annotations(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says; whole numbers are numbers too, and truth values
    are not.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in (int, float):
        return isinstance(value, int | origin) and not isinstance(value, bool)
    if not isinstance(value, origin) or (origin is Sequence and isinstance(value, str)):
        return False
    if origin is Mapping:
        return all(map(_fits, value.values(), repeat(inner[1])))
    if origin not in (tuple, Sequence):
        return True
    wanted = inner if origin is tuple and ... not in inner else inner[:1] * len(value)
    return len(value) == len(wanted) and all(map(_fits, value, wanted))


_LISTS = (tuple, list, range)
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    NoneType: "None",
}


def _in_words(kind: Any) -> str:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, inner))
    if origin is Literal:
        return "one of " * (len(inner) > 1) + ", ".join(inner)
    if origin is Mapping:
        return f"a mapping, each value {_in_words(inner[1])}"
    if origin in (tuple, Sequence):
        some = "a sequence" if origin is Sequence or ... in inner else f"{len(inner)} values"
        return f"{some}, each {_in_words(inner[0])}"
    return _WORDS.get(origin) or str(origin.__name__)


def check_ratio(ratio: float) -> float:
    """Returns the ratio.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= float(ratio) < 1:
        raise ValueError(f"`ratio` must be in [0, 1), got {ratio}")
    return float(ratio)
