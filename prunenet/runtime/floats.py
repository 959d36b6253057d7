"""Names of dtypes, and double precision on devices that lack it."""

from __future__ import annotations

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype as options and records give it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def float64_device(device: torch.device) -> torch.device:
    """Returns the device, or the CPU where the device (MPS) has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def in_float64(*tensors: Tensor) -> list[Tensor]:
    """Converts tensors to float64 on the `float64_device` of the first."""
    device = float64_device(tensors[0].device)
    return [tensor.to(device, torch.float64) for tensor in tensors]
