"""The processes that torchrun has started, as one job: they meet, know of each other, end together.

Much of this is not done here, as killing ranks shows (torch 2.13, two gloo ranks): torchrun's agent
ends all ranks seconds after the first that dies, and c10d wakes a rank that waits for a dead one.
Neither ends a rank that computes when there is no agent, notices a rank that is stopped, bounds the
meeting, or says in one sentence which failure came first. That is what `Team` does.
"""

from __future__ import annotations

import _thread
import logging
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

from prunenet.runtime.failures import PeerFailed

TICK, GRACE = 0.2, 10.0  # seconds
_MEETING, _PATIENCE = 300.0, 5.0
"""Seconds until a meeting fails, and until it is said that somebody is missing."""
_SILENCE, _SILENCE_AT_START = 600.0, 60.0
"""Seconds without a sign of life, which threads give, after which a rank is taken for dead."""
_CLIENT, _TRY = timedelta(seconds=30), timedelta(seconds=2)
# a rank may wait for another one's work for hours; that the other one lives is watched
_COLLECTIVE = timedelta(days=7)
_log = logging.getLogger(__name__)
_server: Any = None  # of the store; lives as long as rank 0 does
_joins = 0


@dataclass(slots=True, eq=False)
class Team:
    """The processes of one job.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        prefix: of the job's keys in the store, since jobs may follow each other in the same
            processes.
        store: the main thread's connection to the job's store; see `client`.
        over: set when this rank has nothing to wait for any more.
        joined: whether tensors can travel already.
        lost: the sentence that names a rank that has gone, where this one has noticed it.
        followed: whether this rank was stopped because another one failed.
        uses: of `fresh`; equal on all ranks, which do the same things in the same order.
    """

    rank: int
    size: int
    prefix: str
    store: Any = None
    over: threading.Event = field(default_factory=threading.Event)
    joined: bool = False
    lost: str | None = None
    followed: bool = False
    uses: int = 0

    def connect(self, device: str) -> str:
        """Let tensors travel between the ranks.

        Args:
            device: as a user gave it.

        Returns:
            This rank's own device.

        Raises:
            ValueError: as `own_device`.
            PeerFailed: the others do not answer.
        """
        device, backend = own_device(device)
        with peers():
            dist.init_process_group(
                backend,
                store=self.client(),
                rank=self.rank,
                world_size=self.size,
                timeout=_COLLECTIVE,
            )
        self.joined = True
        return device

    def client(self, timeout: timedelta = _CLIENT) -> Any:
        """Open a connection to the store; threads do not share one, since a call may block.

        Raises:
            RuntimeError: there is no store.
        """
        store = dist.TCPStore(*_address(), is_master=False, timeout=timeout)  # type: ignore[attr-defined]
        return dist.PrefixStore(self.prefix, store)  # type: ignore[attr-defined]

    def fresh(self) -> str:
        """Return a key that no other use of the store has."""
        self.uses += 1
        return f"use {self.uses}"

    def gather(self) -> None:
        """Wait until all processes have come to the store; say so where that takes long.

        Raises:
            PeerFailed: some have not come within five minutes.
        """
        start, said, missing = time.monotonic(), False, list(range(self.size))
        while missing:
            waited = time.monotonic() - start
            names, place = ", ".join(map(str, missing)), "{}:{}".format(*_address())
            if waited > _MEETING:
                raise PeerFailed(
                    f"process {names} of this job has not come within {_MEETING:.0f} seconds: it"
                    f" was killed, or cannot reach {place}; start all again"
                )
            if waited > _PATIENCE and not said:
                _log.warning("waiting for process %s of this job at %s", names, place)
                said = True
            # of short steps: a signal is heard between them, not inside
            try:
                self.store = self.store or self.client(_TRY)
                self.store.set(f"here {self.rank}", "")
                missing = [rank for rank in missing if not self.store.check([f"here {rank}"])]
            except RuntimeError:  # rank 0, which serves the store, has not come
                self.store = None
            time.sleep(TICK if missing else 0)

    def meet(self) -> None:
        """Return when all ranks have come here.

        Raises:
            PeerFailed: one of them will not.
        """
        with peers():
            dist.all_reduce(torch.zeros(1))

    def blames(self) -> bool:
        """Return whether this rank is the first to fail, and so the one to say why."""
        try:
            return not self.followed and bool(self.store.add("failed", 1) == 1)
        except (RuntimeError, AttributeError):  # the store has gone with its rank, or never came
            return True

    def watch(self) -> None:
        """Stop this process when another one has failed or is silent. Runs in a thread."""
        try:
            self._look()
        except RuntimeError:  # or all is over
            self.lost = "the process of this job that holds its store has ended without a word"
        if self.over.wait(TICK):
            return
        self.followed = self.lost is None
        _thread.interrupt_main()
        if not self.over.wait(GRACE):  # in a call that nothing wakes
            if self.lost:
                os.write(2, f"error: {self.lost}\n".encode())
            os._exit(1)

    def _look(self) -> None:
        """Returns when there is a reason to stop, or nothing more to watch."""
        store, count, heard = self.client(), 0, time.monotonic()
        neighbour = (self.rank + 1) % self.size
        while not self.over.wait(5 * TICK) and not store.add("failed", 0):
            store.add(f"alive {self.rank}", 1)
            now, time_is = store.add(f"alive {neighbour}", 0), time.monotonic()
            if now != count:
                count, heard = now, time_is
            silent = time_is - heard
            if silent > (_SILENCE if self.joined else _SILENCE_AT_START):
                if store.add("failed", 1) == 1:
                    self.lost = (
                        f"process {neighbour} of this job has given no sign of life for"
                        f" {silent:.0f} seconds; end it, and start the same command again"
                    )
                return

    def leave(self, patience: float = GRACE) -> None:
        """Let rank 0 go last, since it may serve the store that says why a rank has failed.

        Args:
            patience: seconds after which it goes all the same.
        """
        with suppress(RuntimeError, AttributeError):
            gone, start = self.store.add("gone", 1), time.monotonic()
            while _server and gone < self.size and time.monotonic() - start < patience:
                time.sleep(TICK / 10)
                gone = self.store.add("gone", 0)


