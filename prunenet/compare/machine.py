"""On what, and with which software, a cell was measured: versions, commit, memory."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("prunenet", "torch", "transformers", "lm_eval", "optuna", "scikit-learn")


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of the package's own checkout, with "+" behind it where files differ from it;
    None in an installation.
    """
    file = Path(__file__).resolve()
    # some other project's repository around us
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    found, changed = (
        _git(file.parent, "rev-parse", "HEAD"),
        _git(file.parent, "status", "--porcelain", "--untracked-files=no"),
    )
    return None if found is None else found + ("+" if changed else "")


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


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read after it has counted its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        asked = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _restart() -> None:
    """Sets Linux' own peak (VmHWM) back to what is in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
        return next(
            1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")
        )
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
