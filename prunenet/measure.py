"""Measures checkpoints side by side: quality of each, then the speed of all in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prunenet.checkpoint import load_model, load_provenance, load_tokenizer
from prunenet.evaluate import perplexity, summarise
from prunenet.latency import check_positions, speed_side_by_side
from prunenet.placement import AUTO
from prunenet.text import TestText

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
    """One row per checkpoint: `Result.as_dict()` with its `name`, its `folder` and the `ratio` it was pruned at (0: dense).

    Args:
        sources: folders or hub ids; all are held in memory at once, but with device "auto": then one after the other.
        text, window, stride, max_windows: see `prunenet.evaluate.perplexity`.
        speed: also measure tokens per second, repeat by repeat over all models, so that noise hits them alike.
        batch: sequences at once when measuring speed.
        compiled: measure the speed of compiled code, see `prunenet.latency.speed_side_by_side`.
        device, max_memory, dtype: see `prunenet.checkpoint.load_model`.
        progress: called with (windows scored, windows in all), over all models.

    Raises:
        CheckpointError, TextError, ValueError: see those functions.
    """
    if len(set(sources)) < len(sources):
        raise ValueError(f"each model is measured once, got one twice among {', '.join(sources)}")
    if device == AUTO and len(sources) > 1:
        rows = []
        for done, source in enumerate(sources):
            rows += measure(
                [source],
                text,
                window=window,
                stride=stride,
                max_windows=max_windows,
                speed=speed,
                batch=batch,
                compiled=compiled,
                device=device,
                max_memory=max_memory,
                dtype=dtype,
                progress=None if progress is None else _shifted(progress, done, len(sources)),
            )
            gc.collect()  # accelerate's hooks and the modules know each other: the weights would wait for the next one's
        return rows
    if speed and batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    models = {source: load_model(source, dtype=dtype, device=device, max_memory=max_memory) for source in sources}
    tokenizers = {source: load_tokenizer(source) for source in sources}
    for model in models.values():
        check_positions(model, window, "window")
        if speed:
            check_positions(model, _PROMPT + _NEW_TOKENS, "measuring speed (--no-speed leaves it out)")
    qualities = {}
    for done, (source, model) in enumerate(models.items()):
        advance = None if progress is None else _shifted(progress, done, len(models))
        qualities[source] = perplexity(
            model,
            tokenizers[source],
            text,
            window=window,
            stride=stride,
            max_windows=max_windows,
            progress=advance,
        )
    pace = {"prompt": _PROMPT, "new_tokens": _NEW_TOKENS, "batch": batch}
    speeds = speed_side_by_side(models, **pace, compiled=compiled) if speed else {}
    rows = []
    for source, model in models.items():
        folder = source if Path(source).is_dir() else None
        ratio = 0.0 if folder is None else _ratio(folder)
        result = summarise(model, perplexity=qualities[source], speed=speeds.get(source), folder=folder)
        rows.append({"name": Path(source).name, "folder": source, "ratio": ratio, **result.as_dict()})
    return rows


def _ratio(folder: str) -> float:
    return load_provenance(folder).ratio if (Path(folder) / "prunenet.json").exists() else 0.0


def _shifted(progress: Callable[[int, int], None], models_done: int, models: int) -> Callable[[int, int], None]:
    def advance(done: int, total: int) -> None:
        progress(models_done * total + done, models * total)

    return advance
