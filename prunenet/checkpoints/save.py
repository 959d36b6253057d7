"""Writes a pruned model as a checkpoint that is complete and verified by a reload, or not there.

Only safetensors and JSON are written; no code of a checkpoint's folder is ever run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.companions import companion_bytes, source_folder, write_companions
from prunenet.checkpoints.contents import MASKS, RECORD
from prunenet.checkpoints.load import load_model, read_model
from prunenet.checkpoints.model_card import CARD, bare_card, card_of, inherited_fields
from prunenet.checkpoints.offload import check_reread, write_placed
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.records import (
    LAYERS,
    find_masks,
    find_provenance,
    how_to_load,
    mask_names,
)
from prunenet.checkpoints.records import load_head_masks as load_head_masks
from prunenet.checkpoints.records import load_layer_mask as load_layer_mask
from prunenet.checkpoints.records import load_masks as load_masks
from prunenet.checkpoints.records import load_provenance as load_provenance
from prunenet.models import modeling
from prunenet.models.heads import group_counts
from prunenet.models.layers import count_parameters, ffn_widths, probe_tokens
from prunenet.models.surgery import zero_padded
from prunenet.runtime.files import CheckpointError, expanded, new_folder
from prunenet.runtime.floats import dtype_name
from prunenet.runtime.own_files import packed
from prunenet.runtime.paths import named
from prunenet.runtime.placement import is_placed, parameters
from prunenet.runtime.products import with_fast_products

Masks = Sequence[Bool[Tensor, " _"]]
_TEXTS, _ENTRY = 12_000, 120
"""Bytes of configuration, provenance, card and code together; and of a tensor's header entry."""


@with_fast_products
def save_pruned(
    model: PreTrainedModel,
    out: str | Path,
    keep: Masks | None,
    provenance: Provenance,
    *,
    groups: Masks | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card_text: str | None = None,
) -> Path:
    """Writes a pruned model as a Hugging Face checkpoint; the folder appears complete and verified,
    or not at all.

    Before the folder is moved into place it is loaded afresh; every tensor and the logits on fixed
    token ids must equal those of `model` exactly (on the model's device, in its dtype). The same
    call writes the same bytes.

    Configuration, generation defaults and tokenizer are those of the checkpoint that the model was
    loaded from, but for what the cut changed; see `prunenet.checkpoints.companions`.

    Args:
        model: the narrow model, of `prunenet.models.surgery.narrowed`.
        out: folder to create; it may exist if it is empty.
        keep: the masks that were applied, one per layer, over the dense model's channels; None
            where they are not known, of a model whose record was lost.
        provenance: written to `prunenet.json` and into the model card.
        groups: the masks of attention heads that were applied; None where heads were left whole.
        tokenizer: saved instead of the source's own, if it is another one or was changed.
        card_text: Markdown put into the model card, such as a table of results.

    Returns:
        The folder.

    Raises:
        CheckpointError: `out` exists, the disk is full or refuses, or the reload differs.
        ValueError: model, masks and provenance contradict each other.
    """
    _check_provenance(model, keep, provenance)
    if keep is not None:
        _check_heads(model, groups, provenance)
    out = expanded(out)
    with new_folder(out, bytes_to_write(model, keep, groups)) as folder:
        _write_model(model, folder, tokenizer)
        write_provenance(
            folder,
            keep,
            provenance,
            groups=groups,
            card_text=card_text,
            source=source_folder(model.config),
        )
        _verify(model, folder)
    return out


