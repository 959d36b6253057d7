"""SliceGPT: rotates the residual stream to its principal directions and slices off the smallest.

Source: Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
ICLR 2024, arXiv 2401.15024, section 3, and the authors' code; docs/methods.md, section 6. The
rotation itself is in `prunenet.models.rotation`, the modules of the sliced model are in
`prunenet.models.sliced_modeling`. As in the authors' code, covariances are of the residual stream
in front of the norm, each is measured behind the layers already sliced, and the LM head stays
whole.

What differs:
- the size may be given as a ratio of FFN channels: the sliced model is then the largest that has no
  more parameters than a model that lost so many channels. With tied embeddings the budget is
  strict: slicing needs an LM head of its own;
- no random rotation inside the sliced stream at the end, which changes only the rounding of half
  precision;
- families with RMSNorms only (the authors also turn LayerNorms into RMSNorms);
- text is the caller's; the authors use 1024 sequences of 2048 tokens of WikiText-2 or Alpaca.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float64, Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import base_of
from prunenet.checkpoints.provenance import Provenance
from prunenet.models.layers import check_tokens, decoder_layers, ffn_widths
from prunenet.models.rotation import (
    blocks_of,
    check_rotatable,
    covariance,
    eigenbasis,
    residual_widths,
    rotate_ends,
    unrotated,
    width_for,
)
from prunenet.policies.apply import Pruned
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.widths.allocation import parameters_left
from prunenet.refit.calls import layer_calls
from prunenet.runtime.placement import check_together, home

_BATCH = 4
Basis = Callable[[Float64[Tensor, "d_model d_model"]], Float64[Tensor, "d_model d_model"]]


def sliced(
    evidence: Evidence,
    ratio: float | None = None,
    *,
    slicing: float | None = None,
    slice_head: bool = False,
    round_to: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Slices a model; the given one stays as it is.

    `Pruned.save_pretrained` writes a checkpoint that contains the code of its modules.

    Args:
        evidence: the model and the text to measure on.
        ratio: share of FFN channels, in [0, 1), whose removal from every layer would leave as many
            parameters: the slice is the widest that does not exceed them.
        slicing: SliceGPT's own measure: share of the residual stream sliced off, in [0, 1). Give
            exactly one of `ratio` and `slicing`.
        slice_head: whether the stream in front of the LM head is sliced too (the authors leave it
            whole).
        round_to: the width left is a multiple of this (rounded down, as the authors do), or d_model
            at slicing 0.
        progress: called with (layers done, layers in all).

    Raises:
        ValueError: neither or both of ratio and slicing, one out of range, no text, or a budget
            that no slice fits.
        UnsupportedArchitecture: the family's residual stream cannot be rotated.
    """
    model = evidence.model
    check_rotatable(model)
    if (ratio is None) == (slicing is None):
        given = "neither" if ratio is None else "both"
        raise ValueError(
            "give one of ratio (share of FFN channels) and slicing (share of the residual stream),"
            f" got {given}"
        )
    ids = evidence.ids
    if slicing is None:
        assert ratio is not None
        width = width_for(
            model, parameters_left(model, ratio, round_to), round_to=round_to, slice_head=slice_head
        )
    else:
        width = width_at_slicing(model.config.hidden_size, slicing, round_to)
    layers, d_model = len(decoder_layers(model)), model.config.hidden_size
    widths = residual_widths(layers, d_model, width, slice_head=slice_head)
    made = slice_stream(model, ids, widths, progress=progress)
    blocks = evidence.blocks
    assert blocks is not None
    how = {
        "residual_width": width,
        "slicing": 1 - width / d_model,
        "head": "sliced" if slice_head else "whole",
    }
    provenance = Provenance.of(
        model,
        made,
        policy="slicegpt",
        policy_sha256=None,
        regime=blocks.regime,
        ratio=0.0 if ratio is None else ratio,
        seed=evidence.seed,
        residual_widths=tuple(widths),
        how=how | {"text": dict(blocks.source)},
        **base_of(model),
    )
    return Pruned(
        made, [torch.ones(d_ff, dtype=torch.bool) for d_ff in ffn_widths(model)], provenance
    )


