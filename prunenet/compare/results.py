"""The file of a comparison: one JSON object a line, one line a cell. What is in it is not done
again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunenet.runtime.files import write_atomic

Line = dict[str, Any]
_START = b'{"cell": "'


class Results:
    """Lines by cell, in the order of the file.

    A line that a kill has cut short is dropped. A cell's line is appended; one that is there
    already, of a failure that was tried again, is replaced. One process writes at a time.

    Args:
        path: of the file, which need not be there.

    Raises:
        ValueError: the file holds something else; it is left as it is.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lines: dict[str, Line] = {}
        self._torn = False
        content = self.path.read_bytes() if self.path.exists() else b""
        whole, _, rest = content.rpartition(b"\n")
        self._torn = bool(rest)
        # it is going to be dropped: only if it is ours
        if self._torn and not rest.startswith(_START[: len(rest)]):
            raise self._foreign(content.count(b"\n") + 1)
        for number, text in enumerate(whole.splitlines(), start=1):
            line = self._read(number, text)
            self._lines[line["cell"]] = line

    def __getitem__(self, cell: str) -> Line:
        return self._lines[cell]

    def prepare(self) -> None:
        """Makes the file, if there is none, so that a disk that refuses says so before the work.

        Raises:
            OSError: it refuses.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.open("ab").close()

    def done(self, cell: str) -> bool:
        """Whether the cell has a line, and one without an error."""
        return cell in self._lines and self._lines[cell]["error"] is None

    def add(self, line: Mapping[str, Any]) -> None:
        """Writes a cell's line, on the disk when this returns; the file has been prepared.

        Raises:
            OSError: the disk is full or refuses.
        """
        new = line["cell"] not in self._lines and not self._torn
        self._lines[line["cell"]] = dict(line)
        if not new:
            write_atomic(self.path, b"".join(map(_bytes, self._lines.values())))
            self._torn = False
            return
        with self.path.open("ab") as file:
            file.write(_bytes(line))
            file.flush()
            os.fsync(file.fileno())

    def _read(self, number: int, text: bytes) -> Line:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not {"cell", "error"} <= set(line):
            raise self._foreign(number)
        return line

    def _foreign(self, number: int) -> ValueError:
        return ValueError(
            f"line {number} of {self.path} is not one of 'prunenet compare'; mend it, or give"
            " another --out"
        )


def _bytes(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"
