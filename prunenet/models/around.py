"""Describes what stands around discovered channels, for the statistics: the norm in front, the
matrix by which attention writes, and the activation function. A row without them still cuts. Also
whether the configuration states a multiple of the width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import Architecture
from prunenet.models.groups import Group
from prunenet.models.knobs import field_of
from prunenet.models.twin import D_MODEL, logits_of

_OUT = re.compile(r"att[a-z_]*\.(o_proj|out_proj|dense|c_proj|wo|o|to_out|output\.dense|proj)$")
_TRIED = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "sigmoid")


@torch.no_grad()
def described(row: Architecture, model: PreTrainedModel, ids: Tensor) -> Architecture:
    """A row with norms, attention and activation filled in as far as they are found.

    Args:
        row: of a twin.
        model: the twin.
        ids: its text.
    """
    anatomy = Anatomy.of(model, row)
    group = anatomy.groups[0]
    seen = _observed(model, ids)
    path, offset = _norm(group, anatomy, seen)
    named = [name for name, m in group.module.named_modules() if isinstance(m, nn.Linear)]
    outs = [name for name in named if _OUT.search(name)]
    stated = field_of(model.config, row.width)
    return replace(
        row,
        norms=() if path is None else (path,),
        norm_offset=offset,
        attention_out=outs[0] if outs else "",
        activation=_activation(group, seen),
        multiple=row.spelled().per_layer and stated not in (None, max(anatomy.widths)),
    )


_Seen = dict[nn.Module, tuple[Tensor, Tensor]]


def _observed(model: PreTrainedModel, ids: Tensor) -> _Seen:
    """(first input, output) of each module's first call."""
    seen: _Seen = {}

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            seen.setdefault(module, (inputs[0], output))

    hooks = [module.register_forward_hook(see) for module in model.modules()]
    try:
        logits_of(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _norm(group: Group, anatomy: Anatomy, seen: _Seen) -> tuple[str | None, float]:
    """Path in the layer of the norm whose output the FFN reads, and what it adds to its weight."""
    reads = next((where.module for where in group.slices if where.module in seen), None)
    if reads is None:
        return None, 0.0
    entering = seen[reads][0]
    for path, module in group.module.named_modules():
        weight = getattr(module, "weight", None)
        if module not in seen or not isinstance(weight, Tensor) or weight.shape != (D_MODEL,):
            continue
        inside, outside = seen[module]
        if torch.equal(outside.reshape(-1), entering.reshape(-1)):
            scaled = inside * inside.square().mean(-1, keepdim=True).rsqrt()
            added = float(torch.nan_to_num(outside / scaled - weight).median())
            return path, 1.0 if abs(added - 1) < 1e-2 else 0.0
    return None, 0.0


def _activation(group: Group, seen: _Seen) -> str | None:
    """The function between the input matrices and the output matrix, measured; None where it is
    none of transformers' or where experts hide it.
    """
    down = group.down.module
    if group.expert is not None or down not in seen:
        return None
    inner = seen[down][0].flatten(0, -2)
    rows = {}
    for where in group.slices:
        if where.role != "down" and where.module in seen:
            rows[where.role] = seen[where.module][1].flatten(0, -2)
    if "gate_up" in rows:
        fused = next(where for where in group.slices if where.role == "gate_up")
        halves = (
            rows["gate_up"].chunk(2, -1)
            if fused.layout == "concat"
            else (rows["gate_up"][..., ::2], rows["gate_up"][..., 1::2])
        )
        pair: Sequence[Tensor] = halves
    else:
        pair = [rows[role] for role in ("gate", "up") if role in rows]
    for name in _TRIED:
        made = ACT2FN[name](pair[0]) * (pair[1] if len(pair) == 2 else 1)
        if made.shape == inner.shape and torch.allclose(made, inner, rtol=1e-6, atol=1e-9):
            return name
    return None
