"""What shared measurements cost. A cell that finds a measurement done still owes its price, so that
times can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
Key = tuple[str, int, str]
"""(text, seed, measurement)."""


@dataclass(slots=True, eq=False)
class Use:
    """What one cell, or one measurement, has used.

    Attributes:
        keys: of the measurements, with those that they are made of.
        inner: seconds spent in measurements inside this one.
        shared: seconds that measurements made before this cell took; known when the cell is over.
    """

    keys: set[Key] = field(default_factory=set)
    inner: float = 0.0
    shared: float = 0.0


class Ledger:
    """The seconds of every measurement, each second counted once, and what each of them is made
    of.
    """

    def __init__(self) -> None:
        self._seconds: dict[Key, float] = {}
        self._made_of: dict[Key, frozenset[Key]] = {}
        self._open: list[Use] = []

    @contextmanager
    def cell(self) -> Iterator[Use]:
        """Yields what the block uses; `shared` is filled in at its end."""
        before = dict(self._seconds)
        use = Use()
        self._open.append(use)
        try:
            yield use
        finally:
            self._open.remove(use)
            use.shared = sum(seconds for key, seconds in before.items() if key in use.keys)

    def measured(self, key: Key, make: Callable[[], T]) -> T:
        """What `make` gives. The first time, how long it took is recorded, without measurements
        inside it.
        """
        for use in self._open:
            use.keys |= {key} | self._made_of.get(key, frozenset())
        if key in self._seconds:
            return make()
        own, start = Use(), time.perf_counter()
        self._open.append(own)
        try:
            value = make()
        finally:
            self._open.remove(own)
            whole = time.perf_counter() - start
            if self._open:
                self._open[-1].inner += whole
        self._seconds[key], self._made_of[key] = whole - own.inner, frozenset(own.keys)
        return value

    def forget(self, text: str, seed: int) -> None:
        """Drops what is known of measurements on a text: they are going to be made again."""
        for key in [key for key in self._seconds if key[:2] == (text, seed)]:
            del self._seconds[key], self._made_of[key]