def write_provenance(
    folder: Path,
    keep: Masks | None,
    provenance: Provenance,
    *,
    groups: Masks | None = None,
    card_text: str | None = None,
    source: Path | None = None,
) -> None:
    """Writes what stands beside the model and its code: `prunenet.json`,
    `prunenet_masks.safetensors` and the model card.

    Args:
        folder: holds the model.
        keep, provenance, groups, card_text: as for `save_pruned`.
        source: folder of the base model, whose card states licence and languages.
    """
    (folder / RECORD).write_text(provenance.to_json(), encoding="utf-8")
    if keep is not None:
        (folder / MASKS).write_bytes(packed(_indices(keep, groups, provenance)))
    card = card_of(
        provenance,
        card_text,
        code=any(folder.glob("*.py")),
        loading=how_to_load(folder),
        inherited=inherited_fields(source),
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def export_padded(source: str | Path, out: str | Path) -> Path:
    """Turns a checkpoint with per-layer widths into a stock one: every layer filled with zero
    channels to the widest.

    Groups of attention heads that differ between layers are filled up too, see
    `prunenet.models.surgery.zero_padded`. The result computes the same function, needs no code
    beside it, and is larger. Where another tool has saved the pruned model and its provenance is
    lost, the result has none either.

    Args:
        source: folder or hub id.
        out: folder to create; it may exist if it is empty.

    Returns:
        The folder.

    Raises:
        CheckpointError: as `load_model` and `save_pruned`; or the widths are the same in all layers
            already; or the residual stream is sliced.
    """
    provenance, (keep, groups) = find_provenance(source), find_masks(source)
    model = load_model(source)
    if hasattr(model.config, "residual_widths"):
        raise CheckpointError(
            f"{source} has a sliced residual stream, which stock loaders cannot read, padded or not"
        )
    if not modeling.is_per_layer(model):
        raise CheckpointError(
            f"{source} has one width for all layers already; stock loaders read it as it is"
        )
    heads = hasattr(model.config, modeling.HEADS)
    model = zero_padded(model)
    total, body = count_parameters(model)
    width = ffn_widths(model)[0]
    if provenance is None:
        with new_folder(expanded(out), bytes_to_write(model)) as folder:
            _write_model(model, folder, None)
            name = named(source)
            card = bare_card(name, total, width, how_to_load(folder))
            (folder / CARD).write_text(card, encoding="utf-8")
            _verify(model, folder)
        return expanded(out)
    provenance = dataclasses.replace(
        provenance,
        padded_to=width,
        padded_groups=group_counts(model)[0] if heads else None,
        parameters_after=total,
        non_embedding_after=body,
    )
    return save_pruned(model, out, keep, provenance, groups=groups)


def _write_model(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Writes all that makes the model, its weights first."""
    if is_placed(model):
        write_placed(folder, model)
    else:
        model.save_pretrained(folder)
    write_companions(folder, model, tokenizer)


def bytes_to_write(
    model: PreTrainedModel, keep: Masks | None = None, groups: Masks | None = None
) -> int:
    """Returns how much room a checkpoint takes at least, with all its files.

    Args:
        model: may be on the meta device.
        keep, groups: as for `save_pruned`.
    """
    weights = [p.numel() * p.element_size() + _ENTRY for _, p in parameters(model)]
    masks = [4 * int(mask.sum()) + _ENTRY for mask in (*(keep or ()), *(groups or ()))]
    return sum(weights) + sum(masks) + companion_bytes(model) + _TEXTS


def _indices(keep: Masks, groups: Masks | None, made: Provenance) -> dict[str, Tensor]:
    """What the file of masks holds: the numbers of what is kept, by layer."""
    masks = dict(zip(mask_names(made, "keep"), keep, strict=True))
    if groups is not None:
        masks |= zip(mask_names(made, "groups"), groups, strict=True)
    left = {name: mask.nonzero().flatten() for name, mask in masks.items()}
    if made.layers is not None:
        left[LAYERS] = torch.tensor(made.layers)
    return {name: numbers.to("cpu", torch.int32) for name, numbers in left.items()}


def _check_provenance(model: PreTrainedModel, keep: Masks | None, made: Provenance) -> None:
    said, widths = list(made.widths), ffn_widths(model)
    kept = said if keep is None else [int(mask.sum()) for mask in keep]
    expected = [made.padded_to] * len(kept) if made.padded_to else kept
    if said != kept or widths != expected:
        raise ValueError(
            f"masks keep {kept} channels, provenance says {said}, the model has {widths}"
        )
    dense = list(made.dense_widths) if keep is None else [mask.numel() for mask in keep]
    if list(made.dense_widths) != dense:
        raise ValueError(
            f"masks are for layers of {dense} channels, provenance says {list(made.dense_widths)}"
        )


def _check_heads(
    model: PreTrainedModel, groups: Sequence[Tensor] | None, provenance: Provenance
) -> None:
    said = [
        None if counts is None else list(counts)
        for counts in (provenance.dense_groups, provenance.groups)
    ]
    given = (
        [None, None]
        if groups is None
        else [[m.numel() for m in groups], [int(m.sum()) for m in groups]]
    )
    if said != given:
        raise ValueError(
            f"masks are for {given[0]} groups of heads and keep {given[1]}, provenance says"
            f" {said[0]} and {said[1]}; give the masks of heads that were applied, or None where"
            " heads were left whole"
        )
    if groups is not None:
        expected = (
            [provenance.padded_groups] * len(groups) if provenance.padded_groups else given[1]
        )
        if (counts := group_counts(model)) != expected:
            raise ValueError(f"masks keep {expected} groups of heads, the model has {counts}")


@torch.no_grad()
def _verify(model: PreTrainedModel, folder: Path) -> None:
    """Raises CheckpointError unless the folder, loaded afresh, holds the tensors and computes the
    logits of the model.
    """
    read = partial(read_model, folder, "auto", model.config._attn_implementation)
    if is_placed(model):
        return check_reread(model, read)
    fresh = read().to(model.device)  # type: ignore[arg-type]
    stored = fresh.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in stored or not torch.equal(stored[name], tensor):
            raise CheckpointError(
                f"{folder.name} was not saved: tensor {name} differs after a reload"
            )
    # A cast such as model.half() also rounds rotary frequencies, which are not stored: a reload
    # computes them in float32.
    mine = dict(model.named_buffers())
    cast = {
        n: b for n, b in fresh.named_buffers() if n in mine and b.to(mine[n].dtype).equal(mine[n])
    }
    ids = probe_tokens(model, model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    training = model.training
    try:
        first = torch.func.functional_call(model.train(False), cast, kwargs=inputs).logits
    finally:
        model.train(training)
    if not bool(first.isfinite().all()):
        kind = dtype_name(model.dtype)
        raise CheckpointError(
            f"{folder.name} was not saved: the model's logits are not finite in {kind}; its weights"
            " are damaged, or load it in float32"
        )
    difference = float((first - fresh(**inputs).logits).abs().max())
    if not difference == 0:
        raise CheckpointError(
            f"{folder.name} was not saved: after a reload its logits differ by up to {difference},"
            " not 0"
        )
