"""Text from a local file, a dataset, or the standard library (no download).

Calibration text and test text are different types, so that nothing is tuned on what it is tested
on: functions that calibrate take a `CalibrationText` and refuse a `TestText`, functions that score
take a `TestText`.

Sources, the same words everywhere (`--text` on the command line):

* `builtin`: the standard library's `pydoc_data.topics`, English technical prose, 180 000 characters
  in each half. Topics in name order; a paragraph that an earlier topic already has is dropped
  (topics quote each other), so the halves share no paragraph. Test text is the topics of even rank,
  calibration text those of odd rank. The wording follows the Python release, so `name` carries it:
  compare numbers of one release only.
* a local file: rows (JSON, JSON lines, CSV, TSV, parquet), whose texts are joined by blank lines,
  or prose, taken as it is; see `prunenet.text.formats`. WikiText's own `wiki.test.raw` has no blank
  lines between its rows, and scores a little worse than the dataset.
* a dataset, `id[:config[:split]]`, for example `Salesforce/wikitext:wikitext-2-raw-v1`; the split
  defaults to `test` for test text and `train` for calibration text. A folder of data files, or one
  that `datasets.save_to_disk` wrote, works in place of the id.

How a text becomes token windows: `prunenet.text.windows`.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from prunenet.runtime.paths import expanded
from prunenet.text.formats import (
    SUFFIXES,
    TextError,
    column_texts,
    read_file,
    without_surrogates,
)
from prunenet.text.hub import dataset_texts, split_source

__all__ = [
    "CalibrationText",
    "TestText",
    "TextError",
    "builtin_content",
    "content_sha256",
    "load_text",
]

# Rows of a dataset are read until this many characters: WikiText-2's training split (11 million)
# fits whole, a web crawl does not.
MAX_CHARACTERS = 50_000_000


@dataclass(frozen=True, slots=True)
class _Text:
    name: str
    content: str

    def __post_init__(self) -> None:
        # Neither a tokenizer nor a hash takes lone surrogates.
        object.__setattr__(self, "content", without_surrogates(self.content))


@dataclass(frozen=True, slots=True)
class CalibrationText(_Text):
    """Text that a method may look at.

    Attributes:
        name: where it came from.
        content: the whole text; lone surrogates become U+FFFD.
    """


@dataclass(frozen=True, slots=True)
class TestText(_Text):
    """Text that is scored, and that no method may look at.

    Attributes:
        name: where it came from.
        content: the whole text; lone surrogates become U+FFFD.
    """

    __test__: ClassVar[bool] = False  # the name starts like a pytest class


Text = TypeVar("Text", CalibrationText, TestText)


def load_text(source: str | Path, kind: type[Text], column: str | None = None) -> Text:
    """Reads a text.

    Args:
        source: `builtin`, a file, or `id[:config[:split]]`; see the module's docstring.
        kind: `CalibrationText` or `TestText`: what the text will be used for.
        column: of rows, the column to read; default `text`, else `content`, see
            `prunenet.text.formats.column_texts`. The built-in text has none.

    Raises:
        TextError: no such file or dataset, nothing in it, a format that is not read, no such
            column, or a test split asked for calibration.
    """
    name, test = str(source), kind is TestText
    if name == "builtin":
        half = "test" if test else "calibration"
        release = f"builtin {half} half (Python {platform.python_version()})"
        return kind(release, builtin_content(test=test))
    path = expanded(source)
    if path.is_file():
        content = _file_content(path, column)
    elif path.exists() and not path.is_dir():
        raise TextError(
            f"{name!r} is a pipe or a device, which is read once; write it to a file, and give that"
        )
    elif _looks_like_a_file(name) and not split_source(name)[0].is_dir():
        raise TextError(
            f"text file {name!r} does not exist; give a file, a dataset id or 'builtin'"
        )
    else:
        content = _joined(dataset_texts(name, test=test, column=column), MAX_CHARACTERS)
    if not content.strip():
        raise TextError(f"text {name!r} is empty; give a file or a dataset with text in it")
    return kind(name, content)


def builtin_content(*, test: bool) -> str:
    """One half of the built-in text: the test half, or the calibration half. No paragraph is in
    both.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    halves: tuple[list[str], list[str]] = ([], [])
    for rank, name in enumerate(sorted(topics)):
        for paragraph in re.split(r"\n[ \t]*\n", topics[name].strip("\n")):
            normal = " ".join(paragraph.split())
            if normal and normal not in seen:
                seen.add(normal)
                halves[rank % 2].append(paragraph)
    return "\n\n".join(halves[0 if test else 1])


def content_sha256(text: CalibrationText | TestText) -> str:
    """Hexadecimal sha256 of the text's UTF-8 bytes, to record with a result."""
    return hashlib.sha256(text.content.encode()).hexdigest()


def _looks_like_a_file(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix.lower() in SUFFIXES


def _file_content(path: Path, column: str | None) -> str:
    found = read_file(path)
    if not isinstance(found, str):
        return _joined(column_texts(found, column))
    if column is not None:
        raise TextError(
            f"{str(path)!r} is plain text, which has no column {column!r}; leave `column` out"
        )
    return found


def _joined(texts: Iterable[str], most: int | None = None) -> str:
    """Texts joined by blank lines, up to the one that reaches `most` characters."""
    rows: list[str] = []
    characters = 0
    for text in texts:
        rows.append(text if text.strip() else "")
        characters += len(text)
        if most is not None and characters >= most:
            break
    return "\n\n".join(rows)
