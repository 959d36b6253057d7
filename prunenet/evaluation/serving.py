"""Measures tokens per second of llama.cpp on models written as GGUF files, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec

from prunenet.checkpoints.exports.choices import GgufType
from prunenet.checkpoints.exports.gguf import export_gguf
from prunenet.checkpoints.exports.llama_cpp import serving
from prunenet.evaluation.options import SPEED, SpeedOptions
from prunenet.evaluation.speed import is_narrow, medians
from prunenet.runtime.passing import passing_folder


@dataclass(frozen=True, slots=True)
class Served:
    """A model in llama.cpp; medians over the repeats.

    Attributes:
        type: of the file's matrices.
        bytes: of the file.
        prefill_tokens_per_second, decode_tokens_per_second: as llama.cpp itself counts them.
        prefill_spread, decode_spread: (fastest - slowest) / median of the repeats.
    """

    type: GgufType
    bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_spread: float
    decode_spread: float


def check_servable(options: SpeedOptions) -> None:
    """Raises ImportError where llama.cpp is not installed, and ValueError for options that it
    cannot be measured with.
    """
    if find_spec("xllamacpp") is None or find_spec("gguf") is None:
        raise ImportError(
            "`serve` measures llama.cpp, which is not installed: pip install 'prunenet[gguf]'"
        )
    if options.batch != 1 or options.compiled:
        raise ValueError(
            f"`serve` reads one sequence at a time, uncompiled; got a `batch` of {options.batch}"
            f"{' and compiled code' if options.compiled else ''}: leave these out"
        )


def serve_side_by_side(
    sources: Sequence[str], type: GgufType, options: SpeedOptions = SPEED
) -> dict[str, Served]:
    """Writes checkpoints as temporary GGUF files, and measures llama.cpp with them; each repeat
    measures all of them in turn. One warm-up per model is thrown away.

    Args:
        sources: folders or hub ids; all are held in memory at once.
        type: of the files' matrices.
        options: how; as many threads as torch uses.

    Raises:
        ImportError, ValueError: see `check_servable`.
        CheckpointError: as `export_gguf`.
    """
    check_servable(options)
    sizes: dict[str, int] = {}
    times: dict[str, list[tuple[float, float]]] = {source: [] for source in sources}
    with passing_folder() as scratch, ExitStack() as stack:
        servers = {}
        for index, source in enumerate(sources):
            made = export_gguf(source, scratch / str(index), type)
            sizes[source] = made.bytes
            room = options.prompt + options.new_tokens
            servers[source] = stack.enter_context(serving(made.path, context=room + 1))
        for repeat in range((options.most or options.repeats) + 1):
            if repeat > options.repeats and all(map(is_narrow, times.values())):
                break
            for source, server in servers.items():
                seconds = server.seconds(options.prompt, options.new_tokens)
                times[source] += [seconds] if repeat else []
    found = {source: medians(pairs, options) for source, pairs in times.items()}
    return {
        source: Served(
            type, sizes[source], pace.prefill, pace.decode, pace.prefill_spread, pace.decode_spread
        )
        for source, pace in found.items()
    }
