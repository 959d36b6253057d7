"""The program `prunenet`: its commands and its entry point. Every command takes --json.

Results go to standard output, progress and errors to standard error. A user's mistake is one
sentence and exit code 1 (2 where the command line itself is off); PRUNENET_DEBUG=1 shows the
traceback.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from prunenet.cli.compare import compare
from prunenet.cli.demo import demo
from prunenet.cli.evaluate import evaluate
from prunenet.cli.export import export
from prunenet.cli.models import models
from prunenet.cli.options import grouped
from prunenet.cli.order import order
from prunenet.cli.prune import prune
from prunenet.cli.push import card, push
from prunenet.cli.recover import recover
from prunenet.cli.report import report
from prunenet.cli.signals import ending_cleanly
from prunenet.cli.train import train
from prunenet.cli.train_widths import train_widths

app = typer.Typer(
    help="Learns once per model family which FFN channels matter, and cuts any model of that family"
    " to any size.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (
    train,
    train_widths,
    prune,
    evaluate,
    compare,
    recover,
    order,
    export,
    card,
    push,
    report,
    models,
    demo,
)
for command in COMMANDS:
    name = "eval" if command is evaluate else command.__name__.replace("_", "-")
    app.command(name)(grouped(command))


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"prunenet {version('prunenet')}")
        raise typer.Exit
    return wanted


@app.callback()
def _program(
    shown: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_version, help="Print the version and end."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command; see `prunenet.__main__` for the entry point."""
    with ending_cleanly():
        _main()


def _main() -> None:
    # Quiet libraries: their warnings and bars are not results. Set here, where the process is ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if (known := sys.modules.get("transformers.utils.logging")) is not None:
        known.disable_progress_bar()  # imported before it could read the environment
    app()
