"""Walks a model and yields the FFN of one decoder layer at a time: views on weights in memory, or
copies read from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from prunenet.models.architectures import Architecture, UnsupportedArchitecture, architecture_for
from prunenet.runtime.placement import parameters, present, ties


@dataclass(frozen=True, slots=True)
class FFN:
    """The weights of one layer's FFN. Tensors are views: nothing is copied, dtype and device are
    the model's.

    Of a placed model (`prunenet.runtime.placement`) they may be the only copy on the layer's
    device, and go with it.

    Channel j is row j of `gate` and `up` (and of their biases) plus column j of `down`.

    Attributes:
        index: layer number, from 0.
        gate: (d_ff, d_model); None in an ungated FFN.
        up: (d_ff, d_model).
        down: (d_model, d_ff).
        gate_bias, up_bias: (d_ff,) or None.
        down_bias: (d_model,) or None.
        norm_scale: (d_model,) scale of the norm in front of the FFN; None when there is none (or it
            has no scale).
        attention_out: (d_model, heads * head_dim), what attention writes to the residual stream
            with; None if unknown.
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


@runtime_checkable
class EmbeddingMatrix(Protocol):
    """Rows of an embedding matrix, (vocabulary, width): a tensor, or a
    `prunenet.checkpoints.shards.StoredTensor`.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@runtime_checkable
class Streamed(Protocol):
    """A model whose weights stay on disk and are read one layer at a time; see
    `prunenet.checkpoints.streaming.StreamedCheckpoint`.
    """

    @property
    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: structure, shapes and configuration, no weights."""
        ...

    def ffn(self, index: int) -> FFN:
        """One layer's weights, a copy; whoever lets go of it frees the memory."""
        ...

    def embeddings(self) -> tuple[EmbeddingMatrix, EmbeddingMatrix | None]:
        """As `embeddings` below."""
        ...


Weights = PreTrainedModel | Streamed


def structure(model: Weights) -> PreTrainedModel:
    """The model, or what stands for it where its weights are on disk: shapes and configuration, to
    read no weight from.
    """
    return model if isinstance(model, PreTrainedModel) else model.skeleton


def ffn_at(model: Weights, index: int) -> FFN:
    """The FFN of one layer.

    Raises:
        UnsupportedArchitecture: see `decoder_layers`; or the residual stream is sliced
            (`prunenet.models.sliced_modeling`).
    """
    check_whole(structure(model))
    if not isinstance(model, PreTrainedModel):
        return model.ffn(index)
    architecture = architecture_for(model.config)
    layer = decoder_layers(model, architecture)[index]
    with present(layer):
        return read_ffn(layer, index, architecture)


def embeddings(model: Weights) -> tuple[EmbeddingMatrix, EmbeddingMatrix | None]:
    """(input embeddings, output embeddings); the second is None where it is the first, or where
    there is none.
    """
    if not isinstance(model, PreTrainedModel):
        return model.embeddings()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None and any(model.get_parameter(name) is head.weight for name in ties(model)):
        head = None
    with present(table, *(() if head is None else (head,))):
        rows = table.get_parameter("weight").detach()
        columns = None if head is None else head.get_parameter("weight").detach()
    return rows, None if columns is None or columns.data_ptr() == rows.data_ptr() else columns


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


def read_ffn(layer: nn.Module, index: int, architecture: Architecture) -> FFN:
    """The FFN of one decoder layer, as views."""
    up = plain_linear(layer, architecture.up)
    down = plain_linear(layer, architecture.down)
    attention = _find(layer, (architecture.attention_out,))
    norm = _find(layer, architecture.norms)
    scale = getattr(norm, "weight", None)
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None
    if architecture.fused:
        gate_weight, up_weight = up.weight.detach().chunk(2)
        gate_bias, up_bias = (None, None) if up.bias is None else up.bias.detach().chunk(2)
    else:
        gate = None if architecture.gate is None else plain_linear(layer, architecture.gate)
        gate_weight, gate_bias = (
            (None, None) if gate is None else (gate.weight.detach(), _detached(gate.bias))
        )
        up_weight, up_bias = up.weight.detach(), _detached(up.bias)
    return FFN(
        index=index,
        gate=gate_weight,
        up=up_weight,
        down=down.weight.detach(),
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=_detached(down.bias),
        norm_scale=scale.detach() + architecture.norm_offset if isinstance(scale, Tensor) else None,
        attention_out=attention.weight.detach() if isinstance(attention, nn.Linear) else None,
    )