def own_device(device: str) -> tuple[str, str]:
    """Return this rank's device and the backend for its tensors; a GPU becomes the current one.

    Args:
        device: cpu, or cuda for a GPU of its own for each rank of a machine.

    Raises:
        ValueError: more processes than GPUs, one GPU for all of them, or another kind of device.
    """
    local = int(os.environ["LOCAL_RANK"])
    if device == "auto":
        raise ValueError(
            "`device` auto is for one process, which has all devices: leave torchrun or auto out"
        )
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(
            f"several processes compute on cpu or cuda, got {device}; start one process alone"
        )
    devices = torch.cuda.device_count() if device.startswith("cuda") else 0
    if not devices:
        return device, "gloo"
    if device != "cuda":
        raise ValueError(f"each process takes a GPU of its own: say `device` cuda, got {device}")
    if local >= devices:
        raise ValueError(
            f"a machine of this job has {devices} GPUs, one a process: give torchrun"
            f" --nproc-per-node {devices}"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}", "cpu:gloo,cuda:nccl"


@contextmanager
def peers() -> Iterator[None]:
    """Turn what torch.distributed says of a peer that has gone into `PeerFailed`."""
    try:
        yield
    except RuntimeError as error:  # gloo's, NCCL's or the store's
        reason = str(error).strip().splitlines()[0][:200]
        raise PeerFailed(
            "another process of this job has ended without a word, killed or out of memory"
            f" ({reason}); the same command goes on from what is on the disk (training: with"
            " `resume`)"
        ) from error


def _address() -> tuple[str, int]:
    """Host and port of the store."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def gather_processes() -> Team:
    """Return the job that torchrun's environment describes, once all its processes are here.

    Several jobs may follow each other in the same processes. They share one store: of a new one
    each time, a quick rank could meet the last one. torchrun's agent serves it, or else rank 0.

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
    global _server, _joins
    _joins += 1
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0 and _server is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        try:
            _server = dist.TCPStore(  # type: ignore[attr-defined]
                *_address(), is_master=True, wait_for_workers=False, multi_tenant=True
            )
        except RuntimeError as error:
            reason = str(error).partition("\n")[0][:200]
            place = "{}:{}".format(*_address())
            raise ValueError(
                f"rank 0 cannot listen at {place} ({reason}); give another MASTER_PORT"
            ) from error
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    team = Team(rank, size, f"prunenet {restarts} {_joins}")
    team.gather()
    return team
