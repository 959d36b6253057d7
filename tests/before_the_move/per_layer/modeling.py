"""Causal language models whose layers differ in FFN width or heads. Travels beside the checkpoint; needs transformers only.

`modeling.PerLayerLlamaForCausalLM` is `transformers.LlamaForCausalLM` with the widths of `config.per_layer_config`, and so on
for any class name. `config.per_layer_ffn` says where the FFN is, as dotted paths, and `config.per_layer_heads` where attention
is, whose width is its number of key-value heads. A model has either or both.
"""

from typing import Any

import torch
import transformers

PREFIX = "PerLayer"
FFN, HEADS = "per_layer_ffn", "per_layer_heads"


class PerLayerWidths:
    """Builds the stock model at the widest layer's width, then narrows each layer. The checkpoint's weights come later."""

    _auto_class = "AutoModelForCausalLM"  # makes save_pretrained copy this file and write config.auto_map

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        structures = [getattr(config, name) for name in (FFN, HEADS) if hasattr(config, name)]
        fields = [structure["width"] for structure in structures]
        widths = [{field: getattr(layer, field) for field in fields} for layer in config.per_layer_config]
        # Stock code cannot read a width that differs between layers. It sees this very object without them, and not a
        # copy: from_pretrained and every submodule go on using it.
        config.per_layer_config = None
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
            for structure, field in zip(structures, fields, strict=True):
                narrow(self, structure, [layer[field] for layer in widths], getattr(config, field))
        finally:
            config.per_layer_config = dict(enumerate(widths))


def is_per_layer(model: Any) -> bool:
    """Whether a model needs this file to be loaded."""
    return isinstance(model, PerLayerWidths)


def narrow(model: Any, structure: dict[str, Any], widths: list[int], widest: int) -> None:
    """Keeps the first channels, or heads, of each freshly built layer."""
    paths = [*((path, 0) for path in structure["inputs"]), (structure["output"], 1)]
    for layer, width in zip(model.get_submodule(structure["layers"]), widths, strict=True):
        for path, dim in paths:
            linear = layer.get_submodule(path)
            # A fused gate and up linear has two rows per channel, a key-value head has those of its query heads.
            kept = linear.weight.shape[dim] // widest * width
            linear.weight = torch.nn.Parameter(linear.weight.detach().narrow(dim, 0, kept).clone())
            if dim == 0 and linear.bias is not None:
                linear.bias = torch.nn.Parameter(linear.bias.detach()[:kept].clone())
            linear.out_features, linear.in_features = linear.weight.shape
            parent = layer.get_submodule(path.rpartition(".")[0])
            if hasattr(parent, "intermediate_size"):
                parent.intermediate_size = width


def __getattr__(name: str) -> Any:
    """The per-layer form of a transformers class, made when first asked for."""
    if not name.startswith(PREFIX) or not hasattr(transformers, name.removeprefix(PREFIX)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = getattr(transformers, name.removeprefix(PREFIX))
    globals()[name] = type(name, (PerLayerWidths, stock), {"__module__": __name__, "stock_class": stock})
    return globals()[name]
