"""Pictures of a comparison: quality against size, and against the time of pruning. Needs matplotlib
(extra `figures`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
except ImportError as error:
    raise ImportError(
        f"figures need matplotlib ({error}); pip install 'prunenet[figures]', or leave figures out"
    ) from error

from prunenet.compare.summary import Row, Value
from prunenet.evaluation.images import ImageFormat, save_figure
from prunenet.runtime.files import expanded, make_folders

# Okabe and Ito's palette, as in `report`: a colour a regime.
_COLOURS = {"weights": "#0072B2", "self": "#009E73", "data": "#D55E00"}
_DENSE = "#444444"
_SCALE = 6.0
"""A perplexity axis ends at so many times the lowest value of the smallest models; methods above it
are named there with their value.
"""
_GAP = 0.037  # between names beside a panel, in heights of the panel
_X = Callable[[Row], float | None]
_Y = Callable[[Row], Value | None]


def draw_comparison(
    rows: Sequence[Row], folder: str | Path, title: str = "", kind: ImageFormat = "png"
) -> list[Path]:
    """Writes `perplexity.png` and `time.png`, and `zero_shot.png` where there are tasks; replaces
    those that exist.

    A line is a method, a point one ratio, a colour the regime. A bar is the standard deviation over
    seeds, or the 95 % interval where seeds do not differ. Names stand beside the point of the
    highest ratio. The dotted line is the dense model.

    Args:
        rows: of `summary.summarise`.
        folder: made if it is missing.
        title: over every figure, for example the model's name.
        kind: "png", "svg" or "pdf".

    Returns:
        The files written.
    """
    folder = expanded(folder)
    make_folders(folder)
    texts = list(dict.fromkeys(text for row in rows for text in row.perplexity))
    quality: dict[str, _Y] = {f"perplexity, {text}": _perplexity_on(text) for text in texts}
    figures = {
        "perplexity": (_millions, "parameters, millions", quality),
        "time": (_seconds, "seconds of pruning, text included (log axis)", quality),
    }
    if any(row.accuracy is not None for row in rows):
        accuracy: dict[str, _Y] = {"mean zero-shot accuracy": lambda row: row.accuracy}
        figures["zero_shot"] = (_millions, "parameters, millions", accuracy)
    return [
        _draw(rows, folder / f"{name}.{kind}", *panels, title) for name, panels in figures.items()
    ]


def _draw(
    rows: Sequence[Row], path: Path, x: _X, label: str, panels: dict[str, _Y], title: str
) -> Path:
    figure = Figure(figsize=(6.4 * len(panels), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, y) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_xlabel(label)
        axes.set_ylabel(name.partition(",")[0] + (" (log axis)" if "," in name else ""))
        lines = _lines(rows, x, y)
        for line in lines.values():
            _line(axes, line, x, y)
        _frame(axes, lines, y, log=name.startswith("perplexity"))
        if x is _seconds:
            axes.set_xscale("log")
        else:
            axes.invert_xaxis()
        _names(axes, lines, x, y)
        _dense(axes, rows, y)
    figure.legend(
        handles=[
            Line2D([], [], color=colour, linewidth=4, label=f"regime {regime}")
            for regime, colour in _COLOURS.items()
            if any(row.regime == regime and row.method != "dense" for row in rows)
        ],
        loc="outside lower center",
        ncols=len(_COLOURS),
        frameon=False,
    )
    if title:
        figure.suptitle(title, fontsize=12)
    save_figure(figure, path, dpi=130)
    return path


def _lines(rows: Sequence[Row], x: _X, y: _Y) -> dict[str, list[Row]]:
    """Rows of each method that have a place, by rising ratio."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.ratio):
        if row.method != "dense" and x(row) is not None and y(row) is not None:
            found.setdefault(row.method, []).append(row)
    return found


