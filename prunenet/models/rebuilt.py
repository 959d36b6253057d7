"""Models newly built around the weights of others.

transformers remembers on a model how it was read: quantised, converted, renamed. When such a model
is saved, it tries to undo that; of one dequantised from MXFP4 it writes other experts, and says
nothing. A new model has no such memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rebuilt(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Returns a model of the same class that takes over the weights of another.

    Args:
        model: its parameters are the new one's.
        config: of the new one; states the shapes that the weights have.
    """
    kind: Any = type(model)
    config = copy.deepcopy(config)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        made: PreTrainedModel = kind(config)
    made.load_state_dict(model.state_dict(), strict=True, assign=True)
    made.tie_weights()
    computed = dict(model.named_buffers())
    for name, buffer in list(made.named_buffers()):
        if buffer.is_meta:  # not stored, such as rotary frequencies
            module, _, own = name.rpartition(".")
            made.get_submodule(module)._buffers[own] = computed[name]
    made.generation_config = model.generation_config
    made.requires_grad_(True).train(model.training)
    return made


def forget_quantisation(model: PreTrainedModel) -> bool:
    """Makes a model whose weights are plain numbers an ordinary one; says whether they are."""
    quantised = vars(model).get("hf_quantizer") is not None
    if quantised and not all(
        type(p) is torch.nn.Parameter and p.dtype in _FLOATS for p in model.parameters()
    ):
        return False
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    if quantised:
        vars(model.config).pop("quantization_config", None)
    return True
