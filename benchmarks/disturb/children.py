"""Runs a command in a fork of this process, in which torch and all the rest are imported already.

A fork costs milliseconds where the imports of a new process cost nine seconds of a processor.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .kinds import Outcome
from .operations import Disturbance, watched

SECONDS, LONGEST = 120.0, 600
_open, _close, _write = os.open, os.close, os.write  # before they are disturbed
_SPOKEN = 12
"""Lines of standard error that a command may say beside its one sentence: notes, stages."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code; minus the signal that ended it.
        seconds: that it ran.
        out, err: what it printed.
        late: whether it had to be killed because it gave no answer.
        told: what it wrote about itself at its end; empty where it was killed.
    """

    code: int
    seconds: float
    out: str
    err: str
    late: bool
    told: Mapping[str, Any]

    @property
    def sentence(self) -> str:
        """The last line of standard error."""
        return (self.err.strip().splitlines() or [""])[-1]

    def faults(self) -> list[tuple[str, str]]:
        """What no command may do, whatever is done to it."""
        found = []
        if self.late:
            found.append(("hang", f"no answer in {SECONDS:.0f} seconds; {self.err[-300:]}"))
        if "Traceback (most" in self.err or "fault of prunenet" in self.err:
            found.append(("traceback", self.err[-600:]))
        else:
            wrong = self.code == 1 and not 0 < len(self.sentence) <= LONGEST
            if wrong or len(self.err.splitlines()) > _SPOKEN:
                found.append(("unbounded", self.err[:300]))
        return found + [("outside", path) for path in self.told.get("outside", [])]


@dataclass(slots=True)
class Child:
    """A running child; `wait` for it."""

    pid: int
    ready: int
    spool: Path
    started: float = field(default_factory=time.monotonic)

    def listen(self) -> None:
        """Wait until its handlers of signals are there."""
        os.read(self.ready, 1)
        self.started = time.monotonic()

    def wait(self, seconds: float = SECONDS) -> Ended:
        """Wait for its end, and end it where that takes too long."""
        handle = os.pidfd_open(self.pid)
        late = not select.select([handle], [], [], seconds)[0]
        if late:
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        took = time.monotonic() - self.started
        os.close(handle)
        os.close(self.ready)
        texts = [
            path.read_text(errors="replace") if path.exists() else ""
            for path in (self.spool / name for name in ("out", "err", "told"))
        ]
        told = json.loads(texts[2]) if texts[2] else {}
        return Ended(os.waitstatus_to_exitcode(status), took, texts[0], texts[1], late, told)


def start(
    argv: Sequence[str],
    home: Path,
    spool: Path,
    *,
    watch: Disturbance | None = None,
    allowed: Callable[[str], bool] | None = None,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> Child:
    """Start `prunenet` in a fork.

    Args:
        argv: its arguments.
        home: its current folder; `home/cache` is its cache.
        spool: a folder for what it prints.
        watch: counts and disturbs its file operations.
        allowed: says which files it may open; others are noted.
        environment: added to its own.
        prepare: called in it, before the command.
    """
    spool.mkdir(parents=True, exist_ok=True)
    for name in ("out", "err", "told"):
        (spool / name).unlink(missing_ok=True)
    ready, tell = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(tell)
        return Child(pid, ready, spool)
    code = 70
    try:
        os.setpgid(0, 0)
        code = lived(argv, home, spool, tell, watch, allowed, environment, prepare)
    finally:
        os._exit(code)


def lived(
    argv: Sequence[str],
    home: Path,
    spool: Path,
    tell: int,
    watch: Disturbance | None = None,
    allowed: Callable[[str], bool] | None = None,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> int:
    """The whole life of a child; returns its exit code."""
    os.chdir(home)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        place = spool / name[3:] if number else os.devnull
        descriptor = _open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        _close(descriptor)
        setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    (home / "tmp").mkdir(exist_ok=True)
    places = {"PRUNENET_CACHE": str(home / "cache"), "TMPDIR": str(home / "tmp")}
    os.environ |= {**places, "COLUMNS": "110", **(environment or {})}
    tempfile.tempdir = None  # chosen anew
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["prunenet", *argv]
    known, outside = set(sys.modules), list[str]()
    if allowed is not None:
        sys.addaudithook(_noting(outside, allowed))
    prepare()
    if watch is not None:
        watched(watch)
    code = _run(tell)
    told = {
        "outside": sorted(set(outside)),
        "operations": watch.names if watch else [],
        "modules": sorted(set(sys.modules) - known),
    }
    descriptor = _open(spool / "told", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    _write(descriptor, json.dumps(told).encode())
    return code


def _run(tell: int) -> int:
    from prunenet.__main__ import _command
    from prunenet.cli.signals import run

    def command() -> None:
        _write(tell, b"x")  # the handlers of signals are there
        _command()

    try:
        run(command)
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1


def _noting(outside: list[str], allowed: Callable[[str], bool]) -> Callable[[str, Any], None]:
    def hook(event: str, values: Any) -> None:
        if event == "open" and isinstance(values[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(values[0]))
            if not allowed(path):
                outside.append(path)

    return hook


def ran(argv: Sequence[str], home: Path, spool: Path, **how: Any) -> Ended:
    """Run `prunenet` in a fork, to its end; see `start`."""
    return start(argv, home, spool, **how).wait()


def preload(end: Ended) -> None:
    """Import here what a command had to import: later forks begin with that."""
    for name in end.told["modules"]:
        with suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all pages


def outcome(what: str, faults: Sequence[tuple[str, str]]) -> Outcome:
    """An outcome without a fault said twice."""
    return Outcome(what, tuple(dict.fromkeys(faults)))
