"""The subcommand `prunenet compare`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.markup import escape

from prunenet.cli import tables
from prunenet.cli.console import errors, one_job, show
from prunenet.cli.options import (
    Bos,
    Device,
    Dtype,
    Json,
    MaxMemory,
    Model,
    PolicyName,
    TextColumn,
    Window,
)
from prunenet.runtime import parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunenet.compare.plan import Evaluation, Plan
    from prunenet.compare.pruner import Amount, Pruner
    from prunenet.compare.results import Line, Results
    from prunenet.compare.spec import Spec
    from prunenet.evaluation.perplexity import EvaluationOptions
    from prunenet.text.corpora import CalibrationText

T = TypeVar("T")
Specs = Annotated[
    list[str],
    typer.Argument(
        metavar="METHOD", help="method[:allocation][@moments][+heads][+refit], or all; see above."
    ),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="JSON lines; what is in it is not done again.")
]
RatioList = Annotated[
    str, typer.Option(metavar="SHARES", help="Shares of FFN channels to remove, as in 0.2,0.3.")
]
SeedList = Annotated[str, typer.Option(metavar="NUMBERS", help="As in 0,1,2.")]
TaskList = Annotated[
    str,
    typer.Option(
        metavar="TASKS", help="Zero-shot tasks, as in arc_easy,piqa, or all in the folder."
    ),
]
Texts = Annotated[
    list[str],
    typer.Option(
        "--text",
        help="Text to score, repeatable: builtin, a file, or a dataset as id[:config[:split]].",
    ),
]
Calibration = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=TEXT",
        help="A short name for a calibration text, repeatable, as in ptb=ptb.valid.txt.",
    ),
]
Tokens = Annotated[int, typer.Option(help="Tokens of calibration text.")]
CalibrationWindow = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a block of calibration text; default 256, or what the model reads."
    ),
]


def compare(
    model: Model,
    specs: Specs,
    out: Out = Path("compare.jsonl"),
    ratios: RatioList = "0.2,0.3",
    seeds: SeedList = "0",
    text: Texts = ["builtin"],  # noqa: B006
    text_column: TextColumn = None,
    bos: Bos = "auto",
    window: Window = 1024,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows; default: no overlap.")
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(help="Score only the first windows of each text.")
    ] = None,
    tasks: TaskList = "",
    task_data: Annotated[
        Path | None, typer.Option(help="Folder of their <task>.jsonl files.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first questions of each task.")
    ] = None,
    calibration: Calibration = [],  # noqa: B006
    calibration_tokens: Tokens = 16384,
    calibration_window: CalibrationWindow = None,
    policy: PolicyName = None,
    round_to: Annotated[int, typer.Option("--round", help="Widths are multiples of this.")] = 8,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Draw into this folder (needs matplotlib).")
    ] = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Compare ways to prune at equal size: METHODs x --ratios x --seeds, one JSON line each; a
    killed run goes on.

    A METHOD is method[:allocation][@moments][+heads][+refit], as in wanda_sp, flap:uniform,
    llm_pruner_element1:owl@ptb, wanda_sp:learned@seed:ptb+layerwise. What is left out is the
    method's own. Moments: self (the model writes the text; the default), random (tokens), TEXT or
    seed:TEXT (the model goes on from the first tokens of its documents), with TEXT builtin, a file,
    a dataset, or a name given with --calibration. Heads: cut attention heads too, at the same size,
    where the method does (random, magnitude, flap, llm_pruner_*, saap*). Refit: off, mean_bias,
    layerwise or sequential. Methods and allocations: a wrong name lists them. Ours: prunenet (what
    'prunenet prune' does), prunenet-weights, elimination.
    """
    with one_job(device) as place:
        from prunenet.checkpoints.load import load_model, load_tokenizer
        from prunenet.compare.plan import Plan
        from prunenet.compare.pruner import Pruner
        from prunenet.compare.results import Results
        from prunenet.compare.spec import parse_all
        from prunenet.evaluation.perplexity import EvaluationOptions
        from prunenet.policies.artifact import policy_for
        from prunenet.text.calibration import block_tokens
        from prunenet.text.windows import bos_token

        named = dict(_named(given) for given in calibration)
        parsed = parse_all(specs, named)
        shares, numbers = _listed("ratios", ratios, float), _listed("seeds", seeds, int)
        _check_presentation(markdown, figures)
        results = Results(out)
        if max_windows is not None and max_windows < 1:
            raise ValueError(f"--max-windows must be 1 or more, got {max_windows}")
        options = EvaluationOptions(window=window, stride=stride, max_windows=max_windows, bos=bos)
        scored = _evaluation(text, text_column, options, _task_files(tasks, task_data), limit)
        texts = _calibration_texts(
            {spec.text for spec in parsed if spec.text is not None}, named, text_column, scored
        )
        dense = load_model(model, dtype=dtype, device=place, max_memory=max_memory)
        tokenizer = load_tokenizer(model)
        trained, name = policy_for(policy, dense.config.model_type)
        front = int(bos_token(tokenizer, bos) is not None)
        if calibration_window is None:
            calibration_window = block_tokens(dense, front)
        amount = _amount(calibration_tokens, calibration_window)
        # "all" means what can be done; what was asked for by name is refused by `check`.
        parsed = [
            spec
            for spec in parsed
            if spec.name in specs or _possible(spec, dense, trained is not None)
        ]
        plan = Plan(model, parsed, shares, numbers, scored, amount, round_to)
        pruner = Pruner(
            dense,
            tokenizer,
            policy=trained,
            policy_name=name,
            texts=texts,
            amount=amount,
            round_to=round_to,
            bos=bos,
        )
        lines = _presented(_done(plan, pruner, results), markdown, figures, as_json)
    _end(lines)


