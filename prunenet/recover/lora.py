"""Low-rank updates beside the linears of a model, by peft: put there, and merged into the weights.

Source: Hu et al., arXiv 2106.09685, section 4.1: W x + s B A x, with A drawn and B zeros at first.
What differs: `prunenet.recover`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunenet.models.layers import decoder_layers

_SCALE = 2  # s, of an update of any rank: peft's alpha over the rank


def adapted(model: PreTrainedModel, rank: int, seed: int) -> PreTrainedModel:
    """A copy with a low-rank update beside every linear of its decoder layers, but for those of
    attention without heads; it changes nothing yet.

    The weights themselves lie where the given model's lie. Updates are held in float32 (or better).

    Raises:
        ImportError: peft is not installed.
        ValueError: the rank is above the smaller side of every linear, where it adds nothing; or
            there is no linear.
    """
    peft = load_peft()
    linears = _linears(model)
    if not linears:
        raise ValueError("no decoder layer has a linear to update; give `updates` full")
    most = max(min(linear.weight.shape) for linear in linears)
    if rank > most:
        raise ValueError(
            f"`rank` must be at most {most}, the smaller side of the largest linear, got {rank}"
        )
    # Other parameters on the same memory: peft switches gradients off, and the given model's flags
    # stay as they are.
    shared: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    student = copy.deepcopy(model, shared)
    # the layers alone: of a whole mixture peft takes names for those of fused experts
    layers, inside = decoder_layers(student), {*_linears(student)}
    names = [name for name, module in layers.named_modules() if module in inside]
    turned = any(isinstance(linear, Conv1D) for linear in linears)  # its weight is (in, out)
    config = peft.LoraConfig(
        r=rank, lora_alpha=_SCALE * rank, target_modules=names, fan_in_fan_out=turned
    )
    # peft draws from the global generator; what it draws is replaced
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(config, layers)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        update: Any = layers.get_submodule(name)
        down, up = update.lora_A["default"].weight, update.lora_B["default"].weight
        dtype = torch.promote_types(down.dtype, torch.float32)
        start = (2 * torch.rand(down.shape, generator=generator) - 1) * down.shape[1] ** -0.5
        down.data, up.data = start.to(down.device, dtype), torch.zeros_like(up, dtype=dtype)
    return student


def _linears(model: PreTrainedModel) -> list[nn.Linear | Conv1D]:
    """Those of the decoder layers, without empty ones."""
    found = (m for m in decoder_layers(model).modules() if isinstance(m, nn.Linear | Conv1D))
    return [linear for linear in found if linear.weight.numel()]


def updates_of(student: PreTrainedModel) -> nn.ParameterList:
    """What is trained of a student: of `adapted` the updates in the order of the linears, (rank,
    d_in) and (d_out, rank) in turn.
    """
    return nn.ParameterList(p for p in student.parameters() if p.requires_grad)


@torch.no_grad()
def merged(student: PreTrainedModel) -> PreTrainedModel:
    """The model of `adapted` with its updates added to the weights, in float32 and rounded once; in
    place.

    New weights are made for those linears: the model that was given to `adapted` stays as it is.
    """
    for name, module in list(student.named_modules()):
        if hasattr(module, "lora_A"):
            update: Any = module
            linear: nn.Linear | Conv1D = update.get_base_layer()
            delta = update.get_delta_weight("default")
            linear.weight = nn.Parameter(
                (linear.weight.to(delta) + delta).to(linear.weight), requires_grad=False
            )
            parent, _, last = name.rpartition(".")
            setattr(student.get_submodule(parent), last, linear)
    vars(decoder_layers(student)).pop("peft_config", None)
    return student.requires_grad_(True)


def load_peft() -> Any:
    """The library. Raises ImportError, with the extra to install, where it is not there."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"recovery needs peft ({error}); pip install 'prunenet[recover]'"
        ) from error
    return peft
