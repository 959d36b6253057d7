"""Reads texts from a dataset: an id on the Hugging Face hub, a folder of data files, or a folder
that `datasets.save_to_disk` wrote.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunenet.runtime.paths import expanded
from prunenet.text.formats import Row, Table, TextError, column_texts

_MOST_FILES = 20_000  # of a dataset in a folder


def dataset_texts(source: str, *, test: bool, column: str | None) -> Iterator[str]:
    """The texts of a dataset, row by row.

    Args:
        source: `id[:config[:split]]`, with a folder in place of the id if need be.
        test: whether the text will be scored: the split defaults to `test`, else to `train`.
        column: see `prunenet.text.formats.column_texts`.

    Raises:
        TextError: no such dataset, split or column, or a test split asked for calibration.
    """
    place, config, split = split_source(source)
    if not test and split.startswith("test"):
        raise _seen(source)
    asked = split or ("test" if test else "train")
    if place.is_dir() and (saved := _saved(place)):
        rows = _saved_rows(place, saved, split, asked, test=test)
    else:
        _check_size(place)
        rows = _rows(place.as_posix(), config or None, asked)
    table = Table(f"dataset {place.as_posix()!r}", enumerate(rows, 1))
    return column_texts(table, column)


def split_source(source: str) -> tuple[Path, str, str]:
    """(dataset id or folder, configuration, split); the last two may be empty. A folder may have a
    colon in its name.
    """
    whole = expanded(source)
    if whole.is_dir():
        return whole, "", ""
    name, config, split, *_ = (*source.split(":"), "", "")
    return expanded(name), config, split


def _seen(source: str) -> TextError:
    return TextError(
        f"{source!r} is a test split, and calibration must not see test text; ask for 'train' or"
        " 'validation'"
    )


def _saved(folder: Path) -> str | None:
    """The file that marks what `save_to_disk` wrote: several splits or one dataset; None if it did
    not write the folder.
    """
    return next(
        (name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()), None
    )


def _saved_rows(folder: Path, mark: str, split: str, asked: str, *, test: bool) -> Iterator[Row]:
    """Rows of one split. `split` is empty where none was named, and a folder of one dataset is
    then taken whole.
    """
    import datasets  # type: ignore[import-untyped]

    if mark == "dataset_dict.json":
        found = sorted(path.name for path in folder.iterdir() if (path / "state.json").is_file())
        if asked not in found:
            raise TextError(
                f"dataset {str(folder)!r} has no split {asked!r}; it has {', '.join(found) or '-'}"
            )
        folder = folder / asked
    _check_files(folder)
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and `datasets` raise many types
        raise TextError(f"dataset {str(folder)!r} cannot be loaded: {_reason(error)}") from error
    known = str(dataset.split or "")
    if mark == "state.json" and split and split != known:
        raise TextError(
            f"dataset {str(folder)!r} is one split, {known or 'without a name'}, and not {split!r};"
            " leave the split out"
        )
    if not test and known.startswith("test"):
        raise _seen(str(folder))
    yield from dataset


def _check_files(folder: Path) -> None:
    """Raises TextError where the folder's index names files outside it."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
        inside = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        inside = False
    if not inside:
        raise TextError(
            f"dataset {str(folder)!r} is damaged: its state.json does not name the files beside it"
        )


def _check_size(place: Path) -> None:
    """Raises TextError for a folder such as `/`, which `datasets` would search for hours."""
    many = 0
    for _, _, files in os.walk(place):  # nothing where it is no folder
        many += len(files)
        if many > _MOST_FILES:
            raise TextError(
                f"folder {str(place)!r} holds more than {_MOST_FILES:,} files; give the folder of"
                " the dataset's files alone, or one file"
            )


def _rows(name: str, config: str | None, split: str) -> Iterator[Row]:
    import datasets
    from huggingface_hub import is_offline_mode

    local = Path(name).is_dir()
    if not local and not is_offline_mode():
        _check_reachable(name)
    try:
        # Streaming reads only the rows that are used; offline, the copy that `datasets` keeps in
        # its cache is all there is.
        yield from datasets.load_dataset(
            name, config, split=split, streaming=local or not is_offline_mode()
        )
    except Exception as error:  # `datasets` raises many types; each means that there is no text
        raise TextError(
            f"dataset {name!r} (configuration {config}, split {split!r}) cannot be loaded:"
            f" {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    lines: list[Any] = str(error).strip().splitlines() or [type(error).__name__]
    return str(lines[0])[:300]


def _check_reachable(name: str) -> None:
    """Asks the hub once, with a short time-out: `datasets` itself retries for 23 seconds without a
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
