"""Language models whose layers differ in FFN width or in heads.

A copy of this file lies beside every checkpoint with per-layer widths; it needs transformers alone
(4.57 or 5) and is run with `trust_remote_code=True`.

`modeling.PerLayerLlamaForCausalLM` is `transformers.LlamaForCausalLM` with the widths of
`config.per_layer_config`. Any other class name works alike, such as `PerLayerLlamaModel`.
`config.per_layer_ffn` locates the FFN by dotted paths from the causal LM, and
`config.per_layer_heads` the attention, whose width is its number of key-value heads. A model has
either or both. Of a multimodal model the widths are in `config.text_config.per_layer_config`.

Attention may have no heads: it then writes nothing, or its output linear's bias (`NoHeads`). Stock
caches and masks count tokens in the first layer of each kind of attention, so these keep heads.

Its `config.json` asks for an attention called `UNTRUSTED`, which does not exist. Stock code then
refuses the model by that name; the classes of this file take the default attention.
"""

from functools import cache
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

PREFIX = "PerLayer"
FFN, HEADS = "per_layer_ffn", "per_layer_heads"
UNTRUSTED = "none, because this model needs its own code: load it with trust_remote_code=True"


class PerLayerWidths:
    """Builds the stock model at the width of the widest layer, then narrows each layer.

    The weights are those of a fresh model; `from_pretrained` fills in the checkpoint's later.
    """

    # makes save_pretrained copy this file and write config.auto_map
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if config._attn_implementation == UNTRUSTED:
            config._attn_implementation = None
        if "embed_out.weight" in (getattr(self, "_tied_weights_keys", None) or ()):
            raise ImportError(
                "a GPT-NeoX with per-layer widths needs transformers 5, for version 4 calls its"
                " tensors by other names; for that, make a stock checkpoint (prunenet export --pad)"
            )
        structures = [getattr(config, name) for name in (FFN, HEADS) if hasattr(config, name)]
        text = holder_of(config, structures[0]["width"])[0]
        stated = overrides(text)
        widths = {s["width"]: layer_values(config, s["width"]) for s in structures}
        names = [field.rpartition(".")[2] for field in widths]
        for layer, values in enumerate(zip(*widths.values(), strict=True)):
            stated.setdefault(layer, {}).update(zip(names, values, strict=True))
        # Stock code cannot read a width that differs between layers. It sees this very object
        # without them, and not a copy: from_pretrained and every submodule go on using it.
        text.per_layer_config = without(stated, names)
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
            for structure in structures:
                field = structure["width"]
                narrow(self, structure, widths[field], getattr(*holder_of(config, field)))
            if hasattr(config, HEADS):
                structure = getattr(config, HEADS)
                settle_heads(self, structure, widths[structure["width"]])
        finally:
            text.per_layer_config = stated


def is_per_layer(model: Any) -> bool:
    """Returns whether loading a model needs this file."""
    return isinstance(model, PerLayerWidths)


def holder_of(config: Any, field: str) -> tuple[Any, str]:
    """Returns the configuration that has a dotted field, and the field's name in it."""
    *parts, name = field.split(".")
    for part in parts:
        config = getattr(config, part)
    return config, name


def overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Returns the fields in which each layer differs from the configuration, by layer."""
    stated = config.per_layer_config
    if not isinstance(stated, dict):  # transformers 4 keeps what the file says
        stated = config.to_dict().get("per_layer_config") or {}
    return {int(layer): dict(fields) for layer, fields in stated.items()}


def without(stated: dict[int, dict[str, Any]], names: Any) -> dict[int, dict[str, Any]] | None:
    """Returns what a family itself states of its layers; None where that is nothing."""
    own = {
        layer: {name: value for name, value in fields.items() if name not in names}
        for layer, fields in stated.items()
    }
    return {layer: fields for layer, fields in own.items() if fields} or None


def layer_values(config: Any, field: str) -> list[int]:
    """Returns a dotted configuration field of each decoder layer, first to last."""
    config, name = holder_of(config, field)
    given = overrides(config)
    widest = vars(config)[config.attribute_map.get(name, name)]  # they may not be asked for it
    return [given.get(layer, {}).get(name, widest) for layer in range(config.num_hidden_layers)]


def layers_of(model: Any, structure: dict[str, Any]) -> Any:
    """Returns the decoder layers of a causal LM, or of a bare decoder such as LlamaModel."""
    layers, prefix = structure["layers"], model.base_model_prefix
    return model.get_submodule(
        layers if hasattr(model, prefix) else layers.removeprefix(f"{prefix}.")
    )


def narrow(model: Any, structure: dict[str, Any], widths: list[int], widest: int) -> None:
    """Keeps the first channels, or heads, of each freshly built layer."""
    paths = [*((path, 0) for path in structure["inputs"]), (structure["output"], 1)]
    for layer, width in zip(layers_of(model, structure), widths, strict=True):
        for path, dim in paths:
            linear = layer.get_submodule(path)
            turned = isinstance(linear, Conv1D)  # its weight is (in, out)
            weight = linear.weight.detach()
            # A fused gate and up linear has two rows per channel, a key-value head has those of its
            # query heads.
            kept = weight.shape[dim ^ turned] // widest * width
            linear.weight = torch.nn.Parameter(weight.narrow(dim ^ turned, 0, kept).clone())
            if dim == 0 and linear.bias is not None:
                linear.bias = torch.nn.Parameter(linear.bias.detach()[:kept].clone())
            sizes = ("nx", "nf") if turned else ("out_features", "in_features")
            for size, number in zip(sizes, linear.weight.shape, strict=True):
                setattr(linear, size, number)
            parent = layer.get_submodule(path.rpartition(".")[0])
            if hasattr(parent, "intermediate_size"):
                parent.intermediate_size = width


class NoHeads:
    """Attention without heads: it puts nothing into a cache, and gives what the stock one would."""

    written_by: str

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        """Returns what the output linear makes of nothing, and no weights of attention."""
        nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        return getattr(self, self.written_by)(nothing), None


@cache
def without_heads(stock: type, written_by: str) -> Any:
    """Returns a class of attention without heads; `written_by` names its output linear."""
    fields = {"__module__": __name__, "stock_class": stock, "written_by": written_by}
    return type(f"NoHeads{stock.__name__}", (NoHeads, stock), fields)


def settle_heads(model: Any, structure: dict[str, Any], counts: Any) -> None:
    """Gives the attention of layers without heads a class of its own, and others the stock one."""
    path, _, name = structure["output"].rpartition(".")
    for layer, count in zip(layers_of(model, structure), counts, strict=True):
        attention = layer.get_submodule(path)
        stock: type = getattr(type(attention), "stock_class", type(attention))
        attention.__class__ = stock if count else without_heads(stock, name)


def __getattr__(name: str) -> Any:
    """Returns the per-layer form of a transformers class, made when first asked for."""
    if not name.startswith(PREFIX) or not hasattr(transformers, name.removeprefix(PREFIX)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = getattr(transformers, name.removeprefix(PREFIX))
    globals()[name] = type(
        name, (PerLayerWidths, stock), {"__module__": __name__, "stock_class": stock}
    )
    return globals()[name]
