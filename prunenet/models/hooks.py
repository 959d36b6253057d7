"""Changes what a module computes, or learns, for the length of a `with` block, or of a hook, and no
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def calling(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each of these modules computes what the given function does. Its hooks are called as
    ever.
    """
    # Most modules have the forward of their class; accelerate gives them one of their own, which
    # must come back.
    own = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            vars(module).pop("forward", None)
            if before is not None:
                module.forward = before


@contextmanager
def skipping(layers: Sequence[nn.Module], keep: Tensor) -> Iterator[None]:
    """Inside, what the layers that a mask drops return is what they were given.

    Args:
        layers: decoder layers.
        keep: mask of them, (layers,).
    """

    def passed(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as hooks:
        for layer, stays in zip(layers, keep.tolist(), strict=True):
            if not stays:
                hooks.enter_context(layer.register_forward_hook(passed, with_kwargs=True))
        yield


def zeroing(dropped: Tensor) -> Any:
    """A forward pre-hook that zeroes the dropped columns of a module's input; `dropped`:
    (in_features,) bool.
    """

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # masked_fill and not a product: a dropped channel that overflows must not become inf * 0.
        return (inputs[0].masked_fill(dropped, 0), *inputs[1:])

    return hook


def scaling(mask: Tensor) -> Any:
    """A forward pre-hook that multiplies a module's input by a mask, (in_features,); gradients
    reach the mask.
    """

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * mask.to(inputs[0]), *inputs[1:])

    return hook


@contextmanager
def requiring_grad(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters of a model require gradients, and no others do."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
