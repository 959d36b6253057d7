"""Text, and its token windows, from a dataset id, a local file, or the standard library (no
download).

Calibration text and test text are different types, so that nothing is tuned on what it is tested
on: functions that calibrate take a `CalibrationText` and refuse a `TestText`, functions that score
take a `TestText`.

Sources, the same words everywhere (`--text` on the command line):

* `builtin`: the standard library's `pydoc_data.topics`, English technical prose, 180 000 characters
  in each half. Topics in name order; a paragraph that an earlier topic already has is dropped
  (topics quote each other), so the halves share no paragraph. Test text is the topics of even rank,
  calibration text those of odd rank. The wording follows the Python release, so `name` carries it:
  compare numbers of one release only.
* a local file: `.jsonl` (one object with a "text" column per line) or plain text, taken as it is
  (so WikiText's own `wiki.test.raw` has no blank lines between its rows, and scores a little worse
  than the dataset).
* a dataset, `id[:config[:split]]`, for example `Salesforce/wikitext:wikitext-2-raw-v1`; the split
  defaults to `test` for test text and `train` for calibration text. A folder of data files works in
  place of the id.

WikiText protocol (METHODS.md section 10): rows of a dataset joined by blank lines, tokenised once,
non-overlapping windows.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Rows are read until this many characters: WikiText-2's training split (11 million) fits whole, a
# web crawl does not.
MAX_CHARACTERS = 50_000_000
_TEXT_COLUMNS = ("text", "content", "document", "sentence")
_FILE_SUFFIXES = (".txt", ".raw", ".tokens", ".md", ".json", ".jsonl")


class TextError(ValueError):
    """A text cannot be had, or is too short."""


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Text that a method may look at.

    Attributes:
        name: where it came from.
        content: the whole text.
    """

    name: str
    content: str


@dataclass(frozen=True, slots=True)
class TestText:
    """Text that is scored, and that no method may look at.

    Attributes:
        name: where it came from.
        content: the whole text.
    """

    __test__: ClassVar[bool] = False  # the name starts like a pytest class

    name: str
    content: str


Text = TypeVar("Text", CalibrationText, TestText)


def load_text(source: str | Path, kind: type[Text]) -> Text:
    """Reads a text.

    Args:
        source: `builtin`, a file, or `id[:config[:split]]`; see the module's docstring.
        kind: `CalibrationText` or `TestText`: what the text will be used for.

    Raises:
        TextError: no such file or dataset, nothing in it, not readable as text, or a test split
            asked for calibration.
    """
    name = str(source)
    if name == "builtin":
        half = "test" if kind is TestText else "calibration"
        release = f"builtin {half} half (Python {platform.python_version()})"
        return kind(release, builtin_content(test=kind is TestText))
    path = Path(source).expanduser()
    if path.is_file():
        content = _file_content(path)
    elif _looks_like_a_file(name) and not _split_source(name)[0].is_dir():
        raise TextError(
            f"text file {name!r} does not exist; give a file, a dataset id or 'builtin'"
        )
    else:
        content = _dataset_content(name, test=kind is TestText)
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


def tokenise(
    tokenizer: PreTrainedTokenizerBase, text: CalibrationText | TestText
) -> Int[Tensor, " tokens"]:
    """Token ids of the whole text, tokenised once, with the special tokens that the tokenizer adds
    by default (often none).
    """
    ids = tokenizer(text.content, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def token_windows(
    ids: Int[Tensor, " tokens"], window: int, stride: int | None = None
) -> Iterator[tuple[Int[Tensor, " window"], int]]:
    """Cuts a token sequence into windows for scoring; each token is scored at most once.

    A window's last `scored` tokens are scored, the ones before are context. Its first token has no
    context and is never scored. Tokens after the last whole window are left out.

    Args:
        ids: (tokens,).
        window: tokens in a window, at least 2.
        stride: tokens between the starts of two windows, in [1, window]; default `window`: no
            overlap.

    Yields:
        ((window,) view on `ids`, number of scored tokens): `window - 1` for the first, then
        min(stride, window - 1).

    Raises:
        ValueError: window or stride out of range.
        TextError: fewer tokens than one window.
    """
    stride = window if stride is None else stride
    if window < 2:
        raise ValueError(
            f"a window has at least 2 tokens (one is context for the next), got {window}"
        )
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride must be in [1, {window}] for a window of {window} tokens, got {stride}"
        )
    if len(ids) < window:
        raise TextError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}; give more text or"
            " a smaller --window"
        )
    starts = range(0, len(ids) - window + 1, stride)
    return (
        (ids[start : start + window], window - 1 if start == 0 else min(stride, window - 1))
        for start in starts
    )


