"""States what is Gemma's own in the words of llama.cpp: windows of attention, capped logits, two
bases of rotation.

llama.cpp decides some of it by itself: which layers see a window, and by the number of layers how
queries are scaled.

Source: docs/methods.md, section 20; llama.cpp of October 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunenet.models.heads import HEAD_DIM, QUERY_HEADS
from prunenet.runtime.files import CheckpointError

_LARGE = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the one size whose queries are scaled by d_model / heads and not by head_dim."""
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def check_layers(config: Any, period: int) -> None:
    """Checks that llama.cpp computes attention as a Gemma's configuration says.

    Args:
        config: of a gemma, gemma2 or gemma3_text.
        period: of how many layers all but the last see a window; 0: llama.cpp has no window here.

    Raises:
        CheckpointError: it computes otherwise.
    """
    if getattr(config, "attention_bias", False):
        raise CheckpointError("llama.cpp computes a Gemma's attention without biases")
    if period == 0:
        return
    layers = range(config.num_hidden_layers)
    expected = [
        "full_attention" if i % period == period - 1 else "sliding_attention" for i in layers
    ]
    if list(config.layer_types) != expected:
        seeing = [i for i in layers if config.layer_types[i] != "sliding_attention"]
        raise CheckpointError(
            f"llama.cpp lets every {period}th layer of a {config.model_type} see all tokens, and"
            f" this model layers {seeing}"
        )
    scaled = int(getattr(config, HEAD_DIM))
    if config.num_hidden_layers == _LARGE[config.model_type]:
        scaled = config.hidden_size // getattr(config, QUERY_HEADS)
    if config.query_pre_attn_scalar != scaled:
        raise CheckpointError(
            f"llama.cpp divides queries of a {config.model_type} by the root of {scaled}, and this"
            f" model by that of {config.query_pre_attn_scalar}"
        )


def hyperparameters(config: Any) -> dict[str, bool | int | float | str]:
    """Returns what the file says of windows, caps and rotation, by keys without the architecture's
    name.
    """
    stated: dict[str, bool | int | float | str] = {
        "attention.sliding_window": int(config.sliding_window)
    }
    stated |= {name: float(cap) for name in _CAPS if (cap := getattr(config, name)) is not None}
    rope: Mapping[str, Any] = config.rope_parameters
    if "sliding_attention" in rope:
        stated["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        whole = rope["full_attention"]
        if whole["rope_type"] == "linear":
            stated |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(whole["factor"])}
    return stated
