"""The cells of a comparison: methods x ratios x seeds on one model, one after the other, each into
one JSON line.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import identify, tokenizer_sha256
from prunenet.compare.machine import commit, synchronise, versions
from prunenet.compare.plan import Cell, Evaluation, Plan, asked, cells, key_of
from prunenet.compare.pruner import Made, Pruner
from prunenet.compare.recovered import Recovery
from prunenet.compare.results import Line, Results
from prunenet.compare.spec import Spec
from prunenet.evaluation.perplexity import check_fits, perplexity, scored_windows
from prunenet.evaluation.zeroshot import TaskResult, read_task, zero_shot
from prunenet.models.anatomy import Anatomy
from prunenet.models.heads import attentions
from prunenet.models.layers import (
    active_parameters,
    count_parameters,
    down_linears,
    ffn_widths,
)
from prunenet.policies.methods import METHODS
from prunenet.runtime import parallel
from prunenet.runtime.choices import check_ratio
from prunenet.runtime.floats import dtype_name
from prunenet.runtime.memory import peak_memory
from prunenet.runtime.placement import home, where
from prunenet.runtime.products import fast_products
from prunenet.text.calibration import check_seed

# What every line has, besides what identifies its cell; None until it is known.
_MEASURED = (
    *("regime", "applied_regime", "policy", "calibration", "widths", "residual_widths"),
    *("parameters", "active_parameters", "non_embedding_parameters", "bias_parameters"),
    *("perplexity", "tasks", "accuracy"),
    *("seconds_calibration", "seconds_pruning", "seconds_shared", "seconds_evaluation"),
    *("peak_memory_pruning", "peak_memory_evaluation"),
)


def check(plan: Plan, pruner: Pruner) -> None:
    """Raises ValueError (or a kind of it) for what no cell of the plan could do, before any
    work.
    """
    model, scored = pruner.model, plan.evaluation
    if not plan.ratios or not plan.seeds or not scored.texts:
        raise ValueError("a comparison has a ratio, a seed and a text to score at least")
    if scored.limit is not None and scored.limit < 1:
        raise ValueError(f"`limit` must be 1 or more, got {scored.limit}")
    for seed in plan.seeds:
        check_seed(seed)
    for ratio in plan.ratios:
        pruner.channels(check_ratio(ratio))
    for spec in plan.specs:
        check_spec(spec, pruner)
    check_fits(model, pruner.tokenizer, scored.options)
    pruner.check_texts(plan.specs)
    for text in scored.texts:
        scored_windows(model, pruner.tokenizer, text, scored.options)
    for task, file in scored.tasks.items():
        read_task(task, file)
    if any(spec.recovered for spec in plan.specs):
        Recovery(pruner, *plan.recovery).check()


def check_spec(spec: Spec, pruner: Pruner) -> None:
    """Raises ValueError (or a kind of it) for what cannot be done to the pruner's model."""
    model, row = pruner.model, METHODS.get(spec.method)
    if spec.needs_policy and pruner.policy is None:
        raise ValueError(
            f"{spec.name!r} asks a policy, and none ships for model type"
            f" {model.config.model_type!r}; train one (prunenet train) and give its folder as"
            " `policy`"
        )
    if spec.heads:
        attentions(model)
    if pruner.policy is not None and spec.method in ("prunenet", "prunenet-weights"):
        pruner.policy.check_measured(spec.moments is not None)
    if spec.allocation not in ("auto", "uniform") and (why := Anatomy.of(model).tied_by):
        raise ValueError(
            f"{spec.name!r} gives each layer a width of its own, and those of a"
            f" {type(model).__name__} share one, for {why}; say"
            f" {replace(spec, allocation='uniform').name}"
        )
    if row is None:
        return
    if row.able is not None:
        row.able(model)
    elif row.needs == "gradients" or spec.refit == "mean_bias":
        down_linears(model)
    wanted = "active" if pruner.share_of == "active" else "total"
    if row.shrinks not in ("both", wanted):
        raise ValueError(f"{spec.name!r} {_SHRINKS[row.shrinks]}")


_SHRINKS = {
    "total": "leaves the active parameters as they are, but for a few of the router: take shares"
    " (`share_of`) of all parameters",
    "active": "leaves all parameters where they are: take shares (`share_of`) of the active ones",
}


