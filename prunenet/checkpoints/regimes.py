"""The three regimes: what a method may look at (docs/design.md, section 1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

TextRegime = Literal["self", "data"]
"""Whose text was looked at: the model's own, or external text (docs/design.md, section 1)."""
Regime = Literal["weights", TextRegime]
REGIMES: dict[str, str] = {  # one that looks at more comes later
    "weights": "nothing but the checkpoint was looked at",
    "self": "nothing but the checkpoint and text that the model generated was looked at",
    "data": "external calibration text was looked at",
}


def most(regimes: Iterable[str]) -> str:
    """The regime of a whole way to prune, from those of its steps: the one that looks at most."""
    return max(regimes, key=list(REGIMES).index)
