"""Where output may go: what can be said of a path before any work is said before it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message is one sentence that says what to do."""


def named(place: str | Path) -> str:
    """The name of a folder, that of "." too, or the last part of a hub id."""
    return Path(place).expanduser().resolve().name


def expanded(path: str | Path) -> Path:
    """Expand a leading `~`, as shells do only where it begins a word: not in `--out=~/x`.

    Raises:
        ValueError: the text is empty, or names the home of an unknown user.
    """
    if not str(path):
        raise ValueError("the path is empty (an unset variable?); give a name")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path} names the home of no known user; give the whole path") from None


def cache_folder() -> Path:
    """Return `PRUNENET_CACHE`, read at call time, or `~/.cache/prunenet`."""
    return expanded(os.environ.get("PRUNENET_CACHE") or "~/.cache/prunenet")


def check_home(out: Path) -> None:
    """Check before any work that a folder `out` can be made, or written in if it exists.

    Raises:
        CheckpointError: a file is in its place, its name is too long, not UTF-8 or holds a NUL
            byte, a link leads nowhere, or its disk is closed to this user.
    """
    _check_text(out)
    check_place(out, out)


def check_absent(out: Path) -> None:
    """Check before any work that a folder `out` can be made; it may exist if it is empty.

    Raises:
        CheckpointError: as `check_home`; or `out` has content, is a link that leads nowhere, the
            current folder or the root of a disk.
    """
    _check_text(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; give another folder, or remove it first")
    check_home(out)
    if out.exists() and (_is_mounted(out) or out.samefile(".")):
        what = "the root of a disk" if _is_mounted(out) else "the current folder"
        raise CheckpointError(f"{out} is {what}, which cannot be replaced; give a folder in it")


def check_file(path: Path, *, regular: bool = False) -> None:
    """Check before any work that `write_atomic` can write `path`.

    Args:
        path: of the file; its parents may be missing.
        regular: whether to refuse devices and pipes, too.

    Raises:
        CheckpointError: as `check_home`; or a folder, a disk or a socket is in its place.
    """
    real = resolved(path)
    if is_stream(path):
        if regular:
            raise CheckpointError(f"{path} is a device or a pipe; give a file")
        return
    check_place(path, path.absolute().parent)
    check_place(path, real.parent)


def check_room(out: Path, needed: int) -> None:
    """Check that the disk of `out` has `needed` bytes free. Raises CheckpointError."""
    if shutil.disk_usage(_home(out)).free < needed:
        raise disk_full(out, needed)


def is_stream(path: Path) -> bool:
    """Return whether `path` is a character device or a pipe, which is written straight into.

    Raises:
        CheckpointError: a folder, a disk or a socket is there.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path} is a folder; give a file")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise CheckpointError(f"{path} is a disk or a socket; give a file")
    return not stat.S_ISREG(mode)


def _check_name(path: Path) -> None:
    """Raises CheckpointError for what no file system takes."""
    try:
        os.lstat(path)
    except ValueError:
        raise CheckpointError(f"{str(path)!r} holds a NUL byte; give another name") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            reason = "its name is too long; give a shorter one"
            raise CheckpointError(f"{path} cannot be written: {reason}") from None


def _check_text(folder: Path) -> None:
    """Raises CheckpointError for a folder that the writers of tokenizers cannot name."""
    real = str(resolved(folder))
    try:
        real.encode()
    except UnicodeEncodeError:
        said = real.encode("utf-8", "backslashreplace").decode()
        try:
            os.fsencode(real).decode()
        except UnicodeError:
            raise CheckpointError(f"{said} is not UTF-8; give another name") from None
        raise CheckpointError(
            f"{said} cannot be named in this locale; set PYTHONUTF8=1, or give another name"
        ) from None


def resolved(path: Path) -> Path:
    """Return where the links of a path lead.

    Raises:
        CheckpointError: its name is too long or holds a NUL byte.
    """
    _check_name(path)
    return Path(os.path.realpath(path))


def check_place(out: Path, folder: Path) -> None:
    """Check that `folder` can be made, or written in if it exists, for the sake of `out`.

    Raises:
        CheckpointError: it cannot.
    """
    absolute = folder.absolute()
    place = next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))
    reason = None
    if not place.is_dir():
        reason = "is a file" if place.exists() else "is a link that leads nowhere"
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = "is closed to you"
    if reason is not None:
        raise CheckpointError(
            f"{out} cannot be written, because {place} {reason}; give another folder"
        )


def _is_mounted(folder: Path) -> bool:
    """Whether another disk, or a folder of the same one (as in containers), is mounted here."""
    name = os.path.realpath(folder).replace("\\", "\\134").replace(" ", "\\040")
    with suppress(OSError):  # Linux
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
        return any(line.split(" ")[4] == name for line in mounts)
    return folder.is_mount()


def _home(out: Path) -> Path:
    """The nearest parent that exists."""
    return next(parent for parent in out.absolute().parents if parent.exists())


def disk_full(out: Path, needed: int) -> CheckpointError:
    """Return the error for `out`, whose weights have `needed` bytes, on a disk without room."""
    free = shutil.disk_usage(_home(out)).free
    part = " (its weights alone)" if needed <= free else ""
    return CheckpointError(
        f"no room for {out}: it takes at least {needed / 1e6:,.1f} MB{part} and its disk has"
        f" {free / 1e6:,.1f} MB free; make room or give a folder on another disk"
    )
