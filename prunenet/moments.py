"""Second moments of FFN activations, layer by layer: what refit and the reconstruction reward need (METHODS.md 3).

One pass over the token blocks carries their hidden states from layer to layer, so that memory holds the moments of one layer
and the hidden states of all blocks. A caller may change a layer between measuring and passing it: the next layer is then
measured behind the changed one (sequential mode, METHODS.md 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.architectures import architecture_for
from prunenet.layers import check_tokens, decoder_layers, down_linears


@dataclass(frozen=True, slots=True)
class Moments:
    """Of one layer's activations h, the input of its down linear, over all tokens.

    Attributes:
        second: E[h h^T], (d_ff, d_ff), float32.
        mean: E[h], (d_ff,), float32.
        tokens: how many were averaged.
    """

    second: Float[Tensor, "d_ff d_ff"]
    mean: Float[Tensor, " d_ff"]
    tokens: int


class _Captured(Exception):
    """Stops the forward pass once the first layer's input is known."""


class LayerWalk:
    """Carries token blocks through a model, one decoder layer at a time.

    Args:
        model: a causal LM in eval mode; not changed by the walk itself.
        blocks: (n, tokens) token ids, without padding.
        batch: blocks per forward pass.
        changing: whether the caller changes layers on the way. Then leaving the loop body passes the hidden states through the
            layer as it is by then; otherwise the outputs of the measurement are passed on, at half the cost.

    Iterate over it: each layer may be measured (`moments`) and, if `changing`, changed before or after.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Int[Tensor, "n tokens"], *, batch: int = 4, changing: bool = False
    ) -> None:
        check_tokens(model, blocks)
        architecture = architecture_for(model.config)
        self.layers = list(decoder_layers(model, architecture))
        self._downs = down_linears(model)
        self._model = model
        self._calls = [self._calls_of(part) for part in torch.split(blocks.to(model.device), batch)]
        self._hidden = [calls[0][0] for calls in self._calls]
        self._outputs: list[Tensor] = []
        self._changing = changing
        self.tokens = blocks.numel()

    def __iter__(self) -> Iterator[int]:
        for index in range(len(self.layers)):
            self._outputs = []
            yield index
            if self._changing or not self._outputs:
                self._outputs = [self._through(index, part) for part in range(len(self._calls))]
            self._hidden = self._outputs

    @torch.no_grad()
    def moments(self, index: int) -> Moments:
        """Of the layer that the walk stands at."""
        d_ff = self._downs[index].in_features
        device = self._hidden[0].device
        second = torch.zeros(d_ff, d_ff, device=device)
        mean = torch.zeros(d_ff, device=device)

        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            h = inputs[0].flatten(0, -2).float()
            second.addmm_(h.T, h)
            mean.add_(h.sum(0))

        hook = self._downs[index].register_forward_pre_hook(add)
        try:
            self._outputs = [self._through(index, part) for part in range(len(self._calls))]
        finally:
            hook.remove()
        return Moments(second / self.tokens, mean / self.tokens, self.tokens)

    @torch.no_grad()
    def _through(self, index: int, part: int) -> Tensor:
        _, args, kwargs = self._calls[part][index]
        out = self.layers[index](self._hidden[part], *args, **kwargs)
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, Tensor)
        return result

    @torch.no_grad()
    def _calls_of(self, ids: Int[Tensor, "n tokens"]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """(hidden states, other arguments, keyword arguments) with which each layer is called; hidden states of layer 0 only.

        The layers themselves are skipped while the calls are recorded: each hands its input on.
        """
        calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        # Most layers have the forward of their class; accelerate gives them one of their own, which must come back.
        own = [vars(layer).get("forward") for layer in self.layers]

        def recorder(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                calls.append((hidden if index == 0 else None, rest, kwargs))
                if index == len(self.layers) - 1:
                    raise _Captured
                return hidden

            return forward

        try:
            for index, layer in enumerate(self.layers):
                layer.forward = recorder(index)
            self._model(input_ids=ids, use_cache=False)
        except _Captured:
            pass
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                vars(layer).pop("forward", None)
                if forward is not None:
                    layer.forward = forward
        return calls


def ffn_moments(model: PreTrainedModel, blocks: Int[Tensor, "n tokens"], *, batch: int = 4) -> Iterator[Moments]:
    """The moments of each layer of a model left as it is, first to last."""
    walk = LayerWalk(model, blocks, batch=batch)
    for index in walk:
        yield walk.moments(index)
