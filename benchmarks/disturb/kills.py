"""Commands that are ended by a signal: before each file operation, and at random moments.

After it the same command is run again. It must finish, with the result of an undisturbed run and
nothing else; an older output was whole at every moment.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial

from .children import Ended, outcome, start
from .commands import Reference, Yard, again, hidden, judged, torn
from .kinds import Kind, Outcome
from .operations import Disturbance

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def kinds(yard: Yard) -> Iterator[Kind]:
    """Two of each command."""
    for command in yard.commands:
        reference = yard.reference(command)
        most = len(reference.operations) * len(SIGNALS)
        attempt = partial(_at_operation, yard, reference)
        yield Kind("kills", f"{command.name}, before an operation", attempt, most)
        attempt = partial(_at_moment, yard, reference)
        yield Kind("kills", f"{command.name}, at a moment", attempt)


def spread(number: int, count: int) -> tuple[int, int]:
    """The operation, from 1, and the round of an attempt; the first attempts lie all over a run."""
    order = random.Random(count).sample(range(1, count + 1), count)
    return order[number % count], number // count


def _at_operation(yard: Yard, reference: Reference, number: int, _: random.Random) -> Outcome:
    at, turn = spread(number, len(reference.operations))
    sent = SIGNALS[turn]
    with yard.copy(reference) as place:
        watch = Disturbance(at, sent)
        child = start(reference.command.argv, place, yard.home / "spool", watch=watch)
        faults = _ended(child.wait(), sent) + torn(place, reference)
        if sent != signal.SIGKILL:
            faults += hidden(place, reference)
        return outcome(sent.name, faults + went_on(yard, reference))


def _at_moment(yard: Yard, reference: Reference, _: int, draw: random.Random) -> Outcome:
    sent, moment = draw.choice(SIGNALS), draw.uniform(0, 1.1 * reference.seconds)
    with yard.copy(reference) as place:
        child = start(reference.command.argv, place, yard.home / "spool")
        child.listen()
        time.sleep(moment)
        os.kill(child.pid, sent)
        end = child.wait()
        faults = _ended(end, sent) + torn(place, reference)
        if sent != signal.SIGKILL:
            faults += hidden(place, reference)
        what = "finished before" if end.code == 0 else sent.name
        return outcome(what, faults + went_on(yard, reference))


def _ended(end: Ended, sent: signal.Signals) -> list[tuple[str, str]]:
    """What is wrong with how it ended: 128 and the signal's number, or it was done already."""
    right = -sent if sent == signal.SIGKILL else 128 + sent
    wrong = [] if end.code in (0, right) else [("exit code", f"{end.code}: {end.err[-300:]}")]
    return wrong + ([] if sent == signal.SIGKILL and not end.late else end.faults())


def went_on(yard: Yard, reference: Reference) -> list[tuple[str, str]]:
    """Runs the command of the trial again: what is wrong with that, and with its result."""
    place = yard.home / "trial"
    end, is_there = again(reference, place, yard.home / "spool")
    faults = end.faults() + judged(place, reference)
    if end.code and not is_there:
        faults.append(("stuck", end.sentence))
    if not reference.command.writes and end.out != reference.printed:
        faults.append(("different", "what it printed"))
    return faults
