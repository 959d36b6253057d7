"""Finds a checkpoint, in a folder or on the hub, and says in one sentence what is wrong with it
before its weights are read.

Only safetensors and JSON are read; no code of a checkpoint's folder is ever run.
"""

from __future__ import annotations

import glob
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from prunenet.checkpoints.contents import (
    ADAPTER,
    CONFIG,
    GENERATION,
    INDEX,
    MASKS,
    RECORD,
    SINGLE,
    TOKENIZER,
    ModelFiles,
    config_fields,
    model_files,
    weight_names,
)
from prunenet.checkpoints.gguf import checkpoint_of, gguf_file
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.runtime.files import CheckpointError

DTYPES = ("auto", "float32", "bfloat16", "float16")
_OURS = (RECORD, MASKS, "README.md")
# torch has no class for these on the CPU
_NO_MEMORY = ("can't allocate memory", "unable to mmap", "not enough memory")


def open_checkpoint(source: str | Path, dtype: str = "auto") -> ModelFiles:
    """The files of a checkpoint, complete and of a supported family; a hub id's are fetched first.

    Args:
        source: folder with `config.json` and safetensors weights, or `owner/name` on the hub.
        dtype: one of `DTYPES`, checked before anything else.

    Raises:
        UnsupportedArchitecture: the model's type has no row in the table; checked before any weight
            is read or fetched.
        CheckpointError: nothing there, hub unreachable, quantised, or damaged or missing weights.
        ValueError: unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    config_fields(find_folder(source, CONFIG))
    folder = find_folder(source, CONFIG, GENERATION, INDEX, SINGLE, ADAPTER, *TOKENIZER, *_OURS)
    if local_folder(source) is None and not (folder / SINGLE).is_file():
        # shards may have any name: their index says which
        names = weight_names(folder, missing=True)
        folder = find_folder(source, *map(glob.escape, names))
    return model_files(folder)


def stored_as(source: str | Path) -> str | None:
    """The packed form of a checkpoint that is dequantised when it is loaded: "mxfp4", "fp8" or
    "GGUF"; None where its weights are plain numbers.
    """
    if gguf_file(Path(source).expanduser()) is not None:
        return "GGUF"
    fields = config_fields(find_folder(source, CONFIG))
    return (fields.get("quantization_config") or {}).get("quant_method")


def source_name(source: str | Path) -> str:
    """A folder or hub id as a text.

    Raises:
        TypeError: it is something else, such as a model that is loaded.
    """
    if not isinstance(source, str | Path):
        raise TypeError(
            f"a model is given by its folder or hub id, got {type(source).__name__}; save it"
            " (`save_pretrained`) and give the folder"
        )
    return str(source)


def check_loaded(**given: object) -> None:
    """Raises TypeError where the name of a model or a policy was given in place of it."""
    loads = {"model": "prunenet.load_model", "policy": "prunenet.Policy.from_pretrained"}
    for what, one in given.items():
        if isinstance(one, str | Path):
            raise TypeError(
                f"`{what}` is a {what} that is loaded, got a name; give {loads[what]}({str(one)!r})"
            )


def local_folder(source: str | Path) -> Path | None:
    """The folder that a source names, `~` expanded; None for a hub id."""
    path = Path(source).expanduser()
    return path if path.is_dir() else None


def find_folder(source: str | Path, *patterns: str) -> Path:
    """The local folder of a source; files of a hub id that match the patterns are fetched, or found
    in the cache.

    Raises:
        CheckpointError: there is none.
    """
    folder = local_folder(source)
    file = gguf_file(Path(source).expanduser())
    if file is not None:
        return checkpoint_of(file)
    if folder is not None:
        return folder
    if Path(source).expanduser().exists():
        raise CheckpointError(
            f"{source} is a file; give the folder that holds config.json and model.safetensors"
        )
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"folder {source} does not exist; check the path")
    try:
        return Path(
            snapshot_download(source, allow_patterns=list(patterns), ignore_patterns=["*/*"])
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        # Of a listing that names more than was fetched, once and on purpose: what is there may do.
        if (partial := getattr(error, "snapshot_path", None)) is not None:
            return Path(partial)
        raise CheckpointError(
            f"{source!r} is neither a folder here nor available from the Hugging Face hub"
            f" ({in_short(error)}); check the spelling and the connection, or give the path of a"
            " downloaded checkpoint"
        ) from error


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Turns whatever transformers raises about a folder into one sentence; it promises no types.

    Raises:
        CheckpointError: instead of any other error but a lack of memory.
    """
    try:
        yield
    except (CheckpointError, UnsupportedArchitecture, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if any(text in str(error) for text in _NO_MEMORY):
            raise
        raise CheckpointError(f"{folder} cannot be loaded: {in_short(error)}") from error


def check_device(device: str) -> None:
    """Raises CheckpointError for a device that this machine has not, or that holds no numbers."""
    try:
        found = torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"weights cannot be put on device {device!r}: {in_short(error)}"
        ) from error
    if found.is_meta:
        raise CheckpointError(
            "weights cannot be put on device 'meta', which holds shapes alone: give cpu or cuda"
        )


def in_short(error: BaseException) -> str:
    """The message on one line; libraries write paragraphs, and of a missing key its name alone."""
    said = f"it knows no {error}" if isinstance(error, KeyError) else str(error)
    return textwrap.shorten(said, 240, placeholder=" ...").rstrip(".: ") or type(error).__name__
