"""Checkpoints on disk (DESIGN section 5): load with one clear error, save beside and rename, verify
by reload, provenance.

Only safetensors and JSON are read; no code of a checkpoint's folder is ever run.
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

from prunenet.checkpoints.companions import write_companions
from prunenet.checkpoints.contents import CONFIG, MASKS, PROVENANCE
from prunenet.checkpoints.load import load_model, read_model
from prunenet.checkpoints.mask_files import read_masks, write_masks
from prunenet.checkpoints.offload import check_reread, write_placed
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.sources import find_folder, in_short
from prunenet.models import modeling
from prunenet.models.heads import group_counts
from prunenet.models.layers import count_parameters, ffn_widths
from prunenet.models.surgery import zero_padded
from prunenet.runtime.files import CheckpointError, new_folder
from prunenet.runtime.placement import is_placed, parameters


def save_pruned(
    model: PreTrainedModel,
    out: str | Path,
    keep: Sequence[Bool[Tensor, " _"]],
    provenance: Provenance,
    *,
    groups: Sequence[Bool[Tensor, " _"]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card_text: str | None = None,
) -> Path:
    """Writes a pruned model as a Hugging Face checkpoint; the folder appears complete and verified,
    or not at all.

    Before the folder is moved into place it is loaded afresh; every tensor and the logits on fixed
    token ids must equal those of `model` exactly (on the model's device, in its dtype). The same
    call writes the same bytes.

    Args:
        model: the narrow model, of `surgery.narrowed`.
        out: folder to create; it may exist if it is empty.
        keep: the masks that were applied, one per layer, over the dense model's channels.
        provenance: written to `prunenet.json` and into the model card.
        groups: the masks of attention heads that were applied; None where heads were left whole.
        tokenizer: saved beside the model.
        card_text: Markdown put into the model card, e.g. a table of results.

    Returns:
        The folder.

    Raises:
        CheckpointError: `out` exists, the disk is full or refuses, or the reload differs.
        ValueError: model, masks and provenance contradict each other.
    """
    _check_provenance(model, keep, provenance)
    _check_heads(model, groups, provenance)
    out = Path(out)
    with new_folder(out, sum(p.numel() * p.element_size() for _, p in parameters(model))) as folder:
        if is_placed(model):
            write_placed(folder, model)
        else:
            model.save_pretrained(folder)
        write_companions(folder, model, tokenizer)
        write_provenance(folder, keep, provenance, groups=groups, card_text=card_text)
        _verify(model, folder)
    return out


def write_provenance(
    folder: Path,
    keep: Sequence[Bool[Tensor, " _"]],
    provenance: Provenance,
    *,
    groups: Sequence[Bool[Tensor, " _"]] | None = None,
    card_text: str | None = None,
) -> None:
    """Writes what stands beside the model and its code: `prunenet.json`,
    `prunenet_masks.safetensors` and the model card.
    """
    (folder / PROVENANCE).write_text(provenance.to_json(), encoding="utf-8")
    write_masks(folder / MASKS, keep, groups)
    (folder / "README.md").write_text(
        provenance.card(card_text, code=any(folder.glob("*.py"))), encoding="utf-8"
    )


def load_provenance(source: str | Path) -> Provenance:
    """Reads `prunenet.json` of a local folder or hub id.

    Raises:
        CheckpointError: missing, damaged, or of a newer format.
    """
    path = find_folder(source, CONFIG, PROVENANCE, MASKS) / PROVENANCE
    try:
        return Provenance.from_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{source} is not a checkpoint of prunenet: it has no {PROVENANCE}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {in_short(error)}; copy it anew, or prune again"
        ) from error


def load_masks(source: str | Path) -> list[Bool[Tensor, " _"]]:
    """The keep mask of each layer, over the channels of the base model. Raises CheckpointError as
    `load_provenance`.
    """
    return _masks(source)[0]


def load_head_masks(source: str | Path) -> list[Bool[Tensor, " _"]] | None:
    """The mask of each layer over the base model's groups of heads; None where heads are whole.
    Raises as `load_masks`.
    """
    return _masks(source)[1]


def export_padded(folder: str | Path, out: str | Path) -> Path:
    """Turns a checkpoint with per-layer widths into a stock one: every layer filled with zero
    channels to the widest.

    Groups of attention heads that differ between layers are filled up too, see
    `surgery.zero_padded`. Computes the same function, needs no code beside it, and is larger.
    Raises as `load_model` and `save_pruned`, and CheckpointError where the widths are the same in
    all layers already.
    """
    provenance = load_provenance(folder)
    if provenance.residual_widths is not None:
        raise CheckpointError(
            f"{folder} has a sliced residual stream, which stock loaders cannot read, padded or not"
        )
    model, groups = load_model(folder), load_head_masks(folder)
    if not modeling.is_per_layer(model):
        raise CheckpointError(
            f"{folder} has one width for all layers already; stock loaders read it as it is"
        )
    model = zero_padded(model)
    total, body = count_parameters(model)
    provenance = dataclasses.replace(
        provenance,
        padded_to=max(provenance.widths),
        padded_groups=None if groups is None else group_counts(model)[0],
        parameters_after=total,
        non_embedding_after=body,
    )
    return save_pruned(model, out, load_masks(folder), provenance, groups=groups)


def _check_provenance(
    model: PreTrainedModel, keep: Sequence[Tensor], provenance: Provenance
) -> None:
    kept, widths = [int(mask.sum()) for mask in keep], ffn_widths(model)
    expected = [provenance.padded_to] * len(kept) if provenance.padded_to else kept
    if list(provenance.widths) != kept or widths != expected:
        raise ValueError(
            f"masks keep {kept} channels, provenance says {list(provenance.widths)}, the model has"
            f" {widths}"
        )
    dense = [mask.numel() for mask in keep]
    if list(provenance.dense_widths) != dense:
        raise ValueError(
            f"masks are for layers of {dense} channels, provenance says"
            f" {list(provenance.dense_widths)}"
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


def _masks(
    source: str | Path,
) -> tuple[list[Bool[Tensor, " _"]], list[Bool[Tensor, " _"]] | None]:
    said = load_provenance(source)
    groups = None
    if said.dense_groups is not None and said.groups is not None:
        groups = (said.dense_groups, said.groups)
    path = find_folder(source, CONFIG, PROVENANCE, MASKS) / MASKS
    return read_masks(path, (said.dense_widths, said.widths), groups)


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
    ids = ((torch.arange(24, device=model.device) * 7919 + 11) % model.config.vocab_size).view(
        2, 12
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    training = model.training
    try:
        first = torch.func.functional_call(model.train(False), cast, kwargs=inputs).logits
    finally:
        model.train(training)
    difference = float((first - fresh(**inputs).logits).abs().max())
    if not difference == 0:
        raise CheckpointError(
            f"{folder.name} was not saved: after a reload its logits differ by up to {difference},"
            " not 0"
        )
