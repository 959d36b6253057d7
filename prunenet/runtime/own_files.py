"""Reads and writes the safetensors files that only prunenet writes: keep masks, policies, cached
text, training states.

Their header holds the sha256 of their content, so that a changed byte is noticed and not believed.
Files of versions before that have no hash; they are read, and what they hold is checked as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from prunenet.runtime.json_files import SIZE, Count, JsonError, convert, parse_json

_KEY, _HASH = "prunenet", "sha256"
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name of a tensor -> its dtype and shape."""


class _Entry(TypedDict, total=False):
    """Of a header; one alone has none of this: the notes."""

    data_offsets: tuple[Count, Count]


class ContentError(ValueError):
    """What is wrong with a file of our own, as the second half of a sentence."""


def packed(tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a safetensors file with its hash in the header; the same content gives the same
    bytes.

    Args:
        tensors: of any device.
        facts: what JSON holds; written into the header.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    known = dict(facts or {})
    # One entry alone: safetensors writes several in an order that differs from run to run.
    header = json.dumps({_HASH: _digest(content, known), **known})
    return save(content, metadata={_KEY: header})


def unpacked(path: Path, *, hashed: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a file that `packed` gave.

    Args:
        path: of the file.
        hashed: whether a file without a hash, of a version before, is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ContentError: what is wrong with it, as the second half of a sentence.
    """
    if path.exists() and not path.is_file():  # reading a pipe may never end
        raise ContentError("it is not a regular file")
    try:
        _check_size(path)  # before any of it is in memory
        content = path.read_bytes()
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        notes = parse_json(content[8 : 8 + length], dict).get("__metadata__") or {}
        facts = parse_json(notes[_KEY], dict) if _KEY in notes else {}
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ContentError((error.strerror or str(error)).lower()) from None
    except (SafetensorError, JsonError, KeyError, ValueError, RuntimeError) as error:
        # safetensors gives a KeyError for a dtype that torch does not have
        reason = str(error).splitlines() or [type(error).__name__]
        raise ContentError(reason[0][:200]) from None
    written = facts.pop(_HASH, None)
    if written is None and hashed:
        raise ContentError("its header has no sha256")
    if written is not None and written != _digest(tensors, facts):
        raise ContentError("its content is not what was written, by its sha256")
    return tensors, facts


def _check_size(path: Path) -> None:
    """Raises ContentError for a header that is too large, or one that the file's size belies."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, SIZE):
            raise ContentError("it is no safetensors file")
        entries = convert(parse_json(file.read(length), dict), dict[str, _Entry])
    end = max((e.get("data_offsets", (0, 0))[1] for e in entries.values()), default=0)
    if 8 + length + end != size:
        raise ContentError(
            f"it has {size - 8 - length:,} bytes of tensors, and its header says {end:,}"
        )


def check_layout(tensors: Mapping[str, Tensor], expected: Layout) -> None:
    """Raises ContentError unless exactly the expected tensors are there, and finite.

    Args:
        tensors: as read.
        expected: names, dtypes and shapes.
    """
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ContentError(f"it has no {missing[0]}")
    if foreign := sorted(tensors.keys() - expected.keys()):
        raise ContentError(f"it has {foreign[0][:80]!r}, which does not belong there")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if (found.dtype, tuple(found.shape)) != (dtype, shape):
            raise ContentError(
                f"{name} is {_kind(found.dtype, found.shape)}, not {_kind(dtype, shape)}"
            )
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise ContentError(f"{name} has numbers that are not finite")


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """What `check_layout` expects where the same tensors are to come back."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {_kind(tensor.dtype, tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
