"""Many processes, one job: the ranks that torchrun starts share layers, masks and cells
(torch.distributed).

Nothing here does anything until `joined`: in one process every function is the identity, and a
program that uses torch.distributed for its own purposes is left alone. Inside, work is split and
its results are put together in a fixed order, so that every rank has what one process would have.
Tensors travel on their device: between CPUs by gloo, between CUDA devices by NCCL, byte for byte.
How ranks meet, and stop when one of them fails: `prunenet.runtime.team`.
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

from prunenet.runtime.team import GRACE, TICK, Followed, PeerFailed, Team, gather_processes, peers

_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
_team: Team | None = None
_apart = False


def rank() -> int:
    """This process's number in the job, from 0."""
    return 0 if _team is None or _apart else _team.rank


def size() -> int:
    """How many processes the job has."""
    return 1 if _team is None or _apart else _team.size


def is_first() -> bool:
    """Whether this is the process that reads and writes for all: files, the screen, TensorBoard."""
    return rank() == 0


def is_owner(index: int) -> bool:
    """Whether layer (or text, ...) `index` is this rank's: they are dealt out in turn."""
    return index % size() == rank()


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Makes the processes that torchrun has started one job; all of them come here. Without
    torchrun, nothing.

    Args:
        device: as a user gave it; "cuda" is a GPU of its own for each rank.

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
    team, store = gather_processes()
    threading.Thread(target=team.watch, daemon=True).start()
    try:
        place = team.connect(store, device)
        _team = team
        yield place
        team.meet()
    except BaseException as error:
        team.over.set()
        if team.silent is not None:
            raise PeerFailed(team.silent) from error
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
    """Inside, this process works as if it were alone: nothing is split, nobody is waited for."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def share(count: int) -> slice:
    """This rank's part of `count` things; the parts of all ranks, in their order, are the whole."""
    return _share(count, rank())


def _share(count: int, of: int) -> slice:
    each, more = divmod(count, size())
    start = of * each + min(of, more)
    return slice(start, start + each + (of < more))


def all_gather(part: Tensor, count: int) -> Tensor:
    """The whole of `count` rows, on every rank, from each rank's `share` of them."""
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
    """What `make` gives on one rank, on all of them; it is not called on the others.

    It lies on the CPU, or on each rank's own GPU where it lay on one; contiguous where there are
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
    """`broadcast` for what JSON holds. Tuples become lists where there are several ranks."""
    if size() == 1:
        return make()
    text = broadcast(
        source, lambda: torch.frombuffer(bytearray(json.dumps(make()).encode()), dtype=torch.uint8)
    )
    return json.loads(text.numpy().tobytes())


def gather_from_owners(found: Mapping[int, Sequence[Tensor]], count: int) -> list[list[Tensor]]:
    """The tensors of `count` layers (or texts, ...), on every rank, from the ranks whose they are
    (`is_owner`).
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
    """The numbers from 0 to `count`, each to one rank: whoever is free takes the next."""
    if _team is None or _apart:
        yield from range(count)
        return
    store, name = _team.client(), _team.fresh()
    with peers():
        while (number := store.add(name, 1) - 1) < count:
            yield number


@contextmanager
def posted(take: Callable[[Any], None]) -> Iterator[Callable[[Any], None]]:
    """Yields what hands an object (as JSON holds it) to `take`, which rank 0 calls, one object at a
    time, as they come.

    The block is left when all ranks have left it and everything has been taken. What `take` raises
    is raised by rank 0.
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
