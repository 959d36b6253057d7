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
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models import modeling
from prunenet.models.anatomy import Anatomy, DecoderLayer, Slice
from prunenet.models.architectures import Architecture, architecture_for
from prunenet.models.heads import GROUPS, group_counts, state_counts
from prunenet.models.hooks import zeroing
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
    _check(Anatomy.of(model), keep, groups)
    narrow = Anatomy.of(shared_copy(model))
    for layer, mask in zip(narrow.layers, keep, strict=True):
        _pick_channels(layer, mask.nonzero().flatten())
    if groups is not None:
        for layer, mask in zip(narrow.layers, groups, strict=True):
            _pick(layer.groups(mask.numel()), mask.nonzero().flatten(), mask.numel())
    counted = groups is not None or hasattr(model.config, modeling.HEADS)
    kept = [int(mask.sum()) for mask in keep]
    set_widths(narrow.model, kept, group_counts(narrow.model) if counted else None)
    return narrow.model


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
    anatomy = Anatomy.of(model)
    _check(anatomy, keep, groups)
    masked = list(zip(anatomy.downs, keep, strict=True))
    if groups is not None:
        outs = zip(anatomy.outs, groups, strict=True)
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
    wide = Anatomy.of(shared_copy(model))
    widths, config = wide.widths, wide.model.config
    index = torch.arange(max(widths))
    for layer in wide.layers:
        _pick_channels(layer, torch.where(index < layer.width, index, -1))
    counts = None
    if hasattr(model.config, modeling.HEADS):
        # The stock field then says how many groups a stock model can have.
        config.per_layer_config = None
        index = torch.arange(getattr(config, GROUPS))
        for layer, count in zip(wide.layers, group_counts(model), strict=True):
            _pick(layer.groups(count), torch.where(index < count, index, -1), count)
        counts = group_counts(wide.model)
    set_widths(wide.model, [max(widths)] * len(widths), counts)
    return wide.model


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


def _check(anatomy: Anatomy, keep: Sequence[Tensor], groups: Sequence[Tensor] | None) -> None:
    anatomy.check_whole()
    widths = anatomy.widths
    if groups is not None:
        _check_groups(group_counts(anatomy.model), groups)
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


def _pick_channels(layer: DecoderLayer, channels: Int[Tensor, " width"]) -> None:
    """Rebuilds the FFN of a layer from some of its channels; -1 is a channel of zeros."""
    _pick(layer.channels(), channels, layer.width)
    ffn: Any = layer.module.get_submodule(layer.architecture.down.rpartition(".")[0])
    if hasattr(ffn, "intermediate_size"):
        ffn.intermediate_size = channels.numel()


def _pick(slices: Sequence[Slice], units: Int[Tensor, " kept"], count: int) -> None:
    """Rebuilds linears from some of the `count` units that lie in them; -1 is a unit of zeros."""
    for where in slices:
        index, linear = where.entries(units, count), where.linear
        derive(linear, "weight", partial(_selected, dim=where.axis, index=index))
        if where.axis == 1:
            linear.in_features = index.numel()
            continue
        if linear.bias is not None:
            derive(linear, "bias", partial(_selected, dim=0, index=index))
        linear.out_features = index.numel()


def _selected(tensor: Tensor, dim: int, index: Int[Tensor, " n"]) -> Tensor:
    # before the move: on the meta device nothing can be counted
    blank = (index < 0).nonzero().flatten().to(tensor.device)
    return tensor.index_select(dim, index.clamp_min(0).to(tensor.device)).index_fill_(dim, blank, 0)
