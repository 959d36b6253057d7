"""The terminal: results on standard output, progress and errors on standard error, a user's mistake
in one sentence.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from prunenet.runtime import parallel
from prunenet.runtime.files import lock
from prunenet.runtime.team import Followed, PeerFailed

FLAGS: dict[str, str] = {"blocks": "--moments self or data"}
"""Flag of each argument that the library's messages name in backticks; `grouped` adds its own."""
errors = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns a user's mistake, a disk's refusal, a missing extra or too little memory into one
    sentence and exit code 1.
    """
    try:
        yield
    except Followed:
        raise typer.Exit(1) from None
    except (
        ValueError,
        OSError,
        ImportError,
        PeerFailed,
        MemoryError,
        torch.OutOfMemoryError,
    ) as error:
        if os.environ.get("PRUNENET_DEBUG"):
            raise
        errors.print(f"[red]error:[/red] {escape(_sentence(error))}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise typer.Exit(130) from None


@contextmanager
def one_process(out: Path | None = None) -> Iterator[None]:
    """Run a command that does not share its work between processes, as `one_sentence`.

    Args:
        out: what the command writes, locked for the whole command; see `prunenet.runtime.files`.
    """
    with one_sentence():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "train, prune, compare and recover share work between processes, this command does"
                " not: run it alone"
            )
        with nullcontext() if out is None else lock(out):
            yield


@contextmanager
def one_job(device: str, out: Path | None = None) -> Iterator[str]:
    """Run a command in all processes that torchrun has started, as `one_sentence`.

    Rank 0 has the screen and writes. The first rank that fails says why.

    Args:
        device: see `prunenet.runtime.parallel.joined`.
        out: what the command writes, locked for the whole command; see `prunenet.runtime.files`.

    Yields:
        The device of this process; see `prunenet.runtime.parallel.joined`.
    """
    with one_sentence():
        try:
            with parallel.joined(device) as place:
                errors.quiet = not parallel.is_first()
                with lock(out) if out is not None and parallel.is_first() else nullcontext():
                    yield place
        finally:
            errors.quiet = False


def show(facts: dict[str, Any], as_json: bool, render: Callable[[], Any]) -> None:
    """One JSON object, or what `render` gives."""
    if not parallel.is_first():
        return
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        # A pipe or a log has no width: take one that the widest table fits.
        Console(width=None if sys.stdout.isatty() else 110).print(render())


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        said = str(error).partition(". ")[0] or "out of memory"
        return (
            f"{said}: take --dtype bfloat16, spread the weights with --device auto, or read them"
            " with --stream"
        )
    text = str(error) or type(error).__name__
    return re.sub(r"`(\w+)`", lambda name: FLAGS.get(name[1], name[0]), text)
