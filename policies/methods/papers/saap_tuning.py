"""Fine-tunes a pruned model group by group, as SAAP does after the cut.

Source: Zheng et al. (SAAP), arXiv 2412.15127, which fine-tunes by groups; docs/methods.md, section
8. [rec], our reconstruction: the recipe is that of Xu et al., "QA-LoRA: Quantization-Aware Low-Rank
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
  `bits=None` skips quantisation, to separate its cost from the gain of the training.
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
from prunenet.runtime.choices import check_fields
from prunenet.runtime.placement import home


@dataclass(frozen=True, slots=True, eq=False)
class GroupTuned:
    """Holds a fine-tuned model.

    Attributes:
        model: has linears of its own in the decoder layers and shares everything else with the
            given model.
        losses: of each step's blocks, before the step; nats per token.
    """

    model: PreTrainedModel
    losses: list[float]


@dataclass(frozen=True, slots=True)
class GroupTuning:
    """Holds the options of group-wise fine-tuning.

    Attributes:
        steps: of training, 0 or more; 0 quantises only.
        batch: blocks of each step, 1 or more.
        rank: of an update, 1 or more.
        group: inputs that share a step and an offset, 1 or more.
        bits: of a weight, or None to leave the weights as they are.
        learning_rate: at the first step, above 0.

    Raises:
        ValueError: a number out of range.
    """

    steps: int = 100
    batch: int = 4
    rank: int = 8
    group: int = 32
    bits: int | None = 4
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        check_fields(self)
        if (
            self.steps < 0
            or min(self.batch, self.rank, self.group) < 1
            or not self.learning_rate > 0
        ):
            raise ValueError(
                "group-wise fine-tuning needs steps >= 0, batch, rank and group >= 1 and"
                f" learning_rate > 0, got {self.steps}, {self.batch}, {self.rank}, {self.group} and"
                f" {self.learning_rate}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Holds the update of one linear, W + spread(up @ down), equal for all inputs of a group.

    Attributes:
        down: (rank, groups), drawn uniformly as LoRA's.
        up: (d_out, rank), zeros at first.
        group: inputs of each group; the last one may be smaller.
    """

    down: Float[Tensor, "rank groups"]
    up: Float[Tensor, "d_out rank"]
    group: int

    @classmethod
    def of(cls, linear: nn.Linear, rank: int, group: int, generator: torch.Generator) -> Adapter:
        """Makes an update that changes nothing yet."""
        groups = -(-linear.in_features // group)
        start = (2 * torch.rand(rank, groups, generator=generator) - 1) * groups**-0.5
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        down = start.to(linear.weight.device, dtype).requires_grad_()
        return cls(down, down.new_zeros(linear.out_features, rank).requires_grad_(), group)

    def __call__(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """Returns what the update adds to the linear's output."""
        return pooled(x.to(self.down), self.group) @ self.down.T @ self.up.T

    @torch.no_grad()
    def merged(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """Adds the update to each group's offset, so that W alone computes linear and adapter."""
        return (weight.to(self.up) + spread(self.up @ self.down, weight.shape[1], self.group)).to(
            weight
        )


def group_tuned(
    model: PreTrainedModel,
    blocks: Int[Tensor, "n tokens"],
    generator: torch.Generator,
    options: GroupTuning | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> GroupTuned:
    """Quantises the linears of all decoder layers, trains group-wise low-rank updates and merges
    them.

    Args:
        model: usually a narrow one; in eval mode, left as it was.
        blocks: training text in blocks of 2 tokens or more; never test text.
        generator: on the CPU; draws the start and the order of the blocks.
        options: default `GroupTuning()`.
        progress: called with (steps done, steps in all).

    Raises:
        ValueError: blocks that the model cannot read, or a loss that is not finite.
    """
    options = options or GroupTuning()
    check_tokens(model, blocks)
    if blocks.shape[1] < 2:
        raise ValueError(
            f"group-wise fine-tuning needs blocks of 2 tokens or more, got {blocks.shape[1]}"
        )
    tuned = _with_own_linears(model)
    linears = [
        m for layer in decoder_layers(tuned) for m in layer.modules() if isinstance(m, nn.Linear)
    ]
    if options.bits is not None:
        for linear in linears:
            weight = linear.weight.detach()
            linear.weight.data = quantised(weight, bits=options.bits, group=options.group)
    adapters = [Adapter.of(linear, options.rank, options.group, generator) for linear in linears]
    losses = []
    with ExitStack() as hooks:
        for linear, adapter in zip(linears, adapters, strict=True):
            hooks.enter_context(linear.register_forward_hook(_adding(adapter)))
        for loss in _trained(tuned, adapters, _batches(blocks, options.batch, generator), options):
            losses.append(loss)
            if progress is not None:
                progress(len(losses), options.steps)
    for linear, adapter in zip(linears, adapters, strict=True):
        linear.weight.data = adapter.merged(linear.weight.detach())
    return GroupTuned(tuned, losses)


def quantised(
    weight: Float[Tensor, "d_out d_in"], *, bits: int = 4, group: int = 32
) -> Float[Tensor, "d_out d_in"]:
    """Rounds each weight to the nearest of 2^bits levels of its row's group.

    Levels are evenly spaced between the least and the largest weight of the group.

    Args:
        weight: any float dtype, which the result has too.
        bits: 1 to 8.
        group: inputs of each group; the last one may be smaller.

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
    """Averages over each group of inputs."""
    d_in = x.shape[-1]
    groups = F.pad(x, (0, -d_in % group)).reshape(*x.shape[:-1], -1, group)
    return groups.sum(-1) / _sizes(d_in, group).to(x)


def spread(
    update: Float[Tensor, "d_out groups"], d_in: int, group: int
) -> Float[Tensor, "d_out d_in"]:
    """Returns the matrix M with M x = update pooled(x)."""
    return (update / _sizes(d_in, group).to(update)).repeat_interleave(group, dim=1)[:, :d_in]


def _sizes(d_in: int, group: int) -> Tensor:
    return torch.tensor([min(group, d_in - start) for start in range(0, d_in, group)])


def _trained(
    model: PreTrainedModel,
    adapters: list[Adapter],
    batches: Iterator[Tensor],
    options: GroupTuning,
) -> Iterator[float]:
    """Trains the adapters, whose hooks are on the model; yields each step's loss."""
    learned = [tensor for adapter in adapters for tensor in (adapter.down, adapter.up)]
    learning_rate = options.learning_rate
    optimiser = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=0.0)
    for step in range(options.steps):
        for settings in optimiser.param_groups:
            settings["lr"] = learning_rate * (1 - step / options.steps)
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
    """Yields all blocks in a drawn order, then again in another one.

    The last batch of an order may be smaller.
    """
    while True:
        for rows in torch.split(torch.randperm(len(blocks), generator=generator), batch):
            yield blocks[rows.to(blocks.device)]


def _adding(adapter: Adapter) -> Any:
    def hook(_linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + adapter(inputs[0]).to(output)

    return hook


def _with_own_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Copies the linears of the decoder layers and shares everything else with the given model."""
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
