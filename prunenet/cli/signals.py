"""How the command ends when it is told to: Ctrl-C, SIGTERM and SIGHUP unwind and clean up alike.

Imports nothing that takes time: it stands before the imports of torch and transformers, which take
seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REPEATED = 3.0
"""Seconds in which a second signal adds nothing: torchrun passes on what the terminal has sent."""
_SWALLOWED = 0.05
"""Seconds until an exception that a destructor has swallowed is raised again."""
_DEAF = 15.0
"""Seconds until a process ends though its main thread is in a call that does not return."""
_received: list[tuple[int, float]] = []  # (signal, when), in the order in which they came


class Ended(KeyboardInterrupt):
    """The process has been told to end, by Ctrl-C or by a signal."""


def exit_code() -> int:
    """Return 128 plus the number of the first signal, as shells do; Ctrl-C's where none came."""
    return 128 + (_received[0][0] if _received else signal.SIGINT)


def received() -> bool:
    """Return whether a signal to end has come."""
    return bool(_received)


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Make signals raise `Ended` inside the block, and end it with one word and its exit code.

    Signals that the caller ignores (as `nohup` does) stay ignored. Blocks may be nested, and only
    the outermost one acts; so do blocks outside the main thread, which gets no signals.

    Raises:
        SystemExit: a signal came; 130, 143 or 129.
    """
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGALRM) is _raise
    ):
        yield
        return
    hook = sys.unraisablehook
    sys.unraisablehook = _again(hook)
    known = (signal.SIG_DFL, signal.default_int_handler)
    taken = [number for number in _ENDING if signal.getsignal(number) in known]
    before = {number: signal.signal(number, _raise) for number in (*taken, signal.SIGALRM)}
    over = threading.Event()
    deaf = _start_last_resort(over)
    try:
        yield
    except SystemExit as end:
        if received() and end.code == 128 + signal.SIGINT:  # typer's word for any KeyboardInterrupt
            raise SystemExit(exit_code()) from None
        raise
    except (KeyboardInterrupt, Exception) as error:
        # an import that is interrupted may fail with an error of its own
        if not isinstance(error, KeyboardInterrupt) and not received():
            raise
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write("interrupted\n")
        raise SystemExit(exit_code()) from None
    finally:
        over.set()  # before what was received is forgotten: the thread must not act on it
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(-1)
        os.close(deaf)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        _received.clear()


def run(command: Callable[[], Any]) -> None:
    """Run a command as all that this process does: `ending_cleanly`, from its first imports on."""
    _fill_closed()
    try:
        with ending_cleanly():
            command()
    finally:
        # nothing is left to clean up, and the interpreter's own end would show a traceback
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _drop_unwritten()


def _raise(number: int, _: FrameType | None) -> None:
    if number == signal.SIGALRM:
        raise Ended
    _received.append((number, time.monotonic()))
    if len(_received) > 1 and _received[-1][1] - _received[-2][1] < _REPEATED:
        return
    raise Ended


def _start_last_resort(over: threading.Event) -> int:
    """Starts a thread that ends a process whose main thread does not hear; returns the descriptor
    whose closing ends the thread. Once `over` is set, the thread ends no process.

    Python calls a handler in the main thread alone, and not inside a call of a library, such as one
    that waits for another process. The descriptor is told of each signal at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_the_deaf, args=(reader, over), daemon=True).start()
    return writer


def _end_the_deaf(reader: int, over: threading.Event) -> None:
    while number := int.from_bytes(os.read(reader, 1), "little"):
        deadline = time.monotonic() + _DEAF
        while number in _ENDING and not received() and not over.is_set():
            time.sleep(_SWALLOWED)
            if time.monotonic() > deadline:
                os.write(2, b"interrupted\n")
                os._exit(128 + number)
    os.close(reader)


def _again(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hook for exceptions that Python cannot raise: `Ended` is raised a little later."""

    def raised_later(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _SWALLOWED)
        else:
            hook(unraisable)

    return raised_later


def _fill_closed() -> None:
    """Opens what the caller has closed of standard input, output and error: else the next file
    that is opened takes its number, and gets what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _drop_unwritten() -> None:
    """Drops what the standard streams do not take: Python would end with exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