def _line(axes: Axes, rows: Sequence[Row], x: _X, y: _Y) -> None:
    """The points of a method, joined, with the standard deviations over seeds."""
    values = [_value(y, row) for row in rows]
    axes.errorbar(
        [_place(x, row) for row in rows],
        [value.mean for value in values],
        yerr=list(zip(*map(_reach, values), strict=True)),
        color=_colour(rows[-1]),
        marker="o",
        markersize=5,
        linewidth=1,
        elinewidth=1,
        capsize=3 if any(any(_reach(value)) for value in values) else 0,
    )


def _reach(value: Value) -> tuple[float, float]:
    """Down and up: the deviation over seeds, or else the interval; 0 where there is neither."""
    if value.deviation is not None or value.low is None or value.high is None:
        return value.deviation or 0.0, value.deviation or 0.0
    return max(0.0, value.mean - value.low), max(0.0, value.high - value.mean)


def _frame(axes: Axes, lines: Mapping[str, Sequence[Row]], y: _Y, *, log: bool) -> None:
    """The axis of quality; that of perplexity is cut off at `_SCALE`."""
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not log:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    last = [_value(y, rows[-1]).mean for rows in lines.values()]
    if last and max(last) > _SCALE * min(last):
        axes.set_ylim(top=_SCALE * min(last))


def _names(axes: Axes, lines: Mapping[str, Sequence[Row]], x: _X, y: _Y) -> None:
    """Names the methods in a column on the right, each joined to its last point by a thin line."""
    last = sorted((rows[-1] for rows in lines.values()), key=lambda row: _value(y, row).mean)
    _, top = axes.get_ylim()
    points = [(_place(x, row), min(_value(y, row).mean, top)) for row in last]
    if not points:
        return
    shares = axes.transAxes.inverted().transform(axes.transData.transform(points))[:, 1]
    for row, point, height in zip(last, points, _apart(shares.tolist()), strict=True):
        mean = _value(y, row).mean
        axes.annotate(
            row.method if mean <= top else f"\N{UPWARDS ARROW} {row.method} ({mean:,.0f})",
            point,
            (1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=_colour(row),
            annotation_clip=False,
            arrowprops=_leader(_colour(row)) if mean <= top else None,
        )


def _leader(colour: str) -> dict[str, Any]:
    """A thin line from the left edge of a name."""
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6}
    return line | {"relpos": (0.0, 0.5), "shrinkA": 2, "shrinkB": 3}


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights (rising, in [0, 1]) moved until neighbours are a gap apart, and back below 1 where
    that fits.
    """
    gap = min(_GAP, 1.0 / len(heights))
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + gap) if found else height)
    ceiling = max(1.0, gap * len(heights))
    for number in reversed(range(len(found))):
        found[number] = min(found[number], ceiling)
        ceiling = found[number] - gap
    return found


def _dense(axes: Axes, rows: Sequence[Row], y: _Y) -> None:
    """The dense model, as a dotted line."""
    found = [value for row in rows if row.method == "dense" and (value := y(row)) is not None]
    for value in found[:1]:
        axes.axhline(value.mean, color=_DENSE, linewidth=1, linestyle=":")
        axes.annotate(
            f"dense: {value.mean:,.4g}",
            (0.01, value.mean),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=9,
            color=_DENSE,
        )


def _place(x: _X, row: Row) -> float:
    found = x(row)
    assert found is not None  # `_lines` has left the others out
    return found


def _value(y: _Y, row: Row) -> Value:
    found = y(row)
    assert found is not None  # `_lines` has left the others out
    return found


def _colour(row: Row) -> str:
    return _DENSE if row.regime is None else _COLOURS[row.regime]


def _perplexity_on(text: str) -> _Y:
    return lambda row: row.perplexity.get(text)


def _millions(row: Row) -> float | None:
    return None if row.parameters is None else row.parameters / 1e6


def _seconds(row: Row) -> float | None:
    """None for the dense model: a log axis has no place for it."""
    return None if row.seconds is None or row.seconds.mean <= 0 else row.seconds.mean
