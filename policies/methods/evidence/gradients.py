"""Computes Taylor importance of FFN channels and groups of heads from gradients of the calibration
loss.

Source: Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS
2023, arXiv 2305.11627, section 3.2; docs/methods.md, section 6.

What differs:
- a channel's bias counts as one more weight of its slice (LLaMA has none);
- under grouped queries a head is a group: a key-value head with its query heads (authors:
  multi-head attention);
- the squared gradients are those of each sequence, as published; the first-order gradient is their
  mean, in the same passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.evaluation.losses import next_token_loss
from prunenet.models.architectures import architecture_for
from prunenet.models.heads import group_counts
from prunenet.models.hooks import requiring_grad
from prunenet.models.layers import check_tokens, decoder_layers, down_linears, plain_linear
from prunenet.runtime.placement import check_together, home


@dataclass(frozen=True, slots=True)
class Slice:
    """Holds one slice (gate, up or down) of every channel of a layer, one channel a row.

    The last entry of a row is the channel's bias, where it has one.

    Attributes:
        weight: w.
        first: g, the gradient of the mean loss.
        second: G, the mean over sequences of each sequence's squared gradient.
    """

    weight: Float[Tensor, "d_ff entries"]
    first: Float[Tensor, "d_ff entries"]
    second: Float[Tensor, "d_ff entries"]


@dataclass(frozen=True, slots=True)
class TaylorSums:
    """Holds sums over the weights w of each slice of each structure of a layer.

    The slices of a channel are its gate, up and down weights (ungated: up, down). Those of a group
    of heads are its rows of the query, key and value matrices and its columns of the output matrix.
    g is the gradient of the mean loss, G the mean over sequences of each one's squared gradient.

    Attributes:
        vector: sum of w g.
        element1: sum of |w g|.
        element2: sum of w^2 G.
        mix: sum of |w g - w^2 G / 2|.
    """

    vector: Float[Tensor, "slices structures"]
    element1: Float[Tensor, "slices structures"]
    element2: Float[Tensor, "slices structures"]
    mix: Float[Tensor, "slices structures"]


def draw_windows(
    ids: Int[Tensor, "n tokens"],
    count: int,
    length: int,
    generator: torch.Generator,
    *,
    bos: int | None = None,
) -> Int[Tensor, "count drawn"]:
    """`count` random windows of blocks, of different blocks as long as there are enough.

    Args:
        ids: token blocks.
        count: windows.
        length: tokens of each; no more than a block has.
        generator: on the CPU.
        bos: id of the BOS token that blocks begin with; windows then begin with it too, besides
            their `length` tokens.
    """
    if bos is not None:
        ids = ids[:, 1:]
    blocks, tokens = ids.shape
    length = min(length, tokens)
    rows = torch.cat(
        [torch.randperm(blocks, generator=generator) for _ in range(-(-count // blocks))]
    )[:count]
    starts = torch.randint(tokens - length + 1, (count,), generator=generator)
    found = torch.stack(
        [ids[row, start : start + length] for row, start in zip(rows, starts, strict=True)]
    )
    return found if bos is None else torch.cat((torch.full_like(found[:, :1], bos), found), 1)


def taylor_sums(model: PreTrainedModel, windows: Int[Tensor, "n tokens"]) -> list[TaylorSums]:
    """Computes the Taylor sums of each layer's channels; arguments as for `channel_gradients`."""
    return [_sums(slices) for slices in channel_gradients(model, windows)]


def group_taylor_sums(model: PreTrainedModel, windows: Int[Tensor, "n tokens"]) -> list[TaylorSums]:
    """Computes the Taylor sums of each layer's groups of heads.

    Arguments and errors are those of `channel_gradients` and `prunenet.models.heads`.
    """
    counts, architecture = group_counts(model), architecture_for(model.config)
    parameters = [
        _parameters(layer, architecture.attention_in, architecture.attention_out)
        for layer in decoder_layers(model, architecture)
    ]
    gradients = _gradients(model, windows, parameters)
    layers = [_slices(layer, False, gradients) for layer in parameters]
    return [_sums(slices, count) for slices, count in zip(layers, counts, strict=True)]


