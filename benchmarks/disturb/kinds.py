"""What every part shares: a kind of disturbance, what came of an attempt, and the line of a batch.

An attempt is drawn by the seed, the kind and its number, so any of them can be made again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FAULTS = (
    "traceback",
    "unbounded",  # a message of many lines, or a very long one
    "hang",
    "crash",  # by a signal that nobody sent
    "leftover",
    "torn",  # an older output is neither whole old nor whole new
    "different",  # another result than the undisturbed one, without a word
    "stuck",  # the same command does not go on afterwards
    "exit code",
    "execution",
    "outside",  # a file outside the folder was read
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one attempt.

    Attributes:
        what: one word, such as killed, finished, clean, accepted.
        faults: (one of `FAULTS`, what was seen).
    """

    what: str
    faults: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        assert all(fault in FAULTS for fault, _ in self.faults), self.faults


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of disturbance.

    Attributes:
        part, name: together they are the kind's name.
        attempt: (number, random numbers of the attempt) -> outcome.
        most: how many different attempts there are; None: any number.
    """

    part: str
    name: str
    attempt: Callable[[int, random.Random], Outcome]
    most: int | None = None


def batch(kind: Kind, first: int, count: int, seed: int) -> dict[str, Any]:
    """The line of `count` attempts from number `first` on."""
    outcomes, faults, examples = Counter[str](), Counter[str](), []
    survived = 0
    for number in range(first, first + count):
        made = kind.attempt(number, random.Random(f"{seed} {kind.part} {kind.name} {number}"))
        outcomes[made.what] += 1
        survived += not made.faults
        faults.update({fault for fault, _ in made.faults})
        for fault, seen in dict(reversed(made.faults)).items():  # the first of each
            examples.append({"number": number, "fault": fault, "seen": seen[-400:]})
    return {
        "part": kind.part,
        "kind": kind.name,
        "seed": seed,
        "first": first,
        "tried": count,
        "survived": survived,
        "outcomes": dict(outcomes),
        "faults": dict(faults),  # attempts that had one
        "examples": examples,
    }
