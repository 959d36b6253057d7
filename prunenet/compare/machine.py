"""On what, and with which software, a cell was measured: versions, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
