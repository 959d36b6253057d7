"""The command `prunenet eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from prunenet.checkpoints.exports.choices import GgufType
from prunenet.checkpoints.options import LoadOptions
from prunenet.cli import tables
from prunenet.cli.console import errors, one_process, show
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Besides:
    """What is measured besides perplexity and size."""

    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure tokens per second.")
    ] = True
    serve: Annotated[
        GgufType | None,
        typer.Option(
            help="Write each model as a GGUF file of this type too, and measure tokens per second"
            " in llama.cpp (extra 'gguf')."
        ),
    ] = None
    repetition: Annotated[
        bool,
        typer.Option(
            "--repetition", help="Count the 4-grams that greedy texts of 128 tokens repeat."
        ),
    ] = False


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints; the first is the one to compare with.")
    ],
    scored: Scored,
    options: EvaluationOptions,
    pace: SpeedOptions,
    besides: Besides,
    loading: LoadOptions,
    as_json: Json = False,
) -> None:
    """Measure perplexity, size and speed of models, side by side."""
    with one_process():
        from prunenet.evaluation.side_by_side import evaluate as measured
        from prunenet.text.corpora import TestText, load_text

        if not besides.speed and besides.serve is None and pace != SpeedOptions():
            raise ValueError(
                "--no-speed measures no speed: leave it out, or --prompt, --new-tokens, --repeats,"
                " --most-repeats, --compile and --batch"
            )
        text = load_text(scored.text, TestText, scored.text_column)
        with tables.progress(errors, "scoring") as advance:
            found = measured(
                models,
                text,
                options,
                speed=pace if besides.speed else None,
                serve=besides.serve,
                repetition=besides.repetition,
                loading=loading,
                progress=advance,
            )
        rows = [row.as_dict() for row in found]
        show({"models": rows}, as_json, lambda: tables.comparison(rows), only_here=True)
