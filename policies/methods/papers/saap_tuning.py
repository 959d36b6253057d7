"""Group-wise fine-tuning of a pruned model: what SAAP does after the cut.

Source: Zheng et al. (SAAP), arXiv 2412.15127, which fine-tunes by groups; METHODS.md section 8.
[rec], our reconstruction: the recipe is that of Xu et al., "QA-LoRA: Quantization-Aware Low-Rank
Adaptation of Large Language Models", ICLR 2024, arXiv 2309.14717. Each row of a weight matrix is
quantised in groups of 32 inputs, w = offset + step q with q in 0 .. 15, and a low-rank update acts
on inputs pooled over the same groups, so that after training it is merged into the offsets: the
model stays 4-bit.

What differs:
- weights are stored dequantised, in the model's dtype (no packed 4-bit format): the fine-tuned
  model loads as any other does;
- pooling is a mean, so that the size of an update does not depend on that of a group; a last,
  smaller group is pooled alone;
- a bounded number of AdamW steps with a linearly falling learning rate, on the caller's blocks;
  `bits=None` skips quantisation, to tell its cost from what the training brings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from prunenet.evaluation.losses import next_token_loss
from prunenet.models.layers import check_tokens, decoder_layers
from prunenet.runtime.placement import home


@dataclass(frozen=True, slots=True, eq=False)
class GroupTuned:
    """A fine-tuned model.

    Attributes:
        model: the linears of its decoder layers are its own, everything else is shared with the
            model given.
        losses: of each step's blocks, before the step; nats per token.
    """

    model: PreTrainedModel
    losses: list[float]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The update of one linear, W + spread(up @ down): the same for all inputs of a group.

    Attributes:
        down: (rank, groups), drawn uniformly as LoRA's.
        up: (d_out, rank), zeros at first.
        group: inputs of each group, the last one's rest.
    """

    down: Float[Tensor, "rank groups"]
    up: Float[Tensor, "d_out rank"]
    group: int

    @classmethod
    def of(cls, linear: nn.Linear, rank: int, group: int, generator: torch.Generator) -> Adapter:
        """The start, which changes nothing."""
        groups = -(-linear.in_features // group)
        start = (2 * torch.rand(rank, groups, generator=generator) - 1) * groups**-0.5
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        down = start.to(linear.weight.device, dtype).requires_grad_()
        return cls(down, down.new_zeros(linear.out_features, rank).requires_grad_(), group)

    def __call__(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """What the update adds to the linear's output."""
        return pooled(x.to(self.down), self.group) @ self.down.T @ self.up.T

    @torch.no_grad()
    def merged(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """W with the update added to each group's offset: computes what the linear and the adapter
        do together.
        """
        return (weight.to(self.up) + spread(self.up @ self.down, weight.shape[1], self.group)).to(
            weight
        )


def group_tuned(
    model: PreTrainedModel,
    blocks: Int[Tensor, "n tokens"],
    generator: torch.Generator,
    *,
    steps: int = 100,
    batch: int = 4,
    rank: int = 8,
    group: int = 32,
    bits: int | None = 4,
    learning_rate: float = 1e-3,
    progress: Callable[[int, int], None] | None = None,
) -> GroupTuned:
    """Quantises the linears of all decoder layers, trains group-wise low-rank updates and merges
    them.

    Args:
        model: usually a narrow one; in eval mode, left as it was.
        blocks: what to train on, 2 tokens or more each; never test text.
        generator: on the CPU; draws the start and the order of the blocks.
        steps: of training, the bound on its cost; 0 quantises only.
        batch: blocks of each step.
        rank: of an update.
        group: inputs that share a step and an offset.
        bits: of a weight, or None to leave the weights as they are.
        learning_rate: at the first step, above 0.
        progress: called with (steps done, steps in all).

    Raises:
        ValueError: a number out of range, blocks that the model cannot read, or a loss that is not
            finite.
    """
    check_tokens(model, blocks)
    if steps < 0 or min(batch, rank, group) < 1 or learning_rate <= 0 or blocks.shape[1] < 2:
        raise ValueError(
            "group-wise fine-tuning needs steps >= 0, batch, rank and group >= 1, learning_rate >"
            f" 0 and blocks of 2 tokens or more, got {steps}, {batch}, {rank}, {group},"
            f" {learning_rate} and {blocks.shape[1]}"
        )
    tuned = _with_own_linears(model)
    linears = [
        m for layer in decoder_layers(tuned) for m in layer.modules() if isinstance(m, nn.Linear)
    ]
    if bits is not None:
        for linear in linears:
            linear.weight.data = quantised(linear.weight.detach(), bits=bits, group=group)
    adapters = [Adapter.of(linear, rank, group, generator) for linear in linears]
    losses = []
    with ExitStack() as hooks:
        for linear, adapter in zip(linears, adapters, strict=True):
            hooks.enter_context(linear.register_forward_hook(_adding(adapter)))
        for loss in _trained(
            tuned, adapters, _batches(blocks, batch, generator), steps, learning_rate
        ):
            losses.append(loss)
            if progress is not None:
                progress(len(losses), steps)
    for linear, adapter in zip(linears, adapters, strict=True):
        linear.weight.data = adapter.merged(linear.weight.detach())
    return GroupTuned(tuned, losses)


def quantised(
    weight: Float[Tensor, "d_out d_in"], *, bits: int = 4, group: int = 32
) -> Float[Tensor, "d_out d_in"]:
    """Each weight at the nearest of 2^bits even levels between the least and the largest of its
    row's group.

    Args:
        weight: any float dtype, which the result has too.
        bits: 1 to 8.
        group: inputs of each group, the last one's rest.

    Raises:
        ValueError: bits out of range.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"weights are quantised to 1 to 8 bits, got {bits}")
    d_in = weight.shape[1]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # The last column repeated changes no group's range.
    padded = torch.cat([wide, wide[:, -1:].expand(-1, -d_in % group)], dim=1).reshape(
        len(weight), -1, group
    )
    low, high = padded.amin(2, keepdim=True), padded.amax(2, keepdim=True)
    step = (high - low) / (2**bits - 1)
    levels = torch.where(step > 0, ((padded - low) / step).round(), 0.0)
    coarse: Tensor = low + step * levels
    return coarse.flatten(1)[:, :d_in].to(weight)


def pooled(x: Float[Tensor, "*tokens d_in"], group: int) -> Float[Tensor, "*tokens groups"]:
    """Mean over each group of inputs."""
    d_in = x.shape[-1]
    groups = F.pad(x, (0, -d_in % group)).reshape(*x.shape[:-1], -1, group)
    return groups.sum(-1) / _sizes(d_in, group).to(x)


def spread(
    update: Float[Tensor, "d_out groups"], d_in: int, group: int
) -> Float[Tensor, "d_out d_in"]:
    """The matrix M with M x = update pooled(x)."""
    return (update / _sizes(d_in, group).to(update)).repeat_interleave(group, dim=1)[:, :d_in]


def _sizes(d_in: int, group: int) -> Tensor:
    return torch.tensor([min(group, d_in - start) for start in range(0, d_in, group)])


def _trained(
    model: PreTrainedModel,
    adapters: list[Adapter],
    batches: Iterator[Tensor],
    steps: int,
    learning_rate: float,
) -> Iterator[float]:
    """Trains the adapters, whose hooks are on the model; yields each step's loss."""
    learned = [tensor for adapter in adapters for tensor in (adapter.down, adapter.up)]
    optimiser = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        for settings in optimiser.param_groups:
            settings["lr"] = learning_rate * (1 - step / steps)
        with torch.enable_grad():
            loss = next_token_loss(model, next(batches).to(home(model)))
            # Of the adapters alone: the model's own gradients and flags stay as they are.
            gradients = torch.autograd.grad(loss, learned)
        reached = float(loss.detach())
        if not math.isfinite(reached):
            raise ValueError(
                f"the loss is {reached} at step {step}; give a smaller learning rate than"
                f" {learning_rate}"
            )
        for tensor, gradient in zip(learned, gradients, strict=True):
            tensor.grad = gradient
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        yield reached


def _batches(
    blocks: Int[Tensor, "n tokens"], batch: int, generator: torch.Generator
) -> Iterator[Int[Tensor, "_ tokens"]]:
    """All blocks in a drawn order, then again in another one; the last batch of an order may be
    smaller.
    """
    while True:
        for rows in torch.split(torch.randperm(len(blocks), generator=generator), batch):
            yield blocks[rows.to(blocks.device)]


def _adding(adapter: Adapter) -> Any:
    def hook(_linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + adapter(inputs[0]).to(output)

    return hook


def _with_own_linears(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose decoder layers' linears can be changed; everything else is shared with the given
    model.
    """
    own = {
        id(m.weight)
        for layer in decoder_layers(model)
        for m in layer.modules()
        if isinstance(m, nn.Linear)
    }
    memo: dict[int, Any] = {
        id(parameter): parameter for parameter in model.parameters() if id(parameter) not in own
    }
    return copy.deepcopy(model, memo)
