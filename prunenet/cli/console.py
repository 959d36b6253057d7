"""The terminal: results on standard output, progress and errors on standard error, a user's mistake
in one sentence.

The screen never fails the work: what it does not take is dropped. Control characters are taken out
of everything that is printed, since names and texts come from files. Nothing here imports torch
before a command works: `--help` and the completion of shells take a second without it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from prunenet.cli import signals
from prunenet.runtime.failures import Followed, PeerFailed
from prunenet.runtime.files import expanded, lock

try:
    from typer._click.globals import get_current_context
except ImportError:  # typer up to 0.2x stands on click
    from click import get_current_context  # type: ignore[no-redef]

_LONGEST = 400
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys or cannot show; tabs and ends of lines stay."""
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|unable to mmap|enforce fail at alloc_cpu"
    r"|not enough memory|bad_alloc|\(os error 12\)",
    re.IGNORECASE,
)
"""What torch (of CPUs), safetensors and C++ say where memory is short."""


class _Stderr:
    """Standard error, as it is at the moment; what it does not take is dropped."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):
            self._stream().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream().flush()

    def _stream(self) -> Any:
        # while a bar is shown, rich puts a stream of its own there, which prints on this console
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)


class Screen(Console):
    """rich's console without control characters in what it prints."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or not _CONTROL.search(segment.text):
                yield segment
            else:
                yield Segment(_CONTROL.sub("", segment.text), segment.style)


errors = Screen(file=_Stderr(), highlight=False, soft_wrap=True)  # type: ignore[arg-type]


def path(text: str | Path) -> Path:
    """Parse an option that is a path, or its default: expand `~`, which shells leave alone in
    `--out=~/x`; refuse "".
    """
    try:
        return expanded(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@contextmanager
def one_sentence() -> Iterator[None]:
    """End a command that fails with one sentence and exit code 1, whatever the failure is.

    A signal ends it with one word and 128 plus its number. `PRUNENET_DEBUG` shows the traceback.
    """
    hook, threading.excepthook = threading.excepthook, _thread_failed
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Followed:
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, Exception) as error:
        # what is interrupted may fail with an error of its own
        told = signals.received() and not isinstance(error, PeerFailed)
        if told or isinstance(error, KeyboardInterrupt):
            errors.print("interrupted")
            raise typer.Exit(signals.exit_code()) from None
        if os.environ.get("PRUNENET_DEBUG"):
            raise
        errors.print(f"[red]error:[/red] {escape(sentence(error))}")
        raise typer.Exit(1) from None
    finally:
        threading.excepthook = hook


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Says what went wrong in a library's thread, such as the writer of a log, in one sentence.

    A disk that refuses is not said here: the writer raises that again where it is called.
    """
    if os.environ.get("PRUNENET_DEBUG"):
        threading.__excepthook__(failed)
    elif failed.exc_value is not None and not isinstance(failed.exc_value, OSError):
        errors.print(f"note: {escape(sentence(failed.exc_value))}")


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
        from prunenet.runtime import parallel

        try:
            with parallel.joined(device) as place:
                errors.quiet = not parallel.is_first()
                with lock(out) if out is not None and parallel.is_first() else nullcontext():
                    yield place
        finally:
            errors.quiet = False


def show(
    facts: dict[str, Any], as_json: bool, render: Callable[[], Any], *, only_here: bool = False
) -> None:
    """Print the result on standard output, from the first process.

    Args:
        facts: printed as one JSON object where `as_json` asks for it.
        as_json: whether a machine reads it.
        render: returns what is printed otherwise: a text, or anything of rich's.
        only_here: whether nothing else holds the result. A result that is on the disk is complete
            without its table, and a note on standard error says so.

    Raises:
        OSError: standard output does not take a result that is `only_here`.
    """
    from prunenet.runtime import parallel

    if not parallel.is_first():
        return
    try:
        if sys.stdout is None or sys.stdout.closed:
            raise OSError(errno.EBADF, "closed")
        _put(json.dumps(facts) + "\n" if as_json else _drawn(render()))
    except OSError as error:
        if only_here:
            raise OSError(error.errno, error.strerror, "standard output") from error
        reason = (error.strerror or str(error)).lower()
        errors.print(f"note: standard output takes no more ({reason}); the result is complete")


def _drawn(shown: RenderableType) -> str:
    # A pipe or a log has no width: take one that the widest table fits.
    screen = Screen(width=None if sys.stdout.isatty() else 110)
    with screen.capture() as capture:
        screen.print(shown, markup=not isinstance(shown, str))
    return capture.get()


def _put(text: str) -> None:
    """Raises OSError where standard output is full, or read by nobody any more."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def sentence(error: BaseException) -> str:
    """Return one sentence of at most about 400 characters, which names the options of the command.

    Arguments that the library names in backquotes become options: `out` becomes --out. Errors that
    nobody has thought of are said to be faults of prunenet.
    """
    if _is_no_memory(error):
        text = _no_memory(error)
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{os.fsdecode(error.filename)}: {error.strerror.lower()}"
    elif isinstance(error, (ValueError, OSError, ImportError, PeerFailed)):
        text = str(error) or type(error).__name__
    else:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        text = f"this is a fault of prunenet: {text}; PRUNENET_DEBUG=1 shows the traceback"
    text = " ".join(_CONTROL.sub(" ", text).split())
    if len(text) > _LONGEST:  # the remedy stands at the end
        text = f"{text[: _LONGEST * 5 // 8]} ... {text[-_LONGEST * 3 // 8 :]}"
    return re.sub("`([a-z_]+)`", lambda found: _option(found[1]) or found[0], text)


