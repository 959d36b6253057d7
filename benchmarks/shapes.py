"""The shapes of real models, and random models of them, for benchmarks that need no trained
weights.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, int | bool]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def config_of(shape: str, layers: int | None = None) -> LlamaConfig:
    """The configuration of a shape; `layers`: in place of its own number."""
    return LlamaConfig(**SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers}))


def random_model(
    shape: str,
    layers: int | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A model with weights of standard deviation 0.02, made where it stays."""
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config_of(shape, layers))
    finally:
        torch.set_default_dtype(usual)
    return model.eval().requires_grad_(False)


def parameters_of(shape: str) -> tuple[int, int]:
    """(parameters of the whole model, of one decoder layer)."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(shape, 1))
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    return sum(parameter.numel() for parameter in model.parameters()) + layer * (
        config_of(shape).num_hidden_layers - 1
    ), layer
