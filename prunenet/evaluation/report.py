"""Draws what pruning does to a model: perplexity and speed against size, as one figure."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
except ImportError as error:
    raise ImportError(
        f"figures need matplotlib ({error}); pip install 'prunenet[figures]'"
    ) from error

from prunenet.evaluation.images import image_format, save_figure
from prunenet.runtime.files import expanded

# Okabe and Ito's palette: told apart with every kind of colour blindness; markers differ too.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_REQUIRED = (
    "ratio",
    "parameters",
    "perplexity",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
)
_MOST = 500  # models in one figure: more labels cover each other, and take minutes to place


def draw_report(rows: Sequence[Any], path: str | Path, title: str = "") -> None:
    """Writes a figure: perplexity (log axis) on the left, prefill and decode speed on the right,
    against parameters.

    Args:
        rows: one per model, in any order; each has `ratio` (share of FFN channels removed; 0 is the
            dense model), `parameters`, `perplexity`, `prefill_tokens_per_second`,
            `decode_tokens_per_second` (as `Result.as_dict` names them). A perplexity or speed of
            None is left out.
        path: of the PNG, SVG or PDF, by its suffix; replaced if it exists, its folder is made.
        title: over both panels, for example the model's name and the text.

    Raises:
        ValueError: another suffix, no rows or more than 500, or a row that lacks one of these or
            has something else than a number there.
    """
    image_format(path)
    if not rows:
        raise ValueError("a report needs at least one row, got none")
    if len(rows) > _MOST:
        raise ValueError(f"a report draws {_MOST} models at most, one a row, got {len(rows)}")
    for row in rows:
        _check(row)
    ordered = sorted(rows, key=lambda row: row["parameters"])
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic(
        [["perplexity", "prefill"], ["perplexity", "decode"]], sharex=True
    )
    _draw_series(panels["perplexity"], ordered, "perplexity", _BLUE, "o")
    _draw_series(panels["prefill"], ordered, "prefill_tokens_per_second", _ORANGE, "s")
    _draw_series(panels["decode"], ordered, "decode_tokens_per_second", _GREEN, "^")
    panels["perplexity"].set_title("Perplexity (log axis; lower is better)", fontsize=11)
    panels["prefill"].set_title("Prefill, tokens per second (higher is better)", fontsize=11)
    panels["decode"].set_title("Decode, tokens per second (higher is better)", fontsize=11)
    _scale_axes(panels["perplexity"], panels["prefill"], panels["decode"])
    if title:
        figure.suptitle(title, fontsize=12)
    save_figure(figure, expanded(path), dpi=150)


def _check(row: Any) -> None:
    """Raises ValueError where a row is none."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f"a row of the report is an object with its numbers by name, got {reprlib.repr(row)}"
        )
    missing = [name for name in _REQUIRED if name not in row]
    if missing:
        had = ", ".join(str(name)[:40] for name in list(row)[:20])
        raise ValueError(f"a row of the report lacks {', '.join(missing)}; it has {had}")
    wrong = [name for name in _REQUIRED if not _drawable(row[name], name)]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} of a row of the report must be a number, above 0 (a ratio: 0 or"
            f" more), got {reprlib.repr(row[wrong[0]])}"
        )


def _drawable(value: object, name: str) -> bool:
    """Whether an axis has a place for the value; None, of what was not measured, is left out."""
    if value is None:
        return name not in ("ratio", "parameters")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = (0, 1) if name == "ratio" else (0, 1e300)
    return low <= value < high and (value > 0 or name not in ("parameters", "perplexity"))


def _draw_series(
    axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, colour: str, marker: str
) -> None:
    """Draws one line through all models; the dense one's marker is large and hollow."""
    points = [
        (row["parameters"] / 1e6, row[name], _label(row, rows))
        for row in rows
        if row[name] is not None
    ]
    axes.plot(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        color=colour,
        marker=marker,
        markersize=6,
    )
    for x, y, label in points:
        if label == "dense":
            axes.plot(
                [x],
                [y],
                color=colour,
                marker=marker,
                markersize=10,
                markerfacecolor="white",
                markeredgewidth=2,
            )
        shown = f"{label}: {y:,.1f}" if y < 100 else f"{label}: {y:,.0f}"
        # Above and to the right: the lines fall to the right, so that side is free.
        axes.annotate(
            shown, (x, y), xytext=(4, 9), textcoords="offset points", fontsize=9, color=_GREY
        )


def _label(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The ratio; the model's name where several models have that ratio."""
    alike = [other for other in rows if other["ratio"] == row["ratio"]]
    if len(alike) > 1 and row.get("name"):
        return str(row["name"])[:24]
    return "dense" if row["ratio"] == 0 else f"{row['ratio']:g}"


def _scale_axes(quality: Axes, *speeds: Axes) -> None:
    quality.set_yscale("log")
    quality.margins(y=0.15)
    quality.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    quality.yaxis.set_minor_locator(NullLocator())
    quality.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.15g}"))
    for axes in speeds:
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    for axes in (quality, *speeds):
        axes.set_xmargin(0.14)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (quality, speeds[-1]):
        axes.set_xlabel("parameters, millions (labels are ratio: value)")
