"""Keep masks + model -> narrow model; and the dense model made to compute as if it were narrow."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet import modeling
from prunenet.architectures import Architecture, architecture_for
from prunenet.layers import check_whole, decoder_layers, down_linears, ffn_widths
from prunenet.masks import check_keep


def narrowed(model: PreTrainedModel, keep: Sequence[Bool[Tensor, " _"]]) -> PreTrainedModel:
    """A model without the channels that `keep` drops. The given model is left as it was.

    Parameters outside the FFNs are the *same tensors* in both models (so a cut costs the memory of the narrow FFNs only):
    training one, or moving it with `.to(...)`, changes the other. Device, dtype, tied embeddings and the generation
    configuration are kept.

    Where all layers end up equally wide, the result is an ordinary model whose configuration has the new width; where they
    do not, its class is `prunenet.modeling.PerLayer<class>` and `config.per_layer_config` holds the widths.

    Args:
        model: a `*ForCausalLM` model.
        keep: for each layer, first to last, a mask of length d_ff with at least one channel kept.

    Raises:
        UnsupportedArchitecture: the model's type has no row in the table, or its FFN is quantised.
        ValueError: not one mask per layer, a mask of the wrong length, or one that keeps nothing.
    """
    _check(model, keep)
    architecture = architecture_for(model.config)
    # Parameters put in the memo are shared and not copied.
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    narrow: PreTrainedModel = copy.deepcopy(model, memo)
    for layer, mask in zip(decoder_layers(narrow, architecture), keep, strict=True):
        _pick(layer, mask.nonzero().flatten(), mask.numel(), architecture)
    set_widths(narrow, [int(mask.sum()) for mask in keep])
    return narrow


@contextmanager
def masking(model: PreTrainedModel, keep: Sequence[Bool[Tensor, " _"]]) -> Iterator[PreTrainedModel]:
    """Inside the `with` block the model computes as if the channels that `keep` drops were cut.

    The weights do not change; the activations h of dropped channels are zeroed in front of the down linear. The hooks that
    do so are gone after the block, however it ends. Arguments and errors as for `narrowed`.
    """
    _check(model, keep)
    with ExitStack() as hooks:
        for linear, mask in zip(down_linears(model), keep, strict=True):
            hooks.enter_context(linear.register_forward_pre_hook(_zeroing(~mask.to(linear.weight.device))))
        yield model


def zero_padded(model: PreTrainedModel) -> PreTrainedModel:
    """A model of one width that computes the same: narrower layers are filled with zero channels to the widest.

    Shares parameters outside the FFNs with the given model, as `narrowed` does.
    """
    architecture = architecture_for(model.config)
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    wide: PreTrainedModel = copy.deepcopy(model, memo)
    widths = ffn_widths(model)
    for layer, width in zip(decoder_layers(wide, architecture), widths, strict=True):
        index = torch.arange(max(widths))
        _pick(layer, torch.where(index < width, index, -1), width, architecture)
    set_widths(wide, [max(widths)] * len(widths))
    return wide


def set_widths(model: PreTrainedModel, widths: Sequence[int]) -> None:
    """Makes the class and configuration of a model state the widths that its FFNs already have.

    Args:
        model: a causal LM, changed in place.
        widths: channels of each layer, at least 1.
    """
    architecture = architecture_for(model.config)
    config = model.config
    config.per_layer_config = None
    for name in ("per_layer_ffn", "auto_map"):
        config.__dict__.pop(name, None)
    # How transformers renamed tensors when it read them for the dense class: per-layer classes are saved and read as they are.
    model.__dict__.pop("_weight_conversions", None)
    setattr(config, architecture.width, max(widths))
    stock = getattr(type(model), "stock_class", type(model))
    if len(set(widths)) == 1:
        model.__class__ = stock
        return
    config.per_layer_ffn = {
        "width": architecture.width,
        "layers": architecture.layers,
        "inputs": list(architecture.input_linears),
        "output": architecture.down,
    }
    config.per_layer_config = {index: {architecture.width: width} for index, width in enumerate(widths)}
    model.__class__ = getattr(modeling, modeling.PREFIX + stock.__name__)


def _check(model: PreTrainedModel, keep: Sequence[Tensor]) -> None:
    check_whole(model)
    widths = ffn_widths(model)
    if len(keep) != len(widths):
        raise ValueError(f"the model has {len(widths)} layers and needs one keep mask for each, got {len(keep)} masks")
    for index, (mask, d_ff) in enumerate(zip(keep, widths, strict=True)):
        try:
            if mask.dim() != 1:
                raise ValueError(f"a keep mask has one dimension, got {mask.dim()}")
            check_keep(mask, d_ff)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from None


def _pick(layer: nn.Module, channels: Int[Tensor, " width"], d_ff: int, architecture: Architecture) -> None:
    """Rebuilds the FFN of a layer, d_ff channels wide, from the given channels of it; -1 is a channel of zeros."""
    for path in architecture.input_linears:
        linear = layer.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        rows = channels
        if architecture.fused:
            rows = torch.cat([channels, torch.where(channels < 0, channels, channels + d_ff)])
        linear.weight = _select(linear.weight, 0, rows)
        if linear.bias is not None:
            linear.bias = _select(linear.bias, 0, rows)
        linear.out_features = rows.numel()
    down = layer.get_submodule(architecture.down)
    assert isinstance(down, nn.Linear)
    down.weight = _select(down.weight, 1, channels)
    down.in_features = channels.numel()
    ffn: Any = layer.get_submodule(architecture.down.rpartition(".")[0])
    if hasattr(ffn, "intermediate_size"):
        ffn.intermediate_size = channels.numel()


def _select(parameter: Tensor, dim: int, index: Int[Tensor, " n"]) -> nn.Parameter:
    blank = (index < 0).nonzero().flatten().to(parameter.device)  # before the move: on the meta device nothing can be counted
    chosen = parameter.detach().index_select(dim, index.clamp_min(0).to(parameter.device)).index_fill_(dim, blank, 0)
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


def _zeroing(dropped: Tensor) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # masked_fill and not a product: a dropped channel that overflows must not become inf * 0.
        return (inputs[0].masked_fill(dropped, 0), *inputs[1:])

    return hook