def calibration_blocks(
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    *,
    count: int,
    window: int,
    generator: torch.Generator,
) -> Int[Tensor, "count window"]:
    """Draws distinct, non-overlapping windows of a calibration text, uniformly.

    Args:
        tokenizer: of the model to calibrate.
        text: never a `TestText`.
        count: windows to draw, at least 1.
        window: tokens in each, at least 2.
        generator: makes the draw reproducible (on the CPU).

    Raises:
        TypeError: the text is not a `CalibrationText`.
        TextError: the text has fewer than `count` windows.
    """
    if not isinstance(text, CalibrationText):
        raise TypeError(
            f"calibration needs a CalibrationText, got a {type(text).__name__}: test text is only"
            " ever scored"
        )
    ids = tokenise(tokenizer, text)
    windows = [part for part, _ in token_windows(ids, window)] if len(ids) >= window else []
    if len(windows) < count:
        raise TextError(
            f"text {text.name!r} has {len(windows)} windows of {window} tokens, fewer than the"
            f" {count} asked for; give more text, fewer windows or a smaller window"
        )
    chosen = torch.randperm(len(windows), generator=generator)[:count]
    return torch.stack([windows[i] for i in chosen.tolist()])


def _looks_like_a_file(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix in _FILE_SUFFIXES


def _file_content(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{str(path)!r} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    except OSError as error:
        raise TextError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    return _join_rows(_json_rows(path, content)) if path.suffix == ".jsonl" else content


def _json_rows(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise TextError(
                f"line {number} of {str(path)!r} is not JSON; a .jsonl file has one object per line"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise TextError(
                f'line {number} of {str(path)!r} has no "text" column with a string in it'
            )
        yield row["text"]


def _join_rows(rows: Iterable[str]) -> str:
    return "\n\n".join(row if row.strip() else "" for row in rows)


def _split_source(source: str) -> tuple[Path, str, str]:
    """(dataset id or folder, configuration, split); the last two may be empty. A folder may have a
    colon in its name.
    """
    whole = Path(source).expanduser()
    if whole.is_dir():
        return whole, "", ""
    name, config, split, *_ = (*source.split(":"), "", "")
    return Path(name).expanduser(), config, split


def _dataset_content(source: str, *, test: bool) -> str:
    folder, config, split = _split_source(source)
    split = split or ("test" if test else "train")
    if not test and split.startswith("test"):
        raise TextError(
            f"{source!r} is a test split, and calibration must not see test text; ask for 'train'"
            " or 'validation'"
        )
    rows: list[str] = []
    characters = 0
    for row in _dataset_rows(folder.as_posix(), config or None, split):
        rows.append(row)
        characters += len(row)
        if characters >= MAX_CHARACTERS:
            break
    return _join_rows(rows)


def _dataset_rows(name: str, config: str | None, split: str) -> Iterator[str]:
    import datasets  # type: ignore[import-untyped]
    from huggingface_hub import is_offline_mode

    local = Path(name).is_dir()
    if not local and not is_offline_mode():
        _check_reachable(name)
    try:
        # Streaming reads only the rows that are used; offline, the copy that `datasets` keeps in
        # its cache is all there is.
        dataset = datasets.load_dataset(
            name, config, split=split, streaming=local or not is_offline_mode()
        )
        column: str | None = None
        for row in dataset:
            column = column or _text_column(name, row)
            yield row[column]
    except TextError:
        raise
    except Exception as error:
        # `datasets` raises many types; each means that the text cannot be had
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TextError(
            f"dataset {name!r} (configuration {config}, split {split!r}) cannot be loaded:"
            f" {reason[0]}"
        ) from error


def _check_reachable(name: str) -> None:
    """One short request first: `datasets` itself retries for 23 seconds when there is no
    network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=5)
    except (RepositoryNotFoundError, HFValidationError):
        raise TextError(
            f"no file and no public dataset of the Hugging Face hub is called {name!r}; check the"
            " spelling, or give a local file or 'builtin'"
        ) from None
    except Exception as error:
        raise TextError(
            f"dataset {name!r} cannot be fetched: the Hugging Face hub is not reachable; give a"
            " local file or 'builtin', or set HF_HUB_OFFLINE=1 to use a copy in the cache"
        ) from error


def _text_column(name: str, row: dict[str, Any]) -> str:
    columns = [column for column, value in row.items() if isinstance(value, str)]
    preferred = [column for column in _TEXT_COLUMNS if column in columns]
    if preferred:
        return preferred[0]
    if len(columns) == 1:
        return columns[0]
    raise TextError(
        f"dataset {name!r} has no 'text' column and {len(columns)} columns of strings:"
        f" {', '.join(columns) or '-'}"
    )
