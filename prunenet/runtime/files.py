"""Files and folders that appear complete or not at all, each written by one process at a time.

Content lies under a hidden name beside its target until it is complete, and is then renamed. `lock`
keeps other processes away from a target. What a killed process leaves is removed by the next one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from prunenet.runtime.locks import Busy, hold, lock_descriptor, remove_unlocked
from prunenet.runtime.passing import remove_tree
from prunenet.runtime.paths import CheckpointError as CheckpointError
from prunenet.runtime.paths import cache_folder as cache_folder
from prunenet.runtime.paths import check_absent as check_absent
from prunenet.runtime.paths import check_file as check_file
from prunenet.runtime.paths import check_home as check_home
from prunenet.runtime.paths import check_place, disk_full, is_stream, resolved
from prunenet.runtime.paths import check_room as check_room
from prunenet.runtime.paths import expanded as expanded

_HIDDEN = re.compile(r"[0-9a-f]{32}")
_TRIES = 1000  # to make a lock file in a folder that others remove meanwhile


@contextmanager
def lock(target: Path) -> Iterator[None]:
    """Keep other processes from writing `target` as long as the block lasts.

    The hidden file `.NAME.lock` beside the target is locked, see `prunenet.runtime.locks`. All
    threads of the process share the lock, and blocks may be nested. Missing parents are made, and
    removed if nothing comes into them. What killed writers of the target have left is removed.

    Raises:
        CheckpointError: another process holds the lock, or the folder cannot be written.
    """
    real = resolved(target)
    if not real.name:
        raise CheckpointError(f"{target} is no name of a file or a folder; give one")
    check_place(target, target.absolute().parent)
    check_place(target, real.parent)
    made = list[Path]()
    try:
        with ExitStack() as stack:
            if _entered(stack, target, real, made):
                _sweep(real, folders=True)
            yield
    finally:
        for folder in made:
            with suppress(OSError):  # it is used
                folder.rmdir()


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """Yield a folder that becomes `out` when the block succeeds, and is removed when it fails.

    `out` is locked meanwhile. Links are followed.

    Args:
        out: the folder to create, with its parents; it may exist if it is empty.
        needed: bytes that will be written, at least.

    Raises:
        CheckpointError: `out` exists, another process writes it, the disk is full, or the folder
            cannot be written.
    """
    real = resolved(out)
    try:
        with lock(out):
            check_absent(out)
            check_room(out, needed)
            hidden = _beside(real, uuid4().hex)
            try:
                # closed to others until it is complete; the folder in it has the usual permissions
                hidden.mkdir(mode=0o700)
                folder = hidden / real.name
                folder.mkdir()
                yield folder
                _settle(folder)
                folder.rename(real)
            finally:
                remove_tree(hidden)
            _sync(real.parent)
    except Exception as error:
        if _is_full(error):
            raise disk_full(out, needed) from error
        if isinstance(error, OSError):
            raise CheckpointError(f"{out} cannot be written: {error}") from error
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file in one step, so that a reader sees the old content or the new one.

    Links are followed, and the permissions of an existing file are kept. A character device or a
    pipe is written straight into.

    Raises:
        OSError: the disk is full or refuses, or nobody reads the pipe; `filename` is the target,
            which is as it was.
        CheckpointError: a folder, a disk or a socket is in its place.
    """
    with naming(path):
        if is_stream(path):
            _write_straight(path, content)
            return
        real = resolved(path)
        _sweep(real, folders=False)
        temporary, descriptor = _hidden_file(real)
        try:
            with open(descriptor, "wb") as file:
                if real.exists():
                    os.fchmod(descriptor, stat.S_IMODE(real.stat().st_mode))
                file.write(content)
                file.flush()
                os.fsync(descriptor)
                os.replace(temporary, real)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync(real.parent)


def append(path: Path, content: bytes) -> None:
    """Add whole lines to a file; they are on the disk when this returns.

    Missing parents are made. Lines that two processes add at once both stay.

    Raises:
        OSError: the disk is full or refuses; `filename` is the target.
    """
    with naming(path):
        make_folders(path.parent)
        with path.open("ab", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())


def whole_lines(path: Path) -> tuple[list[bytes], bytes]:
    """Read the lines of a file that `append` writes.

    Returns:
        The whole ones, none where there is no file; and what a kill left of another.

    Raises:
        CheckpointError: it is no regular file, or is closed to this user.
    """
    if path.exists() and not path.is_file():  # reading a pipe may never end
        raise CheckpointError(f"{path} is no regular file; give another one")
    try:
        whole, _, rest = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return whole.splitlines(), rest


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and its missing parents, so that they survive a power cut.

    Returns:
        Those that were missing, deepest first.

    Raises:
        OSError: the disk is full or refuses.
    """
    absolute = folder.absolute()
    missing = [path for path in (absolute, *absolute.parents) if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync(path.parent)
    return missing


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the operating system's errors inside the block the name of `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _beside(target: Path, ending: str) -> Path:
    """A hidden path beside the target, of a name that fits where the target's own does."""
    name = target.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return target.with_name(f".{name}.{ending}")


def _entered(stack: ExitStack, said: Path, target: Path, made: list[Path]) -> bool:
    """Puts the lock of the target on the stack; see `hold`. Notes the folders that were made."""
    tries = 0
    while True:
        try:
            made[:0] = make_folders(target.parent)
            return stack.enter_context(hold(_beside(target, "lock")))
        except Busy as error:
            process = f" ({error})" if str(error) else ""
            raise CheckpointError(
                f"another prunenet{process} is writing {said}; wait for it, or give another `out`"
            ) from None
        except OSError as error:
            tries += 1
            # another process had made the folder, and has removed it; /proc takes no file at all
            if isinstance(error, FileNotFoundError) and tries < _TRIES:
                continue
            raise CheckpointError(
                f"{said} cannot be written: {error.strerror}; give another `out`"
            ) from error


def _sweep(target: Path, *, folders: bool) -> None:
    """Removes what killed writers of the target have left: unlocked hidden files, and, for the
    holder of its lock, hidden folders.
    """
    prefix = _beside(target, "").name
    with suppress(OSError):
        for path in target.parent.iterdir():
            ours = path.name.startswith(prefix) and _HIDDEN.fullmatch(path.name[len(prefix) :])
            if ours and path.is_dir():
                if folders:
                    shutil.rmtree(path, ignore_errors=True)
            elif ours:
                remove_unlocked(path)


def _hidden_file(target: Path) -> tuple[Path, int]:
    """A new hidden file beside the target, locked against `_sweep`, and its descriptor."""
    while True:
        path = _beside(target, uuid4().hex)
        # Not tempfile's: its files stay closed to others, and this one is going to be read by them.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(BlockingIOError):  # of a sweep, see below
            lock_descriptor(descriptor)
            if os.fstat(descriptor).st_nlink:
                return path, descriptor
        os.close(descriptor)  # swept between the two


def _write_straight(path: Path, content: bytes) -> None:
    try:
        # without this flag a pipe that nobody reads would block for ever
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "Nobody reads this pipe; start its reader first") from None
        raise
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as file:
        file.write(content)


def _is_full(error: Exception) -> bool:
    """Whether a disk is full; safetensors and tokenizers have error types of their own."""
    full = f"os error {errno.ENOSPC}"
    return getattr(error, "errno", None) == errno.ENOSPC or full in str(error)


def _settle(folder: Path) -> None:
    """Gives the files the usual permissions, and puts all of them on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            # safetensors closes its files to others
            path.chmod(folder.stat().st_mode & 0o666)
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
