"""Draws what stays of each part of a model, bar by bar: as text, or as an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RENDER_MODES = ["ansi", "rgb_array"]
_COLUMNS = 40
_KEPT, _CUT, _OPEN = (68, 119, 170), (238, 204, 102), (221, 221, 221)
_HEIGHT, _GAP, _WIDTH = 8, 2, 320


def bars_as_text(names: Sequence[str], shares: Sequence[float | None], title: str) -> str:
    """One line a part: its name, a bar and the share that stays.

    Args:
        names: of the parts.
        shares: that stay, in [0, 1]; None where nothing is decided yet.
        title: first line.
    """
    wide = max(map(len, names), default=0)
    lines = [title]
    for name, share in zip(names, shares, strict=True):
        bar = "." * _COLUMNS if share is None else ("#" * round(share * _COLUMNS)).ljust(_COLUMNS)
        lines.append(
            f"{name.rjust(wide)} |{bar}| {'' if share is None else f'{share:.0%}'}".rstrip()
        )
    return "\n".join(lines)


def bars_as_image(shares: Sequence[float | None]) -> NDArray[np.uint8]:
    """One bar a part, top to bottom: (10 * parts + 2, 324, 3). Blue stays, yellow is cut, grey is
    not decided yet.
    """
    image = np.full(
        (len(shares) * (_HEIGHT + _GAP) + _GAP, _WIDTH + 2 * _GAP, 3), 255, dtype=np.uint8
    )
    for row, share in enumerate(shares):
        top = _GAP + row * (_HEIGHT + _GAP)
        bar = image[top : top + _HEIGHT, _GAP : _GAP + _WIDTH]
        bar[:] = _OPEN if share is None else _CUT
        if share is not None:
            bar[:, : round(share * _WIDTH)] = _KEPT
    return image


def drawn(
    mode: str | None, names: Sequence[str], shares: Sequence[float | None], title: str
) -> str | NDArray[np.uint8] | None:
    """What `render` returns in a mode; None without one."""
    if mode == "ansi":
        return bars_as_text(names, shares, title)
    return bars_as_image(shares) if mode == "rgb_array" else None
