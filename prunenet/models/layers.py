"""Reads a model in memory or on disk: FFNs layer by layer, embeddings, activation, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from prunenet.models.anatomy import Anatomy
from prunenet.models.anatomy import check_whole as check_whole
from prunenet.models.anatomy import decoder_layers as decoder_layers
from prunenet.models.anatomy import plain_linear as plain_linear
from prunenet.models.architectures import UnsupportedArchitecture, architecture_for
from prunenet.models.groups import FFN as FFN
from prunenet.models.groups import Group, Slice
from prunenet.runtime.placement import parameters, present, ties

_ACTIVATIONS = (
    *("hidden_activation", "hidden_act", "activation_function", "activation"),
    *("mlp_hidden_act", "ffn_activation", "afn"),
)
"""Configuration fields that name the activation function of the FFNs."""


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
        """One group's weights, a copy; whoever lets go of it frees the memory."""
        ...

    def tensor(self, where: Slice) -> Tensor:
        """The tensor of a slice, a copy."""
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
    """The FFN of one group of channels.

    Raises:
        UnsupportedArchitecture: see `Anatomy.of`; or the residual stream is sliced.
    """
    if isinstance(model, PreTrainedModel):
        return Anatomy.of(model).ffn(index)
    check_whole(model.skeleton)
    return model.ffn(index)


def embeddings(model: Weights) -> tuple[EmbeddingMatrix, EmbeddingMatrix | None]:
    """(input embeddings, output embeddings); the second is None where it is the first, or where
    there is none.

    Raises:
        UnsupportedArchitecture: the model adds up several tables of embeddings.
    """
    if not isinstance(model, PreTrainedModel):
        return model.embeddings()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if isinstance(table, nn.ModuleList):
        raise UnsupportedArchitecture(
            f"a {type(model).__name__} has {len(table)} tables of embeddings, and the statistics"
            " that a policy reads need one; cut it without a policy"
        )
    if head is not None and any(model.get_parameter(name) is head.weight for name in ties(model)):
        head = None
    with present(table, *(() if head is None else (head,))):
        rows = table.get_parameter("weight").detach()
        columns = None if head is None else head.get_parameter("weight").detach()
    return rows, None if columns is None or columns.data_ptr() == rows.data_ptr() else columns


def ffn_reader(model: Weights) -> tuple[tuple[Group, ...], Callable[[int], FFN]]:
    """The groups of channels, and what reads the weights of one by its number: a view, or of a
    streamed model a copy. Raises as `ffn_at`.
    """
    anatomy = Anatomy.of(structure(model))
    anatomy.check_whole()
    if isinstance(model, PreTrainedModel):
        return anatomy.groups, anatomy.ffn
    return anatomy.groups, lambda number: anatomy.groups[number].read(model.tensor)


def iter_ffns(model: Weights) -> Iterator[FFN]:
    """Yields the FFN of each group of channels, first to last: of each decoder layer, or of each of
    its experts. Raises as `ffn_at`.
    """
    groups, read = ffn_reader(model)
    for group in groups:
        yield read(group.number)


def ffn_widths(model: Weights) -> list[int]:
    """Number of channels of each group. Raises as `Anatomy.of`."""
    return Anatomy.of(structure(model)).widths


def down_linears(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear d_ff -> d_model of each group; its input is the activations h of the channels.

    Raises:
        UnsupportedArchitecture: as `Anatomy.of` and `Anatomy.downs`.
    """
    return Anatomy.of(model).downs


def activation(model: Weights) -> Callable[[Tensor], Tensor]:
    """The function act, element by element, of the model's FFNs: h = act(gate) * up, or act(up)
    where there is no gate.

    Raises:
        UnsupportedArchitecture: neither the configuration nor the family's row names it.
    """
    skeleton = structure(model)
    config = text_config(skeleton)
    stated = (getattr(config, field, None) for field in _ACTIVATIONS)
    row = architecture_for(skeleton.config, type(skeleton))
    found = next((name for name in stated if name in ACT2FN), row.activation)
    if found is None and not row.found:
        found = "silu"
    if found is None:
        raise UnsupportedArchitecture(
            f"the activation function of a {type(skeleton).__name__} is not known: none of"
            f" {', '.join(_ACTIVATIONS)} in its configuration names one; cut it without a policy,"
            " or give a row to `prunenet.models.architectures.ARCHITECTURES`"
        )
    act: Callable[[Tensor], Tensor] = ACT2FN[found]
    return act


def positions(model: PreTrainedModel) -> int | None:
    """The most tokens that a sequence of this model may have; None: no limit is known."""
    most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language model: of a multimodal one, a part of its own."""
    return model.config.get_text_config()


def probe_tokens(model: PreTrainedModel, device: torch.device) -> Int[Tensor, "2 12"]:
    """Fixed token ids on which two models are compared; none stands for an image or the like."""
    ids: Tensor = (torch.arange(24, device=device) * 7919 + 11) % text_config(model).vocab_size
    special = [
        value
        for name, value in vars(model.config).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    ]
    if text_config(model) is not model.config:
        low = next(token for token in range(len(special) + 1) if token not in special)
        ids[torch.isin(ids, torch.tensor(special, device=device))] = low
    return ids.view(2, 12)


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
    token; UnsupportedArchitecture where it has several tables of embeddings.
    """
    table: Any = model.get_input_embeddings()
    if not isinstance(getattr(table, "weight", None), Tensor):
        raise UnsupportedArchitecture(
            f"a {type(model).__name__} has several tables of embeddings, so nothing is measured on"
            " text; choose channels from the weights alone (`moments` none)"
        )
    rows = table.weight.shape[0]
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(
            f"token id {high if high >= rows else low} is beyond the model's {rows} embeddings;"
            " give the model its own tokenizer"
        )
    check_positions(model, ids.shape[1], "a block")


def active_parameters(anatomy: Anatomy) -> int:
    """Parameters that one token uses: all but those of experts that it does not pass through."""
    total, _ = count_parameters(anatomy.model)
    idle = sum(
        (1 - group.share) * group.channel_parameters * group.width for group in anatomy.groups
    )
    return round(total - idle)


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(total, non-embedding) parameters; tied tensors count once, and an untied LM head counts as
    an embedding.
    """
    counts = {id(parameter): parameter.numel() for _, parameter in parameters(model)}
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    tables = {id(module.weight) for module in modules if module is not None}
    total = sum(counts.values())
    return total, total - sum(counts.get(table, 0) for table in tables)