def iter_ffns(model: Weights) -> Iterator[FFN]:
    """Yields the FFN of each decoder layer, first to last.

    Raises:
        UnsupportedArchitecture: see `ffn_at`.
    """
    for index in range(len(decoder_layers(structure(model)))):
        yield ffn_at(model, index)


def check_whole(model: PreTrainedModel) -> None:
    """Raises UnsupportedArchitecture where the residual stream is sliced: FFNs then read and write
    different directions.
    """
    if hasattr(model.config, "residual_widths"):
        raise UnsupportedArchitecture(
            f"a {type(model).__name__} has a sliced residual stream and is not cut any further;"
            " give the dense model"
        )


def ffn_widths(model: Weights) -> list[int]:
    """Number of FFN channels of each layer."""
    return [linear.in_features for linear in down_linears(structure(model))]


def down_linears(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear d_ff -> d_model of each layer: its input is the FFN's channel activations h."""
    architecture = architecture_for(model.config)
    return [plain_linear(layer, architecture.down) for layer in decoder_layers(model, architecture)]


def activation(model: Weights) -> Callable[[Tensor], Tensor]:
    """The function act, element by element, of the model's FFNs: h = act(gate) * up, or act(up)
    where there is no gate.
    """
    fields = ("hidden_activation", "hidden_act", "activation_function", "activation")
    config = structure(model).config
    found = next((name for field in fields if (name := getattr(config, field, None))), "silu")
    act: Callable[[Tensor], Tensor] = ACT2FN[found]
    return act


def positions(model: PreTrainedModel) -> int | None:
    """The most tokens that a sequence of this model may have; None: no limit is known."""
    most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most


def check_positions(model: PreTrainedModel, tokens: int, what: str) -> None:
    """Raises ValueError where `tokens` exceeds the model's positions; `what` names the number to
    lower.
    """
    most = positions(model)
    if most is not None and tokens > most:
        raise ValueError(
            f"{what} is {tokens} tokens, more than the {most} positions of this model; ask for"
            " fewer"
        )


def check_tokens(model: PreTrainedModel, ids: Int[Tensor, "n tokens"]) -> None:
    """Raises ValueError where the model has no embedding for a token id, or no position for a
    token.
    """
    table: Any = model.get_input_embeddings()
    rows = table.weight.shape[0]
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(
            f"token id {high if high >= rows else low} is beyond the model's {rows} embeddings;"
            " give the model its own tokenizer"
        )
    check_positions(model, ids.shape[1], "a block")


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(total, non-embedding) parameters; tied tensors count once, and an untied LM head counts as
    an embedding.
    """
    counts = {id(parameter): parameter.numel() for _, parameter in parameters(model)}
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    tables = {id(module.weight) for module in modules if module is not None}
    total = sum(counts.values())
    return total, total - sum(counts.get(table, 0) for table in tables)


def plain_linear(layer: nn.Module, path: str) -> nn.Linear:
    """The linear at a path of a layer; raises UnsupportedArchitecture where it is of another kind,
    as when quantised.
    """
    module = layer.get_submodule(path)
    if not isinstance(module, nn.Linear) or not isinstance(module.weight, torch.nn.Parameter):
        raise UnsupportedArchitecture(
            f"{path} is a {type(module).__name__}, not a plain linear layer; load the model"
            " unquantised"
        )
    return module


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _find(layer: nn.Module, paths: tuple[str, ...]) -> nn.Module | None:
    for path in paths:
        try:
            module = layer.get_submodule(path)
        except AttributeError:
            continue
        if module is not None:
            return module
    return None
