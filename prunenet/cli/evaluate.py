"""The commands `prunenet eval` and `prunenet report`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from prunenet.checkpoints.options import LoadOptions
from prunenet.cli import tables
from prunenet.cli.console import errors, one_process, show
from prunenet.cli.options import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What perplexity is measured on."""

    text: Annotated[
        str,
        typer.Option(help="Text to score: builtin, a file, or a dataset as id[:config[:split]]."),
    ] = "builtin"
    window: Annotated[int, typer.Option(help="Tokens the model sees at once.")] = 1024
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows; default: no overlap.")
    ] = None
    max_windows: Annotated[int | None, typer.Option(help="Score only the first windows.")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How speed is measured."""

    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure tokens per second.")
    ] = True
    batch: Annotated[int, typer.Option(help="Sequences at once when measuring speed.")] = 1
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Measure the speed of what torch.compile makes of them."),
    ] = False


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints; the first is the one to compare with.")
    ],
    scoring: Scoring,
    timing: Timing,
    loading: LoadOptions,
    as_json: Json = False,
) -> None:
    """Measure perplexity, size and speed of models, side by side."""
    with one_process():
        from prunenet.evaluation.side_by_side import measure
        from prunenet.text.corpora import TestText, load_text

        scored = load_text(scoring.text, TestText)
        options = {name: value for name, value in asdict(scoring).items() if name != "text"}
        with tables.progress(errors, "scoring") as advance:
            rows = measure(
                models, scored, **options, **asdict(timing), **asdict(loading), progress=advance
            )
        show({"models": rows}, as_json, lambda: tables.comparison(rows))


def report(
    results: Annotated[Path, typer.Argument(help="JSON written by 'prunenet eval --json'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write.")],
    as_json: Json = False,
) -> None:
    """Draw perplexity and speed against size."""
    with one_process():
        from prunenet.evaluation.report import draw_report, read_rows

        draw_report(read_rows(results), out)
        show({"figure": str(out)}, as_json, lambda: f"drew {out}")