def compare(
    plan: Plan,
    pruner: Pruner,
    results: Results,
    *,
    report: Callable[[Line], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Line]:
    """Does what is not in the results yet, and what failed before. A cell that fails is one line
    with its error.

    Of several processes (`prunenet.runtime.parallel`) each takes the next cell when it is free; the
    first writes the lines of all. Each measures what its own cells read: shared measurements are
    made once a process, texts are written once.

    Args:
        plan: see `check`.
        pruner: of the plan's model.
        results: each line is in the file before the next cell begins.
        report: called with each line that is new.
        progress: called with (cell, cells done, cells in all).

    Returns:
        The plan's lines, those of earlier runs too.
    """
    if parallel.is_first():
        results.prepare()
    shared, about = _of_model(plan, pruner), _of_machine(pruner)
    questions = {cell: asked(plan, cell, pruner) | shared for cell in cells(plan)}
    keys = {cell: key_of(question) for cell, question in questions.items()}
    left = parallel.broadcast_object(
        0, lambda: [key for key in keys.values() if not results.complete(key)]
    )
    todo = [cell for cell in questions if keys[cell] in left]
    pruner.share_texts([(cell.spec.moments, cell.seed) for cell in todo if cell.spec is not None])
    recovery = Recovery(pruner, *plan.recovery, progress)
    recovery.write(sorted({c.seed for c in todo if c.spec is not None and c.spec.recovered}))

    def take(line: Line) -> None:
        results.add(line)
        if report is not None:
            report(line)

    last: Cell | None = None
    with parallel.posted(take) as add:
        for number in parallel.work_queue(len(todo)):
            cell = todo[number]
            _forget(pruner, last, cell)
            last = cell
            if progress is not None:
                progress(cell.name, number, len(todo))
            line = {
                "cell": keys[cell],
                "error": None,
                **questions[cell],
                **dict.fromkeys(_MEASURED),
                **about,
            }
            with parallel.apart(), fast_products(pruner.model):
                _measure(cell, plan.evaluation, recovery, line)
            add(line)
    _forget(pruner, last, None)
    lines: list[Line] = parallel.broadcast_object(
        0, lambda: [results[key] for key in keys.values()]
    )
    return lines


def _of_model(plan: Plan, pruner: Pruner) -> Line:
    """What a line says of the model."""
    name, revision = identify(plan.source)
    return {
        "model": name,
        "revision": revision,
        "tokenizer": tokenizer_sha256(plan.source),
        "dtype": dtype_name(pruner.model.dtype),
    }


def _of_machine(pruner: Pruner) -> Line:
    """What a line says of machine and software."""
    return {
        "device": where(pruner.model),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }


def _forget(pruner: Pruner, last: Cell | None, following: Cell | None) -> None:
    """Drops what the last cell read, unless the next one reads it too: cells come text by text."""
    if last is None or last.spec is None or last.spec.moments is None:
        return
    if (
        following is None
        or following.spec is None
        or (following.spec.moments, following.seed) != (last.spec.moments, last.seed)
    ):
        pruner.forget(last.spec.moments, last.seed)


def _measure(cell: Cell, scored: Evaluation, recovery: Recovery, line: Line) -> None:
    """Makes the model and scores it; fills in the line as far as that goes."""
    try:
        narrow = _prune(cell, recovery, line)
        _score(narrow, scored, recovery.pruner, line)
    except Exception as error:  # a cell may fail in any way; the others go on
        line["error"] = _sentence(error)


def _prune(cell: Cell, recovery: Recovery, line: Line) -> PreTrainedModel:
    spec, pruner = cell.spec, recovery.pruner
    device = home(pruner.model)
    if spec is None:
        made = Made(pruner.model, ffn_widths(pruner.model), 0, "weights", "weights", None, None)
        line |= {"seconds_pruning": 0.0, "seconds_shared": 0.0}
    else:
        if spec.moments is not None:
            line["seconds_calibration"] = pruner.blocks(spec.moments, cell.seed)[1]
        with pruner.ledger.cell() as use, peak_memory(device) as peak:
            start = time.perf_counter()
            made = pruner.make(spec, cell.ratio, cell.seed)
            if spec.recovered:
                made, line["recovery"] = recovery.recovered(made, cell.seed)
            synchronise(device)
            seconds = time.perf_counter() - start
        line |= {
            "seconds_pruning": seconds + use.shared,
            "seconds_shared": use.shared,
            "peak_memory_pruning": peak,
        }
    total, inner = count_parameters(made.model)
    line |= {
        "regime": made.regime,
        "applied_regime": made.applied_regime,
        "policy": made.policy,
        "widths": made.widths,
    }
    line |= {} if made.groups is None else {"head_groups": made.groups}
    line |= {"calibration": None if made.calibration is None else dict(made.calibration)}
    line["residual_widths"] = getattr(made.model.config, "residual_widths", None)
    line["active_parameters"] = active_parameters(Anatomy.of(made.model))
    line |= {"parameters": total, "non_embedding_parameters": inner, "bias_parameters": made.biases}
    return made.model


def _score(narrow: PreTrainedModel, scored: Evaluation, pruner: Pruner, line: Line) -> None:
    with peak_memory(home(narrow)) as peak:
        start = time.perf_counter()
        line["perplexity"] = []
        for label, text in zip(scored.labels, scored.texts, strict=True):
            found = asdict(perplexity(narrow, pruner.tokenizer, text, scored.options))
            # JSON knows no infinity; the loss says it
            value = found["value"] if math.isfinite(found["value"]) else None
            line["perplexity"].append(found | {"text": label, "value": value})
        if scored.tasks:
            answers = zero_shot(
                narrow,
                pruner.tokenizer,
                scored.tasks,
                limit=scored.limit,
                bos=scored.options.bos,
            )
            line |= {
                "tasks": [asdict(answer) for answer in answers],
                "accuracy": _mean_accuracy(answers),
            }
        line["seconds_evaluation"] = time.perf_counter() - start
    line["peak_memory_evaluation"] = peak


def _mean_accuracy(answers: Sequence[TaskResult]) -> float:
    """Over tasks; of each, per character where lm-eval defines that."""
    return sum(a.accuracy if a.accuracy_norm is None else a.accuracy_norm for a in answers) / len(
        answers
    )


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (
        text
        if text and isinstance(error, ValueError)
        else f"{type(error).__name__}: {text}".rstrip(": ")
    )
