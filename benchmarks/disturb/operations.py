"""Counts the operations of a process that change files, and disturbs one of them.

Wraps what Python's own code calls: functions of `os`, `open` for writing, `write` of a file that it
gave, and the writer of safetensors. A write that is disturbed has written the first half.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import safetensors.torch

_CHANGING = (
    *("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "link", "symlink"),
    *("fsync", "write", "sendfile", "truncate", "ftruncate", "chmod", "fchmod", "utime"),
)
_FREEING = ("unlink", "remove", "rmdir", "chmod", "fchmod", "utime")
"""What a full disk still does."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


_Function = Callable[..., Any]


@dataclass(slots=True)
class Disturbance:
    """What happens at an operation.

    Attributes:
        at: its number, from 1; 0: never.
        number: of the signal that the process sends itself before it (negative: of the error that
            it raises, and that all later ones raise where the disk has become full or read-only).
        seen: operations so far.
        names: of those operations.
    """

    at: int = 0
    number: int = signal.SIGKILL
    seen: int = 0
    names: list[str] = field(default_factory=list)

    def before(self, name: str, place: object, half: Callable[[], object] | None = None) -> None:
        """Count an operation; `half`: does the first half of it."""
        self.seen += 1
        self.names.append(f"{name} {place}"[:120])
        if self.seen == self.at:
            if half is not None:
                half()
            if self.number > 0:
                os.kill(os.getpid(), self.number)
        broken = -self.number if self.at and self.number < 0 else 0
        # a full disk still removes: there, the first operation after that fails
        once = self.seen == self.at and not (broken in _FULL and name in _FREEING)
        if broken and (once or (self.seen > self.at and _lasts(broken, name))):
            raise OSError(broken, os.strerror(broken), place if isinstance(place, str) else None)


def _lasts(number: int, name: str) -> bool:
    """Whether a disk that gave this error gives it again for another operation."""
    return number == errno.EROFS or (number in _FULL and name not in (*_FREEING, "fsync"))


class _File:
    """A file for writing whose writes are counted."""

    def __init__(self, file: Any, place: object, watch: Disturbance) -> None:
        self._file, self._place, self._watch = file, place, watch

    def write(self, content: Any) -> Any:
        def half() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        self._watch.before("file.write", self._place, half)
        return self._file.write(content)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def watched(watch: Disturbance) -> None:
    """Wrap the operations of this process, for good: it is a fork that ends soon."""
    for name in _CHANGING:
        setattr(os, name, partial(_called, watch, name, getattr(os, name)))
    os.open = partial(_opened_low, watch, os.open)
    builtins.open = io.open = partial(_opened, watch, builtins.open)  # type: ignore[assignment]
    writer = safetensors.torch.serialize_file
    safetensors.torch.serialize_file = partial(_saved, watch, writer)


def _called(watch: Disturbance, name: str, function: _Function, *given: Any, **how: Any) -> Any:
    watch.before(name, os.fspath(given[0]) if isinstance(given[0], os.PathLike) else given[0])
    return function(*given, **how)


def _opened_low(
    watch: Disturbance, function: _Function, path: Any, flags: int, *rest: Any, **how: Any
) -> Any:
    if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        watch.before("open", str(path))
    return function(path, flags, *rest, **how)


def _opened(
    watch: Disturbance, function: _Function, file: Any, mode: str = "r", *rest: Any, **how: Any
) -> Any:
    if not set(mode) & set("wax+"):
        return function(file, mode, *rest, **how)
    place = str(file) if isinstance(file, int) else os.fsdecode(file)
    if not isinstance(file, int):
        watch.before("open", place)
    return _File(function(file, mode, *rest, **how), place, watch)


def _saved(watch: Disturbance, function: _Function, tensors: Any, path: Any, **how: Any) -> Any:
    try:
        watch.before("save", str(path), lambda: open(path, "wb").close())
    except OSError as error:  # as its writer says it
        text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
        raise safetensors.SafetensorError(text) from None
    return function(tensors, path, **how)
