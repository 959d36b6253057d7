"""Choices about text and windows, for options and commands alike; importing them is quick."""

from __future__ import annotations

from typing import Literal, get_args

Bos = Literal["auto", "yes", "no"]
"""Whether windows begin with the BOS token: as the tokenizer does by itself, always, or never; see
`prunenet.text.windows`.
"""


def check_bos(bos: Bos) -> Bos:
    """Returns the choice. Raises ValueError where it is unknown."""
    if bos not in get_args(Bos):
        raise ValueError(f"`bos` must be one of {', '.join(get_args(Bos))}, got {bos!r}")
    return bos


def check_window(window: int, stride: int | None = None) -> None:
    """Raises ValueError for a window of fewer than 2 tokens, or a stride outside [1, window]."""
    if window < 2:
        raise ValueError(
            f"`window` must be at least 2 tokens (one is context for the next), got {window}"
        )
    if stride is not None and not 1 <= stride <= window:
        raise ValueError(
            f"`stride` must be in [1, {window}] for a window of {window} tokens, got {stride}"
        )
