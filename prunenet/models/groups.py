"""Channel groups: what can be cut of a model, tensor by tensor.

A *channel* is one entry of the vector h between the input matrices of a feed-forward network (FFN)
and its output matrix. A *group* is the channels of one FFN, or of one expert. Each tensor in which
a group lies is one `Slice`, whatever it is: a linear layer of either order, a fused gate and up
matrix, a bias, or one expert's part of a three-dimensional parameter.

A *pattern* (`Pattern`) says by names with `*` where the groups of a family are; a *knob* is the
configuration field that holds their width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Role = Literal["gate", "up", "gate_up", "down", "head"]
"""What a tensor is to the channels: its output is gate, up or both; or its input is h."""
Layout = Literal["plain", "concat", "interleaved"]
"""How two halves lie in a `gate_up`: gate rows behind one another before the up rows, or each gate
row before its up row.
"""
TensorOf = Callable[["Slice"], Tensor]
"""Gives the tensor of a slice, of an expert's slice without the axis of experts."""
_NUMBER = re.compile(
    r"(?<=\.)\d+(?=\.)(?!\.(?:weight|bias)$)"
)  # not `ffn.0.weight` of a Sequential


@dataclass(frozen=True, slots=True)
class Part:
    """Where the channels of a pattern lie in one tensor of each of its FFNs.

    Attributes:
        tensor: name in the model, `*` for each number.
        role: see `Role`.
        axis: of the channels, in the whole tensor.
        layout: see `Layout`.
    """

    tensor: str
    role: Role
    axis: int
    layout: Layout = "plain"