def sliced_at(evidence: Evidence, ratio: float, round_to: int = 8) -> PreTrainedModel:
    """Returns the model of `sliced` at a ratio, as published; the row of `METHODS`."""
    return sliced(evidence, ratio, round_to=round_to).model


def width_at_slicing(d_model: int, slicing: float, round_to: int = 8) -> int:
    """Returns (1 - slicing) d_model, rounded down to a multiple of `round_to`; d_model at 0.

    Raises:
        ValueError: slicing is not in [0, 1), or nothing would be left.
    """
    if not 0 <= slicing < 1:
        raise ValueError(f"slicing must be in [0, 1), got {slicing}")
    if slicing == 0:
        return d_model
    # 1e-9: keeps 0.9 * 640 from falling under its own decimal value in binary.
    width = int((1 - slicing) * d_model + 1e-9) // round_to * round_to
    if width < 1:
        raise ValueError(
            f"slicing {slicing:g} leaves no multiple of {round_to} of a residual stream of"
            f" {d_model}; give less"
        )
    return width


@torch.no_grad()
def slice_stream(
    model: PreTrainedModel,
    ids: Int[Tensor, "n tokens"],
    widths: Sequence[int],
    *,
    basis: Basis = eigenbasis,
    progress: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:
    """Slices the residual stream of a model to the given widths.

    Each point is measured behind the layers already sliced in front of it. Memory holds the sliced
    model, one layer's matrices in float64, and the hidden states of all blocks.

    Args:
        model: a causal LM in eval mode that passes `check_rotatable`; not changed.
        ids: token blocks, without padding.
        widths: of each of the 2 L + 1 points; see `prunenet.models.rotation`.
        basis: covariance -> orthonormal columns, of which the first are kept.
        progress: called with (layers done, layers in all).

    Raises:
        ValueError: blocks that the model cannot read, wrong widths, or hidden states that are not
            finite.
    """
    check_together(model, "slicing")
    check_tokens(model, ids)
    made = unrotated(model, widths)
    calls = [layer_calls(model, part) for part in torch.split(ids.to(home(model)), _BATCH)]
    left = iter(widths)
    embedded = [call[0].hidden for call in calls if call[0].hidden is not None]
    hidden, before = _turned(embedded, basis, next(left))
    rotate_ends(model, made, first=before)
    layers = list(decoder_layers(made))
    for index, (layer, blocks) in enumerate(zip(layers, blocks_of(model, made), strict=True)):
        for block, step in zip(blocks, (_attend, _feed), strict=True):
            block.read(before)
            block.write(before, None)  # the whole stream, to be measured
            whole = [
                step(layer, part, call[index].kwargs)
                for part, call in zip(hidden, calls, strict=True)
            ]
            hidden, behind = _turned(whole, basis, next(left))
            block.write(before, behind)
            before = behind
        if progress is not None:
            progress(index + 1, len(layers))
    rotate_ends(model, made, last=before)
    return made


def _turned(
    whole: list[Tensor], basis: Basis, width: int
) -> tuple[list[Tensor], Float64[Tensor, "d_model width"]]:
    """Projects the stream on its first `width` principal directions; returns both."""
    kept = basis(covariance(whole))[:, :width]
    return [part @ kept.to(part) for part in whole], kept


def _attend(layer: torch.nn.Module, hidden: Tensor, call: dict[str, object]) -> Tensor:
    found: Tensor = layer.attend(hidden, **call)  # type: ignore[operator]
    return found


def _feed(layer: torch.nn.Module, hidden: Tensor, call: dict[str, object]) -> Tensor:
    found: Tensor = layer.feed(hidden)  # type: ignore[operator]
    return found
