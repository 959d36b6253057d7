"""Whole models' cost from lines of `scale.py`, the exponents of cost against parameters, and their
figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from shapes import SHAPES, parameters_of

PHASES = ("score", "spectral setup", "spectral mask", "cut and save")


def report(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints each shape's cost and the exponents; returns what is drawn."""
    clock = "seconds" if any(line["device"] != "cpu" for line in measured) else "cpu_seconds"
    fits = []
    for shape in sorted(
        {line["shape"] for line in measured}, key=lambda name: parameters_of(name)[0]
    ):
        found = sorted(
            (line for line in measured if line["shape"] == shape), key=lambda line: line["layers"]
        )
        if len(found) < 2:
            print(
                f"{shape}: measured at {found[0]['layers']} layers; a second number of layers is"
                " needed (--layers)"
            )
            continue
        fit: dict[str, Any] = {"shape": shape, "parameters": found[0]["parameters"]}
        for phase in PHASES:
            time = extrapolated(found, lambda line, phase=phase: line["phases"][phase][clock])
            memory = extrapolated(found, lambda line, phase=phase: above_libraries(line, phase))
            off = (
                ""
                if time["off"] is None
                else f", {time['off']:+.0%} off at {found[-1]['layers']} layers"
            )
            floors = extrapolated(found, lambda line, phase=phase: line["floor_seconds"][phase])
            fit[phase] = {
                "seconds": time["whole"],
                "megabytes": memory["whole"],
                "floor": floors["whole"],
            }
            shown = (
                f"{time['whole']:.1f} {clock.replace('_', ' ')}{off}, {time['a_layer']:.2f} a layer"
            )
            print(
                f"{shape}, {phase}: {shown} (floor {floors['whole']:.1f} in all),"
                f" {memory['whole']:.0f} MB"
            )
        fits.append(fit)
    for phase in PHASES if len(fits) > 1 else ():
        time, memory = (slope(fits, phase, what) for what in ("seconds", "megabytes"))
        print(
            f"{phase}: time ~ parameters^{time:.2f}, memory ~ parameters^{memory:.2f}, over"
            f" {len(fits)} sizes"
        )
    return fits


def above_libraries(line: dict[str, Any], phase: str) -> float:
    """Peak megabytes of a phase, over those of a process that has loaded the libraries."""
    phases = line["phases"]
    return float(phases[phase]["peak_megabytes"] - phases["libraries"]["peak_megabytes"])


def extrapolated(
    found: Sequence[dict[str, Any]], cost: Callable[[dict[str, Any]], float]
) -> dict[str, Any]:
    """The line through the first two numbers of layers: at all layers; how far off it is at the
    last one measured.
    """
    (first, one), (second, two) = ((line["layers"], cost(line)) for line in found[:2])
    a_layer = max((two - one) / (second - first), 0.0)
    last = found[-1]["layers"]
    off = None if len(found) == 2 else (one + a_layer * (last - first)) / cost(found[-1]) - 1
    layers = SHAPES[found[0]["shape"]]["num_hidden_layers"]
    return {"whole": one + a_layer * (layers - first), "a_layer": a_layer, "off": off}


def slope(fits: Sequence[dict[str, Any]], phase: str, what: str) -> float:
    """Of the least squares line through the logarithms."""
    costs = [max(fit[phase][what], 1e-3) for fit in fits]
    return float(np.polyfit([math.log(fit["parameters"]) for fit in fits], np.log(costs), 1)[0])


def draw(fits: Sequence[dict[str, Any]], path: Path) -> None:
    """Time, with its floor dashed, and memory against parameters, one line a phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    sizes = [fit["parameters"] for fit in fits]
    for axis, (what, label) in zip(
        axes, (("seconds", "time, s"), ("megabytes", "peak memory, MB")), strict=True
    ):
        for phase in PHASES:
            exponent = f": exponent {slope(fits, phase, what):.2f}" if len(fits) > 1 else ""
            (drawn,) = axis.loglog(
                sizes, [fit[phase][what] for fit in fits], marker="o", label=phase + exponent
            )
            if what == "seconds":
                axis.loglog(
                    sizes,
                    [fit[phase]["floor"] for fit in fits],
                    "--",
                    color=drawn.get_color(),
                    alpha=0.6,
                )
        axis.set(xlabel="parameters", ylabel=label)
        axis.set_xticks(
            sizes, [f"{fit['shape']}\n{fit['parameters'] / 1e9:.2g} billion" for fit in fits]
        )
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    print(f"drew {path}")
