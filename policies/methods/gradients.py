"""Taylor importance of FFN channels: sums over weights and gradients of the calibration loss.

Source: Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, arXiv 2305.11627,
section 3.2; METHODS.md section 6.

What differs:
- a channel's bias counts as one more weight of its slice (LLaMA has none);
- the squared gradients are those of each sequence, as published; the first-order gradient is their mean, in the same passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from prunenet.architectures import Architecture, architecture_for
from prunenet.layers import check_tokens, decoder_layers


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice (gate, up or down) of every channel of a layer, one channel a row, its bias the last entry where it has one.

    Attributes:
        weight: w.
        first: g, the gradient of the mean loss.
        second: G, the mean over sequences of the squared gradient of each.
    """

    weight: Float[Tensor, "d_ff entries"]
    first: Float[Tensor, "d_ff entries"]
    second: Float[Tensor, "d_ff entries"]


@dataclass(frozen=True, slots=True)
class TaylorSums:
    """Of one layer: sums over the weights w of each slice (gate, up, down; ungated: up, down) of each channel.

    g is the gradient of the mean loss, G the mean over sequences of the squared gradient of each.

    Attributes:
        vector: sum of w g.
        element1: sum of |w g|.
        element2: sum of w^2 G.
        mix: sum of |w g - w^2 G / 2|.
    """

    vector: Float[Tensor, "slices d_ff"]
    element1: Float[Tensor, "slices d_ff"]
    element2: Float[Tensor, "slices d_ff"]
    mix: Float[Tensor, "slices d_ff"]


def draw_windows(
    ids: Int[Tensor, "n tokens"], count: int, length: int, generator: torch.Generator
) -> Int[Tensor, "count length"]:
    """`count` random windows of blocks, of different blocks as long as there are enough.

    Args:
        ids: token blocks.
        count: windows.
        length: tokens of each; no more than a block has.
        generator: on the CPU.
    """
    blocks, tokens = ids.shape
    length = min(length, tokens)
    rows = torch.cat([torch.randperm(blocks, generator=generator) for _ in range(-(-count // blocks))])[:count]
    starts = torch.randint(tokens - length + 1, (count,), generator=generator)
    return torch.stack([ids[row, start : start + length] for row, start in zip(rows, starts, strict=True)])


def next_token_loss(model: PreTrainedModel, ids: Int[Tensor, "n tokens"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of every token but the first of each sequence, in nats; differentiable."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def taylor_sums(model: PreTrainedModel, windows: Int[Tensor, "n tokens"]) -> list[TaylorSums]:
    """Of each layer. Arguments and errors: `channel_gradients`."""
    return [_sums(slices) for slices in channel_gradients(model, windows)]


def channel_gradients(model: PreTrainedModel, windows: Int[Tensor, "n tokens"]) -> Iterator[list[Slice]]:
    """The slices (gate, up, down; ungated: up, down) of each layer, from one backward pass for each window.

    Holds two float copies of the FFN weights until the last layer is read (640 MB for SmolLM2-135M). The model's own gradients
    and flags stay as they are.

    Args:
        model: in eval mode.
        windows: (n, tokens), two tokens or more.

    Raises:
        ValueError: windows too short, or tokens that the model does not have.
    """
    check_tokens(model, windows)
    if windows.shape[1] < 2:
        raise ValueError(f"a loss needs windows of 2 tokens or more, got {windows.shape[1]}")
    architecture = architecture_for(model.config)
    parameters = [_parameters(layer, architecture) for layer in decoder_layers(model, architecture)]
    flat = [parameter for layer in parameters for _, rows in layer for parameter in rows]
    first = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in flat]
    second = [torch.zeros_like(total) for total in first]
    with _only_these_learn(model, flat), torch.enable_grad():
        for window in torch.split(windows.to(model.device), 1):
            for i, gradient in enumerate(torch.autograd.grad(next_token_loss(model, window), flat)):
                first[i] += gradient / len(windows)
                second[i] += gradient.to(second[i]).square_() / len(windows)
    gradients = iter(zip(first, second, strict=True))
    return (_slices(layer, architecture, gradients) for layer in parameters)


def _parameters(layer: nn.Module, architecture: Architecture) -> list[tuple[bool, list[nn.Parameter]]]:
    """(whether channels are columns, [weight, and bias if its channels' own]) of each linear of the FFN."""
    inputs = [layer.get_submodule(path) for path in architecture.input_linears]
    found = [(False, [p for p in (linear.weight, linear.bias) if isinstance(p, nn.Parameter)]) for linear in inputs]
    down = layer.get_submodule(architecture.down).weight
    assert isinstance(down, nn.Parameter)
    return [*found, (True, [down])]


def _slices(
    layer: list[tuple[bool, list[nn.Parameter]]], architecture: Architecture, gradients: Iterator[tuple[Tensor, Tensor]]
) -> list[Slice]:
    found: list[Slice] = []
    for columns, parameters in layer:
        parts = []
        for parameter in parameters:
            first, second = next(gradients)
            parts.append([t.T if columns else t.reshape(len(t), -1) for t in (parameter.detach().to(first), first, second)])
        whole = [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]
        fused = architecture.fused and not columns
        found += [Slice(*half) for half in zip(*(t.chunk(2) for t in whole), strict=True)] if fused else [Slice(*whole)]
    return found


def _sums(slices: list[Slice]) -> TaylorSums:
    rows = [(part.weight * part.first, part.weight.square() * part.second) for part in slices]
    return TaylorSums(
        vector=torch.stack([linear.sum(1) for linear, _ in rows]),
        element1=torch.stack([linear.abs().sum(1) for linear, _ in rows]),
        element2=torch.stack([square.sum(1) for _, square in rows]),
        mix=torch.stack([(linear - square / 2).abs().sum(1) for linear, square in rows]),
    )


@contextmanager
def _only_these_learn(model: PreTrainedModel, parameters: list[nn.Parameter]) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
