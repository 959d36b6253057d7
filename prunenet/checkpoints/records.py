"""Reads what a pruned checkpoint says of itself: its provenance, its masks, and how to load it.

A pruned model that another tool has saved (transformers, peft, TRL) has lost `prunenet.json` and
`prunenet_masks.safetensors`. It is a model all the same, so what can do without them does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from prunenet.checkpoints.companions import source_folder
from prunenet.checkpoints.contents import CONFIG, MASKS, RECORD, config_fields
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.sources import find_folder, in_short
from prunenet.models import modeling
from prunenet.models.layers import Weights, structure
from prunenet.runtime.files import CheckpointError
from prunenet.runtime.json_files import SIZE
from prunenet.runtime.own_files import ContentError, unpacked

_OURS = "prunenet*"
LAYERS = "layers.left"
"""Tensor of the file of masks that numbers the decoder layers that stay."""
_COPY = (
    f"if another tool has saved the pruned model, copy {RECORD} and {MASKS} from the folder that"
    " prunenet wrote"
)


def find_provenance(source: str | Path) -> Provenance | None:
    """Returns the provenance of a checkpoint; None where it has none.

    Args:
        source: folder or hub id.

    Raises:
        CheckpointError: no such checkpoint, or a record that is damaged or of a newer format.
    """
    path = find_folder(source, CONFIG, _OURS) / RECORD
    try:
        if path.stat().st_size > SIZE or not path.is_file():
            raise CheckpointError(f"{path} cannot be read: it is no file of a few kilobytes")
        return Provenance.from_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {in_short(error)}") from error


def load_provenance(source: str | Path) -> Provenance:
    """Returns the provenance of a checkpoint.

    Args:
        source: folder or hub id.

    Raises:
        CheckpointError: as `find_provenance`; or there is none.
    """
    if (found := find_provenance(source)) is None:
        raise CheckpointError(
            f"{source} is not a checkpoint of prunenet: it has no {RECORD}; {_COPY}"
        )
    return found


def find_masks(
    source: str | Path,
) -> tuple[list[Bool[Tensor, " _"]] | None, list[Bool[Tensor, " _"]] | None]:
    """Returns the keep masks of a checkpoint, and those of heads; None where it has none.

    Args:
        source: folder or hub id.

    Raises:
        CheckpointError: as `find_provenance`; or masks that are damaged or of another model.
    """
    made = find_provenance(source)
    if made is None or not (find_folder(source, CONFIG, _OURS) / MASKS).exists():
        return None, None
    return load_masks(source), load_head_masks(source)


def load_masks(source: str | Path) -> list[Bool[Tensor, " _"]]:
    """Returns the keep mask of each layer that stays, over the channels of the base model.

    Args:
        source: folder or hub id.

    Raises:
        CheckpointError: as `load_provenance`; or masks that are missing, damaged or of another
            model.
    """
    made = load_provenance(source)
    return _masks(source, made, made.dense_widths, made.widths, "keep")


def load_head_masks(source: str | Path) -> list[Bool[Tensor, " _"]] | None:
    """Returns the mask of each layer that stays over the base model's groups of heads; None where
    heads are whole.

    Args:
        source: folder or hub id.

    Raises:
        CheckpointError: as `load_masks`.
    """
    made = load_provenance(source)
    if made.dense_groups is None or made.groups is None:
        return None
    return _masks(source, made, made.dense_groups, made.groups, "groups")


def load_layer_mask(source: str | Path) -> Bool[Tensor, " layers"] | None:
    """Returns the mask over the base model's decoder layers; None where all stay.

    Args:
        source: folder or hub id.

    Raises:
        CheckpointError: as `load_masks`.
    """
    made = load_provenance(source)
    if made.layers is None or made.dense_layers is None:
        return None
    mask = torch.zeros(made.dense_layers, dtype=torch.bool)
    with _reading(source) as indices:
        mask[_sound(LAYERS, _entry(indices, LAYERS), len(made.layers), len(mask))] = True
        if mask.nonzero().flatten().tolist() != list(made.layers):
            raise ContentError(f"{LAYERS} is not the {list(made.layers)} of {RECORD}")
    return mask


def recorded_ratio(source: str | Path) -> float | None:
    """Returns the share of FFN channels that a checkpoint was pruned by.

    Args:
        source: folder or hub id.

    Returns:
        0 for a model without provenance; None where it has per-layer widths and no provenance.

    Raises:
        CheckpointError: as `find_provenance`.
    """
    if (made := find_provenance(source)) is not None:
        return made.ratio
    fields = config_fields(find_folder(source, CONFIG))
    return None if modeling.FFN in fields or modeling.HEADS in fields else 0.0


def check_not_padded(source: str | Path, remedy: str) -> None:
    """Refuses a checkpoint whose narrower layers are filled with zero channels.

    Args:
        source: folder or hub id.
        remedy: what those zeros would do, and what to give instead.

    Raises:
        ValueError: it is one, by its provenance.
        CheckpointError: as `find_provenance`.
    """
    made = find_provenance(source)
    if made is not None and (made.padded_to is not None or made.padded_groups is not None):
        raise ValueError(f"{source} is filled up with zeros, {remedy}")


def how_to_load(folder: Path) -> str:
    """Says in one sentence what a loader of a checkpoint needs; for the last lines and the card.

    Args:
        folder: complete.

    Raises:
        CheckpointError: it is no checkpoint.
    """
    fields = config_fields(folder)
    if "residual_widths" in fields:
        return "Load it with trust_remote_code=True: its residual stream is sliced."
    if modeling.FFN not in fields and modeling.HEADS not in fields:
        return "Any loader of this model family reads it."
    what = "widths" if modeling.FFN in fields else "heads"
    stock = "or make a stock checkpoint of it by `prunenet export --pad`"
    if modeling.FFN in fields:
        stock += ", or cut with --widths uniform"
    return f"Load it with trust_remote_code=True, for its layers differ in their {what}; {stock}."


def mask_names(made: Provenance, what: str) -> list[str]:
    """Returns the name of each mask in the file of masks; layers have their numbers in the base
    model.

    Args:
        made: names the layers that stay.
        what: "keep" for channels, "groups" for heads.
    """
    return [f"layers.{number}.{what}" for number in made.layers or range(len(made.widths))]


def _masks(
    source: str | Path, made: Provenance, lengths: Sequence[int], kept: Sequence[int], what: str
) -> list[Bool[Tensor, " _"]]:
    masks = [torch.zeros(length, dtype=torch.bool) for length in lengths]
    with _reading(source) as indices:
        for name, mask, count in zip(mask_names(made, what), masks, kept, strict=True):
            mask[_sound(name, _entry(indices, name), count, len(mask))] = True
    return masks


@contextmanager
def _reading(source: str | Path) -> Iterator[Mapping[str, Tensor]]:
    """The file of masks; says in one sentence what is wrong with it."""
    path = find_folder(source, CONFIG, _OURS) / MASKS
    try:
        yield unpacked(path)[0]
    except (FileNotFoundError, ContentError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise CheckpointError(f"{path} is missing or damaged: {why}; {_COPY}") from error


def _entry(indices: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in indices:
        raise ContentError(f"it has no {name}")
    return indices[name]


def _sound(name: str, indices: Tensor, count: int, length: int) -> Tensor:
    """The numbers of what was kept, rising; raises ContentError for anything else."""
    if indices.dtype != torch.int32 or indices.shape != (count,):
        raise ContentError(f"{name} is not the numbers of {count} entries, as {RECORD} says")
    rising = bool((indices.diff() > 0).all())
    if not rising or bool(((indices < 0) | (indices >= length)).any()):
        raise ContentError(f"{name} is not numbers that rise from 0 to {length - 1} at most")
    return indices.long()


def check_channels(model: Weights, remedy: str) -> None:
    """Refuses a model some of whose channels are zeros that fill narrower layers.

    They are refused and not dropped: ratios, masks and features count the channels of the model
    that was given.

    Args:
        model: looked up by the folder that it comes from.
        remedy: what to do instead.

    Raises:
        ValueError: it is one.
    """
    if (folder := source_folder(structure(model).config)) is not None:
        check_not_padded(folder, f"which would count as channels; {remedy}")
