"""Files of every kind, mutated, through what reads them and through commands.

A mutation is refused in one sentence, or taken: then the answer is that of the file as it was
(`same`), or of another file that is valid, too, and read as it says (`another`), by `Target.says`.
An answer that is neither is `different`. Reading runs in forks, so that it may crash or hang.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .children import LONGEST, outcome, ran
from .commands import Yard, judged
from .kinds import Kind, Outcome
from .mutations import mutate
from .targets import Target, libraries, made

SECONDS = 40.0
_CLEAN = (ValueError, OSError, ImportError)  # what the command line turns into one sentence
_IN_OPEN = 0x20


def kinds(yard: Yard) -> Iterator[Kind]:
    """One of each kind of file, and one of each file that a command reads."""
    root = yard.home / "files"
    found = made(root) if not root.exists() else []
    for target in found:
        if yard.only in target.kind:
            reader = Reader(target, root)
            yield Kind("fuzz", target.kind, reader.attempt)
    for name, command in (
        ("m/config.json", "prune weights"),
        ("m/model.safetensors", "prune streamed"),
        ("m/tokenizer_config.json", "eval"),
        ("m/tokenizer.json", "eval"),
        ("cut/prunenet.json", "export"),
        ("cut/prunenet_masks.safetensors", "recover"),
        ("l.jsonl", "compare"),
        ("r.json", "report"),
        ("t.txt", "eval"),
    ):
        if yard.only in f"{command}, {name}":
            attempt = partial(_through_command, yard, command, name)
            yield Kind("fuzz", f"{command}, {name}", attempt)


@dataclass(slots=True)
class Reader:
    """A fork that reads mutations of one file, as they are asked for.

    Attributes:
        target: the file and what reads it.
        root: the folder of all files; `root/secret` may not be read, `root/canary` not appear.
    """

    target: Target
    root: Path
    pid: int = 0
    asks: Any = None
    answers: Any = None

    def attempt(self, number: int, draw: random.Random) -> Outcome:
        """What came of one mutation."""
        if not self.pid:
            self._begin()  # it reads the file as it is, first
        before = self.target.file.read_bytes()
        try:
            how = mutate(self.target.file, draw)
            return self._asked(how)
        finally:
            _put_back(self.target.file, before)

    def close(self) -> None:
        """End the fork."""
        if self.pid:
            self.asks.close()
            self.answers.close()
            os.waitpid(self.pid, 0)
            self.pid = 0

    def _asked(self, how: str) -> Outcome:
        self.asks.write(b"x")
        heard, _, _ = select.select([self.answers], [], [], SECONDS)
        said = self.answers.readline() if heard else b""
        if said:
            what, faults = json.loads(said)
            return Outcome(what, tuple((fault, f"{how}: {seen}") for fault, seen in faults))
        if not heard:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        self.asks.close()
        self.answers.close()
        if not heard:
            return Outcome("hang", (("hang", how),))
        died = self.root.parent / "died"
        why = died.read_text()[-600:] if died.exists() else os.waitstatus_to_exitcode(status)
        return Outcome("crash", (("crash", f"{how}: {why}"),))

    def _begin(self) -> None:
        ask, asked = os.pipe()
        answer, answered = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.close(asked)
            os.close(answer)
            try:
                self._live(os.fdopen(ask, "rb"), answered)
            except BaseException:
                (self.root.parent / "died").write_text(traceback.format_exc())
            finally:
                os._exit(70)
        os.close(ask)
        os.close(answered)
        self.asks, self.answers = os.fdopen(asked, "wb", 0), os.fdopen(answer, "rb")
        begun = self.answers.readline()
        assert begun, (self.root.parent / "died").read_text()

    def _live(self, asks: Any, answered: int) -> None:
        """The fork: answers until it is asked no more."""
        quiet = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(quiet, number)
        os.chdir(self.root)
        (self.root / "tmp").mkdir(exist_ok=True)
        tempfile.tempdir = str(self.root / "tmp")
        guard = Guard(self.root)
        sys.addaudithook(guard.hook)
        right = self.target.read()
        guard.seen()
        os.write(answered, b"begun\n")
        while asks.read(1):
            what, faults = read_as(self.target, right)
            faults += guard.seen()
            os.write(answered, json.dumps([what, faults]).encode() + b"\n")


def read_as(target: Target, right: Any) -> tuple[str, list[tuple[str, str]]]:
    """Reads a mutated file: what came of it, and its faults."""
    try:
        answer = target.read()
    except _CLEAN as error:
        text = str(error)
        fits = text and len(text) <= LONGEST and "\n" not in text
        return "clean", [] if fits else [("unbounded", text[:300])]
    except BaseException as error:
        return "traceback", [("traceback", _end(error))]
    if answer == right:
        return "same", []
    try:
        said = target.says()
    except BaseException as error:
        return "different", [("different", f"taken, but who says what it holds: {_end(error)}")]
    if said is not None and said == answer:
        return "another", []
    return "different", [("different", f"{str(answer)[:200]} in place of {str(said)[:200]}")]


@dataclass(slots=True)
class Guard:
    """Notes which files outside a folder are opened, by Python and by anybody, and canaries."""

    root: Path
    outside: list[str] = field(default_factory=list)
    notes: int = -1

    def __post_init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.notes = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self.notes, os.fsencode(self.root / "secret"), _IN_OPEN) >= 0

    def hook(self, event: str, values: Any) -> None:
        """An audit hook."""
        if event != "open" or not isinstance(values[0], str | bytes | os.PathLike):
            return
        path = os.path.realpath(os.fsdecode(values[0]))
        if not allowed(self.root, path):
            self.outside.append(path)

    def seen(self) -> list[tuple[str, str]]:
        """What was noted since the last time."""
        faults = [("outside", path) for path in self.outside]
        self.outside.clear()
        try:
            os.read(self.notes, 65536)
            faults.append(("outside", "a file of the secret folder was opened"))
        except BlockingIOError:
            pass
        canary = self.root / "canary"
        if canary.exists():
            canary.unlink()
            faults.append(("execution", "the canary"))
        return faults


def allowed(root: Path, path: str) -> bool:
    """Whether a process that works in a folder may open a file: one of it, or of a library."""
    if path == str(root) or path.startswith(f"{root}/"):
        return not path.startswith(f"{root}/secret")
    return path.startswith(libraries())


def _put_back(path: Path, content: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(content)


def _through_command(yard: Yard, command: str, name: str, _: int, draw: random.Random) -> Outcome:
    """A command that reads the file: refused in one sentence, or the right result.

    Another result than the undisturbed one is right where the file is another valid one; that is
    judged by `read_as` in the kinds of files, so here only its form is.
    """
    (found,) = [c for c in yard.all_commands if c.name == command]
    reference = yard.reference(found)
    with yard.copy(reference) as place:
        how = mutate(place / name, draw)
        end = ran(found.argv, place, yard.home / "spool")
        faults = [(fault, f"{how}: {seen}") for fault, seen in end.faults()]
        if end.code not in (0, 1):
            faults.append(("exit code", f"{how}: {end.code}: {end.err[-300:]}"))
        if end.code:
            return outcome("clean", faults)
        left = [fault for fault in judged(place, reference) if fault[0] == "leftover"]
        return outcome("taken", faults + left)


def _end(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/prunenet/" in f.filename or "/policies/" in f.filename]
    place, last = (own or frames)[-1], frames[-1]
    said = f"{type(error).__name__}: {str(error)[:120]}"
    return f"{said} at {Path(place.filename).name}:{place.lineno} ({Path(last.filename).name})"
