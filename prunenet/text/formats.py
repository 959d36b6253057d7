"""Reads a local file as prose or as rows, judged by its content first and by its suffix then.

* Rows: JSON lines or one JSON array (`.jsonl`, `.ndjson`, `.json`, or any other name with JSON
  objects inside), CSV and TSV with a header, parquet and Arrow files.
* Prose: any other text, unless its suffix or its first bytes belong to a format that is not read
  here (HTML, PDF, zip, ...).
* `.gz` around JSON, CSV or prose is unpacked.
* Text is UTF-8, or UTF-16 and UTF-32 where a byte order mark says so; the mark is dropped.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import sys
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]

_JSON = (".jsonl", ".ndjson", ".json")
_DELIMITED = {".csv": None, ".tsv": "\t", ".tab": "\t"}
_STORED: dict[str, Literal["parquet", "arrow"]] = {".parquet": "parquet", ".arrow": "arrow"}
_PROSE = (".txt", ".text", ".raw", ".tokens", ".md")
SUFFIXES = (*_PROSE, *_JSON, *_DELIMITED, *_STORED, ".gz")
"""Suffixes, in lower case, that say that a name is a file's."""
# Formats that would otherwise be scored as prose, tags and all, or whose bytes are no text.
_UNREAD = {
    *(".html", ".htm", ".xhtml", ".xml", ".svg", ".yaml", ".yml", ".toml", ".ini"),
    *(".pdf", ".rtf", ".docx", ".odt", ".epub", ".xlsx", ".xls", ".ods", ".ipynb"),
    *(".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar"),
    *(".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".safetensors", ".gguf"),
    *(".h5", ".hdf5", ".orc", ".avro", ".feather", ".db", ".sqlite", ".msgpack"),
}
_MAGIC = {
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"{\\rtf": "RTF",
    b"\x28\xb5\x2f\xfd": "compressed by zstandard",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"SQLite format 3": "a database",
}
_MARKUP = ("<!doctype", "<html", "<?xml")
_MARKS = {  # UTF-32's marks begin like UTF-16's, so they come first
    BOM_UTF32_LE: "utf-32",
    BOM_UTF32_BE: "utf-32",
    BOM_UTF16_LE: "utf-16",
    BOM_UTF16_BE: "utf-16",
    BOM_UTF8: "utf-8-sig",
}
_UNPACKED = 2**31  # bytes that a file may have, or a .gz unpack to; parquet is read by rows
_HEAD = 8192  # bytes in which a NUL means that a file is no text, as for git
_TEXT_COLUMNS = ("text", "content", "document", "sentence")


class TextError(ValueError):
    """A text cannot be had, or is too short."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a file or a dataset.

    Attributes:
        name: what errors call it.
        rows: (number from 1, row) each, read as they are asked for.
        unit: what the numbers count.
        declared: whether all rows have the same columns by declaration, as in CSV and parquet.
    """

    name: str
    rows: Iterable[tuple[int, Row]]
    unit: Literal["line", "row"] = "row"
    declared: bool = True


def read_file(path: Path) -> str | Table:
    """Prose as one string, or the rows of a file.

    Raises:
        TextError: unreadable, damaged, not text, or of a format that is not read; while rows are
            read, also a row that is not what the format says.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
        stored = _stored_kind(path, head)
        size = path.stat().st_size
        if not stored and size > _UNPACKED:
            raise TextError(f"{str(path)!r} has {size:,} bytes; give a part, at most {_UNPACKED:,}")
        data = b"" if stored else path.read_bytes()
    except OSError as error:
        raise TextError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    if stored:
        return Table(repr(str(path)), _stored_rows(path, stored))
    suffix = path.suffix.lower()
    if data.startswith(b"\x1f\x8b"):
        data = _unzipped(path, data)
        suffix = Path(path.stem).suffix.lower() if suffix == ".gz" else suffix
    if reason := _unread(suffix, data):
        raise TextError(
            f"{str(path)!r} is {reason}, which is not read as text; give plain text, JSON lines,"
            " CSV or parquet"
        )
    content = _decoded(path, data)
    if suffix in _DELIMITED:
        return Table(repr(str(path)), _delimited_rows(path, content, _DELIMITED[suffix]))
    if suffix in _JSON or _holds_json(content):
        rows, unit = _json_rows(path, content)
        return Table(repr(str(path)), rows, unit, declared=False)
    if content[:200].lstrip().lower().startswith(_MARKUP):
        raise TextError(
            f"{str(path)!r} is HTML or XML, which is not read as text; extract its text first"
        )
    return content


def column_texts(table: Table, column: str | None = None) -> Iterator[str]:
    """The texts of a table, from one column.

    Args:
        table: its rows.
        column: its name. Default: `text`, else `content`, `document` or `sentence`; else, where
            columns are declared, the only one that holds strings.

    Raises:
        TextError: there is no such column, or a row has no string in it. An empty value (null) of a
            table with declared columns is an empty text.
    """
    chosen = column
    for number, row in table.rows:
        if not isinstance(row, dict):
            raise TextError(f"{table.unit} {number} of {table.name} is not an object")
        if chosen is None:
            chosen = _default_column(table, row)
        value = row.get(chosen)
        if value is None and table.declared and chosen in row:
            value = ""
        if not isinstance(value, str):
            raise TextError(
                f'{table.unit} {number} of {table.name} has no "{chosen}" column with a string in'
                f" it; name the column to read, it has {_listed(row)}"
            )
        yield value


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which no encoding and no tokenizer knows;
    surrogates that make a pair become their character.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _default_column(table: Table, row: Row) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    for name in _TEXT_COLUMNS:
        # A null may stand in the first row of a table whose columns are declared.
        if name in strings or (table.declared and name in row and row[name] is None):
            return name
    if not table.declared:
        return _TEXT_COLUMNS[0]
    if len(strings) == 1:
        return strings[0]
    raise TextError(
        f"{table.name} has no 'text' column and {len(strings)} columns of strings:"
        f" {_listed(strings)}; name the one to read"
    )


def _listed(names: Iterable[str]) -> str:
    """Column names for an error: the first ones, each cut short."""
    shown = [str(name)[:40] for name in names]
    return ", ".join([*shown[:8], *(["..."] if len(shown) > 8 else [])]) or "-"


def _stored_kind(path: Path, head: bytes) -> Literal["parquet", "arrow"] | None:
    if head.startswith(b"PAR1"):
        return "parquet"
    return "arrow" if head.startswith(b"ARROW1") else _STORED.get(path.suffix.lower())


def _unzipped(path: Path, data: bytes) -> bytes:
    try:
        with gzip.open(BytesIO(data)) as file:
            found = file.read(_UNPACKED + 1)
    except (OSError, EOFError, zlib.error):
        raise TextError(f"{str(path)!r} is damaged: its gzip data cannot be unpacked") from None
    if len(found) > _UNPACKED:
        raise TextError(f"{str(path)!r} unpacks to more than 2 GiB; give a part of it")
    return found


def _unread(suffix: str, data: bytes) -> str | None:
    """What a file is that is neither prose nor rows; None for all others."""
    for magic, what in _MAGIC.items():
        if data.startswith(magic):
            return what
    if data.startswith(b"BZh") and data[4:10] == b"1AY&SY":
        return "compressed by bzip2"
    if data.startswith((b"PAR1", b"ARROW1")):
        return "parquet or Arrow inside .gz"
    return f"a {suffix} file" if suffix in _UNREAD else None


def _decoded(path: Path, data: bytes) -> str:
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and b"\0" in data[:_HEAD]:
        raise TextError(
            f"{str(path)!r} holds NUL bytes, so it is not text, or UTF-16 without its byte order"
            " mark; convert it to UTF-8 first"
        )
    try:
        content = data.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
        raise TextError(
            f"{str(path)!r} is not {name} text (byte {error.start}); convert it first"
        ) from None
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _holds_json(content: str) -> bool:
    """Whether a text of any name is JSON: one document, or a first line that is an object."""
    start = content[:_HEAD].lstrip()
    if not start.startswith(("{", "[")):
        return False
    first = content.lstrip().split("\n", 1)[0]
    return isinstance(_loaded(first), dict) or isinstance(_loaded(content), dict | list)


def _json_rows(
    path: Path, content: str
) -> tuple[Iterator[tuple[int, Row]], Literal["line", "row"]]:
    """Rows of one JSON array, of one object, or of lines with an object each."""
    whole = _loaded(content)
    if isinstance(whole, list):
        return enumerate(whole, 1), "row"
    if isinstance(whole, dict) and "\n" in content.strip():
        return enumerate([whole], 1), "row"
    if content.lstrip().startswith("["):
        raise TextError(f"{str(path)!r} is not JSON: its array is damaged or ends too early")
    return _json_lines(path, content), "line"


def _json_lines(path: Path, content: str) -> Iterator[tuple[int, Row]]:
    # Only "\n" ends a line: other line ends of Unicode may stand inside JSON strings.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        row = _loaded(line)
        if row is _NO_JSON:
            raise TextError(
                f"line {number} of {str(path)!r} is not JSON; a .jsonl file has one object per line"
            )
        yield number, row


_NO_JSON = object()


def _loaded(text: str) -> Any:
    """What a JSON text holds; `_NO_JSON` where it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NO_JSON


def _delimited_rows(path: Path, content: str, delimiter: str | None) -> Iterator[tuple[int, Row]]:
    """Rows of CSV; no delimiter: the one of `,`, `;`, tab and `|` that the header has most of."""
    header = content.lstrip("\n").split("\n", 1)[0]
    delimiter = delimiter or max(",;\t|", key=header.count)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        lines = csv.reader(StringIO(content, newline=""), delimiter=delimiter, strict=True)
        rows = [(lines.line_num, fields) for fields in lines if fields]
    except csv.Error as error:
        raise TextError(f"{str(path)!r} is not CSV: {error} (line {lines.line_num})") from None
    finally:
        csv.field_size_limit(limit)
    names = rows[0][1] if rows else []
    for number, (line, fields) in enumerate(rows[1:], 1):
        if len(fields) != len(names):
            raise TextError(
                f"line {line} of {str(path)!r} has {len(fields)} fields and its header"
                f" {len(names)}: {_listed(names)}"
            )
        yield number, dict(zip(names, fields, strict=True))


def _stored_rows(path: Path, kind: Literal["parquet", "arrow"]) -> Iterator[tuple[int, Row]]:
    import datasets  # type: ignore[import-untyped]

    try:
        # `datasets` takes names for patterns.
        files = glob.escape(str(path.absolute()))
        stored = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        yield from enumerate(stored, 1)
    except Exception as error:  # pyarrow and `datasets` raise many types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TextError(f"{str(path)!r} cannot be read as {kind}: {reason[0][:300]}") from error
