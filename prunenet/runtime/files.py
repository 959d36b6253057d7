"""Folders and files that appear complete or not at all: written under a hidden name beside the
target, then renamed.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message is one sentence that says what to do."""


def cache_folder() -> Path:
    """`PRUNENET_CACHE`, read at call time, or `~/.cache/prunenet`."""
    return Path(os.environ.get("PRUNENET_CACHE") or "~/.cache/prunenet").expanduser()


def check_home(out: Path) -> None:
    """Raises CheckpointError where a folder `out` cannot be, or cannot be written in: said before
    the work, not after.
    """
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not place.is_dir():
        raise CheckpointError(
            f"{out} cannot be written, because {place} is a file; give another folder"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{out} cannot be written, because {place} is closed to you; give another folder"
        )


def check_absent(out: Path) -> None:
    """Raises CheckpointError where `out` exists and is not an empty folder, or cannot be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; give another folder, or remove it first")
    check_home(out)


def check_room(out: Path, needed: int) -> None:
    """Raises CheckpointError where the disk that `out` will be on has less than `needed` bytes
    free.
    """
    home = next(parent for parent in out.absolute().parents if parent.exists())
    if shutil.disk_usage(home).free < needed:
        raise _disk_full(out, needed, home)


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """Yields a folder that becomes `out` when the block succeeds and is removed, with all in it,
    when it does not.

    Args:
        out: the folder to create, with its parents; it may exist if it is empty.
        needed: bytes that will be written, at least.

    Raises:
        CheckpointError: `out` exists, the disk is full, or the folder cannot be written.
    """
    check_absent(out)
    check_room(out, needed)
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    home = out.absolute().parents[len(missing)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # What tempfile makes is closed to others; the folder inside it has the usual permissions.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as hidden:
            folder = Path(hidden) / out.name
            folder.mkdir()
            yield folder
            for path in folder.rglob("*"):
                if path.is_file():
                    # safetensors closes its files to others
                    path.chmod(folder.stat().st_mode & 0o666)
                _sync(path)
            _sync(folder)
            folder.rename(out)
        _sync(out.parent)
    except BaseException as error:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        # safetensors and tokenizers wrap the operating system's error in types of their own.
        if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(
            error
        ):
            raise _disk_full(out, needed, home) from error
        if isinstance(error, OSError):
            raise CheckpointError(f"{out} cannot be written: {error}") from error
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Writes beside the target and renames, so that a reader sees the old file or the new one.

    Raises:
        OSError: the disk is full or refuses; its `filename` is the target, which is as it was.
    """
    # Not tempfile's: its files stay closed to others, and this one is going to be read by them.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _disk_full(out: Path, needed: int, home: Path) -> CheckpointError:
    free = shutil.disk_usage(home).free
    return CheckpointError(
        f"no room for {out}: it takes at least {needed / 1e6:,.1f} MB and its disk has"
        f" {free / 1e6:,.1f} MB free; make room or give a folder on another disk"
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
