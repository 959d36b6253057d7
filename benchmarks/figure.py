"""Draws the README's figure: perplexity against parameters, without data and with it.

    python benchmarks/figure.py --out docs/figures/quality

Reads `results/calibration_free.jsonl`, rows scored on the whole of WikiText-2 test; measures
nothing. Writes `<out>.svg` and `<out>.png`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from _common import Line, parser, read_lines
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

RESULTS = Path(__file__).resolve().parent / "results" / "calibration_free.jsonl"
# Okabe and Ito's palette, as in `prunenet compare --figures`: a colour a regime.
SELF, WEIGHTS, DATA = "#009E73", "#0072B2", "#D55E00"
GREY, INK_SOFT, INK = "#a0a0a0", "#666666", "#222222"
DEFAULT = "default: blend + refit, learned widths"
FROM_WEIGHTS = "policy, learned widths"
PANELS = {
    "ptb": "Baselines calibrated on other text\n(Penn Treebank)",
    "wikitext2": "Baselines calibrated in the test's domain\n(WikiText-2 validation)",
}
BASELINES = {
    "wanda_sp": ("Wanda-sp", "s"),
    "flap": ("FLAP", "^"),
    "llm_pruner_element1": ("LLM-Pruner", "D"),
}
LOWEST, HIGHEST = 22.0, 190.0  # perplexity
LEFT, RIGHT = 138.0, 77.0  # millions of parameters


@dataclass(frozen=True)
class Look:
    """How a line is drawn; dashed, with hollow markers, where it was calibrated in domain."""

    colour: str
    marker: str
    dashed: bool = False
    width: float = 1.3


@dataclass(frozen=True)
class Point:
    """Perplexity at one size.

    Attributes:
        parameters: of the whole model, biases that a method adds not counted apart.
        mean: over seeds.
        deviation: standard deviation over seeds; 0 for one seed.
        seeds: how many.
    """

    parameters: int
    mean: float
    deviation: float
    seeds: int


def points(lines: Iterable[Line], method: str) -> dict[float, Point]:
    """A method's point at each ratio, scored on the whole split; text of the default amount."""
    found: dict[float, list[Line]] = {}
    for line in lines:
        if (line["method"], line["windows"]) == (method, 0) and line.get("sequences", 160) == 160:
            found.setdefault(line["ratio"], []).append(line)
    return {ratio: _point(found[ratio]) for ratio in sorted(found)}


def _point(lines: list[Line]) -> Point:
    values = [line["perplexity_wikitext2"] for line in lines]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Point(lines[0]["parameters"], statistics.mean(values), spread, len(values))


def draw(lines: list[Line], out: Path) -> list[Path]:
    """Writes the figure as SVG and as PNG."""
    style = {"font.size": 9.5, "svg.hashsalt": "prunenet", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.4, 4.3), layout="constrained")
        for axes, (text, title) in zip(
            figure.subplots(1, 2, sharex=True, sharey=True), PANELS.items(), strict=True
        ):
            _panel(axes, lines, text)
            axes.set_title(title, fontsize=9.5, loc="left", color=INK)
        figure.supxlabel(
            "parameters, millions (share of FFN channels removed)", fontsize=9.5, color=INK
        )
        figure.axes[0].set_ylabel("perplexity, WikiText-2 test (log axis)", color=INK)
        paths = [out.with_suffix(suffix) for suffix in (".svg", ".png")]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else {})
    return paths


def _panel(axes: Axes, lines: list[Line], text: str) -> None:
    (dense,) = points(lines, "dense").values()
    axes.axhline(dense.mean, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    start = {0.0: dense}
    random = points(lines, "random")
    _line(axes, start | random, Look(GREY, ""))
    for name, (label, marker) in BASELINES.items():
        found = start | points(lines, f"{name}, own allocation, {text}")
        _line(axes, found, Look(DATA, marker, dashed=text == "wikitext2"))
        _end(axes, found, label, DATA)
    weights = start | points(lines, FROM_WEIGHTS)
    _line(axes, weights, Look(WEIGHTS, "v"))
    default = start | points(lines, DEFAULT)
    _line(axes, default, Look(SELF, "o", width=2.6))
    _frame(axes, default)
    _end(axes, default, "PruneNet,\nno data", SELF, weight="bold")
    _note(axes, "PruneNet,\nweights\nalone", WEIGHTS, (123.6, 71), weights[0.3])
    note = f"random\n({random[0.3].mean:,.0f}\nat 30%)"
    _note(axes, note, INK_SOFT, (117.4, 163))
    _note(axes, f"dense: {dense.mean:.1f}", INK, (RIGHT, dense.mean * 1.05), align="right")


def _line(axes: Axes, found: Mapping[float, Point], look: Look) -> None:
    """Joins a method's points; bars are standard deviations over seeds."""
    x = [point.parameters / 1e6 for point in found.values()]
    y = [point.mean for point in found.values()]
    style = (0, (4, 2)) if look.dashed else "-"
    axes.plot(x, y, color=look.colour, linewidth=look.width, linestyle=style)
    for point in list(found.values())[1:] if look.marker else ():
        axes.errorbar(
            point.parameters / 1e6,
            point.mean,
            yerr=point.deviation if point.seeds > 1 else None,
            fmt=look.marker,
            color=look.colour,
            markerfacecolor="white" if look.dashed else look.colour,
            markersize=5,
            capsize=5,
            elinewidth=1,
            capthick=1,
        )


def _end(axes: Axes, found: Mapping[float, Point], label: str, colour: str, **font: str) -> None:
    """Names a line where it ends, or where it leaves the panel."""
    *_, (x0, y0), (x1, y1) = ((point.parameters / 1e6, point.mean) for point in found.values())
    top = HIGHEST * 0.9
    if y1 > top:
        share = math.log(top / y0) / math.log(y1 / y0)
        x1, y1 = x0 + share * (x1 - x0), top
    axes.annotate(
        label,
        (x1, y1),
        (7, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        linespacing=1.05,
        **font,
    )


def _note(
    axes: Axes,
    label: str,
    colour: str,
    place: tuple[float, float],
    of: Point | None = None,
    align: str = "left",
) -> None:
    """Writes at a place, with a thin line to the point that it names."""
    axes.text(*place, label, color=colour, ha=align, va="center", linespacing=1.05)
    if of is not None:
        axes.annotate(
            "",
            (of.parameters / 1e6, of.mean),
            (place[0] - 8.5, place[1] * 0.88),
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 4},
        )


def _frame(axes: Axes, default: Mapping[float, Point]) -> None:
    """Axes: sizes as ticks, the dense model on the left."""
    axes.set_yscale("log")
    axes.set_ylim(LOWEST, HIGHEST)
    axes.set_xlim(LEFT, RIGHT)
    sizes = {point.parameters / 1e6: ratio for ratio, point in default.items()}
    axes.set_xticks(
        list(sizes), [f"{size:.1f}\n({ratio:.0%})" for size, ratio in sizes.items()], fontsize=9
    )
    axes.yaxis.set_major_locator(FixedLocator([25, 35, 50, 75, 100, 150]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--results", type=Path, default=RESULTS)
    arguments = made.parse_args()
    for path in draw(read_lines(arguments.results), arguments.out):
        print(path)


if __name__ == "__main__":
    main()