def channel_gradients(
    model: PreTrainedModel, windows: Int[Tensor, "n tokens"]
) -> Iterator[list[Slice]]:
    """Yields the slices (gate, up, down; ungated: up, down) of each layer with their gradients.

    Takes one backward pass for each window. Memory holds two float copies of the FFN weights until
    the last layer is read (640 MB for SmolLM2-135M). The model's own gradients and flags stay as
    they are.

    Args:
        model: in eval mode.
        windows: (n, tokens), two tokens or more.

    Raises:
        ValueError: windows too short, or tokens that the model does not have.
    """
    architecture = architecture_for(model.config)
    down_linears(model)  # refuses what is none
    layers = decoder_layers(model, architecture)
    parameters = [
        _parameters(layer, architecture.input_linears, architecture.down) for layer in layers
    ]
    gradients = _gradients(model, windows, parameters)
    return (_slices(layer, architecture.fused, gradients) for layer in parameters)


def _gradients(
    model: PreTrainedModel,
    windows: Int[Tensor, "n tokens"],
    parameters: list[list[tuple[bool, list[nn.Parameter]]]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the gradient of the mean loss, and the mean squared gradient, of each parameter."""
    check_together(model, "a method that reads gradients")
    check_tokens(model, windows)
    if windows.shape[1] < 2:
        raise ValueError(f"a loss needs windows of 2 tokens or more, got {windows.shape[1]}")
    flat = [parameter for layer in parameters for _, rows in layer for parameter in rows]
    first = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in flat]
    second = [torch.zeros_like(total) for total in first]
    with requiring_grad(model, flat), torch.enable_grad():
        for window in torch.split(windows.to(home(model)), 1):
            for i, gradient in enumerate(torch.autograd.grad(next_token_loss(model, window), flat)):
                first[i] += gradient / len(windows)
                second[i] += gradient.to(second[i]).square_() / len(windows)
    return iter(zip(first, second, strict=True))


def _parameters(
    layer: nn.Module, inputs: Sequence[str], output: str
) -> list[tuple[bool, list[nn.Parameter]]]:
    """Lists the linears of an FFN, or of attention.

    Returns:
        For each: whether its channels are columns; its weight, and its bias where that belongs to
        the channels.
    """
    linears = [plain_linear(layer, path) for path in inputs]
    found = [
        (False, [p for p in (linear.weight, linear.bias) if isinstance(p, nn.Parameter)])
        for linear in linears
    ]
    columns = plain_linear(layer, output).weight
    assert isinstance(columns, nn.Parameter)
    return [*found, (True, [columns])]


def _slices(
    layer: list[tuple[bool, list[nn.Parameter]]],
    fused: bool,
    gradients: Iterator[tuple[Tensor, Tensor]],
) -> list[Slice]:
    found: list[Slice] = []
    for columns, parameters in layer:
        parts = []
        for parameter in parameters:
            first, second = next(gradients)
            parts.append(
                [
                    t.T if columns else t.reshape(len(t), -1)
                    for t in (parameter.detach().to(first), first, second)
                ]
            )
        whole = [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]
        halves = zip(*(t.chunk(2) for t in whole), strict=True)
        found += [Slice(*half) for half in halves] if fused and not columns else [Slice(*whole)]
    return found


def _sums(slices: list[Slice], groups: int | None = None) -> TaylorSums:
    """Sums over each channel, or over so many groups of neighbouring rows of every matrix."""
    rows = [(part.weight * part.first, part.weight.square() * part.second) for part in slices]

    def stacked(sums: list[Tensor]) -> Tensor:
        return (
            torch.stack(sums)
            if groups is None
            else torch.cat([row.view(groups, -1).T for row in sums])
        )

    return TaylorSums(
        vector=stacked([linear.sum(1) for linear, _ in rows]),
        element1=stacked([linear.abs().sum(1) for linear, _ in rows]),
        element2=stacked([square.sum(1) for _, square in rows]),
        mix=stacked([(linear - square / 2).abs().sum(1) for linear, square in rows]),
    )
