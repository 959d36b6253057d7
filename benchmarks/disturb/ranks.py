"""Jobs of two processes under torchrun's agent, one of them killed; then the same job again.

The agent is torchrun's own (`torch.distributed.launcher`), with forks in place of new interpreters.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from .children import Child, Ended, lived, outcome
from .commands import Reference, Yard, judged, torn
from .kinds import Kind, Outcome

_SHARED = ("prune self", "train", "compare", "recover")


def kinds(yard: Yard) -> Iterator[Kind]:
    """One of each command that shares its work."""
    for command in yard.commands:
        if command.name in _SHARED:
            yield Kind("ranks", command.name, partial(_killed, yard, yard.reference(command)))


def _killed(yard: Yard, reference: Reference, _: int, draw: random.Random) -> Outcome:
    rank, moment = draw.randrange(2), draw.uniform(0, 2.5 * reference.seconds)
    sent = draw.choice((signal.SIGKILL, signal.SIGTERM))
    argv = reference.command.argv
    with yard.copy(reference) as place:
        first = _job(argv, place, yard.home / "spool", (rank, sent, moment))
        faults = _said(first) + torn(place, reference)
        second = _job(argv, place, yard.home / "spool", None)
        if second.code and "--resume" in second.err:
            second = _job((*argv, "--resume"), place, yard.home / "spool", None)
        faults += _said(second) + judged(place, reference)
        if second.code and "exists already" not in second.err:
            faults.append(("stuck", second.err[-300:]))
        return outcome("finished before" if not first.code else f"rank {rank} {sent.name}", faults)


def _said(end: Ended) -> list[tuple[str, str]]:
    """Tracebacks and hangs of ranks; what the agent says of its own is not ours."""
    return [fault for fault in end.faults() if fault[0] in ("traceback", "hang")]


def _job(
    argv: Sequence[str], place: Path, spool: Path, kill: tuple[int, int, float] | None
) -> Ended:
    """A job, to its end; its code is 0 where every rank's is."""
    spool.mkdir(exist_ok=True)
    for name in ("out", "err", "told"):
        (spool / name).unlink(missing_ok=True)
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            code = _agent(argv, place, spool, tell, kill)
        except BaseException:
            code = 1
        finally:
            os._exit(code)
    os.close(tell)
    return Child(pid, ready, spool).wait()


def _agent(
    argv: Sequence[str],
    place: Path,
    spool: Path,
    tell: int,
    kill: tuple[int, int, float] | None,
) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    quiet = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):
        os.dup2(quiet, number)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    try:
        elastic_launch(config, _rank)(list(argv), str(place), str(spool), tell, kill)
    except ChildFailedError:
        return 1
    return 0


def _rank(
    argv: list[str], place: str, spool: str, tell: int, kill: tuple[int, int, float] | None
) -> None:
    if kill is not None and int(os.environ["RANK"]) == kill[0]:
        threading.Thread(target=_end, args=kill[1:], daemon=True).start()
    os._exit(lived(argv, Path(place), Path(spool), tell))


def _end(sent: int, moment: float) -> None:
    time.sleep(moment)
    os.kill(os.getpid(), sent)
