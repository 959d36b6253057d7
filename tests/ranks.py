"""Jobs of several processes for tests: forked from a server that has imported everything once."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

JOBS = multiprocessing.get_context("forkserver")
JOBS.set_forkserver_preload(
    [
        "prunenet.cli.app",
        "prunenet.policies.training.train",
        "prunenet.compare.run",
        "prunenet.compare.summary",
    ]
)


@dataclass(frozen=True)
class Ended:
    """What each process left: its exit code and what it wrote."""

    codes: list[int | None]
    errors: list[str]
    output: list[str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def job(
    ranks: int, home: Path, task: Callable[..., Any], *args: Any, patience: float = 60
) -> Ended:
    """Runs a function of a test module in so many processes with torchrun's environment; one gets
    an environment without.
    """
    forkserver.ensure_running()
    port = free_port()
    log = home / f"job{port}"
    log.mkdir(parents=True)
    started = [
        JOBS.Process(target=_rank, args=(rank, ranks, port, log, task, args))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(patience)
    hung = [process for process in started if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, (
        f"{len(hung)} processes hung: {[path.read_text() for path in sorted(log.iterdir())]}"
    )
    texts = [
        [(log / f"{kind}{rank}").read_text() for rank in range(ranks)] for kind in ("err", "out")
    ]
    return Ended([process.exitcode for process in started], *texts)


def _rank(
    rank: int, ranks: int, port: int, log: Path, task: Callable[..., Any], args: Sequence[Any]
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), number)
    if ranks > 1:
        names = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ |= {name: str(value) for name, value in names.items()}
    import torch
    import typer

    torch.set_num_threads(1)
    try:
        task(*args)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def dies_at(module: Any, name: str, call: int, rank: int) -> None:
    """Kills the process of that rank, without a word, at a call of a function."""
    if os.environ.get("RANK") != str(rank):
        return
    real, calls = getattr(module, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)

    setattr(module, name, counted)
