"""The file of a comparison: one JSON object a line, one line a cell. What is in it is not done
again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from prunenet.checkpoints.regimes import Regime
from prunenet.runtime.files import check_file, expanded, lock, naming, write_atomic
from prunenet.runtime.json_files import Count, JsonError, Positive, Within, convert, parse_json

Line = dict[str, Any]
_START = b'{"cell": "'
_SIZE = 2**30
"""Largest file, in bytes: several hundred thousand lines."""


class _Text(TypedDict):
    text: str


class _Interval(TypedDict, total=False):
    """Lines of before have none."""

    low: Annotated[float, Within(0)] | None
    high: Annotated[float, Within(0)] | None


class _Scored(_Interval):
    text: str
    value: Annotated[float, Within(0)] | None
    tokens: Count


class _Errors(TypedDict, total=False):
    standard_error: Annotated[float, Within(0)] | None
    standard_error_norm: Annotated[float, Within(0)] | None


class _Task(_Errors):
    accuracy: float
    accuracy_norm: float | None


class _Evaluation(TypedDict):
    texts: list[_Text]
    tasks: dict[str, str]
    window: Positive
    stride: Positive
    limit: Positive | None


class _Versions(TypedDict):
    prunenet: str


class _Any(TypedDict):
    """Every line."""

    cell: str
    error: str | None


class _Some(_Any, total=False):
    """Whatever else of a line a table reads; a failed cell has only some of it."""

    model: str
    dtype: str
    versions: _Versions
    method: str
    ratio: Annotated[float, Within(0, 1)]
    seed: int
    evaluation: _Evaluation
    regime: Regime | None
    applied_regime: Regime | None
    parameters: Count | None
    active_parameters: Count | None
    perplexity: list[_Scored] | None
    accuracy: float | None
    tasks: list[_Task] | None
    seconds_pruning: Annotated[float, Within(0)] | None
    seconds_calibration: Annotated[float, Within(0)] | None


class _Finished(_Any):
    """A cell that has been measured: all that tables and figures read, and none of it missing."""

    model: str
    dtype: str
    versions: _Versions
    method: str
    ratio: float
    seed: int
    evaluation: _Evaluation
    regime: Regime
    applied_regime: Regime
    parameters: Count
    perplexity: list[_Scored]
    accuracy: float | None
    tasks: list[_Task] | None
    seconds_pruning: float
    seconds_calibration: float | None


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
        self.path = expanded(path)
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

    def complete(self, cell: str) -> bool:
        """Whether the cell is done.

        Raises:
            ValueError: it is, and its line lacks what a table reads.
        """
        if not self.done(cell):
            return False
        line = self._lines[cell]
        try:
            convert(line, _Finished)
            asked, tasks = line["evaluation"], line.get("tasks") or []
            if [text["text"] for text in asked["texts"]] != [t["text"] for t in line["perplexity"]]:
                raise JsonError("perplexity is of other texts than evaluation")
            if len(asked["tasks"]) != len(tasks):
                raise JsonError(f"tasks has {len(tasks)} items, not {len(asked['tasks'])}")
        except JsonError as error:
            raise ValueError(
                f"{self.path} has a damaged line of cell {cell}: {error}; remove that line"
            ) from None
        return True

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
        found = self.path.exists()
        if found and self.path.stat().st_size > _SIZE:
            size = self.path.stat().st_size
            raise ValueError(
                f"{self.path} is no file of 'prunenet compare': it has {size:,} bytes, more than"
                f" {_SIZE:,}; give another `out`"
            )
        content = self.path.read_bytes() if found else b""
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
            line: Line = parse_json(text, _Some)
        except JsonError as error:
            raise self._foreign(number, str(error)) from None
        return line

    def _foreign(self, number: int, why: str = "it is cut off") -> ValueError:
        return ValueError(
            f"line {number} of {self.path} is not one of 'prunenet compare' ({why}); mend it, or"
            " give another `out`"
        )


def _bytes(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"
