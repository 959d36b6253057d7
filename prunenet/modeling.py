"""Causal language models whose FFN width differs from layer to layer. Travels beside the checkpoint; needs transformers only.

`modeling.PerLayerLlamaForCausalLM` is `transformers.LlamaForCausalLM` with the widths of `config.per_layer_config`, and so on
for any class name. `config.per_layer_ffn` says where the FFN is, as dotted paths.
"""

from typing import Any

import torch
import transformers

PREFIX = "PerLayer"


class PerLayerWidths:
    """Builds the stock model at the widest layer's width, then narrows each FFN. The checkpoint's weights come later."""

    _auto_class = "AutoModelForCausalLM"  # makes save_pretrained copy this file and write config.auto_map

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        field = config.per_layer_ffn["width"]
        widths = [getattr(layer, field) for layer in config.per_layer_config]
        # Stock code cannot read a width that differs between layers. It sees this very object without them, and not a
        # copy: from_pretrained and every submodule go on using it.
        config.per_layer_config = None
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
            narrow(self, widths, getattr(config, field))
        finally:
            config.per_layer_config = {index: {field: width} for index, width in enumerate(widths)}


def narrow(model: Any, widths: list[int], widest: int) -> None:
    """Keeps the first channels of each layer's freshly built FFN."""
    paths = model.config.per_layer_ffn
    for layer, width in zip(model.get_submodule(paths["layers"]), widths, strict=True):
        for path, dim in [*((path, 0) for path in paths["inputs"]), (paths["output"], 1)]:
            linear = layer.get_submodule(path)
            kept = linear.weight.shape[dim] // widest * width  # a fused gate and up linear has two rows per channel
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
