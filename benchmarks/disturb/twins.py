"""Two processes at one output: the second says at once who works there, and spoils nothing."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from functools import partial

from .children import Ended, outcome, start
from .commands import Reference, Yard, judged
from .kinds import Kind, Outcome

_DONE = ("exists already", "--resume")  # what a late one says of a result, or a run, that is there


def kinds(yard: Yard) -> Iterator[Kind]:
    """One of each command that writes."""
    for command in yard.commands:
        if command.writes:
            attempt = partial(_two, yard, yard.reference(command))
            yield Kind("twins", command.name, attempt)


def _two(yard: Yard, reference: Reference, _: int, draw: random.Random) -> Outcome:
    argv = reference.command.argv
    with yard.copy(reference) as place:
        first = start(argv, place, yard.home / "spool")
        first.listen()
        time.sleep(draw.uniform(0, 1.1 * reference.seconds))
        second = start(argv, place, yard.home / "spool2")
        second.listen()
        begun = time.monotonic()
        pids = {first.pid: second.pid, second.pid: first.pid}
        ends = {child.pid: child.wait() for child in (second, first)}
        faults = [fault for end in ends.values() for fault in end.faults()]
        faults += judged(place, reference)
        if all(end.code for end in ends.values()):
            faults.append(("stuck", " / ".join(end.sentence for end in ends.values())))
        what = "both finished"
        for pid, end in ends.items():
            if end.code:
                what, wrong = _loser(end, pids[pid])
                faults += wrong
        del begun
        return outcome(what, faults)


def _loser(end: Ended, other: int) -> tuple[str, list[tuple[str, str]]]:
    """What the process without a result said."""
    said = re.search(r"another prunenet(?: \(pid (\d+)\))? is writing", end.err)
    if said:
        named = said[1] in (None, str(other))
        return "told", [] if named else [("different", f"names process {said[1]}, not {other}")]
    if any(text in end.err for text in _DONE):
        return "came late", []
    return "told nothing", [("stuck", end.sentence)]
