"""The command `prunenet demo`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from prunenet.cli import tables
from prunenet.cli.console import errors, one_process, show
from prunenet.cli.options import Json, Out

Sizes = Annotated[list[float], typer.Option("--ratio", help="Repeat for several sizes.")]


def has_screen() -> bool:
    """Returns whether a page that is opened would be seen here: a desktop, not a bare server."""
    return sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )


def demo(
    out: Out = Path("demo"),
    ratios: Sizes = [0.2, 0.3, 0.4],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Fetch a real model, cut it to several sizes, train a short policy too, and compare."""
    with one_process(out):
        from prunenet.cli.demo_steps import run_demo

        rows = run_demo(out, ratios, errors)
        show({"models": rows}, as_json, lambda: tables.comparison(rows))
        places = {
            "report": out / "report.html",
            "figure": out / "report.png",
            "policy": out / "policy",
        }
        places |= {f"checkpoint {row['name']}": row["folder"] for row in rows[1:]}
        for name, place in places.items():
            errors.print(f"{name}: {escape(str(place))}")
        if errors.is_terminal and has_screen():
            typer.launch(str(out / "report.html"))
