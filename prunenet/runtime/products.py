"""Products in a low precision that the processor has no arithmetic for.

Checkpoints are mostly stored in bfloat16. On a CPU without instructions for it, torch multiplies
such matrices several times as slowly as in float32 (docs/results.md, bfloat16 on a CPU without it).
Inside `fast_products` operands are converted to float32, multiplied, and the result is rounded
back, which is what processors with such instructions do: they too add up in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_HELD = 10**9
"""Most parameters that are held in float32 at once, 4 bytes each."""
Call = TypeVar("Call", bound=Callable[..., Any])
_PRODUCTS = frozenset(
    (
        *(torch.mm, torch.bmm, torch.matmul, torch.addmm, torch.baddbmm, torch.einsum),
        *(Tensor.mm, Tensor.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.addmm, Tensor.baddbmm),
        *(F.linear, F.conv1d, F.scaled_dot_product_attention),
    )
)


@contextmanager
def fast_products(*models: nn.Module, unchanged: bool = False) -> Iterator[None]:
    """Inside, products of models on the CPU are nearly as fast in their dtype as in float32.

    Nothing changes for float32, and where the CPU has arithmetic of the dtype. Memory holds one
    matrix in float32 besides; where gradients pass, all matrices that they pass. Blocks may be
    nested.

    Args:
        models: that are computed.
        unchanged: nothing changes their weights inside, so that those of a small model are
            converted once.
    """
    weights = [parameter for model in models for parameter in model.parameters()]
    if _Widened.entered or not any(map(_slow, weights)):
        yield
        return
    small = sum(weight.numel() for weight in weights) <= _HELD
    with _Widened(weights if unchanged and small else ()):
        yield


def with_fast_products(function: Call) -> Call:
    """Decorates a function: it runs inside `fast_products` of all models that it is given."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        with fast_products(*(model for model in given if isinstance(model, nn.Module))):
            return function(*args, **kwargs)

    return cast(Call, wrapped)


@cache
def lacks(dtype: torch.dtype) -> bool:
    """Whether this CPU has no arithmetic of a dtype, which it then imitates slowly."""
    known = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if dtype not in known:
        return False
    asked = getattr(torch.ops.mkldnn, known[dtype], None)
    return asked is None or not asked()


class _Widened(TorchFunctionMode):
    """Products of what `lacks` names, in float32."""

    entered = False

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        # by identity, which the caller keeps theirs: offloading makes other weights and drops them
        self._held = dict[int, Tensor | None].fromkeys(map(id, held))

    def __enter__(self) -> Any:
        _Widened.entered = True
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _Widened.entered = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and "out" not in kwargs:
            low = [tensor.dtype for tensor in _tensors(args) if _slow(tensor)]
            if low:
                args, kwargs = tree_map(self._wide, (args, kwargs))
                return func(*args, **kwargs).to(low[0])
        return func(*args, **kwargs)

    def _wide(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and _slow(value)):
            return value
        wide = self._held.get(id(value))
        if wide is None:
            wide = value.float()
            if id(value) in self._held:
                self._held[id(value)] = wide
        return wide


def _tensors(args: Any) -> Iterator[Tensor]:
    """The tensors of a call, those in a list (`einsum`) included."""
    for given in args:
        if isinstance(given, Tensor):
            yield given
        elif isinstance(given, list | tuple):
            yield from _tensors(given)


def _slow(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and lacks(tensor.dtype)