def _is_no_memory(error: BaseException | None) -> bool:
    """Whether the error, or one that it comes from, is of too little memory."""
    torch = sys.modules.get("torch")  # not imported for the sake of an error
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    while error is not None:
        if isinstance(error, kinds) or (
            getattr(error, "errno", None) == errno.ENOMEM or _NO_MEMORY.search(str(error))
        ):
            return True
        error = error.__cause__
    return False


def _no_memory(error: BaseException) -> str:
    """What takes less memory, of what the command knows and does not do already."""
    said = str(error).partition(". ")[0] or "out of memory"
    if _NO_MEMORY.search(str(error)):
        asked = re.search(r"(\d+) bytes", str(error))
        said = "out of memory" + (f" ({int(asked[1]) / 1e6:,.0f} MB more)" if asked else "")
    given = _given()
    ways = [
        f"give fewer {_option(name)} than {given[name]}"
        for name in ("tokens", "calibration_tokens", "micro_batch", "batch")
        if isinstance(given.get(name), int) and given[name] > 1
    ]
    streams = bool(given.get("stream", False))
    if given.get("dtype", "auto") not in ("bfloat16", "float16"):
        ways.append("take --dtype bfloat16")
    if not given or ("max_memory" in given and given["device"] != "auto" and not streams):
        ways.append("spread the weights with --device auto")
    if not given or ("stream" in given and not streams and given["device"] != "auto"):
        ways.append("read them with --stream")
    ways = ways or ["free some, or take a machine with more"]
    *first, last = ways
    return f"{said}: " + (f"{', '.join(first)}, or {last}" if first else last)


def _given() -> dict[str, Any]:
    """The options of the command that runs, by name; empty outside of one."""
    context = get_current_context(silent=True)
    return {} if context is None else dict(context.params)


def _option(name: str) -> str | None:
    """The option that the command has for an argument, as in --round for `round_to`."""
    context = get_current_context(silent=True)
    options = [] if context is None else context.command.params
    if name == "blocks" and options:
        return "--moments self or data"
    return next(
        (
            option.opts[0] if option.opts[0].startswith("-") else name.upper()
            for option in options
            if option.name == name
        ),
        None,
    )
