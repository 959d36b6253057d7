"""Share work between the processes that torchrun starts (torch.distributed).

Outside of `joined` every function is the identity, and a program that uses torch.distributed for
its own purposes is left alone. Inside, results are combined in a fixed order, so that every rank
has what one process would have. Tensors travel byte for byte: between CPUs by gloo, between GPUs by
NCCL. `prunenet.runtime.team` starts and ends the job.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prunenet.runtime.failures import Followed, PeerFailed
from prunenet.runtime.team import GRACE, TICK, Team, gather_processes, peers

_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
_team: Team | None = None
_apart = False


def rank() -> int:
    """Return this process's number in the job, from 0."""
    return 0 if _team is None or _apart else _team.rank


def size() -> int:
    """Return the number of processes in the job."""
    return 1 if _team is None or _apart else _team.size


def is_first() -> bool:
    """Return whether this process writes for all: files, the screen, TensorBoard."""
    return rank() == 0


def is_owner(index: int) -> bool:
    """Return whether layer (or text, ...) `index` belongs to this rank: `index` modulo `size`."""
    return index % size() == rank()


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes that torchrun has started into one job as long as the block lasts.

    All processes must come here. Without torchrun, and inside another such block, do nothing.

    Args:
        device: "cpu", or "cuda" for a GPU of its own for each rank; anything without torchrun.

    Yields:
        The device of this rank.

    Raises:
        ValueError: more processes than GPUs, one GPU for all of them, or an environment that is not
            torchrun's.
        PeerFailed: another process has ended without a word.
        Followed: another process has failed and said why.
    """
    global _team
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _team is not None:
        yield device
        return
    team = gather_processes()
    threading.Thread(target=team.watch, daemon=True).start()
    try:
        place = team.connect(device)
        _team = team
        yield place
        team.meet()
    except BaseException as error:
        team.over.set()
        if team.lost is not None:
            raise PeerFailed(team.lost) from error
        first = team.blames()
        team.leave(GRACE / 2)
        if not first:
            raise Followed from error
        raise
    else:
        team.over.set()
        dist.destroy_process_group()
        team.leave()
    finally:
        _team = None


@contextmanager
def apart() -> Iterator[None]:
    """Let this process work alone inside the block: nothing is split, nobody is waited for."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def share(count: int) -> slice:
    """Return this rank's part of `count` things: parts are contiguous and in the order of ranks."""
    return _share(count, rank())


def _share(count: int, of: int) -> slice:
    each, more = divmod(count, size())
    start = of * each + min(of, more)
    return slice(start, start + each + (of < more))


def all_gather(part: Tensor, count: int) -> Tensor:
    """Return all `count` rows on every rank, from each rank's `share` of them.

    Raises:
        PeerFailed: another process has ended without a word. So do all collectives here.
    """
    if size() == 1:
        return part
    padded = part.new_zeros(-(-count // size()), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(size())]
    with peers():
        dist.all_gather(parts, padded)
    lengths = [len(range(count)[_share(count, of)]) for of in range(size())]
    return torch.cat([rows[:length] for rows, length in zip(parts, lengths, strict=True)])


def broadcast(source: int, make: Callable[[], Tensor]) -> Tensor:
    """Broadcast a tensor from rank `source`, the only one that calls `make`.

    Returns:
        The tensor, on the CPU, or on each rank's own GPU if it was on one; contiguous if there are
        several ranks.
    """
    if size() == 1:
        return make()
    head = torch.full((16,), -1)
    if rank() == source:
        sent = make().detach().contiguous()
        head[: 3 + sent.dim()] = torch.tensor(
            [_DTYPES.index(sent.dtype), sent.is_cuda, sent.dim(), *sent.shape]
        )
    with peers():
        dist.broadcast(head, source)
        dtype, cuda, dims, *shape = head.tolist()
        if rank() != source:
            sent = torch.empty(shape[:dims], dtype=_DTYPES[dtype], device="cuda" if cuda else "cpu")
        if sent.numel():
            dist.broadcast(sent.view(-1).view(torch.uint8), source)
    return sent


def broadcast_object(source: int, make: Callable[[], Any]) -> Any:
    """Broadcast a JSON-serialisable object from rank `source`, the only one that calls `make`.

    Tuples become lists if there are several ranks.
    """
    if size() == 1:
        return make()
    text = broadcast(
        source, lambda: torch.frombuffer(bytearray(json.dumps(make()).encode()), dtype=torch.uint8)
    )
    return json.loads(text.numpy().tobytes())


def gather_from_owners(found: Mapping[int, Sequence[Tensor]], count: int) -> list[list[Tensor]]:
    """Gather the tensors of `count` layers (or texts, ...) from their owners, see `is_owner`.

    Args:
        found: tensors of each index that this rank owns.
        count: number of indices.

    Returns:
        The tensors of each index, on every rank.
    """
    if size() == 1:
        return [list(found[index]) for index in range(count)]
    result = []
    for index in range(count):
        source = index % size()
        own = found.get(index, ())
        pieces = int(broadcast(source, partial(torch.tensor, len(own))))
        result.append(
            [broadcast(source, partial(own.__getitem__, number)) for number in range(pieces)]
        )
    return result


def work_queue(count: int) -> Iterator[int]:
    """Iterate over 0 to `count` - 1, each on one rank: a rank that is free takes the next."""
    if _team is None or _apart:
        yield from range(count)
        return
    store, name = _team.client(), _team.fresh()
    with peers():
        while (number := store.add(name, 1) - 1) < count:
            yield number


@contextmanager
def posted(take: Callable[[Any], None]) -> Iterator[Callable[[Any], None]]:
    """Yield a function that sends a JSON-serialisable object to rank 0, which calls `take` on it.

    Rank 0 takes one object at a time, in the order in which they come. The block ends when all
    ranks have left it and every object has been taken.

    Raises:
        Exception: what `take` raises, on rank 0.
        PeerFailed: another process has ended without a word.
    """
    if _team is None or _apart:
        yield take
        return
    team, name = _team, _team.fresh()
    store, failures, last = team.client(), list[Exception](), threading.Event()

    def post(thing: Any) -> None:
        if failures:
            raise failures[0]
        with peers():
            number = store.add(name, 1)
            store.set(f"{name} {number}", json.dumps(thing))

    def collect() -> None:
        box, taken = team.client(), 0
        try:
            while not last.is_set() or taken < box.add(name, 0):
                while taken < box.add(name, 0):
                    taken += 1
                    take(json.loads(box.get(f"{name} {taken}")))
                    box.delete_key(f"{name} {taken}")
                last.wait(TICK)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=collect, daemon=True)
    if team.rank == 0:
        thread.start()
    try:
        yield post
        team.meet()
        last.set()
        if team.rank == 0:
            thread.join()
    finally:
        last.set()
        if team.rank == 0:
            thread.join(GRACE)
    if failures:
        raise failures[0]