@dataclass(frozen=True, slots=True)
class Pattern:
    """FFNs of one form, wherever all of its matrices are.

    Attributes:
        parts: its tensors: inputs, then `down`, then biases, which a model may lack.
        knob: dotted configuration field that holds the width, or a number proportional to it; a
            list holds one number a layer, None stands for a width computed in the code. Patterns
            with one knob are tied to one width, in proportion to what they have.
        experts: whether the tensors' first axis numbers experts.
        companions: fields that must have these values for the knob to hold.
        unless: dotted field, a list by layer: where it is not 0, the layer has no such group.
    """

    parts: tuple[Part, ...]
    knob: str
    experts: bool = False
    companions: tuple[tuple[str, bool], ...] = ()
    unless: str | None = None

    @property
    def down(self) -> Part:
        """The output matrix."""
        return next(part for part in self.parts if part.role == "down")

    @property
    def matrices(self) -> tuple[Part, ...]:
        """All parts but biases."""
        return tuple(part for part in self.parts if not part.tensor.endswith("bias"))


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Where the units of a structure (FFN channels, groups of heads) lie in one tensor.

    Attributes:
        name: of the tensor in the model.
        module: that owns it.
        role, layout: see `Role` and `Layout`.
        axis: of the units, in the whole tensor.
        expert: index on the first axis; None where all of the tensor is meant.
        size: entries of a unit within a run.
    """

    name: str
    module: nn.Module
    role: Role
    axis: int
    layout: Layout = "plain"
    expert: int | None = None
    size: int = 1

    @property
    def attribute(self) -> str:
        """Name of the tensor in its module."""
        return self.name.rpartition(".")[2]

    @property
    def tensor(self) -> Tensor:
        """The slice as the module holds it now, a view."""
        whole: Tensor = getattr(self.module, self.attribute).detach()
        return whole if self.expert is None else whole[self.expert]

    def entries(self, units: Int[Tensor, " kept"], count: int) -> Int[Tensor, " entries"]:
        """The entries along the axis of some units out of `count`, in their order; -1 stays -1."""
        run = units[:, None] * self.size + torch.arange(self.size, device=units.device)
        run = torch.where(units[:, None] < 0, -1, run).flatten()
        if self.layout == "plain":
            return run
        step, shift = (1, count * self.size) if self.layout == "concat" else (2, 1)
        halves = [torch.where(run < 0, run, run * step + half * shift) for half in (0, 1)]
        return torch.cat(halves) if self.layout == "concat" else torch.stack(halves, 1).flatten()

    def laid(self, matrix: Float[Tensor, "d_model d_ff"]) -> Tensor:
        """An output matrix as it lies in this slice, of one expert's: the inverse of `halves`."""
        return matrix.T if self.axis - (self.expert is not None) == 0 else matrix

    def halves(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """A slice's tensor, channels first: (d_ff, d) or (d_ff,), of gate and up each one."""
        axis = self.axis - (self.expert is not None)
        rows = tensor if axis == 0 else tensor.T
        if self.layout == "concat":
            return tuple(rows.chunk(2))
        return (rows[::2], rows[1::2]) if self.layout == "interleaved" else (rows,)


@dataclass(frozen=True, slots=True)
class FFN:
    """The weights of one group, as views: dtype and device are the model's.

    Channel j is row j of `gate` and `up` (and of their biases) plus column j of `down`. With
    offloading these views become invalid when the layer is offloaded.

    Attributes:
        index: number of the group, from 0; that of the layer where each layer has one group.
        gate: (d_ff, d_model); None in an ungated FFN.
        up: (d_ff, d_model).
        down: (d_model, d_ff).
        gate_bias, up_bias: (d_ff,) or None.
        down_bias: (d_model,) or None.
        norm_scale: (d_model,) scale of the norm in front of the FFN; None where there is none.
        attention_out: (d_model, heads * head_dim), attention's output matrix; None if unknown, and
            in all groups of a layer but the first.
        layer: number of the decoder layer; None: `index`.
        share: of all tokens that pass through it, in (0, 1]: an expert's is top-k over experts.
    """

    index: int
    gate: Float[Tensor, "d_ff d_model"] | None
    up: Float[Tensor, "d_ff d_model"]
    down: Float[Tensor, "d_model d_ff"]
    gate_bias: Float[Tensor, " d_ff"] | None = None
    up_bias: Float[Tensor, " d_ff"] | None = None
    down_bias: Float[Tensor, " d_model"] | None = None
    norm_scale: Float[Tensor, " d_model"] | None = None
    attention_out: Float[Tensor, "d_model d_attention"] | None = None
    layer: int | None = None
    share: float = 1.0

    @property
    def d_ff(self) -> int:
        return self.up.shape[0]

    @property
    def d_model(self) -> int:
        return self.up.shape[1]

    @property
    def channel_parameters(self) -> int:
        """Parameters that go away with one channel."""
        slices = 2 if self.gate is None else 3
        biases = (self.up_bias is not None) + (self.gate_bias is not None)
        return slices * self.d_model + biases


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The channels of one FFN or of one expert.

    Attributes:
        number: among the groups of the model, from 0.
        layer: number of the decoder layer, from 0.
        path: of the output matrix in the model.
        expert: its number; None in a dense FFN.
        width: channels.
        slices: the tensors that the channels lie in.
        pattern: that it is one of.
        module: the decoder layer.
        around: norm in front, attention's output and down bias, each by its field of `FFN`, with
            what is added to it.
        share: see `FFN`.
        listed: whether the knob is a list, one number a layer.
        step: the width is a multiple of this where the knob is a whole number.
    """

    number: int
    layer: int
    path: str
    expert: int | None
    width: int
    slices: tuple[Slice, ...]
    pattern: Pattern
    module: nn.Module
    around: Mapping[str, tuple[Slice, float]] = field(default_factory=dict)
    share: float = 1.0
    listed: bool = False
    step: int = 1

    @property
    def down(self) -> Slice:
        """The slice of the output matrix."""
        return next(where for where in self.slices if where.role == "down")

    @property
    def channel_parameters(self) -> int:
        """Parameters that go away with one channel."""
        return sum(where.tensor.numel() for where in self.slices) // self.width

    def read(self, tensor_of: TensorOf = lambda where: where.tensor) -> FFN:
        """The weights of the group.

        Args:
            tensor_of: where to take tensors from; default the model in memory.
        """
        found: dict[str, Tensor] = {}
        for where in self.slices:
            rows = where.halves(tensor_of(where))
            roles = ("gate", "up") if where.role == "gate_up" else (where.role,)
            for role, values in zip(roles, rows, strict=True):
                found[role if values.dim() == 2 else f"{role}_bias"] = values
        found["down"] = found["down"].T
        for name, (where, offset) in self.around.items():
            tensor = tensor_of(where)
            found[name] = tensor + offset if name == "norm_scale" else tensor
        return FFN(
            index=self.number,
            gate=found.pop("gate", None),
            layer=self.layer,
            share=self.share,
            **found,
        )


def laid_out(downs: Sequence[Slice], matrices: Sequence[Float[Tensor, "d_model _"]]) -> Tensor:
    """The whole tensor of the output matrices of one module: of a bank, those of all experts."""
    parts = [down.laid(matrix) for down, matrix in zip(downs, matrices, strict=True)]
    return parts[0].contiguous() if downs[0].expert is None else torch.stack(parts)


def starred(name: str) -> tuple[str, tuple[int, ...]]:
    """A name with `*` for each number in it, and the numbers."""
    return _NUMBER.sub("*", name), tuple(int(found) for found in _NUMBER.findall(name))
