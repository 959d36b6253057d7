"""What pruning methods look at, computed once for all of them: weights, energies, what linears
read, Taylor sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.heads import Attention, attentions, out_linears
from prunenet.models.layers import FFN, check_tokens, decoder_layers, ffn_at, iter_ffns
from prunenet.policies.methods.evidence.gradients import (
    TaylorSums,
    draw_windows,
    group_taylor_sums,
    taylor_sums,
)
from prunenet.policies.methods.widths.influence import block_influence
from prunenet.refit.moments import Energies, LayerWalk
from prunenet.runtime.placement import check_together, device_of, home, is_placed
from prunenet.text.calibration import CalibrationSet

_BATCH = 4


@dataclass(frozen=True, slots=True)
class ChannelNorms:
    """Euclidean norms of each channel's slices, float32.

    Attributes:
        gate: (d_ff,) of the gate rows; of the only input matrix (`up`) where the FFN has no gate.
        up: (d_ff,) of the up rows.
        down: (d_ff,) of the down columns.
        gated: whether `gate` is a matrix of its own.
    """

    gate: Float32[Tensor, " d_ff"]
    up: Float32[Tensor, " d_ff"]
    down: Float32[Tensor, " d_ff"]
    gated: bool


@dataclass(frozen=True, slots=True)
class HeadOutputs:
    """Of one layer: what its heads put into attention's output linear, over all tokens.

    Attributes:
        mean, variance: (d_attention,), float32.
    """

    mean: Float32[Tensor, " d_attention"]
    variance: Float32[Tensor, " d_attention"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """A dense model, the text that a method may read, and everything measured on them so far.

    What is measured is kept: a few numbers a channel. The model must not change while its evidence
    is in use; measuring leaves it as it was.

    Attributes:
        model: a causal LM in eval mode.
        blocks: text to measure on; None for methods that read the weights alone.
        seed: of every random draw.
    """

    model: PreTrainedModel
    blocks: CalibrationSet | None = None
    seed: int = 0

    def generator(self) -> torch.Generator:
        """A fresh CPU generator at the seed."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def ids(self) -> Int[Tensor, "n tokens"]:
        """The text's token ids.

        Raises:
            ValueError: there is no text.
        """
        if self.blocks is None:
            raise ValueError(
                "this method measures activations and needs text, got blocks=None; give self_blocks"
                " or data_blocks"
            )
        return self.blocks.ids

    @property
    def bos(self) -> int | None:
        """Id of the BOS token that blocks begin with, if they do."""
        return None if self.blocks is None else self.blocks.bos

    @cached_property
    def ffns(self) -> Sequence[FFN]:
        """Of each layer, as views; read anew each time where the model is placed
        (`prunenet.runtime.placement`).
        """
        return _Read(self.model) if is_placed(self.model) else list(iter_ffns(self.model))

    @cached_property
    def attentions(self) -> list[Attention]:
        """Of each layer, as views; raises UnsupportedArchitecture where heads cannot be cut."""
        check_together(self.model, "scoring heads")
        return attentions(self.model)

    @cached_property
    def norms(self) -> list[ChannelNorms]:
        """Of each layer."""
        found = []
        for ffn in self.ffns:
            up = ffn.up.float().norm(dim=1)
            gate = up if ffn.gate is None else ffn.gate.float().norm(dim=1)
            found.append(ChannelNorms(gate, up, ffn.down.float().norm(dim=0), ffn.gate is not None))
        return found

    @cached_property
    def energies(self) -> list[Energies]:
        """Of each layer of the dense model, over all blocks."""
        walk = LayerWalk(self.model, self.ids, batch=_BATCH)
        return [walk.energies(index) for index in walk]

    @cached_property
    def taylor(self) -> list[TaylorSums]:
        """Of each layer, from 10 sequences of 64 tokens drawn from the blocks (shorter where the
        blocks are).
        """
        return taylor_sums(self.model, self._sequences)

    @cached_property
    def taylor_by_sequence(self) -> list[list[TaylorSums]]:
        """The same for each of the sequences alone: first the sequence, then the layer."""
        return [taylor_sums(self.model, sequence[None]) for sequence in self._sequences]

    @cached_property
    def group_taylor(self) -> list[TaylorSums]:
        """Of each layer's groups of heads, from the same sequences."""
        return group_taylor_sums(self.model, self._sequences)

    @cached_property
    def group_taylor_by_sequence(self) -> list[list[TaylorSums]]:
        """The same for each of the sequences alone."""
        return [group_taylor_sums(self.model, sequence[None]) for sequence in self._sequences]

    @cached_property
    def influence(self) -> list[float]:
        """Block influence of each layer over all tokens, in [0, 2]; see `block_influence`."""
        return block_influence(self.model, self.ids, batch=_BATCH)

    @property
    def _sequences(self) -> Int[Tensor, "n tokens"]:
        return draw_windows(self.ids, 10, 64, self.generator(), bos=self.bos)

    @cached_property
    def input_norms(self) -> list[list[tuple[nn.Linear, Float[Tensor, " d_in"]]]]:
        """Each linear of each decoder layer with the norms of its inputs over all tokens: (d_in,),
        float32.
        """
        linears = [
            [m for m in layer.modules() if isinstance(m, nn.Linear)]
            for layer in decoder_layers(self.model)
        ]
        squares = {
            linear: torch.zeros(linear.in_features, device=device_of(linear))
            for layer in linears
            for linear in layer
        }

        def add(linear: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(linear, nn.Linear)
            squares[linear] += inputs[0].flatten(0, -2).float().square().sum(0)

        self._watch(squares, add)
        return [[(linear, squares[linear].sqrt()) for linear in layer] for layer in linears]

    @cached_property
    def head_outputs(self) -> list[HeadOutputs]:
        """Of each layer of the dense model."""
        linears = out_linears(self.model)
        # In float64, on the CPU: the variance is a small difference where the mean is large.
        sums = {
            linear: torch.zeros(2, linear.in_features, dtype=torch.float64) for linear in linears
        }

        def add(linear: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(linear, nn.Linear)
            outputs = inputs[0].flatten(0, -2).to("cpu", torch.float64)
            sums[linear] += torch.stack([outputs.sum(0), outputs.square().sum(0)])

        self._watch(sums, add)
        found = []
        for linear in linears:
            mean, second = (sums[linear] / self.ids.numel()).unbind()
            variance = (second - mean.square()).clamp_min(0)
            found.append(
                HeadOutputs(*(t.to(device_of(linear), torch.float32) for t in (mean, variance)))
            )
        return found

    def _watch(
        self, linears: Iterable[nn.Linear], see: Callable[[nn.Module, tuple[Any, ...]], None]
    ) -> None:
        """Shows what enters each linear of the dense model, over all tokens."""
        check_tokens(self.model, self.ids)
        with ExitStack() as hooks, torch.no_grad():
            for linear in linears:
                hooks.enter_context(linear.register_forward_pre_hook(see))
            for part in torch.split(self.ids.to(home(self.model)), _BATCH):
                self.model(input_ids=part, use_cache=False)


@dataclass(frozen=True, slots=True)
class _Read(Sequence[FFN]):
    """The FFN of each layer of a model, none of which is held."""

    model: PreTrainedModel

    def __len__(self) -> int:
        return len(decoder_layers(self.model))

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return ffn_at(self.model, index % len(self))
