"""The command `prunenet demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from prunenet.cli import tables
from prunenet.cli.console import errors, one_process, show
from prunenet.cli.options import Json, Out

Sizes = Annotated[list[float], typer.Option("--ratio", help="Repeat for several sizes.")]


def demo(
    out: Out = Path("demo"),
    ratios: Sizes = [0.2, 0.3, 0.4],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Fetch a real model, train a policy on it, cut it to several sizes, and compare."""
    with one_process(out):
        from prunenet.cli.demo_steps import run_demo

        rows = run_demo(out, ratios, errors)
        show({"models": rows}, as_json, lambda: tables.comparison(rows))
        places = {
            "report": out / "report.html",
            "figure": out / "report.png",
            "policy": out / "policy",
        }
        places |= {f"checkpoint {row['ratio']:g}": row["folder"] for row in rows[1:]}
        for name, place in places.items():
            errors.print(f"{name}: {escape(str(place))}")
