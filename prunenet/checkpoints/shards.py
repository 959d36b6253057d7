"""Safetensors files (https://github.com/huggingface/safetensors, "Format") read and written a slab
at a time.

The library maps a whole file when it reads and takes a whole dictionary of tensors when it writes.
Here a tensor is read by plain file reads of a few of its rows, and written as its rows come, so
that memory holds one slab whatever a tensor's or a file's size. What is written equals the
library's output byte for byte: the same order of tensors, the same padding.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from prunenet.runtime.files import CheckpointError
from prunenet.runtime.floats import dtype_name
from prunenet.runtime.json_files import Count, JsonError, convert, parse_json

SLAB = 32 * 2**20
"""Bytes of a tensor that are read at once."""
_HEADER = 100_000_000  # the format's own bound
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
}
_DTYPES |= {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
# packed forms, which are read by transformers alone
_DTYPES |= {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The library writes tensors by falling dtype, in the order of its own enumeration.
_ORDER = "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 BOOL"
_RANK = {name: rank for rank, name in enumerate(_ORDER.split(" "))}


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; one pass over it, no copy of it."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(math.isfinite(float(bound)) for bound in torch.aminmax(tensor))


def not_finite(where: str, name: str, dtype: torch.dtype) -> str:
    """The sentence on a tensor that `is_finite` refuses."""
    kind = dtype_name(dtype)
    hint = "" if dtype in (torch.float32, torch.float64) else ", or load it in float32"
    return (
        f"tensor {name} of {where} holds numbers that are not finite in {kind}; fetch it"
        f" again{hint}"
    )


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, of which rows can be read: `stored[10:20]` is a tensor of 10 rows, a
    copy.

    Attributes:
        path: of the file.
        name: in the file.
        shape: of the whole tensor. A row is what has the same first index; a tensor without
            dimensions is one row.
        stored: dtype in the file.
        dtype: of what is handed out, rounded where it is another.
        offset: of the first byte in the file.
        device: where rows are put.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    stored: torch.dtype
    dtype: torch.dtype
    offset: int
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 1

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(len(self))
        values = torch.empty((max(stop - start, 0), *self.shape[1:]), dtype=self.stored)
        left = values.view(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self._row * self.stored.itemsize)
            while left:
                got = file.readinto(left)
                if not got:
                    raise CheckpointError(
                        f"{self.path} is damaged (it ends inside tensor {self.name}); fetch it"
                        " again"
                    )
                left = left[got:]
        values = values.to(self.dtype)
        if not is_finite(values):
            raise CheckpointError(not_finite(str(self.path), self.name, self.dtype))
        return values.to(self.device)

    @property
    def _row(self) -> int:
        return math.prod(self.shape[1:])

    def whole(self) -> Tensor:
        """All of it."""
        return self[:].reshape(self.shape)

    def slabs(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows), first to last: at most `SLAB` bytes at once, but no less than a
        row.
        """
        step = max(SLAB // max(self._row * self.stored.itemsize, 1), 1)
        for start in range(0, len(self), step):
            yield start, self[start : start + step]


class _Entry(TypedDict):
    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads the header of a file, by plain reads: nothing is mapped into memory.

    Returns:
        The tensors of the file, by name.

    Raises:
        CheckpointError: not a safetensors file, one that is cut short, or with a dtype that is no
            plain number.
    """
    try:
        start, entries, size = _entries(path)
    except (JsonError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path} is damaged ({reason}); fetch it again") from error
    found, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"tensor {name[:80]} of {path} is stored as {entry['dtype'][:20]}; give the"
                " unquantised checkpoint"
            )
        first, last = entry["data_offsets"]
        if first != end or last - first != math.prod(entry["shape"]) * dtype.itemsize:
            raise CheckpointError(
                f"{path} is damaged (tensor {name[:80]} does not fill its place); fetch it again"
            )
        end, shape = last, tuple(entry["shape"])
        found[name] = StoredTensor(
            path, name, shape, dtype, dtype, start + first, torch.device("cpu")
        )
    if start + end != size:
        raise CheckpointError(
            f"{path} is damaged ({size - start:,} bytes of tensors, its header says {end:,});"
            " fetch it again"
        )
    return found


def _entries(path: Path) -> tuple[int, dict[str, _Entry], int]:
    """(first byte behind the header, its entries, size of the file)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER):
            raise JsonError("it is no safetensors file")
        header = parse_json(file.read(length), dict)
    header.pop("__metadata__", None)
    entries = {name: convert(entry, _Entry, name[:80]) for name, entry in header.items()}
    return 8 + length, entries, size


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], rows: Callable[[str], Iterable[Tensor]]
) -> str:
    """Writes a safetensors file, the bytes of which are those of `safetensors.torch.save_file(...,
    {"format": "pt"})`.

    Args:
        path: of the file.
        tensors: name to any tensor of the right shape and dtype, as on the meta device.
        rows: given a name, the tensor's rows in pieces, first to last.

    Returns:
        sha256 of the file as it should be, taken on the way to the disk.

    Raises:
        ValueError: pieces that do not add up to their tensor.
        OSError: the disk is full or refuses.
    """
    order = sorted(tensors, key=lambda name: (_RANK[_NAMES[tensors[name].dtype]], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        entry = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb", buffering=0) as file:

        def write(content: memoryview) -> int:
            digest.update(content)
            left = content
            while left:
                left = left[file.write(left) :]
            return len(content)

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            pieces = (
                piece.cpu().contiguous().view(-1).view(torch.uint8).numpy() for piece in rows(name)
            )
            written = sum([write(piece.data) for piece in pieces])
            if written != tensors[name].nbytes:
                raise ValueError(
                    f"tensor {name} takes {tensors[name].nbytes} bytes, its pieces gave {written}"
                )
    return digest.hexdigest()
