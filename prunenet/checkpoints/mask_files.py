"""Reads and writes `prunenet_masks.safetensors`: which channels and which groups of heads of the
dense model a pruned one has kept.

A mask is stored by the indices that it keeps, int32, rising: `layers.<number>.keep` for FFN
channels and `layers.<number>.groups` for attention heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from prunenet.runtime.files import CheckpointError
from prunenet.runtime.own_files import ContentError, check_layout, packed, unpacked

Counts = Sequence[int]


def write_masks(
    path: Path,
    keep: Sequence[Bool[Tensor, " _"]],
    groups: Sequence[Bool[Tensor, " _"]] | None = None,
) -> None:
    """Writes the masks of all layers, first to last; `groups` None where heads are whole.

    Raises:
        OSError: the disk is full or refuses.
    """
    masks = {_name(index, "keep"): mask for index, mask in enumerate(keep)}
    masks |= {_name(index, "groups"): mask for index, mask in enumerate(groups or ())}
    path.write_bytes(packed({k: mask.nonzero().flatten().int() for k, mask in masks.items()}))


def read_masks(
    path: Path,
    channels: tuple[Counts, Counts],
    groups: tuple[Counts, Counts] | None = None,
) -> tuple[list[Bool[Tensor, " _"]], list[Bool[Tensor, " _"]] | None]:
    """The masks of all layers, checked against what the provenance says.

    Args:
        path: of the file.
        channels: (FFN channels of each layer before the cut, after it).
        groups: the same of attention heads; None where heads are whole.

    Returns:
        (masks over channels, masks over groups of heads or None).

    Raises:
        CheckpointError: the file is missing or damaged, or does not fit.
    """
    said = {"keep": channels} | ({} if groups is None else {"groups": groups})
    places = {
        _name(index, what): (before, after)
        for what, (lengths, counts) in said.items()
        for index, (before, after) in enumerate(zip(lengths, counts, strict=True))
    }
    try:
        indices, _ = unpacked(path)
        check_layout(
            indices, {name: (torch.int32, (after,)) for name, (_, after) in places.items()}
        )
        masks = {name: _mask(name, indices[name], n) for name, (n, _) in places.items()}
    except (FileNotFoundError, ContentError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise CheckpointError(
            f"{path} is missing or damaged: {reason}; copy it anew, or prune again"
        ) from None
    kept, left = (
        [masks[_name(index, what)] for index in range(len(said[what][0]))] if what in said else None
        for what in ("keep", "groups")
    )
    assert kept is not None
    return kept, left


def _name(index: int, what: str) -> str:
    return f"layers.{index}.{what}"


def _mask(name: str, indices: Tensor, length: int) -> Bool[Tensor, " _"]:
    if not bool((indices.diff() > 0).all()):
        raise ContentError(f"the indices in {name} do not rise")
    if len(indices) and not (int(indices[0]) >= 0 and int(indices[-1]) < length):
        raise ContentError(f"an index in {name} is not from 0 to {length - 1}")
    mask = torch.zeros(length, dtype=torch.bool)
    mask[indices.long()] = True
    return mask
