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
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from prunenet.checkpoints.companions import source_folder, write_companions
from prunenet.checkpoints.converted import let_go
from prunenet.checkpoints.offload import SHARD, write_model
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.save import bytes_to_write, write_provenance
from prunenet.checkpoints.skeleton import Stored, skeleton_of
from prunenet.checkpoints.sources import check_device, local_folder, open_checkpoint
from prunenet.models.anatomy import Anatomy
from prunenet.models.groups import FFN, Slice
from prunenet.models.surgery import narrowed
from prunenet.runtime.files import CheckpointError, expanded, new_folder


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
    stored: dict[str, Stored]

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
        if files.quantised:
            raise CheckpointError(
                f"{files.folder} is stored as {files.quantised['quant_method']}, which is"
                " dequantised in memory and cannot be streamed"
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
        return Anatomy.of(self.skeleton).groups[index].read(self.tensor)

    def tensor(self, where: Slice) -> Tensor:
        """The tensor of a slice, a copy on the checkpoint's device."""
        stored = self.stored[where.name]
        return (
            stored.whole() if where.expert is None else stored[where.expert : where.expert + 1][0]
        )

    def embeddings(self) -> tuple[Stored, Stored | None]:
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
        for piece in _cut_rows(source.stored[name], cuts.get(name, [])):
            yield piece
            done += piece.nbytes
            if progress is not None:
                progress(done, total)

    let_go()
    with new_folder(expanded(out), bytes_to_write(narrow, keep)) as folder:
        hashes = write_model(folder, narrow, state, rows, shard=shard)
        write_companions(folder, narrow, tokenizer)
        write_provenance(folder, keep, provenance, source=source_folder(source.skeleton.config))
        _verify(folder, hashes, state)
    let_go()
    return provenance


def _cuts(
    skeleton: PreTrainedModel, keep: Sequence[Tensor]
) -> dict[str, list[tuple[Slice, Tensor]]]:
    """The slices of each tensor that is not copied whole, with the entries that stay of them."""
    cuts: dict[str, list[tuple[Slice, Tensor]]] = {}
    for group, mask in zip(Anatomy.of(skeleton).groups, keep, strict=True):
        kept = mask.nonzero().flatten()
        for where in group.slices:
            found = (where, where.entries(kept, group.width))
            cuts.setdefault(where.name, []).append(found)
    return cuts


def _cut_rows(tensor: Stored, cut: list[tuple[Slice, Tensor]]) -> Iterator[Tensor]:
    """What stays of a tensor, a slab at a time, on the CPU."""
    tensor = replace(tensor, device=torch.device("cpu"))
    if not cut:
        yield from (slab for _, slab in tensor.slabs())
    elif cut[0][0].expert is not None:
        for number, (where, entries) in enumerate(cut):
            yield tensor[number : number + 1].index_select(where.axis, entries)
    else:
        ((where, entries),) = cut
        if where.axis == 0 and where.layout == "interleaved":
            yield tensor.whole().index_select(0, entries)
        for start, slab in tensor.slabs() if where.layout != "interleaved" else ():
            if where.axis == 0:
                inside = entries[(entries >= start) & (entries < start + len(slab))] - start
                yield slab.index_select(0, inside)
            else:
                yield slab.index_select(where.axis, entries)


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
