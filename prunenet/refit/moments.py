"""Second moments of FFN activations, layer by layer: what refit and the reconstruction reward need
(METHODS.md 3).

One pass over the token blocks carries their hidden states from layer to layer, so that memory holds
the moments of one layer and the hidden states of all blocks, which may wait on the CPU. A caller
may change a layer between measuring and passing it: the next layer is then measured behind the
changed one (sequential mode, METHODS.md 5); `paired_moments` also relates it to the dense model's
layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.architectures import architecture_for
from prunenet.models.hooks import calling
from prunenet.models.layers import check_tokens, decoder_layers, down_linears
from prunenet.runtime.placement import device_of, home, is_placed, present


@dataclass(frozen=True, slots=True)
class Moments:
    """Of one layer's activations h, the input of its down linear, over all tokens.

    Attributes:
        second: E[h h^T], (d_ff, d_ff), float32.
        mean: E[h], (d_ff,), float32.
        tokens: how many were averaged: those that are not skipped.
    """

    second: Float[Tensor, "d_ff d_ff"]
    mean: Float[Tensor, " d_ff"]
    tokens: int


@dataclass(frozen=True, slots=True)
class Energies:
    """Of one layer's activations h, each channel alone: what scores need that relate no channel to
    another.

    Attributes:
        energy: E[h_j^2], (d_ff,), float32: the diagonal of `Moments.second`, at 1 / d_ff of its
            work and memory.
        mean: E[h], (d_ff,), float32.
        tokens: how many were averaged: those that are not skipped.
    """

    energy: Float[Tensor, " d_ff"]
    mean: Float[Tensor, " d_ff"]
    tokens: int


@dataclass(frozen=True, slots=True)
class Target:
    """What a dense model's layer has, t, where the pruned model's has h: the same layer and tokens.

    Attributes:
        cross: E[t h^T], (d_ff, d_ff), float32.
        mean: E[t], (d_ff,), float32.
        energy: E|W t|^2 with W the dense layer's down matrix.
    """

    cross: Float[Tensor, "d_ff d_ff"]
    mean: Float[Tensor, " d_ff"]
    energy: float


class _Captured(Exception):
    """Stops the forward pass once the first layer's input is known."""


class _Sums:
    """Sums over tokens, in float32."""

    def __init__(self, d_ff: int, device: torch.device) -> None:
        self.second = torch.zeros(d_ff, d_ff, device=device)
        self.mean = torch.zeros(d_ff, device=device)
        self.tokens = 0

    def add(self, h: Float[Tensor, "tokens d_ff"]) -> None:
        self.tokens += len(h)
        self.second.addmm_(h.T, h)
        self.mean.add_(h.sum(0))

    def moments(self) -> Moments:
        return Moments(self.second.div_(self.tokens), self.mean.div_(self.tokens), self.tokens)


class LayerWalk:
    """Carries token blocks through a model, one decoder layer at a time.

    Args:
        model: a causal LM in eval mode; not changed by the walk itself.
        blocks: (n, tokens) token ids, without padding.
        batch: blocks per forward pass.
        changing: whether the caller changes layers on the way. Then leaving the loop body passes
            the hidden states through the layer as it is by then; otherwise the outputs of the
            measurement are passed on, at half the cost.
        skip: positions at the start of each block that no moment counts, in [0, tokens). The first
            token of a block is often an attention sink, with activations so large that it alone
            shapes H; later tokens still see it.
        offload: whether hidden states wait on the CPU, a batch at a time being on the layer's
            device. Those of a model that accelerate has placed (`prunenet.runtime.placement`)
            always do.

    Iterate over it: each layer may be measured (`moments`, `energies`) and, if `changing`, changed
    before or after. Inside the loop body the weights of that layer are on its device, wherever they
    are kept.

    Raises:
        ValueError: blocks that the model cannot read, or `skip` out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Int[Tensor, "n tokens"],
        *,
        batch: int = 4,
        changing: bool = False,
        skip: int = 0,
        offload: bool = False,
    ) -> None:
        check_tokens(model, blocks)
        if not 0 <= skip < blocks.shape[1]:
            raise ValueError(
                f"blocks of {blocks.shape[1]} tokens cannot skip their first {skip}; give 0 to"
                f" {blocks.shape[1] - 1}"
            )
        architecture = architecture_for(model.config)
        self.layers = list(decoder_layers(model, architecture))
        self._downs = down_linears(model)
        self._offload = offload or is_placed(model)
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._hidden: list[Tensor] = []
        for part in torch.split(blocks.to(home(model)), batch):
            calls = layer_calls(model, part)
            self._hidden.append(self._put_by(calls[0][0]))
            self._calls.append([(args, kwargs) for _, args, kwargs in calls])
        self._outputs: list[Tensor] = []
        self._changing = changing
        self._skip, self._batch = skip, batch
        self.blocks = blocks
        self.tokens = blocks.numel()

    def __iter__(self) -> Iterator[int]:
        for index in range(len(self.layers)):
            self._outputs = []
            with present(self.layers[index]):
                yield index
                if self._changing or not self._outputs:
                    self._outputs = [self._through(index, part) for part in range(len(self._calls))]
            self._hidden = self._outputs

    def device(self, index: int) -> torch.device:
        """Where a layer computes, and its moments are."""
        return device_of(self._downs[index])

    @torch.no_grad()
    def moments(self, index: int) -> Moments:
        """Of the layer that the walk stands at."""
        sums = _Sums(self._downs[index].in_features, self.device(index))
        for h in self._activations(index):
            sums.add(h)
        return sums.moments()

    @torch.no_grad()
    def energies(self, index: int) -> Energies:
        """Of the layer that the walk stands at."""
        energy, mean = torch.zeros(2, self._downs[index].in_features, device=self.device(index))
        tokens = 0
        for h in self._activations(index):
            tokens += len(h)
            energy += h.square().sum(0)
            mean += h.sum(0)
        return Energies(energy.div_(tokens), mean.div_(tokens), tokens)

    def _activations(self, index: int) -> Iterator[Float[Tensor, "tokens d_ff"]]:
        """In front of the layer's down linear, batch by batch; what the layer then puts out is
        kept.
        """
        outputs = []
        for part in range(len(self._calls)):
            output, h, _ = self._measured(index, part)
            outputs.append(output)
            yield h
        self._outputs = outputs

    def _measured(self, index: int, part: int) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden states behind the layer; then, of each token that counts, h and |W h|^2 in
        float32), of one batch.
        """
        seen: list[Tensor] = []

        def see(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Summed up at once: Falcon adds its attention's output to this tensor in place.
            written = (output if module.bias is None else output - module.bias).float()
            seen.extend((inputs[0].flatten(0, -2), written.square().sum(-1).flatten()))

        hook = self._downs[index].register_forward_hook(see)
        try:
            output = self._through(index, part)
        finally:
            hook.remove()
        blocks = len(self._hidden[part])
        h, energies = (
            rows.reshape(blocks, -1, *rows.shape[1:])[:, self._skip :].flatten(0, 1).float()
            for rows in seen
        )
        return output, h, energies

    @torch.no_grad()
    def _through(self, index: int, part: int) -> Tensor:
        args, kwargs = self._calls[part][index]
        out = self.layers[index](self._hidden[part].to(self.device(index)), *args, **kwargs)
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, Tensor)
        return self._put_by(result)

    def _put_by(self, hidden: Tensor) -> Tensor:
        return hidden.cpu() if self._offload else hidden


