"""The processes that torchrun has started, as one job: how they meet, how each knows that the
others live, how they part.

A rank that fails says why, once for all (a counter in the job's store). A rank that is killed
closes its connections, or falls silent, which its neighbour notices. Either way the others stop:
who waits for it is woken, who works is interrupted.
"""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_store: Any = None
_joins = 0
_START, _CLIENT = timedelta(minutes=10), timedelta(seconds=30)
# one may wait for another's work for hours; that the other lives is watched
_COLLECTIVE = timedelta(days=7)
TICK, GRACE, _SILENCE = 0.2, 10.0, 600.0  # seconds


class PeerFailed(RuntimeError):
    """Another process of the job has ended too early; the message is one sentence."""


class Followed(Exception):
    """This process ends because another one failed, which has said why."""


@dataclass(slots=True, eq=False)
class Team:
    """The processes of this job.

    Attributes:
        rank, size: this one's number, and how many there are.
        prefix: of the job's keys in the store.
        over: set when this rank has nothing to wait for any more.
        store: the main thread's connection to the job's store; see `client`.
        silent: says which rank is gone, where this one noticed.
        followed: whether this rank was stopped because another one failed.
        calls: of `fresh`; equal on all ranks, which do the same things in the same order.
    """

    rank: int
    size: int
    prefix: str
    store: Any = None
    over: threading.Event = field(default_factory=threading.Event)
    silent: str | None = None
    followed: bool = False
    calls: int = 0

    def connect(self, store: Any, device: str) -> str:
        """Lets tensors travel between the ranks; gives this rank's device.

        Raises:
            ValueError: more processes than GPUs, one GPU for all of them, or another kind of
                device.
            PeerFailed: the others do not answer.
        """
        local, backend = int(os.environ["LOCAL_RANK"]), "gloo"
        if device == "auto":
            raise ValueError(
                "--device auto is for one process, which has all devices: leave torchrun or"
                " auto out"
            )
        if device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(
                f"several processes compute on cpu or cuda, got {device}; start one process alone"
            )
        if device.startswith("cuda") and (devices := torch.cuda.device_count()):
            if device != "cuda":
                raise ValueError(
                    f"each process takes a GPU of its own: say --device cuda, got {device}"
                )
            if local >= devices:
                raise ValueError(
                    f"a machine of this job has {devices} GPUs, one a process: give"
                    f" --nproc-per-node {devices}"
                )
            device, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(local)
        with peers():
            own = dist.PrefixStore(self.prefix, store)  # type: ignore[attr-defined]
            dist.init_process_group(
                backend, store=own, rank=self.rank, world_size=self.size, timeout=_COLLECTIVE
            )
        return device

    def client(self) -> Any:
        """A connection to the store; threads do not share one, since a call may block."""
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=_CLIENT,
        )
        return dist.PrefixStore(self.prefix, store)  # type: ignore[attr-defined]

    def fresh(self) -> str:
        """A name that no other use of the store has."""
        self.calls += 1
        return f"use {self.calls}"

    def meet(self) -> None:
        """Returns when all ranks have come here.

        Raises:
            PeerFailed: one of them will not.
        """
        with peers():
            dist.all_reduce(torch.zeros(1))

    def blames(self) -> bool:
        """Whether this rank is the first to fail, and so the one to say why."""
        try:
            return not self.followed and bool(self.store.add("failed", 1) == 1)
        except RuntimeError:  # the store has gone with its rank
            return True

    def watch(self) -> None:
        """Stops this process when another one has failed, or its neighbour has not been heard of
        for ten minutes.
        """
        try:
            self._look()
        except RuntimeError:  # or all is over
            self.silent = "the process of this job that holds its store has ended without a word"
        if self.over.wait(TICK):
            return
        self.followed = self.silent is None
        _thread.interrupt_main()
        if not self.over.wait(GRACE):  # in a call that nothing wakes
            if self.silent:
                os.write(2, f"error: {self.silent}\n".encode())
            os._exit(1)

    def _look(self) -> None:
        """Returns when there is a reason to stop, or nothing more to watch."""
        store, count, heard = self.client(), 0, time.monotonic()
        neighbour = (self.rank + 1) % self.size
        while not self.over.wait(5 * TICK) and not store.add("failed", 0):
            store.add(f"alive {self.rank}", 1)
            now = store.add(f"alive {neighbour}", 0)
            if now != count:
                count, heard = now, time.monotonic()
            elif time.monotonic() - heard > _SILENCE and store.add("failed", 1) == 1:
                self.silent = (
                    f"process {neighbour} of this job has not been heard of for {_SILENCE / 60:.0f}"
                    " minutes"
                )

    def leave(self, patience: float = GRACE) -> None:
        """Rank 0, which may hold the store, goes last, if the others go within so many seconds."""
        with suppress(RuntimeError):
            gone, start = self.store.add("gone", 1), time.monotonic()
            while self.rank == 0 and gone < self.size and time.monotonic() - start < patience:
                time.sleep(TICK / 10)
                gone = self.store.add("gone", 0)


@contextmanager
def peers() -> Iterator[None]:
    """What torch.distributed says of a peer that is gone becomes one sentence: `PeerFailed`."""
    try:
        yield
    except RuntimeError as error:  # gloo's, NCCL's or the store's
        reason = str(error).strip().splitlines()[0][:200]
        raise PeerFailed(
            "another process of this job has ended without a word, killed or out of memory"
            f" ({reason}); the same command goes on from what is on the disk (train: with --resume)"
        ) from error


def gather_processes() -> tuple[Team, Any]:
    """The job that torchrun's environment describes, once all its processes are here, and the store
    for `Team.connect`.

    Several jobs may follow each other in the same processes. They share one store, which rank 0 may
    hold and which lives as long as its process: of a new one each time, a quick rank could meet the
    last one. Keys carry the job's number.

    Raises:
        ValueError: an environment that is not torchrun's.
        PeerFailed: the others did not come.
    """
    missing = [
        name
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE says that this is one of {os.environ['WORLD_SIZE']} processes, and"
            f" {missing[0]} is not set: start them with torchrun, or unset WORLD_SIZE"
        )
    global _store, _joins
    _joins += 1
    with peers():
        if _store is None:
            _store, *_ = next(dist.rendezvous("env://", timeout=_START))  # type: ignore[attr-defined]
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        team = Team(
            int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), f"prunenet {restarts} {_joins}"
        )
        team.store = team.client()
    return team, _store
