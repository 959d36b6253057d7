"""Place models that no one device holds on accelerators, the CPU and the disk (accelerate).

An offloaded weight is on "meta" between calls; a hook of accelerate loads it for the forward pass
of its own module. `present` loads weights outside a forward pass. `derive` changes a weight; a
changed weight is computed whenever it is needed, and not kept. Models on one device pass through
untouched.
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

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_LIMIT = re.compile(r"(cpu|mps|[a-z]+:\d+)=(\d+(?:\.\d+)?)([KMG]i?)?B?")
# attribute of a hook: number of `present` blocks that hold the weights of its module
_HOLDERS = "prunenet_holders"
_HOW = "give it as in cuda:0=20GiB,cpu=60GiB"


def parse_max_memory(text: str) -> dict[int | str, int]:
    """Parse a limit of weights for each device, such as "cuda:0=20GiB,cpu=60GiB".

    Returns:
        Bytes by device, as accelerate names devices: {0: 21474836480, "cpu": 64424509440}.

    Raises:
        ValueError: the text has another form, or names a device twice.
    """
    limits: dict[int | str, int] = {}
    for part in text.split(","):
        found = _LIMIT.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"`max_memory` {part.strip()!r} is not a device and a size: {_HOW}")
        name, amount, unit = found.groups()
        device = int(name.partition(":")[2]) if ":" in name else name
        if device in limits:
            raise ValueError(f"`max_memory` names {name} twice: {_HOW}")
        limits[device] = int(float(amount) * _UNITS[unit or ""])
    return limits


def device_map(max_memory: str | None, folder: str) -> dict[str, Any]:
    """Return arguments for `from_pretrained` that fill accelerators first, then CPU, then disk.

    Args:
        max_memory: see `parse_max_memory`. Accelerators that it omits are not used; a CPU that it
            omits is limited by its free memory.
        folder: for weights that must be converted first, since the checkpoint's own files cannot
            serve them.

    Raises:
        ValueError: as `parse_max_memory`, or the machine lacks an accelerator that is named.
        ImportError: accelerate is not installed.
    """
    limits = None if max_memory is None else parse_max_memory(max_memory)
    try:
        from accelerate.utils import get_max_memory  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError(
            "`device` auto places weights with accelerate: pip install 'prunenet[large]'"
        ) from None
    if limits is not None:
        there: dict[int | str, int] = get_max_memory()
        for device in limits:
            if device not in there:
                name = f"accelerator {device}" if isinstance(device, int) else device
                raise ValueError(
                    f"`max_memory` names {name}, and here are only {', '.join(map(str, there))}:"
                    f" {_HOW}"
                )
        limits.setdefault("cpu", there["cpu"])
        # accelerate fills them in this order
        limits = {name: limits[name] for name in there if name in limits}
    # "sequential" fills a GPU before the next one, up to the user's own limits; "auto" balances
    return {"device_map": "sequential", "max_memory": limits, "offload_folder": folder}


def is_placed(model: nn.Module) -> bool:
    """Return whether the weights are on several devices, or some of them on disk."""
    found = set(getattr(model, "hf_device_map", {}).values())
    return len(found) > 1 or "disk" in found


def check_together(model: nn.Module, what: str) -> None:
    """Raise ValueError if the model is placed: `what` needs all its weights on one device."""
    if is_placed(model):
        raise ValueError(
            f"{what} needs all weights on one device, and `device` auto has placed them on several"
        )


def where(model: PreTrainedModel) -> str:
    """Return the name of a model's device, or of all of them, as in "cuda:0+cpu+disk"."""
    if not is_placed(model):
        return str(model.device)
    names = (
        str(torch.device(name)) if name != "disk" else "disk"
        for name in vars(model)["hf_device_map"].values()
    )
    return "+".join(dict.fromkeys(names))


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes."""
    device = next(module.parameters()).device
    hooks = (hook for part in module.modules() for hook in _hooks(part))
    places = (hook.execution_device for hook in hooks if hook.execution_device is not None)
    return device if device.type != "meta" else torch.device(next(places, device))


def home(model: PreTrainedModel) -> torch.device:
    """Return the device that takes token ids and gives logits."""
    return device_of(model.get_input_embeddings())


def ties(model: PreTrainedModel) -> dict[str, str]:
    """Return {name of a tied parameter: name of the one that it shares}; empty if not placed.

    In a placed model tied parameters are separate objects on "meta", known by their names alone.
    """
    return dict(model.all_tied_weights_keys or {}) if is_placed(model) else {}


def parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over (name, parameter), tied ones once; offloaded ones are on "meta"."""
    tied = ties(model)
    return ((name, parameter) for name, parameter in model.named_parameters() if name not in tied)


def tensor_of(model: PreTrainedModel, name: str) -> Tensor:
    """Return a parameter or buffer by name, on the device of its module."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    with present(module):
        tensor: Tensor = getattr(module, own).detach()
    return tensor


@contextmanager
def present(*modules: nn.Module) -> Iterator[None]:
    """Keep the weights of modules and their submodules loaded as long as the block lasts.

    A tensor taken inside may be kept, and then holds its memory. Blocks may overlap: weights stay
    until the last block ends.
    """
    held = []
    try:
        for part in (part for module in modules for part in module.modules()):
            if (hook := _offloading(part)) is not None:
                if not getattr(hook, _HOLDERS, 0):
                    hook.pre_forward(part)
                    # else the module's own forward pass would load the weights again and drop them
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
    """Copy the modules of a model and share its parameters.

    A parameter may then be replaced in one of the two models.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for hook in (hook for module in model.modules() for hook in _hooks(module)):
        shared = (getattr(hook, name, None) for name in ("weights_map", "tied_params_map"))
        memo |= {id(thing): thing for thing in shared if thing is not None}
    return copy.deepcopy(model, memo)


def compute_on(model: PreTrainedModel, device: torch.device) -> None:
    """Make a model whose weights are all on disk compute on a device."""
    for hook in (hook for module in model.modules() for hook in _hooks(module)):
        hook.execution_device = device
    for module in model.modules():
        module._buffers.update(
            {name: None if b is None else b.to(device) for name, b in module._buffers.items()}
        )


@torch.no_grad()
def derive(module: nn.Module, name: str, change: Tensor | Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter: at once, or in a placed model whenever it is needed.

    Args:
        module: whose parameter it is.
        name: of the parameter.
        change: the new tensor, or a function of the old one that also works on "meta". A parameter
            that the module lacks, such as a bias, needs a tensor.
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
    """A mapping of names to weights, one of them changed."""

    base: Any  # accelerate's mapping, which need not be iterable
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
    """accelerate's hooks of this module, without its submodules'."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _offloading(module: nn.Module) -> Any | None:
    """The hook that loads the module's weights; None where they are on its device."""
    return next(
        (
            hook
            for hook in _hooks(module)
            if getattr(hook, "offload", False) or getattr(hook, _HOLDERS, 0)
        ),
        None,
    )


def _kept_beside(module: nn.Module) -> Any:
    """Gives a module that is not offloaded a hook, so that one of its weights can be derived."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module  # type: ignore[import-untyped]

    here = {name: tensor.detach() for name, tensor in module.named_parameters(recurse=False)}
    remove_hook_from_module(module)
    hook = AlignDevicesHook(execution_device=device_of(module), offload=True, weights_map=here)
    add_hook_to_module(module, hook)
    return hook
