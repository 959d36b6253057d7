"""The file of a comparison: one JSON object a line, one line a cell. What is in it is not done
again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunenet.runtime.files import check_file, lock, naming, write_atomic

Line = dict[str, Any]
_START = b'{"cell": "'


class Results:
    """Lines by cell, in the order of the file.

    A line that a kill has cut short is dropped. A cell's line is appended; one that is there
    already, of a failure that was tried again, is replaced. The file is locked while a line is
    written, and lines that others have added meanwhile stay.

    Args:
        path: of the file, which need not be there.

    Raises:
        ValueError: the file holds something else; it is left as it is.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_file(self.path, regular=True)
        self._lines: dict[str, Line] = {}
        self._read()

    def __getitem__(self, cell: str) -> Line:
        return self._lines[cell]

    def prepare(self) -> None:
        """Make the file, if there is none, so that a disk that refuses says so before the work.

        Raises:
            CheckpointError: another process is writing the file.
            OSError: the disk refuses.
        """
        with lock(self.path), naming(self.path):
            if self.path.exists():
                self.path.open("ab").close()
            else:
                write_atomic(self.path, b"")

    def done(self, cell: str) -> bool:
        """Whether the cell has a line, and one without an error."""
        return cell in self._lines and self._lines[cell]["error"] is None

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a cell's line; it is on the disk when this returns. The file has been prepared.

        Raises:
            CheckpointError: another process is writing the file.
            OSError: the disk is full or refuses.
        """
        with lock(self.path), naming(self.path):
            whole = self._read() and line["cell"] not in self._lines
            self._lines[line["cell"]] = dict(line)
            if not whole:
                write_atomic(self.path, b"".join(map(_bytes, self._lines.values())))
                return
            with self.path.open("ab") as file:
                file.write(_bytes(line))
                file.flush()
                os.fsync(file.fileno())

    def _read(self) -> bool:
        """Takes over the lines of the file. Whether it is whole: holds all lines, and no part of
        one.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        whole, _, rest = content.rpartition(b"\n")
        # it is going to be dropped: only if it is ours
        if rest and not rest.startswith(_START[: len(rest)]):
            raise self._foreign(content.count(b"\n") + 1)
        lines = [
            self._parsed(number, text) for number, text in enumerate(whole.splitlines(), start=1)
        ]
        self._lines |= {line["cell"]: line for line in lines}
        return not rest and len(self._lines) == len(lines)

    def _parsed(self, number: int, text: bytes) -> Line:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        kinds = {"cell": str, "error": str | None}
        if not isinstance(line, dict) or not all(
            name in line and isinstance(line[name], kind) for name, kind in kinds.items()
        ):
            raise self._foreign(number)
        return line

    def _foreign(self, number: int) -> ValueError:
        return ValueError(
            f"line {number} of {self.path} is not one of 'prunenet compare'; mend it, or give"
            " another `out`"
        )


def _bytes(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"
