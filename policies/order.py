"""Sorts the channels of a dense model by a policy, so that every uniform size is a prefix.

The sorted model computes the same function. Masks nest as the ratio rises, so its first channels at
any width are those that `prune` keeps at that width: one folder holds every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.identity import base_of
from prunenet.checkpoints.provenance import How, Provenance
from prunenet.checkpoints.save import save_pruned
from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.layers import ffn_widths
from prunenet.models.surgery import pick
from prunenet.policies.artifact import Policy
from prunenet.runtime.files import write_atomic
from prunenet.runtime.floats import dtype_name
from prunenet.runtime.own_files import packed
from prunenet.runtime.placement import shared_copy

ORDER = "prunenet_order.safetensors"
"""File of the channels' numbers in the dense model, layer by layer, in their new order."""


def order_of(model: PreTrainedModel, policy: Policy) -> list[Int[Tensor, " d_ff"]]:
    """Returns each layer's channels, the one that stays longest first; ties by their number.

    Args:
        model: of a supported family.
        policy: reads weights alone.

    Raises:
        ValueError, UnsupportedArchitecture: as `Policy.scores`.
    """
    policy.check_measured(False)
    return [
        torch.sort(scores, descending=True, stable=True).indices for scores in policy.scores(model)
    ]


def ordered(model: PreTrainedModel, order: Sequence[Int[Tensor, " d_ff"]]) -> PreTrainedModel:
    """Returns a model whose channels stand in another order; the given one stays as it is.

    Args:
        model: of a supported family.
        order: of each layer, the channel that comes to each place.
    """
    sorted_copy = Anatomy.of(shared_copy(model))
    pick(
        [
            (group.slices, channels, group.width)
            for group, channels in zip(sorted_copy.groups, order, strict=True)
        ]
    )
    return sorted_copy.model


def save_ordered(
    model: PreTrainedModel,
    out: str | Path,
    policy: Policy,
    *,
    policy_name: str = "policy",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Writes the sorted model as a checkpoint whose card says how a size is sliced from it.

    Args:
        model: the dense one, in memory.
        out: folder to create.
        policy, policy_name: sorts, and is recorded.
        tokenizer: as for `save_pruned`.

    Raises:
        CheckpointError, ValueError: as `save_pruned` and `order_of`.
        UnsupportedArchitecture: its layers are not one FFN of linear layers each.
    """
    anatomy = Anatomy.of(model)
    plain = all(isinstance(group.down.module, nn.Linear) for group in anatomy.groups)
    if not anatomy.architecture.per_layer or not plain:
        raise UnsupportedArchitecture(
            f"a {type(model).__name__} is not one FFN of linear layers in each layer, so no size"
            " is sliced from it in few lines; cut each size by `prune`"
        )
    order = order_of(model, policy)
    sorted_model = ordered(model, order)
    made = Provenance.of(
        model,
        sorted_model,
        policy=policy_name,
        policy_sha256=policy.sha256,
        seed=policy.config.recipe.get("seed"),
        regime=policy.config.regime,
        ratio=0.0,
        how=How(dtype=dtype_name(model.dtype), widths="ordered", channels="policy"),
        **base_of(model),
    )
    keep = [torch.ones(width, dtype=torch.bool) for width in ffn_widths(model)]
    folder = save_pruned(
        sorted_model, out, keep, made, tokenizer=tokenizer, card_text=slicing_text(model)
    )
    rows = {f"layers.{i}.order": row.to("cpu", torch.int32) for i, row in enumerate(order)}
    write_atomic(folder / ORDER, packed(rows))
    return folder


def slicing_text(model: PreTrainedModel) -> str:
    """Returns Markdown that says how any size is sliced from the sorted model, without prunenet."""
    row, half = Anatomy.of(model).architecture, ffn_widths(model)[0] // 2
    parts = 2 if row.fused else 1
    inputs = ", ".join(f'"{path}"' for path in row.input_linears)
    return f"""## Every size by slicing

In each FFN the channels stand in the order in which they are cut. The first `width` are a model of
that size (multiples of 32 quantise, of 64 to 128 please GPUs); no other code is needed:

```python
import torch
from transformers import AutoModelForCausalLM

model, width = AutoModelForCausalLM.from_pretrained("path/to/this/folder"), {half}
for layer in model.get_submodule("{row.layers}"):
    down = layer.get_submodule("{row.down}")
    down.weight, down.in_features = torch.nn.Parameter(down.weight[:, :width].clone()), width
    for linear in map(layer.get_submodule, [{inputs}]):
        for name, rows in list(linear.named_parameters()):
            kept = torch.cat([part[:width] for part in rows.chunk({parts})])
            setattr(linear, name, torch.nn.Parameter(kept))
        linear.out_features = width * {parts}
model.config.{row.width} = width
model.save_pretrained("smaller")
```
"""
