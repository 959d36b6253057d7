"""Records how a model calls its decoder layers, so that they can be called one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.hooks import calling
from prunenet.models.layers import decoder_layers


@dataclass(frozen=True, slots=True)
class Passed:
    """Stands for what a layer returns besides hidden states, where a later layer is given it.

    Attributes:
        layer: that returns it.
        place: among what it returns behind the hidden states, from 0.
    """

    layer: int
    place: int


class LayerCall(NamedTuple):
    """Holds the arguments of one call of a decoder layer.

    Attributes:
        hidden: the hidden states; None where they come from the layer in front.
        args: other positional arguments.
        kwargs: named arguments.
        called: False of a layer that text does not pass, such as one for images.
    """

    hidden: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    called: bool = True

    def filled(self, passed: Mapping[Passed, Any]) -> LayerCall:
        """This call with what layers in front have returned."""

        def found(value: Any) -> Any:
            return passed[value] if isinstance(value, Passed) else value

        args = tuple(found(value) for value in self.args)
        return self._replace(args=args, kwargs={k: found(v) for k, v in self.kwargs.items()})


class _Captured(Exception):
    """Ends the forward pass once the arguments of all layers are recorded."""


@torch.no_grad()
def layer_calls(model: PreTrainedModel, ids: Int[Tensor, "n tokens"]) -> list[LayerCall]:
    """Records the arguments with which each decoder layer is called.

    The layers themselves are skipped meanwhile: each returns its input, and `Passed` for whatever
    else it returns.

    Args:
        model: a causal LM in eval mode, left as it is.
        ids: token ids without padding, on the model's device.

    Returns:
        One call a layer, first to last; only the first that text passes has hidden states.
    """
    layers = list(decoder_layers(model))
    try:
        return _recorded(model, layers, ids, [0] * len(layers))
    except (TypeError, ValueError):  # code that unpacks what a layer returns
        return _recorded(model, layers, ids, _returned(model, layers, ids[:1, :2]))


def _recorded(
    model: PreTrainedModel, layers: list[nn.Module], ids: Tensor, more: list[int]
) -> list[LayerCall]:
    calls = [LayerCall(None, (), {}, called=False)] * len(layers)

    def recorder(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            first = not any(call.called for call in calls)
            calls[index] = LayerCall(hidden if first else None, rest, kwargs)
            if index == len(layers) - 1:
                raise _Captured
            passed = [Passed(index, place) for place in range(more[index])]
            return (hidden, *passed) if passed else hidden

        return forward

    with (
        suppress(_Captured),
        calling({layer: recorder(index) for index, layer in enumerate(layers)}),
    ):
        model(input_ids=ids, use_cache=False)
    return calls


def _returned(model: PreTrainedModel, layers: list[nn.Module], ids: Tensor) -> list[int]:
    """How many things each layer returns behind the hidden states, seen on a little text."""
    more = [0] * len(layers)

    def see(module: nn.Module, _: Any, out: Any) -> None:
        more[layers.index(module)] = len(out) - 1 if isinstance(out, tuple) else 0

    hooks = [layer.register_forward_hook(see) for layer in layers]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return more