def _possible(spec: Spec, model: PreTrainedModel, policy: bool) -> bool:
    """Whether there is the policy that it needs, and it can take this family of models."""
    from prunenet.models.architectures import UnsupportedArchitecture
    from prunenet.policies.methods import METHODS

    able = METHODS[spec.method].able if spec.method in METHODS else None
    try:
        if able is not None:
            able(model)
    except UnsupportedArchitecture:
        return False
    return policy or not spec.needs_policy


def _check_presentation(markdown: Path | None, figures: Path | None) -> None:
    """Says now what is missing or cannot be written, not after the work."""
    from prunenet.runtime.files import check_home

    if figures is not None:
        importlib.import_module("prunenet.compare.figures")
        check_home(figures)
    if markdown is not None:
        if markdown.is_dir():
            raise ValueError(f"--markdown {markdown} is a folder; give a file")
        check_home(markdown.parent)


def _done(plan: Plan, pruner: Pruner, results: Results) -> list[Line]:
    from prunenet.compare.run import check
    from prunenet.compare.run import compare as run

    check(plan, pruner)
    with tables.stages(errors) as advance:
        pruner.progress = lambda done, of: advance("writing text", done, of)
        return run(plan, pruner, results, report=_report, progress=advance)


def _presented(
    lines: list[Line], markdown: Path | None, figures: Path | None, as_json: bool
) -> list[Line]:
    """The lines; the first process has shown and drawn them."""
    if not parallel.is_first():
        return lines
    from prunenet.compare import summary
    from prunenet.runtime.files import write_atomic

    rows = summary.summarise(lines)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(markdown, summary.markdown(rows, lines).encode())
    if figures is not None:
        from prunenet.compare.figures import draw_comparison

        draw_comparison(rows, figures, lines[0]["model"])
    show(
        {"cells": lines},
        as_json,
        lambda: tables.grid(summary.headings(rows), summary.cells_of(rows), summary.caption(lines)),
    )
    failed = sum(line["error"] is not None for line in lines)
    if failed:
        errors.print(
            f"[red]{failed} of {len(lines)} cells failed[/red]; the same command tries them again"
        )
    return lines


def _end(lines: list[Line]) -> None:
    """On every rank alike."""
    if any(line["error"] is not None for line in lines):
        raise typer.Exit(1)


def _report(line: Line) -> None:
    name = (
        line["method"]
        if line["method"] == "dense"
        else f"{line['method']} {line['ratio']:g} seed {line['seed']}"
    )
    if line["error"] is not None:
        errors.print(f"[red]failed:[/red] {escape(name)}: {escape(line['error'])}")
        return
    found = ", ".join(
        "infinite" if text["value"] is None else f"{text['value']:,.2f}"
        for text in line["perplexity"]
    )
    seconds = line["seconds_pruning"] - line["seconds_shared"] + line["seconds_evaluation"]
    errors.print(f"{escape(name)}: perplexity {found} ({seconds:,.0f} s)")


def _evaluation(
    sources: list[str],
    column: str | None,
    options: EvaluationOptions,
    tasks: dict[str, Path],
    limit: int | None,
) -> Evaluation:
    from prunenet.compare.plan import Evaluation
    from prunenet.text.corpora import TestText, load_text

    texts = [load_text(source, TestText, column) for source in dict.fromkeys(sources)]
    return Evaluation(texts, options, tasks, limit)


def _task_files(tasks: str, folder: Path | None) -> dict[str, Path]:
    from prunenet.evaluation.task_files import task_files

    if not tasks and folder is None:
        return {}
    if folder is None:
        raise ValueError(
            f"tasks are read from local files: give the folder of {tasks.split(',')[0]}.jsonl as"
            " --task-data"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "zero-shot tasks need lm-eval; pip install 'prunenet[eval]', or leave --tasks out"
        )
    names = _listed("tasks", tasks, str) if tasks not in ("", "all") else []
    return task_files(folder, names)


def _calibration_texts(
    wanted: set[str], named: dict[str, str], column: str | None, scored: Evaluation
) -> dict[str, CalibrationText]:
    from prunenet.text.corpora import CalibrationText, load_text

    found = {
        name: load_text(named.get(name, name), CalibrationText, column) for name in sorted(wanted)
    }
    for name, text in found.items():
        if any(text.content == test.content for test in scored.texts):
            raise ValueError(
                f"{name!r} is a text to be scored, and calibration must not see it; give another"
                " split or file"
            )
    return found


def _amount(tokens: int, window: int) -> Amount:
    from prunenet.compare.pruner import Amount

    if window < 2:
        raise ValueError(f"--calibration-window must be 2 or more, got {window}")
    if tokens < 2 * window:
        raise ValueError(
            f"calibration takes two blocks at least, {2 * window} tokens of windows of {window},"
            f" got {tokens}"
        )
    return Amount(tokens // window, window)


def _named(given: str) -> tuple[str, str]:
    from prunenet.compare.spec import RESERVED

    name, equals, source = given.partition("=")
    if not equals or not name or not source or name in RESERVED or set(name) & set("@+:/, "):
        raise ValueError(
            "--calibration is NAME=TEXT, as in ptb=ptb.valid.txt, NAME one word and not"
            f" {', '.join(RESERVED)}; got {given!r}"
        )
    return name, source


def _listed(what: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """The different items between commas."""
    try:
        return list(dict.fromkeys(kind(item.strip()) for item in text.split(",")))
    except ValueError:
        word = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"--{what} are {word} between commas, got {text!r}") from None
