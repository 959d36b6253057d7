"""Measures checkpoints side by side: quality of each, then the speed of all in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.contents import CONFIG, RECORD
from prunenet.checkpoints.exports.choices import GgufType
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.options import AUTO, LoadOptions
from prunenet.checkpoints.records import recorded_ratio
from prunenet.checkpoints.sources import find_folder, source_name
from prunenet.evaluation.options import EVALUATION, SPEED, EvaluationOptions, SpeedOptions
from prunenet.evaluation.perplexity import check_fits, perplexity
from prunenet.evaluation.repetition import Repetition, sampled_openings
from prunenet.evaluation.repetition import repetition as repetition_of
from prunenet.evaluation.result import ModelResult, summarise
from prunenet.evaluation.serving import check_servable, serve_side_by_side
from prunenet.evaluation.speed import speed_side_by_side
from prunenet.models.layers import check_positions
from prunenet.runtime.paths import named
from prunenet.text.corpora import TestText, load_text


def evaluate(
    models: Sequence[str | Path] | str | Path,
    text: TestText | str = "builtin",
    options: EvaluationOptions = EVALUATION,
    *,
    speed: SpeedOptions | None = SPEED,
    serve: GgufType | None = None,
    repetition: bool = False,
    loading: LoadOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ModelResult]:
    """Measures perplexity, size and speed of checkpoints, and gives one row for each.

    Args:
        models: folders or hub ids; all are held in memory at once, but with device "auto": then
            one after the other.
        text: what to score, or its source (`prunenet.text.corpora.load_text`).
        options: how to score it.
        speed: how to measure tokens per second, repeat by repeat over all models, so that noise
            hits them alike; None leaves speed out.
        serve: writes each model as a GGUF file of this type too, and measures llama.cpp with it
            (extra `gguf`); None: does not.
        repetition: whether to count repeated 4-grams in greedy texts, from openings that the first
            model of a tokenizer samples (`prunenet.evaluation.repetition`).
        loading: device and dtype.
        progress: called with (windows scored, windows in all), over all models.

    Raises:
        CheckpointError, TextError, ValueError: see those functions, and `perplexity` and
            `speed_side_by_side`; a model given twice.
    """
    several = isinstance(models, Sequence) and not isinstance(models, str)
    given: Any = models if several else [models]
    sources = list(map(source_name, given))
    if len(set(sources)) < len(sources):
        raise ValueError(f"each model is measured once, got one twice among {', '.join(sources)}")
    if serve is not None:
        check_servable(speed or SPEED)
    scored = load_text(text, TestText) if isinstance(text, str) else text
    loading = loading or LoadOptions()
    load = partial(
        load_model,
        device=loading.device,
        max_memory=loading.max_memory,
        dtype=loading.dtype,
    )
    rows: list[ModelResult] = []
    openings: dict[str, Tensor] | None = {} if repetition else None
    for group in [[source] for source in sources] if loading.device == AUTO else [sources]:
        report = None if progress is None else partial(_report, progress, len(sources), len(rows))
        loaded = {source: load(source) for source in group}
        rows += _together(loaded, scored, options, speed, report, openings)
        del loaded
        # accelerate's hooks and the modules know each other: the weights would wait for the next
        # one's
        gc.collect()
    if serve is None:
        return rows
    served = serve_side_by_side(sources, serve, speed or SPEED)
    return [
        replace(row, **{f"served_{name}": v for name, v in asdict(served[row.folder]).items()})
        for row in rows
    ]


def _together(
    models: dict[str, PreTrainedModel],
    text: TestText,
    options: EvaluationOptions,
    speed: SpeedOptions | None,
    report: Callable[[int, int, int], None] | None,
    openings: dict[str, Tensor] | None,
) -> list[ModelResult]:
    """The rows of models that are in memory at the same time. `openings`: of greedy texts, by
    tokenizer; None where none are written.
    """
    tokenizers = _tokenizers(list(models))
    for source, model in models.items():
        check_fits(model, tokenizers[source], options)
        if speed is not None:
            tokens = speed.prompt + speed.new_tokens
            check_positions(model, tokens, "measuring speed, which can be left out,")
    qualities = {}
    for done, (source, model) in enumerate(models.items()):
        advance = None if report is None else partial(report, done)
        qualities[source] = perplexity(model, tokenizers[source], text, options, progress=advance)
    speeds = {} if speed is None else speed_side_by_side(models, speed)
    rows = []
    for source, model in models.items():
        result = summarise(
            model,
            perplexity=qualities[source],
            speed=speeds.get(source),
            repetition=_repeated(model, tokenizers[source], options, openings),
            folder=find_folder(source, CONFIG, RECORD),  # of a hub id, where its files are
        )
        name, ratio = named(source), recorded_ratio(source)
        rows.append(ModelResult(**asdict(result), name=name, folder=source, ratio=ratio))
    return rows


def _repeated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: EvaluationOptions,
    openings: dict[str, Tensor] | None,
) -> Repetition | None:
    if openings is None:
        return None
    known = _content(tokenizer)
    if known not in openings:
        openings[known] = sampled_openings(model, tokenizer, options.bos)
    return repetition_of(model, openings[known])


def _tokenizers(sources: Sequence[str]) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizer of each source; equal ones are one object, for which a text is tokenised once
    (`prunenet.text.windows.tokenise`).
    """
    found = {source: load_tokenizer(source) for source in sources}
    if len(found) < 2:
        return found
    known: dict[str, PreTrainedTokenizerBase] = {}
    return {source: known.setdefault(_content(tok), tok) for source, tok in found.items()}


def _content(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells tokenizers apart: all that their fast implementation does, and how they begin a
    text; of one without it, itself alone.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return str(id(tokenizer))
    return f"{type(tokenizer).__name__} {tokenizer.bos_token_id} {backend.to_str()}"


def _report(
    progress: Callable[[int, int], None], models: int, before: int, now: int, done: int, total: int
) -> None:
    """`progress` over all models, from the windows of one: `before` are of earlier groups, `now` of
    its own.
    """
    progress((before + now) * total + done, models * total)
