"""Keep masks + model -> narrow model; and the dense model made to compute as if it were narrow.

Cut are channels of the FFNs and, where masks for them are given too, groups of attention heads (see
`prunenet.models.heads`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models import modeling
from prunenet.models.architectures import Architecture, architecture_for
from prunenet.models.heads import (
    GROUPS,
    attentions,
    group_counts,
    out_linears,
    spread,
    state_counts,
)
from prunenet.models.hooks import zeroing
from prunenet.models.layers import (
    check_whole,
    decoder_layers,
    down_linears,
    ffn_widths,
    plain_linear,
)
from prunenet.models.masks import check_keep
from prunenet.runtime.placement import derive, device_of, shared_copy


def narrowed(
    model: PreTrainedModel,
    keep: Sequence[Bool[Tensor, " _"]],
    groups: Sequence[Bool[Tensor, " _"]] | None = None,
) -> PreTrainedModel:
    """A model without the channels that `keep` drops, and without the heads that `groups` drops.
    The given one stays as it was.

    Parameters that are not cut are the *same tensors* in both models (so a cut costs the memory of
    the narrow FFNs only): training one, or moving it with `.to(...)`, changes the other. Device,
    dtype, tied embeddings and the generation configuration are kept. Of a placed model
    (`prunenet.runtime.placement`) nothing is copied: the narrow matrices are picked from the dense
    ones, wherever these are kept, each time that they are needed.

    Where all layers end up equally wide, the result is an ordinary model whose configuration has
    the new width; where they do not, its class is `prunenet.models.modeling.PerLayer<class>` and
    `config.per_layer_config` holds the widths. The same goes for the number of groups; a number
    that the family's configuration refuses (see `heads.state_counts`) travels per layer too.

    Args:
        model: a `*ForCausalLM` model.
        keep: for each layer, first to last, a mask of length d_ff with at least one channel kept.
        groups: for each layer a mask over its groups of heads with at least one kept; None leaves
            attention whole.

    Raises:
        UnsupportedArchitecture: the model's type has no row in the table, its FFN is quantised, or
            its heads cannot be cut.
        ValueError: not one mask per layer, a mask of the wrong length, or one that keeps nothing.
    """
    _check(model, keep, groups)
    architecture = architecture_for(model.config)
    narrow = shared_copy(model)
    for layer, mask in zip(decoder_layers(narrow, architecture), keep, strict=True):
        _pick(layer, mask.nonzero().flatten(), mask.numel(), architecture)
    if groups is not None:
        for layer, mask in zip(decoder_layers(narrow, architecture), groups, strict=True):
            _pick_groups(layer, mask.nonzero().flatten(), mask.numel(), architecture)
    counted = groups is not None or hasattr(model.config, modeling.HEADS)
    set_widths(
        narrow, [int(mask.sum()) for mask in keep], group_counts(narrow) if counted else None
    )
    return narrow


@contextmanager
def masking(
    model: PreTrainedModel,
    keep: Sequence[Bool[Tensor, " _"]],
    groups: Sequence[Bool[Tensor, " _"]] | None = None,
) -> Iterator[PreTrainedModel]:
    """Inside the `with` block the model computes as if what `keep` and `groups` drop were cut.

    The weights do not change; the activations h of dropped channels are zeroed in front of the down
    linear, the outputs of dropped heads in front of attention's output linear. The hooks that do so
    are gone after the block, however it ends. Arguments and errors as for `narrowed`.
    """
    _check(model, keep, groups)
    masked = list(zip(down_linears(model), keep, strict=True))
    if groups is not None:
        outs = zip(out_linears(model), groups, strict=True)
        masked += [
            (linear, mask.repeat_interleave(linear.in_features // len(mask)))
            for linear, mask in outs
        ]
    with ExitStack() as hooks:
        for linear, mask in masked:
            hooks.enter_context(
                linear.register_forward_pre_hook(zeroing(~mask.to(device_of(linear))))
            )
        yield model


def zero_padded(model: PreTrainedModel) -> PreTrainedModel:
    """A model of one width that computes the same: narrower layers are filled with zero channels to
    the widest.

    Where layers differ in their groups of heads, with groups of zeros to a number that stock
    configurations accept. Shares the other parameters with the given model, as `narrowed` does.
    """
    architecture = architecture_for(model.config)
    wide = shared_copy(model)
    widths = ffn_widths(model)
    for layer, width in zip(decoder_layers(wide, architecture), widths, strict=True):
        index = torch.arange(max(widths))
        _pick(layer, torch.where(index < width, index, -1), width, architecture)
    counts = None
    if hasattr(model.config, modeling.HEADS):
        # the stock field then says how many groups a stock model can have
        wide.config.per_layer_config = None
        index = torch.arange(getattr(wide.config, GROUPS))
        for layer, count in zip(
            decoder_layers(wide, architecture), group_counts(model), strict=True
        ):
            _pick_groups(layer, torch.where(index < count, index, -1), count, architecture)
        counts = group_counts(wide)
    set_widths(wide, [max(widths)] * len(widths), counts)
    return wide


def set_widths(
    model: PreTrainedModel, widths: Sequence[int], counts: Sequence[int] | None = None
) -> None:
    """Makes the class and configuration of a model state what its layers already have.

    Args:
        model: a causal LM, changed in place.
        widths: channels of each layer, at least 1.
        counts: groups of heads of each layer, at least 1; None where there are as many as the stock
            fields say.
    """
    architecture = architecture_for(model.config)
    config = model.config
    config.per_layer_config = None
    for name in (modeling.FFN, modeling.HEADS, "auto_map"):
        config.__dict__.pop(name, None)
    # How transformers renamed tensors when it read them for the dense class: per-layer classes are
    # saved and read as they are.
    model.__dict__.pop("_weight_conversions", None)
    setattr(config, architecture.width, max(widths))
    stock = getattr(type(model), "stock_class", type(model))
    varying: dict[str, Sequence[int]] = {}
    if len(set(widths)) > 1:
        varying[architecture.width] = widths
        inputs, output = architecture.input_linears, architecture.down
        setattr(config, modeling.FFN, _structure(architecture, architecture.width, inputs, output))
    if counts is not None and not state_counts(config, counts):
        varying[GROUPS] = counts
        inputs, output = architecture.attention_in, architecture.attention_out
        setattr(config, modeling.HEADS, _structure(architecture, GROUPS, inputs, output))
    if not varying:
        model.__class__ = stock
        return
    layers = range(len(widths))
    config.per_layer_config = {
        index: {field: numbers[index] for field, numbers in varying.items()} for index in layers
    }
    model.__class__ = getattr(modeling, modeling.PREFIX + stock.__name__)


def _structure(
    architecture: Architecture, field: str, inputs: Sequence[str], output: str
) -> dict[str, Any]:
    """What `prunenet.models.modeling` must know to narrow a structure."""
    return {"width": field, "layers": architecture.layers, "inputs": list(inputs), "output": output}


def _check(model: PreTrainedModel, keep: Sequence[Tensor], groups: Sequence[Tensor] | None) -> None:
    check_whole(model)
    widths = ffn_widths(model)
    if groups is not None:
        _check_groups([attention.groups for attention in attentions(model)], groups)
    if len(keep) != len(widths):
        raise ValueError(
            f"the model has {len(widths)} layers and needs one keep mask for each, got {len(keep)}"
            " masks"
        )
    for index, (mask, d_ff) in enumerate(zip(keep, widths, strict=True)):
        try:
            if mask.dim() != 1:
                raise ValueError(f"a keep mask has one dimension, got {mask.dim()}")
            check_keep(mask, d_ff)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from None


def _check_groups(counts: Sequence[int], groups: Sequence[Tensor]) -> None:
    if len(groups) != len(counts):
        raise ValueError(
            f"the model has {len(counts)} layers and needs one mask of heads for each, got"
            f" {len(groups)} masks"
        )
    for index, (mask, count) in enumerate(zip(groups, counts, strict=True)):
        if mask.dtype != torch.bool or mask.shape != (count,):
            raise ValueError(
                f"layer {index}: a mask of heads has {count} booleans here, one a group; got"
                f" {tuple(mask.shape)}, {mask.dtype}"
            )
        if not bool(mask.any()):
            raise ValueError(
                f"layer {index}: a mask of heads must keep at least one group, got one that keeps"
                " none"
            )


def _pick(
    layer: nn.Module, channels: Int[Tensor, " width"], d_ff: int, architecture: Architecture
) -> None:
    """Rebuilds the FFN of a layer, d_ff channels wide, from the given channels of it; -1 is a
    channel of zeros.
    """
    for path in architecture.input_linears:
        rows = channels
        if architecture.fused:
            rows = torch.cat([channels, torch.where(channels < 0, channels, channels + d_ff)])
        _pick_rows(plain_linear(layer, path), rows)
    _pick_columns(plain_linear(layer, architecture.down), channels)
    ffn: Any = layer.get_submodule(architecture.down.rpartition(".")[0])
    if hasattr(ffn, "intermediate_size"):
        ffn.intermediate_size = channels.numel()


def _pick_groups(
    layer: nn.Module, groups: Int[Tensor, " kept"], count: int, architecture: Architecture
) -> None:
    """Rebuilds the attention of a layer, which has `count` groups, from the given ones of them; -1
    is a group of zeros.
    """
    for path in architecture.attention_in:
        linear = plain_linear(layer, path)
        _pick_rows(linear, spread(groups, linear.out_features // count))
    out = plain_linear(layer, architecture.attention_out)
    _pick_columns(out, spread(groups, out.in_features // count))


def _pick_rows(linear: nn.Linear, rows: Int[Tensor, " n"]) -> None:
    derive(linear, "weight", partial(_selected, dim=0, index=rows))
    if linear.bias is not None:
        derive(linear, "bias", partial(_selected, dim=0, index=rows))
    linear.out_features = rows.numel()


def _pick_columns(linear: nn.Linear, columns: Int[Tensor, " n"]) -> None:
    derive(linear, "weight", partial(_selected, dim=1, index=columns))
    linear.in_features = columns.numel()


def _selected(tensor: Tensor, dim: int, index: Int[Tensor, " n"]) -> Tensor:
    # before the move: on the meta device nothing can be counted
    blank = (index < 0).nonzero().flatten().to(tensor.device)
    return tensor.index_select(dim, index.clamp_min(0).to(tensor.device)).index_fill_(dim, blank, 0)
