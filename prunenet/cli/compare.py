"""The command `prunenet compare`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import typer
from rich.markup import escape

from prunenet.checkpoints.options import LoadOptions
from prunenet.cli import tables
from prunenet.cli.console import errors, one_job, path, show
from prunenet.cli.options import HELP, Model, PolicyName, TextColumn
from prunenet.compare.options import CalibrationTexts, CompareOptions, Scored, ShareOf, Watch
from prunenet.evaluation.options import EvaluationOptions
from prunenet.recover.options import TOKENS
from prunenet.runtime.choices import ROUND_TO, RoundTo

if TYPE_CHECKING:
    from prunenet.compare.results import Line

T = TypeVar("T")
Methods = Annotated[
    list[str],
    typer.Argument(
        metavar="METHOD",
        help="method[:allocation][@moments][+heads][+refit][+recovered], or all; see above.",
    ),
]


def _list(wanted: bool) -> bool:
    """Prints the methods and allocations, and ends the program."""
    if not wanted:
        return False
    from prunenet.compare.spec import allocations, methods
    from prunenet.policies.methods.table import METHODS

    rows = [
        [name, METHODS[name].needs, METHODS[name].source]
        if name in METHODS
        else [name, "-", "PruneNet; see 'prunenet prune --help'"]
        for name in methods()
    ]
    note = f"allocations: {', '.join(allocations())}"
    show({}, False, lambda: tables.grid(["method", "reads", "source"], rows, note))
    raise typer.Exit


@dataclass(frozen=True, slots=True, kw_only=True)
class Varied:
    """What is varied besides the method."""

    ratios: Annotated[
        str, typer.Option(metavar="SHARES", help="Shares to remove, as in 0.2,0.3.")
    ] = "0.2,0.3"
    share_of: Annotated[
        ShareOf,
        typer.Option(
            help="What --ratios are shares of: FFN channels, all parameters, or the active ones,"
            " which one token uses."
        ),
    ] = "channels"
    seeds: Annotated[str, typer.Option(metavar="NUMBERS", help="As in 0,1,2.")] = "0"
    policy: PolicyName = None
    round_to: Annotated[str, HELP["round_to"]] = str(ROUND_TO)
    recover_tokens: Annotated[
        int, typer.Option(help="Tokens that methods +recovered learn from, self-written.")
    ] = TOKENS
    recover_window: Annotated[
        int | None, typer.Option(help="Tokens of a block of it. Default: 64.")
    ] = None

    def options(self) -> CompareOptions:
        """Raises ValueError where ratios or seeds are no numbers between commas."""
        ratios, seeds = listed("ratios", self.ratios, float), listed("seeds", self.seeds, int)
        return CompareOptions(
            ratios=ratios,
            share_of=self.share_of,
            seeds=seeds,
            round_to=cast(RoundTo, self.round_to),  # what the option's parser makes
            policy=self.policy,
            recover_tokens=self.recover_tokens,
            recover_window=self.recover_window,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What every model is scored on."""

    text: Annotated[
        list[str],
        typer.Option(
            help="Text to score, repeatable: builtin, a file, or a dataset as id[:config[:split]]."
        ),
    ] = field(default_factory=lambda: ["builtin"])
    text_column: TextColumn = None
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASKS", help="Zero-shot tasks, as in arc_easy,piqa, or all in the folder."
        ),
    ] = ""
    task_data: Annotated[
        Path | None, typer.Option(parser=path, help="Folder of their <task>.jsonl files.")
    ] = None
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each task.")] = None

    def scored(self, options: EvaluationOptions) -> Scored:
        """As the library takes it."""
        return Scored(
            texts=self.text,
            column=self.text_column,
            options=options,
            tasks=listed("tasks", self.tasks, str) if self.tasks else (),
            task_data=self.task_data,
            limit=self.limit,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrating:
    """The calibration text that methods read."""

    calibration: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=TEXT",
            help="A short name for a calibration text, repeatable, as in ptb=ptb.valid.txt.",
        ),
    ] = field(default_factory=list)
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of calibration text.")] = 16384
    calibration_window: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a block of calibration text; default 256, or what the model reads."
        ),
    ] = None

    def texts(self) -> CalibrationTexts:
        """Raises ValueError where a name is not given as NAME=TEXT."""
        return CalibrationTexts(
            named=dict(_named(given) for given in self.calibration),
            tokens=self.calibration_tokens,
            window=self.calibration_window,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Where lines, tables and figures go."""

    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", parser=path, help="JSON lines; what is in it is not done again."
        ),
    ] = Path("compare.jsonl")
    markdown: Annotated[
        Path | None, typer.Option(parser=path, help="Write the table to this file.")
    ] = None
    csv: Annotated[
        Path | None,
        typer.Option(parser=path, help="Write the numbers, deviations and intervals to this file."),
    ] = None
    latex: Annotated[
        Path | None, typer.Option(parser=path, help="Write the table for LaTeX to this file.")
    ] = None
    figures: Annotated[
        Path | None, typer.Option(parser=path, help="Draw into this folder (needs matplotlib).")
    ] = None
    figure_format: Annotated[Literal["png", "svg", "pdf"], typer.Option(help="Of the figures.")] = (
        "png"
    )
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False
    listing: Annotated[
        bool,
        typer.Option(
            "--list",
            is_eager=True,
            callback=_list,
            help="List methods and allocations, with their sources, and end.",
        ),
    ] = False

    def check(self) -> None:
        """Says now what is missing or cannot be written, not after the work.

        Raises:
            ValueError, ImportError: see above.
        """
        from prunenet.runtime.files import check_file, check_home

        if self.figures is not None:
            importlib.import_module("prunenet.compare.figures")
            check_home(self.figures)
        for file in (self.markdown, self.csv, self.latex):
            if file is not None:
                check_file(file)


def compare(
    model: Model,
    methods: Methods,
    varied: Varied,
    scoring: Scoring,
    evaluation: EvaluationOptions,
    calibrating: Calibrating,
    written: Written,
    loading: LoadOptions,
) -> None:
    """Compare ways to prune at equal size: METHODs x --ratios x --seeds, one JSON line each; a
    killed run goes on.

    A METHOD is method[:allocation][@moments][+heads][+refit][+recovered], as in wanda_sp,
    flap:uniform, llm_pruner_element1:owl@ptb, wanda_sp:learned@seed:ptb+layerwise. What is left
    out is the
    method's own. Moments: self (the model samples the text; the default), random (tokens), TEXT or
    seed:TEXT (the model continues the first tokens of its documents), with TEXT builtin, a file, a
    dataset, or a name given with --calibration. Heads: cut attention heads too, at the same size,
    where the method does (random, magnitude, flap, llm_pruner_*, saap*). Refit: off, mean_bias,
    layerwise, sequential or blocks. Recovered: the cut is trained as 'prunenet recover' does, by
    every method on the same text. Methods and allocations: --list shows them. Ours: prunenet (what
    'prunenet prune' does), prunenet-weights, elimination.
    """
    with one_job(loading.device, written.out) as place:
        from prunenet.compare.comparison import compare as run

        written.check()
        with tables.stages(errors) as advance:
            lines = run(
                model,
                methods,
                written.out,
                varied.options(),
                scored=scoring.scored(evaluation),
                calibration=calibrating.texts(),
                loading=replace(loading, device=place),
                watch=Watch(line=_report, progress=advance),
            )
        _present(lines, written)
    if any(line["error"] is not None for line in lines):  # on every rank alike
        raise typer.Exit(1)


def _present(lines: list[Line], written: Written) -> None:
    """Shows and draws the lines, on the first process."""
    from prunenet.runtime import parallel

    if not parallel.is_first():
        return
    from prunenet.compare import summary
    from prunenet.compare.tables import comma_separated, latex
    from prunenet.runtime.files import make_folders, write_atomic

    rows = summary.summarise(lines)
    files: dict[Path | None, Callable[[], str]] = {
        written.markdown: lambda: summary.markdown(rows, lines),
        written.csv: lambda: comma_separated(rows),
        written.latex: lambda: latex(rows, lines),
    }
    for file, text in files.items():
        if file is not None:
            make_folders(file.parent)
            write_atomic(file, text().encode())
    if written.figures is not None:
        from prunenet.compare.figures import draw_comparison

        draw_comparison(rows, written.figures, lines[0]["model"], written.figure_format)

    def table() -> Any:
        headings, note = summary.headings(rows), summary.caption(lines)
        return tables.grid(headings, summary.cells_of(rows), note)

    show({"cells": lines}, written.as_json, table)
    failed = sum(line["error"] is not None for line in lines)
    if failed:
        errors.print(
            f"[red]{failed} of {len(lines)} cells failed[/red]; the same command tries them again"
        )


def _report(line: Line) -> None:
    name = "dense"
    if line["method"] != "dense":
        name = f"{line['method']} {line['ratio']:g} seed {line['seed']}"
    if line["error"] is not None:
        errors.print(f"[red]failed:[/red] {escape(name)}: {escape(line['error'])}")
        return
    found = ", ".join(
        "infinite" if text["value"] is None else f"{text['value']:,.2f}"
        for text in line["perplexity"]
    )
    seconds = line["seconds_pruning"] - line["seconds_shared"] + line["seconds_evaluation"]
    errors.print(f"{escape(name)}: perplexity {found} ({seconds:,.0f} s)")


def _named(given: str) -> tuple[str, str]:
    name, equals, source = given.partition("=")
    if not equals or not source:
        raise ValueError(f"--calibration is NAME=TEXT, as in ptb=ptb.valid.txt; got {given!r}")
    return name, source


def listed(what: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """The different items between commas.

    Raises:
        ValueError: an item is not of the kind.
    """
    try:
        return list(dict.fromkeys(kind(item.strip()) for item in text.split(",")))
    except ValueError:
        word = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"--{what} are {word} between commas, got {text!r}") from None
