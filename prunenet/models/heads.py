"""Attention heads as a second structure: where they are, what they cost, and how a configuration
states their number.

A *group* is what can be cut from an attention layer as one piece: a key-value head with the query
heads that read it, under multi-head attention one head. Group i is the i-th part of the rows of the
query, key and value linears and of the columns of the output linear: heads lie one after the other,
and a key-value head's query heads together. All groups have the same number of query heads, and
keep it. A layer may have no groups, and its attention then writes nothing, but for the layers of
`counting_layers`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import check_heads
from prunenet.models.groups import Group, Part, Pattern, Slice

GROUPS, QUERY_HEADS, HEAD_DIM = "num_key_value_heads", "num_attention_heads", "head_dim"
"""Configuration fields of the families whose heads can be cut."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The weights of one layer's attention. Tensors are views: nothing is copied.

    Attributes:
        index: layer number, from 0.
        query: (groups * query heads of a group * head_dim, d_model).
        key, value: (groups * head_dim, d_model).
        out: (d_model, groups * query heads of a group * head_dim).
        biases: those of query, key and value that there are.
        groups: key-value heads of this layer.
    """

    index: int
    query: Float[Tensor, "d_attention d_model"]
    key: Float[Tensor, "d_groups d_model"]
    value: Float[Tensor, "d_groups d_model"]
    out: Float[Tensor, "d_model d_attention"]
    biases: tuple[Float[Tensor, " _"], ...]
    groups: int

    @property
    def group_parameters(self) -> int:
        """Parameters that go away with one group; 0 where there is none."""
        parts = (self.query, self.key, self.value, self.out, *self.biases)
        return sum(part.numel() for part in parts) // max(self.groups, 1)

    @property
    def group_inputs(self) -> int:
        """Columns of the output linear that are one group's; 0 where there is none."""
        return self.out.shape[1] // max(self.groups, 1)


def attentions(model: PreTrainedModel) -> list[Attention]:
    """Of each decoder layer, first to last.

    Raises:
        UnsupportedArchitecture: no row for the model's type, or heads of the family cannot be cut.
    """
    anatomy, config = Anatomy.of(model), model.config
    row = anatomy.architecture
    check_heads(row)
    head_dim = getattr(config, HEAD_DIM, None) or config.hidden_size // getattr(config, QUERY_HEADS)
    found = []
    for layer in anatomy.layers:
        linears = [layer.linear(path) for path in row.attention_in]
        query, key, value = (linear.weight.detach() for linear in linears)
        biases = tuple(
            linear.bias.detach() for linear in linears if isinstance(linear.bias, nn.Parameter)
        )
        out = layer.linear(row.attention_out).weight.detach()
        found.append(Attention(layer.index, query, key, value, out, biases, len(key) // head_dim))
    return found


def group_counts(model: PreTrainedModel) -> list[int]:
    """Groups of each layer; raises as `attentions`."""
    return [attention.groups for attention in attentions(model)]


def counting_layers(config: Any) -> list[int]:
    """Layers that stock caches and masks ask for the number of tokens: the first of each kind of
    attention. These keep a group of heads.

    Args:
        config: of a text model.
    """
    kinds = getattr(config, "layer_types", None) or ["one"]
    return sorted({kinds.index(kind) for kind in kinds})


def out_linears(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear of each layer whose input is the heads' outputs; raises as `attentions`."""
    return Anatomy.of(model).outs


def head_outputs(model: PreTrainedModel) -> list[Group]:
    """What the heads of each layer give, as channels of attention's output matrix; raises as
    `attentions`.
    """
    anatomy = Anatomy.of(model)
    found = []
    for layer, linear in zip(anatomy.layers, anatomy.outs, strict=True):
        path = f"{layer.path}.{anatomy.architecture.attention_out}"
        out = Slice(f"{path}.weight", linear, "down", 1)
        pattern = Pattern((Part(out.name, "down", 1),), GROUPS)
        found.append(
            Group(
                number=layer.index,
                layer=layer.index,
                path=path,
                expert=None,
                width=linear.in_features,
                slices=(out,),
                pattern=pattern,
                module=layer.module,
            )
        )
    return found


def state_counts(config: Any, counts: Sequence[int]) -> bool:
    """Makes a configuration without per-layer fields state the groups of a model, as far as stock
    fields can.

    Where every layer has as many, and the family's own check accepts the number (Llama's wants
    query heads that divide hidden_size), stock fields say it. Otherwise they get the least number
    that is accepted and serves every layer.

    Args:
        config: changed in place, unless it says the right thing already.
        counts: groups of each layer, at most as many as the configuration states.

    Returns:
        Whether the stock fields say it all.
    """
    stated = int(getattr(config, GROUPS))
    number = stock_count(config, max(*counts, 1))
    if number != stated:
        if getattr(config, HEAD_DIM, None) is None:
            setattr(config, HEAD_DIM, config.hidden_size // getattr(config, QUERY_HEADS))
        setattr(config, QUERY_HEADS, getattr(config, QUERY_HEADS) // stated * number)
        setattr(config, GROUPS, number)
    return set(counts) == {number}


def stock_count(config: Any, least: int) -> int:
    """The smallest number of groups from `least` up to the present one that the family's
    configuration accepts.
    """
    stated = int(getattr(config, GROUPS))
    for number in range(least, stated):
        probe = copy.copy(config)
        setattr(probe, QUERY_HEADS, getattr(config, QUERY_HEADS) // stated * number)
        setattr(probe, GROUPS, number)
        try:
            probe.validate_architecture()
        except ValueError:
            continue
        return number
    return stated
