"""The anatomy of a causal language model: its decoder layers and what can be cut of each.

`Anatomy.of` resolves a model's row of `prunenet.models.architectures` once: dotted paths become
modules. Statistics read a layer as an `FFN`; surgery and streaming read it as `Slice`s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.architectures import (
    Architecture,
    UnsupportedArchitecture,
    architecture_for,
    check_heads,
)
from prunenet.runtime.placement import present


@dataclass(frozen=True, slots=True)
class FFN:
    """The weights of one layer's feed-forward network, as views: dtype and device are the model's.

    Channel j is row j of `gate` and `up` (and of their biases) plus column j of `down`. With
    offloading these views become invalid when the layer is offloaded.

    Attributes:
        index: layer number, from 0.
        gate: (d_ff, d_model); None in an ungated FFN.
        up: (d_ff, d_model).
        down: (d_model, d_ff).
        gate_bias, up_bias: (d_ff,) or None.
        down_bias: (d_model,) or None.
        norm_scale: (d_model,) scale of the norm in front of the FFN; None where there is none.
        attention_out: (d_model, heads * head_dim), attention's output matrix; None if unknown.
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
class Slice:
    """Where the units of a structure (FFN channels, groups of heads) lie in one linear.

    Attributes:
        path: of the linear, from the decoder layer.
        linear: the module.
        axis: 0, units are rows (and entries of the bias); 1, units are columns.
        parts: how many runs of all units lie behind one another (2: gate and up in one linear).
        size: rows or columns of a unit within a run.
    """

    path: str
    linear: nn.Linear
    axis: int
    parts: int = 1
    size: int = 1

    def entries(self, units: Int[Tensor, " kept"], count: int) -> Int[Tensor, " entries"]:
        """The rows or columns of some units out of `count`, in their order; -1 stays -1."""
        run = units[:, None] * self.size + torch.arange(self.size, device=units.device)
        run = torch.where(units[:, None] < 0, -1, run).flatten()
        shift = count * self.size
        runs = [torch.where(run < 0, run, run + part * shift) for part in range(self.parts)]
        return torch.cat(runs)


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLayer:
    """One decoder layer: its modules that can be cut, found by the paths of its architecture.

    Attributes:
        index: layer number, from 0.
        module: the layer.
        architecture: where its parts are.
        down: the linear d_ff -> d_model, whose input is the activations h of the FFN's channels.
    """

    index: int
    module: nn.Module
    architecture: Architecture
    down: nn.Linear

    @property
    def path(self) -> str:
        """Of the layer, from the causal LM."""
        return f"{self.architecture.layers}.{self.index}"

    @property
    def width(self) -> int:
        """FFN channels."""
        return self.down.in_features

    def linear(self, path: str) -> nn.Linear:
        """The linear at a path of this layer. Raises as `plain_linear`."""
        return plain_linear(self.module, path)

    def channels(self) -> list[Slice]:
        """Where the FFN's channels lie: the linears that write them, then the one that reads."""
        row = self.architecture
        parts = 2 if row.fused else 1
        made = [Slice(path, self.linear(path), 0, parts) for path in row.input_linears]
        return [*made, Slice(row.down, self.down, 1)]

    def groups(self, count: int) -> list[Slice]:
        """Where the `count` groups of heads lie: query, key, value and output linears."""
        row = self.architecture
        made = [(path, self.linear(path)) for path in row.attention_in]
        out = self.linear(row.attention_out)
        return [
            *(Slice(path, part, 0, size=part.out_features // count) for path, part in made),
            Slice(row.attention_out, out, 1, size=out.in_features // count),
        ]

    def read(self) -> FFN:
        """The FFN's weights, as views on what the modules hold now."""
        row = self.architecture
        up = self.linear(row.up)
        attention = _find(self.module, (row.attention_out,))
        scale = getattr(_find(self.module, row.norms), "weight", None)
        up_weight, up_bias = up.weight.detach(), _detached(up.bias)
        gate_weight, gate_bias = None, None
        if row.fused:
            gate_weight, up_weight = up_weight.chunk(2)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
        elif row.gate is not None:
            gate = self.linear(row.gate)
            gate_weight, gate_bias = gate.weight.detach(), _detached(gate.bias)
        return FFN(
            index=self.index,
            gate=gate_weight,
            up=up_weight,
            down=self.down.weight.detach(),
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=_detached(self.down.bias),
            norm_scale=scale.detach() + row.norm_offset if isinstance(scale, Tensor) else None,
            attention_out=attention.weight.detach() if isinstance(attention, nn.Linear) else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Anatomy:
    """A model's decoder layers, resolved once. Holds modules and no weights of its own.

    Attributes:
        model: the causal LM, or its skeleton on the meta device.
        architecture: its row.
        layers: first to last.
    """

    model: PreTrainedModel
    architecture: Architecture
    layers: tuple[DecoderLayer, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Anatomy:
        """Resolves a model.

        Raises:
            UnsupportedArchitecture: the model type has no row, the model is not the family's causal
                LM, or an FFN's output matrix is no plain linear layer.
        """
        row = architecture_for(model.config)
        layers = tuple(
            DecoderLayer(index, layer, row, plain_linear(layer, row.down))
            for index, layer in enumerate(decoder_layers(model, row))
        )
        return cls(model, row, layers)

    @property
    def widths(self) -> list[int]:
        """FFN channels of each layer."""
        return [layer.width for layer in self.layers]

    @property
    def downs(self) -> list[nn.Linear]:
        """The linear d_ff -> d_model of each layer."""
        return [layer.down for layer in self.layers]

    @property
    def outs(self) -> list[nn.Linear]:
        """Attention's output linear of each layer.

        Raises:
            UnsupportedArchitecture: heads of this family cannot be cut.
        """
        check_heads(self.architecture)
        return [layer.linear(self.architecture.attention_out) for layer in self.layers]

    def check_whole(self) -> None:
        """Raises UnsupportedArchitecture where the residual stream is sliced."""
        check_whole(self.model)

    def ffn(self, index: int) -> FFN:
        """The FFN of one layer. Raises as `check_whole`."""
        self.check_whole()
        layer = self.layers[index]
        with present(layer.module):
            return layer.read()

    def ffns(self) -> Iterator[FFN]:
        """The FFN of each layer, first to last. Raises as `check_whole`."""
        return (self.ffn(index) for index in range(len(self.layers)))


def decoder_layers(
    model: PreTrainedModel, architecture: Architecture | None = None
) -> nn.ModuleList:
    """The decoder layers of a causal LM.

    Raises:
        UnsupportedArchitecture: the model type has no row, or the model is not the family's causal
            LM.
    """
    architecture = architecture or architecture_for(model.config)
    try:
        layers = model.get_submodule(architecture.layers)
    except AttributeError:
        raise UnsupportedArchitecture(
            f"a {type(model).__name__} has no {architecture.layers!r}; load it with"
            " AutoModelForCausalLM"
        ) from None
    assert isinstance(layers, nn.ModuleList)
    return layers


def check_whole(model: PreTrainedModel) -> None:
    """Raises UnsupportedArchitecture where the residual stream is sliced: the FFNs of such a model
    read and write different directions.
    """
    if hasattr(model.config, "residual_widths"):
        raise UnsupportedArchitecture(
            f"a {type(model).__name__} has a sliced residual stream and is not cut any further;"
            " give the dense model"
        )


def plain_linear(layer: nn.Module, path: str) -> nn.Linear:
    """The linear at a path of a layer.

    Raises:
        UnsupportedArchitecture: it is of another kind, as in a quantised model.
    """
    module = layer.get_submodule(path)
    if not isinstance(module, nn.Linear) or not isinstance(module.weight, nn.Parameter):
        raise UnsupportedArchitecture(
            f"{path} is a {type(module).__name__}, not a plain linear layer; load the model"
            " unquantised"
        )
    return module


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _find(layer: nn.Module, paths: tuple[str, ...]) -> nn.Module | None:
    """The first module that stands at one of the paths."""
    for path in paths:
        try:
            module = layer.get_submodule(path)
        except AttributeError:
            continue
        if module is not None:
            return module
    return None
