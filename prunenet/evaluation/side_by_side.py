"""Measures checkpoints side by side: quality of each, then the speed of all in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prunenet.checkpoints.contents import CONFIG, RECORD
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.records import recorded_ratio
from prunenet.checkpoints.sources import find_folder
from prunenet.evaluation.perplexity import perplexity, summarise
from prunenet.evaluation.speed import check_positions, speed_side_by_side
from prunenet.runtime.placement import AUTO
from prunenet.text.corpora import TestText

_PROMPT, _NEW_TOKENS = 128, 32


def measure(
    sources: Sequence[str],
    text: TestText,
    *,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    speed: bool = True,
    batch: int = 1,
    compiled: bool = False,
    device: str = "cpu",
    max_memory: str | None = None,
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per checkpoint: `Result.as_dict()` with its `name`, its `folder` and the `ratio` it
    was pruned at (0: dense).

    Args:
        sources: folders or hub ids; all are held in memory at once, but with device "auto": then
            one after the other.
        text, window, stride, max_windows: see `prunenet.evaluation.perplexity.perplexity`.
        speed: also measure tokens per second, repeat by repeat over all models, so that noise hits
            them alike.
        batch: sequences at once when measuring speed.
        compiled: measure the speed of compiled code, see
            `prunenet.evaluation.speed.speed_side_by_side`.
        device, max_memory, dtype: see `prunenet.checkpoints.load.load_model`.
        progress: called with (windows scored, windows in all), over all models.

    Raises:
        CheckpointError, TextError, ValueError: see those functions.
    """
    if len(set(sources)) < len(sources):
        raise ValueError(f"each model is measured once, got one twice among {', '.join(sources)}")
    if speed and batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    loading: dict[str, Any] = {"device": device, "max_memory": max_memory, "dtype": dtype}
    windows: dict[str, Any] = {"window": window, "stride": stride, "max_windows": max_windows}
    pace: dict[str, Any] = {
        "prompt": _PROMPT,
        "new_tokens": _NEW_TOKENS,
        "batch": batch,
        "compiled": compiled,
    }
    rows: list[dict[str, Any]] = []
    for group in [[source] for source in sources] if device == AUTO else [list(sources)]:
        report = None if progress is None else partial(_report, progress, len(sources), len(rows))
        rows += _together(group, text, loading, windows, pace if speed else None, report)
        # accelerate's hooks and the modules know each other: the weights would wait for the next
        # one's
        gc.collect()
    return rows


def _together(
    sources: Sequence[str],
    text: TestText,
    loading: dict[str, Any],
    windows: dict[str, Any],
    pace: dict[str, Any] | None,
    report: Callable[[int, int, int], None] | None,
) -> list[dict[str, Any]]:
    """The rows of models that are in memory at the same time; no pace: their speed is not
    measured.
    """
    models = {source: load_model(source, **loading) for source in sources}
    tokenizers = {source: load_tokenizer(source) for source in sources}
    for model in models.values():
        check_positions(model, windows["window"], "window")
        if pace is not None:
            check_positions(
                model, _PROMPT + _NEW_TOKENS, "measuring speed (--no-speed leaves it out)"
            )
    qualities = {}
    for done, (source, model) in enumerate(models.items()):
        advance = None if report is None else partial(report, done)
        qualities[source] = perplexity(model, tokenizers[source], text, **windows, progress=advance)
    speeds = {} if pace is None else speed_side_by_side(models, **pace)
    rows = []
    for source, model in models.items():
        folder = find_folder(source, CONFIG, RECORD)  # of a hub id, where its files are
        ratio = recorded_ratio(source)
        result = summarise(
            model, perplexity=qualities[source], speed=speeds.get(source), folder=folder
        )
        rows.append(
            {"name": Path(source).name, "folder": source, "ratio": ratio, **result.as_dict()}
        )
    return rows


def _report(
    progress: Callable[[int, int], None], models: int, before: int, now: int, done: int, total: int
) -> None:
    """`progress` over all models, from the windows of one: `before` are of earlier groups, `now` of
    its own.
    """
    progress((before + now) * total + done, models * total)
