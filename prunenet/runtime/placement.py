"""Models that no one device holds: accelerate's device map spreads them over accelerators, the CPU
and the disk.

A weight that has no room on its device is on "meta" between calls, and a hook of accelerate brings
it there for the forward pass of its own module. What reads weights outside a forward pass asks for
them by `present`; what changes weights does so by `derive`, and the changed weight, too, is made
when it is needed and not kept. All other models pass through untouched.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

AUTO = "auto"
"""The device that stands for all there are."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_LIMIT = re.compile(r"(cpu|mps|[a-z]+:\d+)=(\d+(?:\.\d+)?)([KMG]i?)?B?")
# on a hook: how many blocks of `present` the weights of its module are held by
_HOLDERS = "prunenet_holders"
_HOW = "give it as in cuda:0=20GiB,cpu=60GiB"


def parse_max_memory(text: str) -> dict[int | str, int]:
    """Bytes of weights for each device, as accelerate takes them, from "cuda:0=20GiB,cpu=60GiB".

    Raises:
        ValueError: something else is said, or a device twice.
    """
    limits: dict[int | str, int] = {}
    for part in text.split(","):
        found = _LIMIT.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"--max-memory {part.strip()!r} is not a device and a size: {_HOW}")
        name, amount, unit = found.groups()
        device = int(name.partition(":")[2]) if ":" in name else name
        if device in limits:
            raise ValueError(f"--max-memory names {name} twice: {_HOW}")
        limits[device] = int(float(amount) * _UNITS[unit or ""])
    return limits


def device_map(max_memory: str | None, folder: str) -> dict[str, Any]:
    """What `from_pretrained` is given to place a model: accelerators first, then the CPU, then the
    disk.

    Args:
        max_memory: see `parse_max_memory`. Accelerators that it leaves out are not used; a CPU that
            it leaves out has what it has free.
        folder: where weights are written that the checkpoint's own files do not hold as they are
            needed.

    Raises:
        ValueError: as `parse_max_memory`; or an accelerator that is not there.
        ImportError: accelerate is not installed.
    """
    limits = None if max_memory is None else parse_max_memory(max_memory)
    try:
        from accelerate.utils import get_max_memory  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError(
            "--device auto places weights with accelerate: pip install 'prunenet[large]'"
        ) from None
    if limits is not None:
        there: dict[int | str, int] = get_max_memory()
        for device in limits:
            if device not in there:
                name = f"accelerator {device}" if isinstance(device, int) else device
                raise ValueError(
                    f"--max-memory names {name}, and here are only {', '.join(map(str, there))}:"
                    f" {_HOW}"
                )
        limits.setdefault("cpu", there["cpu"])
        # accelerate fills them in this order
        limits = {name: limits[name] for name in there if name in limits}
    # "sequential" and not "auto": a GPU is filled before the next one, and the limits are the
    # user's own.
    return {"device_map": "sequential", "max_memory": limits, "offload_folder": folder}


def is_placed(model: nn.Module) -> bool:
    """Whether the weights of a model are on several devices, or some of them on disk."""
    found = set(getattr(model, "hf_device_map", {}).values())
    return len(found) > 1 or "disk" in found


def check_together(model: nn.Module, what: str) -> None:
    """Raises ValueError where `what` needs the weights of a placed model all at once."""
    if is_placed(model):
        raise ValueError(
            f"{what} needs all weights on one device, and --device auto has placed them on several"
        )


def where(model: PreTrainedModel) -> str:
    """The device of a model, or all of them, as in "cuda:0+cpu+disk"."""
    if not is_placed(model):
        return str(model.device)
    names = (
        str(torch.device(name)) if name != "disk" else "disk"
        for name in vars(model)["hf_device_map"].values()
    )
    return "+".join(dict.fromkeys(names))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    device = next(module.parameters()).device
    hooks = (hook for part in module.modules() for hook in _hooks(part))
    places = (hook.execution_device for hook in hooks if hook.execution_device is not None)
    return device if device.type != "meta" else torch.device(next(places, device))


def home(model: PreTrainedModel) -> torch.device:
    """Where token ids go and logits come from."""
    return device_of(model.get_input_embeddings())


def ties(model: PreTrainedModel) -> dict[str, str]:
    """{name: that of the parameter that it is}, where a placed model's tied parameters are told by
    their names alone.
    """
    return dict(model.all_tied_weights_keys or {}) if is_placed(model) else {}


def parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of each, tied ones once; on "meta" where they are not `present`."""
    tied = ties(model)
    return ((name, parameter) for name, parameter in model.named_parameters() if name not in tied)


def tensor_of(model: PreTrainedModel, name: str) -> Tensor:
    """A parameter or buffer by its name, where its module computes."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    with present(module):
        tensor: Tensor = getattr(module, own).detach()
    return tensor


@contextmanager
def present(*modules: nn.Module) -> Iterator[None]:
    """The weights of modules, all they contain included, are where the modules compute as long as
    the block lasts.

    A tensor taken inside may be kept, and holds its memory then. Blocks may overlap: weights stay
    until the last one ends.
    """
    held = []
    try:
        for part in (part for module in modules for part in module.modules()):
            if (hook := _offloading(part)) is not None:
                if not getattr(hook, _HOLDERS, 0):
                    hook.pre_forward(part)
                    # else the module's own forward pass would read the weights again, and put them
                    # away
                    hook.offload = False
                setattr(hook, _HOLDERS, getattr(hook, _HOLDERS, 0) + 1)
                held.append((part, hook))
        yield
    finally:
        for part, hook in held:
            setattr(hook, _HOLDERS, getattr(hook, _HOLDERS) - 1)
            if not getattr(hook, _HOLDERS):
                hook.offload = True
                hook.post_forward(part, None)


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the *same* parameters, wherever they are; each may be replaced in one of the
    two.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for hook in (hook for module in model.modules() for hook in _hooks(module)):
        shared = (getattr(hook, name, None) for name in ("weights_map", "tied_params_map"))
        memo |= {id(thing): thing for thing in shared if thing is not None}
    return copy.deepcopy(model, memo)


def compute_on(model: PreTrainedModel, device: torch.device) -> None:
    """Makes a model whose weights are all on disk compute on a device."""
    for hook in (hook for module in model.modules() for hook in _hooks(module)):
        hook.execution_device = device
    for module in model.modules():
        module._buffers.update(
            {name: None if b is None else b.to(device) for name, b in module._buffers.items()}
        )


@torch.no_grad()
def derive(module: nn.Module, name: str, change: Tensor | Callable[[Tensor], Tensor]) -> None:
    """Replaces a parameter by a tensor, or by what `change` makes of it: at once, or in a placed
    model whenever it is needed.

    `change` must work on the meta device, too. A parameter that the module lacks, such as a bias,
    is given as a tensor.
    """
    parameter = getattr(module, name)
    if parameter is None:
        parameter = next(module.parameters(recurse=False))
    if not _hooks(module):
        setattr(
            module,
            name,
            nn.Parameter(_changed(change, parameter), requires_grad=parameter.requires_grad),
        )
        return
    hook = _offloading(module) or _kept_beside(module)
    hook.weights_map = _Changed(hook.weights_map, name, change)
    hook.tied_params_map, hook.tied_params_names = None, set()
    shape = (change if isinstance(change, Tensor) else change(getattr(module, name).detach())).shape
    empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
    setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


@dataclass(frozen=True, slots=True)
class _Changed:
    """The weights of a module, by name, one of them changed."""

    base: Any  # a mapping, as accelerate has it: it need not be iterable
    name: str
    change: Tensor | Callable[[Tensor], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name != self.name:
            other: Tensor = self.base[name]
            return other
        tensor: Tensor = (
            self.change if isinstance(self.change, Tensor) else self.change(self.base[name])
        )
        return tensor


def _changed(change: Tensor | Callable[[Tensor], Tensor], parameter: nn.Parameter) -> Tensor:
    return change.to(parameter) if isinstance(change, Tensor) else change(parameter.detach())


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Those of accelerate on this very module."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _offloading(module: nn.Module) -> Any | None:
    """The hook that brings the module's weights from elsewhere; None where they are here."""
    return next(
        (
            hook
            for hook in _hooks(module)
            if getattr(hook, "offload", False) or getattr(hook, _HOLDERS, 0)
        ),
        None,
    )


def _kept_beside(module: nn.Module) -> Any:
    """Gives a module whose weights are on its device a hook all the same, for one of them to be
    made when it is needed.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module  # type: ignore[import-untyped]

    here = {name: tensor.detach() for name, tensor in module.named_parameters(recurse=False)}
    remove_hook_from_module(module)
    hook = AlignDevicesHook(execution_device=device_of(module), offload=True, weights_map=here)
    add_hook_to_module(module, hook)
    return hook
