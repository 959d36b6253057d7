"""What every benchmark shares: options, JSON lines, setting, test texts, a clock, child jobs."""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet import __version__
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.compare.machine import synchronise
from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.perplexity import perplexity
from prunenet.runtime.memory import peak_memory
from prunenet.text.corpora import TestText, load_text

Line = dict[str, Any]
_TESTS = {"wikitext2": ("wikitext2/wiki.test.raw", 1024), "builtin": ("builtin", 512)}
_BUILTIN_WINDOWS = 6  # all that the built-in text has


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it stands, with `--out` for its JSON lines."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--out", type=Path, required=True, help="JSON lines; what it holds is not measured again"
    )
    return made


def read_lines(path: Path) -> list[Line]:
    """Every line of a results file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a measurement, with the versions of torch and prunenet, to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "torch": torch.__version__, "prunenet": __version__}) + "\n")


def is_measured(lines: Iterable[Line], place: Mapping[str, Any]) -> bool:
    """Whether a line agrees with every field of `place`."""
    return any(place.items() <= line.items() for line in lines)


def setting(device: str = "cpu") -> Line:
    """The device and the number of threads that a measurement ran on."""
    return {"device": device, "threads": torch.get_num_threads()}


def opened(
    source: str | Path, *, device: str = "cpu", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a checkpoint."""
    return load_model(source, dtype=dtype, device=device), load_tokenizer(source)


def scored(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    *,
    windows: int | None,
    batch_size: int = 1,
) -> dict[str, float]:
    """Perplexity on WikiText-2 test and on the built-in test text, and how many tokens count.

    Args:
        model: measured where it is.
        tokenizer: the model's.
        data: folder that holds `wikitext2/wiki.test.raw`.
        windows: of 1024 tokens of WikiText-2, and at most 6 of 512 of the built-in text; None: all
            of WikiText-2.
        batch_size: windows in one forward pass.
    """
    found: dict[str, float] = {}
    for name, (source, window) in _TESTS.items():
        most = windows
        if name == "builtin":
            most = min(windows or _BUILTIN_WINDOWS, _BUILTIN_WINDOWS)
        else:
            source = str(data / source)
        text = load_text(source, TestText)
        options = EvaluationOptions(window=window, max_windows=most, batch_size=batch_size)
        result = perplexity(model, tokenizer, text, options)
        found |= {f"perplexity_{name}": result.value, f"tokens_{name}": result.tokens}
    return found


def table_head(ratios: Sequence[float]) -> list[str]:
    """The first two lines of a Markdown table of methods, their regimes and a column a ratio."""
    columns = " | ".join(f"{ratio:g}" for ratio in ratios)
    return [f"| | regime | {columns} |", "|---" * (2 + len(ratios)) + "|"]


def job(command: Sequence[str | Path]) -> tuple[list[str], Line]:
    """Runs a command in a process of its own: what it printed, and the JSON of its last line.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    done = subprocess.run([*command], check=True, stdout=subprocess.PIPE, text=True)
    *shown, last = done.stdout.splitlines()
    return shown, json.loads(last)


class Clock:
    """Seconds, seconds of all threads together, and peak megabytes of each phase.

    Peak memory is the most that the process held in the phase, what was there before it included:
    resident memory on a CPU (Linux only), allocated memory on a GPU. A megabyte has 10^6 bytes.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.phases: dict[str, dict[str, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what runs inside, and prints it."""
        with peak_memory(self.device) as peak:
            start, used = time.perf_counter(), time.process_time()
            yield
            synchronise(self.device)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - used
        held = peak["device_bytes" if self.device.type == "cuda" else "host_bytes"]
        self.phases[name] = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_megabytes": held / 1e6,
        }
        print(name, {key: round(value, 1) for key, value in self.phases[name].items()}, flush=True)
