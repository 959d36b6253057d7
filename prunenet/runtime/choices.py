"""Refuses names that are not among the choices of a Literal type."""

from __future__ import annotations

from typing import Any, get_args


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
