"""Temporary folders that go with their process, and those of killed processes with the next one.

Each is locked (`flock`) as long as its process lives; an unlocked one has lost its process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from prunenet.runtime.locks import lock_descriptor

_PREFIX = "prunenet-passing-"


@contextmanager
def passing_folder(home: Path | None = None) -> Iterator[Path]:
    """Yield a new folder that is removed at the end of the block; first remove those of the dead.

    Args:
        home: where it is made; default the system's folder for temporary files.

    Raises:
        OSError: the disk is full or refuses.
    """
    home = home or _temporary()
    for path in home.glob(f"{_PREFIX}*"):
        _remove_dead(path)
    folder, descriptor = _locked(home)
    try:
        yield folder
    finally:
        remove_tree(folder)
        os.close(descriptor)


def _temporary() -> Path:
    """The system's folder for temporary files.

    `tempfile.gettempdir` tries folders by writing a file, which a kill leaves there.
    """
    named = (tempfile.tempdir, *map(os.environ.get, ("TMPDIR", "TEMP", "TMP")))
    return next((Path(name) for name in named if name and Path(name).is_dir()), Path("/tmp"))


def remove_tree(folder: Path) -> None:
    """Remove a folder as far as the disk lets; a signal to end that comes meanwhile waits."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # raised once, see `prunenet.cli.signals`
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _locked(home: Path) -> tuple[Path, int]:
    """A new folder, locked, and its descriptor; again where a sweep came between the two."""
    while True:
        folder = home / f"{_PREFIX}{uuid4().hex}"
        folder.mkdir(mode=0o700)
        with suppress(FileNotFoundError):
            descriptor = _open(folder)
            with suppress(BlockingIOError):
                lock_descriptor(descriptor)
                if folder.exists():
                    return folder, descriptor
            os.close(descriptor)


def _remove_dead(folder: Path) -> None:
    """Removes a folder of this user that nobody has locked; leaves all others."""
    with suppress(OSError):
        descriptor = _open(folder)
        try:
            if os.fstat(descriptor).st_uid == os.getuid() and lock_descriptor(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
