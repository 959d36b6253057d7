"""Lock files: one process at a time, and none that is dead (`flock`, as in git and dpkg).

A lock file exists as long as its holder works. The holder removes it before it lets go; who has
opened the removed file sees that its path has gone, and opens it again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


class Busy(Exception):
    """Another process holds the lock; the message says which one, as far as it is known."""


@dataclass(slots=True)
class _Held:
    """A lock of this process: its open file, and how many blocks are inside it."""

    descriptor: int
    works: bool
    uses: int = 0


_held: dict[tuple[int, Path], _Held] = {}  # by process, since a fork inherits them
_guard = threading.Lock()


@contextmanager
def hold(file: Path) -> Iterator[bool]:
    """Hold the lock file as long as the block lasts.

    All threads of a process share the lock, and blocks may be nested. The file holds the process's
    number.

    Args:
        file: its folder must exist.

    Yields:
        Whether this block has taken the lock: False where the process had it already, and on file
        systems without locks, which keep nobody away.

    Raises:
        Busy: another process holds it.
        OSError: the file cannot be made.
    """
    key = os.getpid(), file
    with _guard:
        if fresh := key not in _held:
            _held[key] = _taken(file)
        lock = _held[key]
        lock.uses += 1
    try:
        yield fresh and lock.works
    finally:
        with _guard:
            lock.uses -= 1
            if not lock.uses:
                del _held[key]
                _let_go(file, lock.descriptor, lock.works)


def lock_descriptor(descriptor: int) -> bool:
    """Lock an open file, without waiting; closing it unlocks it.

    Returns:
        False on file systems without locks.

    Raises:
        BlockingIOError: another open file holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def remove_unlocked(path: Path) -> None:
    """Remove a file that nobody has locked; leave all others, and those that cannot be removed."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if lock_descriptor(descriptor):
                path.unlink()
        finally:
            os.close(descriptor)


def _taken(file: Path) -> _Held:
    while True:
        descriptor, works = _open(file), False
        try:
            works = lock_descriptor(descriptor)
            if works and not _is_same(descriptor, file):  # its last holder has removed it meanwhile
                os.close(descriptor)
                continue
            with suppress(OSError):  # a full disk, or of another user: a lock without a number
                os.truncate(descriptor, 0)
                os.write(descriptor, f"pid {os.getpid()}".encode())
            if not works:
                file.unlink(missing_ok=True)
        except BlockingIOError:
            holder = os.read(descriptor, 100).decode(errors="replace").strip()
            os.close(descriptor)
            raise Busy(holder) from None
        except BaseException:  # a signal to end
            _let_go(file, descriptor, works)
            raise
        return _Held(descriptor, works)


def _let_go(file: Path, descriptor: int, works: bool) -> None:
    """Removes the file of a lock that is held, and unlocks it, though a signal comes meanwhile."""
    try:
        with suppress(OSError):
            if works:
                file.unlink()
    except BaseException:  # raised once, see `prunenet.cli.signals`
        with suppress(OSError):
            file.unlink()
        raise
    finally:
        os.close(descriptor)


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # of another user, whose process may be dead
        return os.open(file, os.O_RDONLY | os.O_NOFOLLOW)


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False
