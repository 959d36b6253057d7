"""The cells of a comparison: methods x ratios x seeds on one model, one after the other, each into one JSON line."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prunenet.checkpoint import identify
from prunenet.compare.machine import commit, peak_memory, synchronise, versions
from prunenet.compare.results import Line, Results
from prunenet.compare.spec import Spec
from prunenet.compare.workshop import Amount, Made, Workshop
from prunenet.evaluate import perplexity
from prunenet.heads import attentions
from prunenet.latency import check_positions
from prunenet.layers import count_parameters, ffn_widths
from prunenet.masks import check_ratio, width_at
from prunenet.policies.artifact import check_measured
from prunenet.policies.methods import METHODS
from prunenet.text import TestText, content_sha256, token_windows, tokenise
from prunenet.zeroshot import TaskResult, read_task, zero_shot

_FORMAT = 1
# What every line has, besides what identifies its cell; None until it is known.
_MEASURED = (
    *("regime", "applied_regime", "policy", "calibration", "widths", "residual_widths"),
    *("parameters", "non_embedding_parameters", "bias_parameters"),
    *("perplexity", "tasks", "accuracy"),
    *("seconds_calibration", "seconds_pruning", "seconds_shared", "seconds_evaluation"),
    *("peak_memory_pruning", "peak_memory_evaluation"),
)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model is scored on.

    Attributes:
        texts: for perplexity, at least one.
        window, stride, max_windows: see `prunenet.evaluate.perplexity`.
        tasks: task -> its file, for `prunenet.zeroshot.zero_shot`; none by default.
        limit: questions of each task; default all.
    """

    texts: Sequence[TestText]
    window: int = 1024
    stride: int | None = None
    max_windows: int | None = None
    tasks: Mapping[str, Path] = field(default_factory=dict)
    limit: int | None = None

    @property
    def labels(self) -> list[str]:
        """A short name of each text; the whole source where short ones would be the same."""
        short = [Path(text.name).name for text in self.texts]
        return short if len(set(short)) == len(short) else [text.name for text in self.texts]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared.

    Attributes:
        source: folder or hub id of the model.
        specs: ways to prune.
        ratios: shares of FFN channels removed, in [0, 1).
        seeds: of text, windows and draws.
        evaluation: how every cell is scored.
        amount: of calibration text.
        round_to: widths are multiples of this.
    """

    source: str
    specs: Sequence[Spec]
    ratios: Sequence[float]
    seeds: Sequence[int]
    evaluation: Evaluation
    amount: Amount = field(default_factory=Amount)
    round_to: int = 8


@dataclass(frozen=True, slots=True)
class Cell:
    """One model to make and to score; `spec` None is the dense one."""

    spec: Spec | None
    ratio: float
    seed: int

    @property
    def name(self) -> str:
        """For a progress bar."""
        return "dense" if self.spec is None else f"{self.spec.name} {self.ratio:g} seed {self.seed}"


def cells(plan: Plan) -> list[Cell]:
    """The dense model, then those that read no text, then text by text and seed by seed: each is measured and dropped once."""
    moments = list(dict.fromkeys([None, *(spec.moments for spec in plan.specs)]))
    order = sorted(plan.specs, key=lambda spec: moments.index(spec.moments))
    found = [Cell(None, 0.0, 0)]
    for source in moments:
        for seed in plan.seeds:
            found += [Cell(spec, ratio, seed) for ratio in plan.ratios for spec in order if spec.moments == source]
    return found


def check(plan: Plan, workshop: Workshop) -> None:
    """Raises ValueError (or a kind of it) for what no cell of the plan could do, before any work."""
    model, scored = workshop.model, plan.evaluation
    if not plan.ratios or not plan.seeds or not scored.texts:
        raise ValueError("a comparison has a ratio, a seed and a text to score at least")
    if scored.limit is not None and scored.limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {scored.limit}")
    if scored.max_windows is not None and scored.max_windows < 1:
        raise ValueError(f"--max-windows must be 1 or more, got {scored.max_windows}")
    for ratio in plan.ratios:
        for d_ff in set(ffn_widths(model)):
            width_at(d_ff, check_ratio(ratio), plan.round_to)
    for spec in plan.specs:
        if spec.needs_policy and workshop.policy is None:
            raise ValueError(
                f"{spec.name!r} asks a policy, and none ships for model type {model.config.model_type!r}; train one "
                "(prunenet train) and give its folder as --policy"
            )
        if spec.heads:
            attentions(model)
        if workshop.policy is not None and spec.method in ("prunenet", "prunenet-weights"):
            check_measured(workshop.policy, spec.moments is not None)
        able = METHODS[spec.method].able if spec.method in METHODS else None
        if able is not None:
            able(model)
    check_positions(model, scored.window, "window")
    workshop.check_texts(plan.specs)
    for text in scored.texts:
        token_windows(tokenise(workshop.tokenizer, text), scored.window, scored.stride)
    for task, file in scored.tasks.items():
        read_task(task, file)


def compare(
    plan: Plan,
    workshop: Workshop,
    results: Results,
    *,
    report: Callable[[Line], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Line]:
    """Does what is not in the results yet, and what failed before. A cell that fails is one line with its error.

    Args:
        plan: see `check`.
        workshop: of the plan's model.
        results: each line is in the file before the next cell begins.
        report: called with each line that is new.
        progress: called with (cell, cells done, cells in all).

    Returns:
        The plan's lines, those of earlier runs too.
    """
    results.prepare()
    name, revision = identify(plan.source)
    shared = {"model": name, "revision": revision, "dtype": str(workshop.model.dtype).removeprefix("torch.")}
    asked = {cell: _asked(plan, cell, workshop) | shared for cell in cells(plan)}
    keys = {cell: _key(facts) for cell, facts in asked.items()}
    todo = [cell for cell in asked if not results.done(keys[cell])]
    about = {
        "device": str(workshop.model.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }
    for number, cell in enumerate(todo):
        if progress is not None:
            progress(cell.name, number, len(todo))
        line = {"cell": keys[cell], "error": None, **asked[cell], **dict.fromkeys(_MEASURED), **about}
        _measure(cell, plan.evaluation, workshop, line)
        results.add(line)
        if report is not None:
            report(line)
        if cell.spec is not None and cell.spec.moments is not None and not _same_text(cell, todo[number + 1 :]):
            workshop.forget(cell.spec.moments, cell.seed)
    return [results[key] for key in keys.values()]


def _same_text(cell: Cell, later: Sequence[Cell]) -> bool:
    """Whether the next cell reads what this one read: cells come text by text."""
    following = later[0] if later else None
    return (
        following is not None
        and following.spec is not None
        and cell.spec is not None
        and (following.spec.moments, following.seed) == (cell.spec.moments, cell.seed)
    )


def _asked(plan: Plan, cell: Cell, workshop: Workshop) -> Line:
    """What was asked for, in the words of a line."""
    spec, scored = cell.spec, plan.evaluation
    fields: dict[str, str | bool | None] = dict.fromkeys(("score", "allocation", "moments", "refit"))
    policy = None
    if spec is not None:
        fields = {"score": spec.method, "allocation": spec.allocation, "moments": spec.moments, "refit": spec.refit}
        fields |= {"heads": True} if spec.heads else {}  # not a field of the others: their cells keep their keys
        policy = workshop.policy if spec.asks_policy else None
    amount = None if spec is None or spec.moments is None else asdict(plan.amount) | {"sha256": workshop.sha256(spec)}
    return {
        "format": _FORMAT,
        "method": "dense" if spec is None else spec.name,
        **fields,
        "ratio": cell.ratio,
        "seed": cell.seed,
        "round_to": plan.round_to,
        "policy_sha256": None if policy is None else policy.sha256,
        "calibration_asked": amount,
        "evaluation": {
            "texts": [
                {"text": label, "sha256": content_sha256(text)} for label, text in zip(scored.labels, scored.texts, strict=True)
            ],
            "window": scored.window,
            "stride": scored.window if scored.stride is None else scored.stride,
            "max_windows": scored.max_windows,
            "tasks": {task: read_task(task, file)[1] for task, file in scored.tasks.items()},
            "limit": scored.limit,
        },
    }


def _key(facts: Line) -> str:
    """The same for the same question, whatever its texts are called."""
    evaluation = facts["evaluation"] | {"texts": [text["sha256"] for text in facts["evaluation"]["texts"]]}
    kind = facts["moments"] if facts["moments"] in (None, "self", "random") else facts["moments"].startswith("seed:")
    question = {name: value for name, value in facts.items() if name != "method"} | {"evaluation": evaluation, "moments": kind}
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]


def _measure(cell: Cell, scored: Evaluation, workshop: Workshop, line: Line) -> None:
    """Makes the model and scores it; fills in the line as far as that goes."""
    try:
        narrow = _prune(cell, workshop, line)
        _score(narrow, scored, workshop, line)
    except Exception as error:  # a cell may fail in any way; the others go on
        line["error"] = _sentence(error)


def _prune(cell: Cell, workshop: Workshop, line: Line) -> PreTrainedModel:
    spec, device = cell.spec, workshop.model.device
    if spec is None:
        made = Made(workshop.model, ffn_widths(workshop.model), 0, "weights", "weights", None, None)
        line |= {"seconds_pruning": 0.0, "seconds_shared": 0.0}
    else:
        if spec.moments is not None:
            line["seconds_calibration"] = workshop.blocks(spec.moments, cell.seed)[1]
        with workshop.ledger.cell() as use, peak_memory(device) as peak:
            start = time.perf_counter()
            made = workshop.make(spec, cell.ratio, cell.seed)
            synchronise(device)
            seconds = time.perf_counter() - start
        line |= {"seconds_pruning": seconds + use.shared, "seconds_shared": use.shared, "peak_memory_pruning": peak}
    total, inner = count_parameters(made.model)
    line |= {"regime": made.regime, "applied_regime": made.applied_regime, "policy": made.policy, "widths": made.widths}
    line |= {} if made.groups is None else {"head_groups": made.groups}
    line |= {"calibration": None if made.calibration is None else dict(made.calibration)}
    line["residual_widths"] = getattr(made.model.config, "residual_widths", None)
    line |= {"parameters": total, "non_embedding_parameters": inner, "bias_parameters": made.biases}
    return made.model


def _score(narrow: PreTrainedModel, scored: Evaluation, workshop: Workshop, line: Line) -> None:
    limits: dict[str, Any] = {"window": scored.window, "stride": scored.stride, "max_windows": scored.max_windows}
    with peak_memory(narrow.device) as peak:
        start = time.perf_counter()
        line["perplexity"] = []
        for label, text in zip(scored.labels, scored.texts, strict=True):
            found = asdict(perplexity(narrow, workshop.tokenizer, text, **limits))
            value = found["value"] if math.isfinite(found["value"]) else None  # JSON knows no infinity; the loss says it
            line["perplexity"].append(found | {"text": label, "value": value})
        if scored.tasks:
            answers = zero_shot(narrow, workshop.tokenizer, scored.tasks, limit=scored.limit)
            line |= {"tasks": [asdict(answer) for answer in answers], "accuracy": _mean_accuracy(answers)}
        line["seconds_evaluation"] = time.perf_counter() - start
    line["peak_memory_evaluation"] = peak


def _mean_accuracy(answers: Sequence[TaskResult]) -> float:
    """Over tasks; of each, per character where lm-eval defines that."""
    return sum(a.accuracy if a.accuracy_norm is None else a.accuracy_norm for a in answers) / len(answers)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}".rstrip(": ")
