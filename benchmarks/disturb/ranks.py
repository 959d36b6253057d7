"""Jobs of two processes under torchrun, one of them killed; then the same job again.

Each starts three interpreters that import torch: ten times the price of other attempts.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from .children import outcome
from .commands import Reference, Yard, judged, torn
from .kinds import Kind, Outcome

_SHARED = ("prune self", "train", "compare", "recover")
_SECONDS, _AFTER = 400.0, 120.0
"""Until a job is taken to hang: from its start, and from the death of a rank."""


def kinds(yard: Yard) -> Iterator[Kind]:
    """One of each command that shares its work."""
    for command in yard.commands:
        if command.name in _SHARED:
            yield Kind("ranks", command.name, partial(_killed, yard, yard.reference(command)))


def _killed(yard: Yard, reference: Reference, _: int, draw: random.Random) -> Outcome:
    rank, moment = draw.randrange(2), draw.uniform(0, 3 * reference.seconds)
    argv = reference.command.argv
    with yard.copy(reference) as place:
        code, faults = _job(argv, place, (rank, moment))
        faults += torn(place, reference)
        second, wrong = _job(argv, place, None)
        if second and (place / "out").exists() and reference.command.name in ("train", "recover"):
            second, wrong = _job((*argv, "--resume"), place, None)
        left = [fault for fault in judged(place, reference) if "/torchelastic_" not in fault[1]]
        faults += wrong + left  # torchrun leaves the folder of its own logs
        if second and not (place / "out" / "config.json").exists():
            faults.append(("stuck", (place.parent / "job").read_text()[-300:]))
        return outcome(f"rank {rank} killed" if code else "finished before", faults)


def _job(
    argv: Sequence[str], place: Path, kill: tuple[int, float] | None
) -> tuple[int, list[tuple[str, str]]]:
    """A job to its end: its exit code, and its faults; what torchrun says of its own is not ours.

    Args:
        argv: of prunenet.
        place: its current folder.
        kill: (rank, seconds after its interpreter has begun its command).
    """
    (place / "tmp").mkdir(exist_ok=True)
    places = {"PRUNENET_CACHE": str(place / "cache"), "TMPDIR": str(place / "tmp")}
    run = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    with (place.parent / "job").open("w+") as said:
        job = subprocess.Popen(
            [sys.executable, *run, "-m", "prunenet", *argv],
            cwd=place,
            env=os.environ | places | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        late = _SECONDS
        if kill is not None and (pid := _pid_of(job, kill[0], place)):
            time.sleep(kill[1])
            os.kill(pid, signal.SIGKILL)
            late = _AFTER
        try:
            job.wait(late)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            return job.wait(), [("hang", f"no end in {late:.0f} seconds")]
        text = (place.parent / "job").read_text()
    ours = "Traceback (most" in text and "/prunenet/" in text
    return job.returncode, [("traceback", text[-600:])] if ours else []


def _pid_of(job: subprocess.Popen[bytes], rank: int, place: Path) -> int | None:
    """The process of a rank, once it holds the output's lock, or a while after its start."""
    end = time.monotonic() + _SECONDS
    while job.poll() is None and time.monotonic() < end:
        found = _children(job.pid, rank)
        if found and any(place.glob(".*.lock")):  # rank 0 is at work, and has met the other
            return found
        time.sleep(0.1)
    return None


def _children(parent: int, rank: int) -> int | None:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            if f"\0RANK={rank}\0".encode() in b"\0" + (path / "environ").read_bytes():
                return int(path.name)
        except OSError:
            continue
    return None
