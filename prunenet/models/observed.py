"""Observes activations h of channel groups: what their output matrices are multiplied by.

One rule serves linear layers, Conv1D, and banks of experts of either order: inside the block every
product with a floating-point matrix whose memory is a group's output matrix, or all of a bank, is
seen. Banks must compute as their own code says, one expert after the other ("eager"): other
implementations copy the weights of experts together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunenet.models.groups import Slice

See = Callable[[int, Tensor, Tensor], None]
"""Takes the place of a slice, h (..., d_ff), and what its matrix makes of h (..., d_model) without
the bias.
"""


class _Watch(TorchFunctionMode):
    """Calls `see` for each product with an output matrix."""

    def __init__(self, downs: Sequence[Slice], see: See) -> None:
        super().__init__()
        self._see = see
        self._widths = [d.tensor.shape[d.axis - (d.expert is not None)] for d in downs]
        # by the address of what is multiplied: the part of one expert, and all of a bank
        self._one = {down.tensor.data_ptr(): place for place, down in enumerate(downs)}
        self._banks: dict[int, list[int]] = {}
        for place, down in enumerate(downs):
            if down.expert is not None:
                bank: Tensor = getattr(down.module, down.attribute)
                self._banks.setdefault(bank.data_ptr(), []).append(place)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() > 1 and out.is_floating_point():
            self._look([*args, *(kwargs or {}).values()], out)
        return out

    def _look(self, given: Sequence[Any], out: Tensor) -> None:
        tensors = [one for one in given if isinstance(one, Tensor) and one.is_floating_point()]
        factors = [one for one in tensors if one.dim() > 1]
        if len(factors) != 2:
            return
        h, matrix = factors
        address = matrix.data_ptr()
        bank = self._banks.get(address, ()) if matrix.dim() == 3 else ()
        places = bank or [self._one[address]] if bank or address in self._one else ()
        if not places or h.shape[-1] != self._widths[places[0]] or out.shape[:-1] != h.shape[:-1]:
            return
        for bias in (one for one in tensors if one.dim() == 1):
            out = out - bias
        if not bank:
            self._see(places[0], h, out)
        for place, rows, written in zip(bank, h, out, strict=False):
            # a bank that takes all tokens at once is given zeros where they go to other experts
            routed = rows.any(-1)
            self._see(place, rows[routed], written[routed])


@contextmanager
def observing(downs: Sequence[Slice], see: See) -> Iterator[None]:
    """Inside, `see` is called with what passes through the channels of some groups.

    Args:
        downs: their output matrices, on their device. Experts compute one after the other inside.
        see: called during a forward pass; must take what it needs at once, since code may change
            tensors in place.
    """
    with _eager(downs), _Watch(downs, see):
        yield


@contextmanager
def _eager(downs: Sequence[Slice]) -> Iterator[None]:
    banks = {down.module for down in downs if down.expert is not None}
    configs = {id(c): c for b in banks if (c := getattr(b, "config", None)) is not None}
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
