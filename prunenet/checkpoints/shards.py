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

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunenet.runtime.files import CheckpointError

SLAB = 32 * 2**20
"""Bytes of a tensor that are read at once."""
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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
        return values.to(self.device, self.dtype)

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


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; reads the header alone.

    Raises:
        CheckpointError: not a safetensors file, one that is cut short, or with a dtype that is no
            plain number.
    """
    try:
        # checks that the header is sound and that the tensors fill the file
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).strip(".: ") or type(error).__name__
        raise CheckpointError(f"{path} is damaged ({reason}); fetch it again") from error
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in entries.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"tensor {name} of {path} is stored as {entry['dtype']}; give the unquantised"
                " checkpoint"
            )
        offset = 8 + length + entry["data_offsets"][0]
        found[name] = StoredTensor(
            path, name, tuple(entry["shape"]), dtype, dtype, offset, torch.device("cpu")
        )
    return found


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
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
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