@torch.no_grad()
def layer_calls(
    model: PreTrainedModel, ids: Int[Tensor, "n tokens"]
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(hidden states, other arguments, keyword arguments) with which each layer is called; hidden
    states of layer 0 only.

    The layers themselves are skipped while the calls are recorded: each hands its input on.

    Args:
        model: a causal LM in eval mode, left as it is.
        ids: token ids without padding, on the model's device.
    """
    layers = list(decoder_layers(model))
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def recorder(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            calls.append((hidden if index == 0 else None, rest, kwargs))
            if index == len(layers) - 1:
                raise _Captured
            return hidden

        return forward

    with (
        suppress(_Captured),
        calling({layer: recorder(index) for index, layer in enumerate(layers)}),
    ):
        model(input_ids=ids, use_cache=False)
    return calls


def ffn_moments(
    model: PreTrainedModel,
    blocks: Int[Tensor, "n tokens"],
    *,
    batch: int = 4,
    skip: int = 0,
) -> Iterator[Moments]:
    """The moments of each layer of a model left as it is, first to last. Arguments: see
    `LayerWalk`.
    """
    walk = LayerWalk(model, blocks, batch=batch, skip=skip)
    for index in walk:
        yield walk.moments(index)


@torch.no_grad()
def paired_moments(dense: LayerWalk, pruned: LayerWalk, index: int) -> tuple[Moments, Target]:
    """Of the layer at which both walks stand: the pruned model's moments, and what the dense model
    has in its place.

    For sequential refit (METHODS.md 5): walk both at once, `for index, _ in zip(dense, pruned)`,
    the pruned walk with `changing=True`, and narrow the pruned model's layer after it was measured.
    Holds two d_ff x d_ff matrices.

    Args:
        dense: over the dense model.
        pruned: over the model being pruned, with the same blocks, batch and `skip`; this layer
            still has all its channels.
        index: of the layer.

    Raises:
        ValueError: other blocks, another batch, skip or width.
    """
    if (dense._batch, dense._skip) != (pruned._batch, pruned._skip) or not torch.equal(
        dense.blocks.cpu(), pruned.blocks.cpu()
    ):
        raise ValueError(
            "activations are paired token by token: give both walks the same blocks, batch and skip"
        )
    d_ff = pruned._downs[index].in_features
    if dense._downs[index].in_features != d_ff:
        raise ValueError(
            f"layer {index} has {dense._downs[index].in_features} channels in the dense model and"
            f" {d_ff} in the pruned one; measure it before it is cut"
        )
    device = pruned.device(index)
    sums, cross, mean = (
        _Sums(d_ff, device),
        torch.zeros(d_ff, d_ff, device=device),
        torch.zeros(d_ff, device=device),
    )
    energy = torch.zeros((), dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part in range(len(pruned._calls)):
        dense_output, t, written = dense._measured(index, part)
        pruned_output, h, _ = pruned._measured(index, part)
        t = t.to(device)
        sums.add(h)
        cross.addmm_(t.T, h)
        mean.add_(t.sum(0))
        energy += written.to(energy).sum()
        outputs[0].append(dense_output)
        outputs[1].append(pruned_output)
    dense._outputs, pruned._outputs = outputs
    return sums.moments(), Target(
        cross.div_(sums.tokens), mean.div_(sums.tokens), float(energy) / sums.tokens
    )
