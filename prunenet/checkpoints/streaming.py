"""Checkpoints that are larger than memory: weights are read a layer at a time, a pruned checkpoint
is written as it is read.

Everything but the weights is the in-memory way's: a model on the meta device says names, shapes,
ties and configuration, and `surgery.narrowed` cuts it. Then each tensor of the narrow one is
written from the rows and columns of the dense one in the file, a slab at a time. The bytes are
those of `checkpoint.save_pruned`, but that files are at most `SHARD` large.

What differs: there is no model to compute logits with, so what is verified is that every written
file reads back with the hash that was taken on its way to the disk, and that the folder opens as a
checkpoint with all tensors of the narrow model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from prunenet.checkpoints.companions import source_folder, write_companions
from prunenet.checkpoints.offload import SHARD, write_model
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.save import bytes_to_write, write_provenance
from prunenet.checkpoints.shards import StoredTensor
from prunenet.checkpoints.skeleton import skeleton_of
from prunenet.checkpoints.sources import check_device, local_folder, open_checkpoint
from prunenet.models.anatomy import FFN, Anatomy
from prunenet.models.surgery import narrowed
from prunenet.runtime.files import CheckpointError, new_folder


@dataclass(frozen=True, slots=True)
class StreamedCheckpoint:
    """A checkpoint on disk, of which one layer's weights at a time are held in memory;
    `prunenet.models.layers.Streamed`.

    Attributes:
        source: folder or hub id, as it was given.
        skeleton: the model on the meta device, in eval mode, with the configuration of the
            checkpoint.
        stored: where each tensor of the skeleton's state lies, by its name there; tied tensors by
            every name.
    """

    source: str
    skeleton: PreTrainedModel
    stored: dict[str, StoredTensor]

    @classmethod
    def open(
        cls, source: str | Path, *, dtype: str = "auto", device: str = "cpu"
    ) -> StreamedCheckpoint:
        """Reads the configuration and the files' headers, no weights.

        Args:
            source: local folder (symbolic links, as in the hub's cache, are followed) or hub id.
            dtype: what weights are rounded to, as for `checkpoint.load_model`; `auto` is the stored
                one.
            device: where one layer's weights are put.

        Raises:
            UnsupportedArchitecture, CheckpointError, ValueError: as `checkpoint.load_model`.
        """
        files = open_checkpoint(source, dtype)
        check_device(device)
        skeleton = skeleton_of(files, dtype)
        if skeleton.converted:
            raise CheckpointError(
                f"{files.folder} stores {skeleton.converted[0]} in a form that is converted when"
                " it is loaded, and cannot be streamed"
            )
        if local_folder(source) is None:  # what provenance records
            config = skeleton.model.config
            config._name_or_path, config._commit_hash = str(source), files.folder.name
        where = torch.device(device)
        stored = skeleton.stored.items()
        placed = {name: replace(tensor, device=where) for name, tensor in stored}
        return cls(str(source), skeleton.model, placed)

    def ffn(self, index: int) -> FFN:
        """The FFN of one layer, a copy on the checkpoint's device.

        Raises:
            UnsupportedArchitecture: as `prunenet.models.anatomy.Anatomy.of`.
            CheckpointError: the file ends where it should not.
        """
        layer = Anatomy.of(self.skeleton).layers[index]
        row = layer.architecture
        empty: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for path in (*row.input_linears, row.down, row.attention_out, *row.norms):
                for module, name, parameter in _parameters(layer.module, path):
                    empty.append((module, name, parameter))
                    tensor = self.stored[f"{layer.path}.{path}.{name}"].whole()
                    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
            return layer.read()
        finally:
            for module, name, parameter in empty:
                setattr(module, name, parameter)

    def embeddings(self) -> tuple[StoredTensor, StoredTensor | None]:
        """(input embeddings, output embeddings); the second is None where it is the first."""
        names = {id(parameter): name for name, parameter in self.skeleton.named_parameters()}
        table, head = self.skeleton.get_input_embeddings(), self.skeleton.get_output_embeddings()  # type: ignore[no-untyped-call]
        rows = table.get_parameter("weight")
        columns = None if head is None else head.get_parameter("weight")
        return self.stored[names[id(rows)]], (
            None if columns is None or columns is rows else self.stored[names[id(columns)]]
        )


def save_streamed(
    source: StreamedCheckpoint,
    out: str | Path,
    keep: Sequence[Bool[Tensor, " _"]],
    describe: Callable[[PreTrainedModel], Provenance],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard: int | str = SHARD,
    progress: Callable[[int, int], None] | None = None,
) -> Provenance:
    """Writes the pruned checkpoint from the dense one on disk; the folder appears complete and
    verified, or not at all.

    Memory holds one slab of a tensor. See the module for how the result is verified.

    Args:
        source: the dense checkpoint.
        out: folder to create; it may exist if it is empty.
        keep: for each layer, first to last, a mask of length d_ff with at least one channel kept.
        describe: given the narrow model on the meta device, what is to be written to
            `prunenet.json`.
        tokenizer: saved beside the model.
        shard: largest file, in bytes or as "5GB".
        progress: called with (bytes written, bytes in all).

    Returns:
        What was written to `prunenet.json`.

    Raises:
        CheckpointError: `out` exists, the disk is full or refuses, the source is damaged, or what
            was written reads back otherwise.
        ValueError: masks that do not fit the model.
    """
    keep = [mask.cpu() for mask in keep]
    narrow = narrowed(source.skeleton, keep)
    provenance = describe(narrow)
    state = remove_tied_weights_from_state_dict(dict(narrow.state_dict()), narrow)
    cuts = _cuts(source.skeleton, keep)
    total = sum(tensor.nbytes for tensor in state.values())
    done = 0

    def rows(name: str) -> Iterator[Tensor]:
        nonlocal done
        for piece in _cut_rows(source.stored[name], *cuts.get(name, (None, None))):
            yield piece
            done += piece.nbytes
            if progress is not None:
                progress(done, total)

    with new_folder(Path(out), bytes_to_write(narrow, keep)) as folder:
        hashes = write_model(folder, narrow, state, rows, shard=shard)
        write_companions(folder, narrow, tokenizer)
        write_provenance(folder, keep, provenance, source=source_folder(source.skeleton.config))
        _verify(folder, hashes, state)
    return provenance


def _parameters(layer: nn.Module, path: str) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name, parameter) of what stands at a path; nothing where nothing does."""
    try:
        module = layer.get_submodule(path)
    except AttributeError:
        return []
    return [(module, name, parameter) for name, parameter in module.named_parameters(recurse=False)]


def _cuts(
    skeleton: PreTrainedModel, keep: Sequence[Tensor]
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """(mask of rows, numbers of columns) that stay of each tensor that is not copied whole."""
    cuts: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for layer, mask in zip(Anatomy.of(skeleton).layers, keep, strict=True):
        kept = mask.nonzero().flatten()
        for where in layer.channels():
            if where.axis == 1:
                cuts[f"{layer.path}.{where.path}.weight"] = (None, where.entries(kept, len(mask)))
                continue
            rows = mask.repeat(where.parts)
            for name, _ in where.linear.named_parameters(recurse=False):
                cuts[f"{layer.path}.{where.path}.{name}"] = (rows, None)
    return cuts


def _cut_rows(
    tensor: StoredTensor, rows: Bool[Tensor, " n"] | None, columns: Int[Tensor, " width"] | None
) -> Iterator[Tensor]:
    """What stays of a tensor, a slab at a time, on the CPU."""
    for start, slab in replace(tensor, device=torch.device("cpu")).slabs():
        if rows is not None:
            slab = slab[rows[start : start + len(slab)]]
        yield slab if columns is None else slab.index_select(1, columns)


def _verify(folder: Path, hashes: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Raises CheckpointError unless every file reads back as it was written and the folder opens as
    the narrow model.
    """
    for name, expected in hashes.items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise CheckpointError(
                    f"{folder.name} was not saved: {name} does not read back as it was written;"
                    " check the disk"
                )
    stored = StreamedCheckpoint.open(folder).stored
    for name, tensor in tensors.items():
        if (stored[name].shape, stored[name].stored) != (tuple(tensor.shape), tensor.dtype):
            raise CheckpointError(
                f"{folder.name} was not saved: tensor {name} has another shape or dtype after a"
                " reload"
            )
