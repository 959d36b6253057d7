"""Causal language models whose residual stream is sliced (SliceGPT). Travels beside the checkpoint;
needs transformers only.

`sliced_modeling.SlicedLlamaForCausalLM` is `transformers.LlamaForCausalLM` with norms that have no
scale, with a linear shortcut in place of each residual connection, and with the widths of
`config.residual_widths`: behind the embedding, then behind attention and behind the FFN of each
layer. It serves every family with RMSNorms in front of attention and FFN.

Source: Ashkboos et al., ICLR 2024, arXiv 2401.15024, section 3.
"""

from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

PREFIX = "Sliced"
UNTRUSTED = "none, because this model needs its own code: load it with trust_remote_code=True"
"""Attention that `config.json` asks for, so that stock code refuses the model by that name."""


class SlicedNorm(nn.Module):
    """RMSNorm without scale. The mean is over the dense model's d_model: what was sliced off counts
    as zeros.
    """

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.d_model, self.eps = d_model, eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return (
            wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.d_model + self.eps)
        ).to(hidden.dtype)


class SlicedLayer:
    """The forward pass of a pre-norm layer whose residuals pass through `attention_shortcut` and
    `ffn_shortcut`.
    """

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.feed(self.attend(hidden_states, **kwargs))

    def attend(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(batch, tokens, width in front) -> (batch, tokens, width behind attention)."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        behind: torch.Tensor = self.attention_shortcut(hidden_states) + getattr(
            self, "resid_attn_dropout", _same
        )(attended)
        return behind

    def feed(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width behind attention) -> (batch, tokens, width behind the FFN)."""
        written = self.mlp(self.post_attention_layernorm(hidden_states))
        behind: torch.Tensor = self.ffn_shortcut(hidden_states) + getattr(
            self, "resid_mlp_dropout", _same
        )(written)
        return behind


class SlicedResiduals:
    """Builds the stock model, then slices it. The checkpoint's weights come later."""

    # makes save_pretrained copy this file and write config.auto_map
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if config._attn_implementation == UNTRUSTED:
            config._attn_implementation = None
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        slice_modules(self)


def slice_modules(model: Any) -> None:
    """Brings the modules of a stock model to the widths of `config.residual_widths`, first
    directions first, in place.

    No parameter of the model changes: those that are too wide are replaced.
    """
    config = model.config
    widths = config.residual_widths
    # Memory is taken where and as the model has it: on the meta device, for example, while a
    # checkpoint is being read.
    like = {"device": model.lm_head.weight.device, "dtype": model.lm_head.weight.dtype}
    _resize(model.model.embed_tokens, 1, widths[0])
    for index, layer in enumerate(model.model.layers):
        first, middle, last = widths[2 * index : 2 * index + 3]
        for block, output, before, behind in (
            (layer.self_attn, layer.self_attn.o_proj, first, middle),
            (layer.mlp, layer.mlp.down_proj, middle, last),
        ):
            for linear in block.children():
                if isinstance(linear, nn.Linear):
                    _resize(linear, *((0, behind) if linear is output else (1, before)))
        layer.input_layernorm = SlicedNorm(config.hidden_size, config.rms_norm_eps)
        layer.post_attention_layernorm = SlicedNorm(config.hidden_size, config.rms_norm_eps)
        layer.attention_shortcut = _shortcut(first, middle, like)
        layer.ffn_shortcut = _shortcut(middle, last, like)
        stock: Any = type(layer)
        layer.__class__ = _sliced_layer(stock)
    model.model.norm = SlicedNorm(config.hidden_size, config.rms_norm_eps)
    _resize(model.lm_head, 1, widths[-1])


def _resize(module: Any, dim: int, width: int) -> None:
    """Keeps the first `width` rows (dim 0, with their biases) or columns (dim 1) of a linear's or
    embedding's weight.
    """
    module.weight = nn.Parameter(module.weight.detach().narrow(dim, 0, width).clone())
    if dim == 0 and module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[:width].clone())
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        module.embedding_dim = width


def _shortcut(before: int, behind: int, like: dict[str, Any]) -> nn.Linear:
    linear = nn.Linear(before, behind, bias=False, device="meta")  # draws no random numbers
    linear.weight = nn.Parameter(torch.eye(behind, before, **like))
    return linear


@cache
def _sliced_layer(stock: type) -> type:
    """The stock layer's class with the other forward pass, under the same name: device maps ask for
    it.
    """
    return type(stock.__name__, (SlicedLayer, stock), {"__module__": __name__})


def _same(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def __getattr__(name: str) -> Any:
    """The sliced form of a transformers class, made when first asked for."""
    if not name.startswith(PREFIX) or not hasattr(transformers, name.removeprefix(PREFIX)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = getattr(transformers, name.removeprefix(PREFIX))
    globals()[name] = type(name, (SlicedResiduals, stock), {"__module__": __name__})
    return globals()[name]
