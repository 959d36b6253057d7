"""The most memory that a block of code held at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yields {"host_bytes", "device_bytes"}, filled in at the end of the block: the most that was
    in use at once inside it.

    Host: resident memory of the whole process, what earlier cells left in it included; where the
    system cannot start its count anew (anything but Linux), the most since the process began, and
    None where it has no such count. Device: what tensors take; None on a CPU.
    """
    found: dict[str, Any] = {"host_bytes": None, "device_bytes": None}
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    _restart()
    yield found
    found["host_bytes"] = _resident()
    found["device_bytes"] = torch.cuda.max_memory_allocated(device) if on_gpu else None


@contextmanager
def added_memory(device: torch.device) -> Iterator[dict[str, int | None]]:
    """Yields {"bytes"}, filled in at the end of the block: the most in use at once inside it, less
    what was in use when it began.

    On a GPU what tensors take; else resident memory of the process, and None where the system
    cannot count that anew (anything but Linux).
    """
    found: dict[str, int | None] = {"bytes": None}
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else _status("VmRSS")
    with peak_memory(device) as peak:
        yield found
    most = peak["device_bytes"] if on_gpu else peak["host_bytes"]
    if before is not None and most is not None:
        found["bytes"] = max(0, most - before)


def _restart() -> None:
    """Sets Linux' own peak (VmHWM) back to what is in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident() -> int | None:
    """Most bytes in use at once, since `_restart` where there is such a thing."""
    if (found := _status("VmHWM")) is not None:
        return found
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _status(field: str) -> int | None:
    """Bytes that Linux counts for this process; None elsewhere."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = (line.split() for line in status.splitlines())
    return next((1024 * int(words[1]) for words in lines if words[0] == f"{field}:"), None)
