"""Measures what pruning methods read, once for all of them: norms of weights, activation energies,
input norms of linears, Taylor sums.
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

from prunenet.features.residual import check_weights
from prunenet.models.heads import Attention, attentions, out_linears
from prunenet.models.layers import FFN, check_tokens, decoder_layers, ffn_at, iter_ffns
from prunenet.policies.methods.evidence.gradients import (
    TaylorSums,
    draw_windows,
    group_taylor_sums,
    taylor_sums,
)
from prunenet.policies.methods.widths.allocation import outlier_share
from prunenet.policies.methods.widths.influence import block_influence
from prunenet.refit.expert_use import expert_use
from prunenet.refit.moments import Energies, LayerWalk, check_activations
from prunenet.runtime.placement import check_together, device_of, home, is_placed, present
from prunenet.text.calibration import CalibrationSet

_BATCH = 4


@dataclass(frozen=True, slots=True)
class ChannelNorms:
    """Holds Euclidean norms of each channel's slices, float32.

    Attributes:
        gate: (d_ff,) of the gate rows; of the up rows where the FFN has no gate.
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
    """Holds moments of the inputs of one layer's attention output linear, over all tokens.

    Attributes:
        mean, variance: (d_attention,), float32.
    """

    mean: Float32[Tensor, " d_attention"]
    variance: Float32[Tensor, " d_attention"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Holds a dense model, calibration text, and every measurement made on them so far.

    Measurements are kept: a few numbers a channel. The model must not change while its evidence is
    in use; measuring leaves it as it was.

    Attributes:
        model: a causal LM in eval mode.
        blocks: text to measure on; None for methods that read the weights alone.
        seed: of every random draw.

    Raises:
        ValueError: on reading an attribute, where weights or activations are not finite.
    """

    model: PreTrainedModel
    blocks: CalibrationSet | None = None
    seed: int = 0

    def generator(self) -> torch.Generator:
        """Makes a new CPU generator at the seed."""
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
        """The FFN of each layer, as views; a placed model (`prunenet.runtime.placement`) reads it
        anew each time.
        """
        if is_placed(self.model):
            return _Read(self.model)
        return [_checked(ffn) for ffn in iter_ffns(self.model)]

    @cached_property
    def expert_use(self) -> dict[int, Float[Tensor, " experts"]]:
        """REAP's score of each expert, by layer. Raises as `prunenet.refit.expert_use`."""
        return expert_use(self.model, self.ids)

    @cached_property
    def attentions(self) -> list[Attention]:
        """The attention of each layer, as views.

        Raises:
            UnsupportedArchitecture: heads of this family cannot be cut.
        """
        check_together(self.model, "scoring heads")
        return attentions(self.model)

    @cached_property
    def norms(self) -> list[ChannelNorms]:
        """Norms of each layer's channels."""
        found = []
        for ffn in self.ffns:
            up = ffn.up.float().norm(dim=1)
            gate = up if ffn.gate is None else ffn.gate.float().norm(dim=1)
            found.append(ChannelNorms(gate, up, ffn.down.float().norm(dim=0), ffn.gate is not None))
        return found

    @cached_property
    def energies(self) -> list[Energies]:
        """Activation energies of each layer of the dense model, over all blocks."""
        walk = LayerWalk(self.model, self.ids, batch=_BATCH)
        return [walk.energies(index) for index in walk]

    @cached_property
    def taylor(self) -> list[TaylorSums]:
        """Taylor sums of each layer, from 10 sequences of 64 tokens drawn from the blocks.

        Sequences are shorter where the blocks are.
        """
        return taylor_sums(self.model, self._sequences)

    @cached_property
    def taylor_by_sequence(self) -> list[list[TaylorSums]]:
        """Taylor sums of each sequence alone: first the sequence, then the layer."""
        return [taylor_sums(self.model, sequence[None]) for sequence in self._sequences]

    @cached_property
    def group_taylor(self) -> list[TaylorSums]:
        """Taylor sums of each layer's groups of heads, from the same sequences."""
        return group_taylor_sums(self.model, self._sequences)

    @cached_property
    def group_taylor_by_sequence(self) -> list[list[TaylorSums]]:
        """Taylor sums of groups of heads, of each sequence alone."""
        return [group_taylor_sums(self.model, sequence[None]) for sequence in self._sequences]

    @cached_property
    def influence(self) -> list[float]:
        """Block influence of each layer over all tokens, in [0, 2]; see `block_influence`."""
        return block_influence(self.model, self.ids, batch=_BATCH)

    @cached_property
    def outliers(self) -> list[float]:
        """Outlier share of each layer over all tokens, in [0, 100]; see `outlier_share`."""
        found = []
        for layer in self.input_norms:
            weights = [_weight(linear) for linear, _ in layer]
            found.append(outlier_share(weights, [norm for _, norm in layer]))
        return found

    @property
    def _sequences(self) -> Int[Tensor, "n tokens"]:
        return draw_windows(self.ids, 10, 64, self.generator(), bos=self.bos)

    @cached_property
    def input_norms(self) -> list[list[tuple[nn.Linear, Float[Tensor, " d_in"]]]]:
        """Each linear of each decoder layer, with norms of its inputs over all tokens, float32."""
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
        for index, layer in enumerate(linears):
            for linear in layer:
                check_activations(squares[linear], index, self.model.dtype)
        return [[(linear, squares[linear].sqrt()) for linear in layer] for layer in linears]

    @cached_property
    def head_outputs(self) -> list[HeadOutputs]:
        """Moments of what each layer's heads put out, in the dense model."""
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
        for index, linear in enumerate(linears):
            check_activations(sums[linear], index, self.model.dtype)
            mean, second = (sums[linear] / self.ids.numel()).unbind()
            variance = (second - mean.square()).clamp_min(0)
            found.append(
                HeadOutputs(*(t.to(device_of(linear), torch.float32) for t in (mean, variance)))
            )
        return found

    def _watch(
        self, linears: Iterable[nn.Linear], see: Callable[[nn.Module, tuple[Any, ...]], None]
    ) -> None:
        """Calls `see` with the inputs of each linear of the dense model, over all tokens."""
        check_tokens(self.model, self.ids)
        with ExitStack() as hooks, torch.no_grad():
            for linear in linears:
                hooks.enter_context(linear.register_forward_pre_hook(see))
            for part in torch.split(self.ids.to(home(self.model)), _BATCH):
                self.model(input_ids=part, use_cache=False)


@dataclass(frozen=True, slots=True)
class _Read(Sequence[FFN]):
    """Reads the FFN of a layer from a placed model each time it is indexed."""

    model: PreTrainedModel

    def __len__(self) -> int:
        return len(decoder_layers(self.model))

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return _checked(ffn_at(self.model, index % len(self)))


def _checked(ffn: FFN) -> FFN:
    """Returns an FFN whose weights are finite; raises ValueError for any other."""
    parts = (ffn.gate, ffn.up, ffn.down, ffn.gate_bias, ffn.up_bias)
    check_weights(f"weights of layer {ffn.index}", *(part for part in parts if part is not None))
    return ffn


def _weight(linear: nn.Linear) -> Tensor:
    with present(linear):
        return linear.weight.detach()
