"""Pictures of a comparison: quality against size, and against the time that it took. Needs
matplotlib (extra `figures`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

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
from prunenet.runtime.files import make_folders, write_atomic

# Okabe and Ito's palette, as in `report`: regimes by colour, methods by marker.
_COLOURS = {"weights": "#0072B2", "self": "#009E73", "data": "#D55E00"}
_DENSE = "#444444"
_MARKERS = "osD^v<>PXp*hdH8"
_X = Callable[[Row], float | None]
_Y = Callable[[Row], Value | None]


def draw_comparison(rows: Sequence[Row], folder: str | Path, title: str = "") -> list[Path]:
    """Writes `perplexity.png` and `time.png`, and `zero_shot.png` where there are tasks; those that
    exist are replaced.

    Every point is a method at a ratio, with the standard deviation over seeds as a bar; thin lines
    join the ratios of a method, and more parameters are lower ratios.

    Args:
        rows: of `summary.summarise`.
        folder: made if it is missing.
        title: over every figure, for example the model's name.

    Returns:
        The files written.
    """
    folder = Path(folder)
    make_folders(folder)
    texts = list(dict.fromkeys(text for row in rows for text in row.perplexity))
    quality: dict[str, _Y] = {f"perplexity, {text}": _perplexity_on(text) for text in texts}
    figures = {
        "perplexity": (_millions, "parameters, millions", quality),
        "time": (
            _seconds,
            "seconds of pruning, text included where it had to be written (log axis)",
            quality,
        ),
    }
    if any(row.accuracy is not None for row in rows):
        figures["zero_shot"] = (
            _millions,
            "parameters, millions",
            {"mean zero-shot accuracy": lambda row: row.accuracy},
        )
    return [_draw(rows, folder / f"{name}.png", *panels, title) for name, panels in figures.items()]


def _draw(
    rows: Sequence[Row], path: Path, x: _X, label: str, panels: dict[str, _Y], title: str
) -> Path:
    figure = Figure(figsize=(6 * len(panels) + 3.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    markers = {
        method: _MARKERS[i % len(_MARKERS)]
        for i, method in enumerate(dict.fromkeys(row.method for row in rows))
    }
    for axes, (name, y) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for method in markers:
            _path(axes, [row for row in rows if row.method == method], x, y)
        for row in rows:
            _point(axes, row, x(row), y(row), markers[row.method])
        axes.set(title=name, xlabel=label)
        if name.startswith("perplexity"):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        if x is _seconds:
            axes.set_xscale("log")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=_legend(rows, markers), loc="outside right upper", fontsize=8, frameon=False
    )
    if title:
        figure.suptitle(title, fontsize=11)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=130)
    write_atomic(path, image.getvalue())
    return path


def _point(axes: Axes, row: Row, x: float | None, y: Value | None, marker: str) -> None:
    if x is None or y is None:
        return
    colour = _colour(row)
    axes.errorbar(
        [x],
        [y.mean],
        yerr=None if y.deviation is None else [y.deviation],
        fmt="none",
        ecolor=colour,
        elinewidth=0.8,
    )
    axes.plot(
        [x], [y.mean], marker=marker, color=colour, markersize=7, alpha=0.85, linestyle="none"
    )


def _path(axes: Axes, rows: list[Row], x: _X, y: _Y) -> None:
    """A thin line through the ratios of one method."""
    points = [
        (at, value.mean)
        for row in rows
        if (at := x(row)) is not None and (value := y(row)) is not None
    ]
    if len(points) > 1:
        axes.plot(*zip(*points, strict=True), color=_colour(rows[0]), linewidth=0.6, alpha=0.5)


def _legend(rows: Sequence[Row], markers: dict[str, str]) -> list[Line2D]:
    """Each method once, in the colour of its regime; the regimes in front."""
    first = {row.method: row for row in reversed(rows) if row.regime is not None}
    regimes = [
        name
        for name in _COLOURS
        if any(row.regime == name and row.method != "dense" for row in rows)
    ]
    handles = [
        Line2D([], [], color=_COLOURS[name], linewidth=6, label=f"regime {name}")
        for name in regimes
    ]
    for method, row in sorted(first.items(), key=lambda pair: rows.index(pair[1])):
        handles.append(
            Line2D(
                [], [], color=_colour(row), marker=markers[method], linestyle="none", label=method
            )
        )
    return handles


def _colour(row: Row) -> str:
    return _DENSE if row.method == "dense" or row.regime is None else _COLOURS[row.regime]


def _perplexity_on(text: str) -> _Y:
    return lambda row: row.perplexity.get(text)


def _millions(row: Row) -> float | None:
    return None if row.parameters is None else row.parameters / 1e6


def _seconds(row: Row) -> float | None:
    """Of the dense model none: a log axis has no place for it."""
    return None if row.seconds is None or row.seconds.mean <= 0 else row.seconds.mean
