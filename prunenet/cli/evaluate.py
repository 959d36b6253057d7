"""The commands `prunenet eval` and `prunenet report`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from prunenet.checkpoints.options import LoadOptions
from prunenet.cli import tables
from prunenet.cli.console import errors, one_process, path, show
from prunenet.cli.options import Json, TextColumn
from prunenet.evaluation.options import EvaluationOptions, SpeedOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The text that is scored."""

    text: Annotated[
        str,
        typer.Option(help="Text to score: builtin, a file, or a dataset as id[:config[:split]]."),
    ] = "builtin"
    text_column: TextColumn = None


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints; the first is the one to compare with.")
    ],
    scored: Scored,
    options: EvaluationOptions,
    pace: SpeedOptions,
    loading: LoadOptions,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure tokens per second.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Measure perplexity, size and speed of models, side by side."""
    with one_process():
        from prunenet.evaluation.side_by_side import evaluate as measured
        from prunenet.text.corpora import TestText, load_text

        text = load_text(scored.text, TestText, scored.text_column)
        with tables.progress(errors, "scoring") as advance:
            found = measured(
                models,
                text,
                options,
                speed=pace if speed else None,
                loading=loading,
                progress=advance,
            )
        rows = [row.as_dict() for row in found]
        show({"models": rows}, as_json, lambda: tables.comparison(rows), only_here=True)


def report(
    results: Annotated[
        Path, typer.Argument(parser=path, help="JSON written by 'prunenet eval --json'.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", parser=path, help="PNG to write.")],
    as_json: Json = False,
) -> None:
    """Draw perplexity and speed against size."""
    with one_process():
        from prunenet.evaluation.report import draw_report

        try:
            rows = list(json.loads(results.read_text(encoding="utf-8"))["models"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{results} is not what 'prunenet eval --json' prints ({error}); make it anew"
            ) from None
        draw_report(rows, out)
        show({"figure": str(out)}, as_json, lambda: f"drew {out}")
