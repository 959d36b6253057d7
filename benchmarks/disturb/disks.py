"""Disks that are full, broken or closed: at each file operation of a command, and real ones.

The command must say so in one sentence and leave nothing behind, or have the right result all the
same; afterwards, with room, the same command must finish.
"""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .children import Ended, outcome, ran
from .commands import Reference, Yard, hidden, judged, torn
from .kills import spread, went_on
from .kinds import Kind, Outcome
from .operations import Disturbance

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


def kinds(yard: Yard) -> Iterator[Kind]:
    """Two of each command; one where this user may not mount a disk."""
    real = _may_mount(yard)
    for command in yard.commands:
        reference = yard.reference(command)
        most = len(reference.operations) * len(ERRORS)
        attempt = partial(_at_operation, yard, reference)
        yield Kind("disks", f"{command.name}, at an operation", attempt, most)
        if real:
            yield Kind("disks", f"{command.name}, a real disk", partial(_real, yard, reference))


def _at_operation(yard: Yard, reference: Reference, number: int, _: random.Random) -> Outcome:
    at, turn = spread(number, len(reference.operations))
    error = ERRORS[turn % len(ERRORS)]
    with yard.copy(reference) as place:
        watch = Disturbance(at, -error)
        end = ran(reference.command.argv, place, yard.home / "spool", watch=watch)
        faults = _said(end) + torn(place, reference)
        if error in (errno.ENOSPC, errno.EDQUOT):  # the others may refuse the removal itself
            faults += hidden(place, reference)
        if end.code == 0:
            return outcome("done all the same", faults + _result(place, reference, end))
        return outcome(errno.errorcode[error], faults + went_on(yard, reference))


def _real(yard: Yard, reference: Reference, number: int, draw: random.Random) -> Outcome:
    """A disk that has room for the beginning and a drawn part of what is written; or is closed."""
    room = draw.uniform(0, 1.3) * _growth(reference)
    closed = number % 8 == 7
    with _disk(yard, reference, room) as place:
        if closed:
            _mount("-o", "remount,ro", place)
        end = ran(reference.command.argv, place, yard.home / "spool")
        faults = _said(end)
        if not closed:
            faults += torn(place, reference) + hidden(place, reference)
        _mount("-o", "remount,rw,size=256m", place)
        if end.code == 0:
            return outcome("done all the same", faults + _result(place, reference, end))
        what = "closed disk" if closed else "full disk"
        return outcome(what, faults + went_on(yard, reference))


def _said(end: Ended) -> list[tuple[str, str]]:
    wrong = [] if end.code in (0, 1) else [("exit code", f"{end.code}: {end.err[-300:]}")]
    return wrong + end.faults()


def _result(place: Path, reference: Reference, end: Ended) -> list[tuple[str, str]]:
    faults = judged(place, reference)
    if not reference.command.writes and end.out != reference.printed:
        faults.append(("different", "what it printed"))
    return faults


def _growth(reference: Reference) -> int:
    """Bytes that the command adds to its folder."""
    end = reference.start.with_name(f"{reference.start.name}-end")
    sizes = [
        sum(path.stat().st_size + 4096 for path in home.rglob("*") if path.is_file())
        for home in (reference.start, end)
    ]
    return max(sizes[1] - sizes[0], 65536)


@contextmanager
def _disk(yard: Yard, reference: Reference, room: float) -> Iterator[Path]:
    """A copy of the folder in which a command begins, on a disk with so much room."""
    place = yard.home / "trial"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    _mount("-t", "tmpfs", "-o", "size=256m", "tmpfs", place)
    try:
        shutil.copytree(reference.start, place, symlinks=True, dirs_exist_ok=True)
        (place / "tmp").mkdir(exist_ok=True)
        used = sum(path.stat().st_blocks * 512 for path in place.rglob("*"))
        _mount("-o", f"remount,size={int(used + room) // 4096 * 4 + 4}k", place)
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def _may_mount(yard: Yard) -> bool:
    place = yard.home / "probe"
    place.mkdir(exist_ok=True)
    try:
        _mount("-t", "tmpfs", "-o", "size=4k", "tmpfs", place)
    except (OSError, subprocess.CalledProcessError):
        return False
    subprocess.run(["umount", place], check=True)
    return True
