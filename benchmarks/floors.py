"""What a phase takes at least on this machine: FLOPs and bytes of each, and the rates at which it
does them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from prunenet.models.layers import FFN, embeddings, iter_ffns
from prunenet.spectra.estimated import PROBES, STEPS

RATIO = 0.3


def flops_of_statistics(ffn: FFN) -> float:
    """Of the matrix products and factorisations in `prunenet.features.from_weights`, each symmetric
    one at half.
    """
    d, n, lead = ffn.d_model, ffn.d_ff, 5 * ffn.d_model // 32
    slices = 2 if ffn.gate is None else 3
    # W^T W, quadratic forms in C, the embeddings' and attention's moments; twins; ridge; leverage;
    # leading vectors.
    of_slice = (
        4 * n * d**2 + n**2 * d + (n * d**2 + d**3 / 3) + 2 * n * d * lead + 9 * 2 * d**2 * lead
    )
    return slices * of_slice + n * d**2 + d**3


def flops_of_tables(model: Any) -> float:
    return sum(len(table) * table.shape[1] ** 2 for table in embeddings(model) if table is not None)


def spectrum(ffn: FFN) -> float:
    return 4 / 3 * ffn.d_model**3


def downdate(ffn: FFN) -> float:
    return round(RATIO * ffn.d_ff) * ffn.d_model**2


def solver(device: str) -> str:
    return "float64" if torch.device(device).type == "cuda" else "float32"


def estimate(ffn: FFN) -> float:
    """FLOPs of one mask's estimate: in each step G x and the removed rows, forth and back, of every
    sign vector.
    """
    return STEPS * PROBES * (2 * ffn.d_model**2 + 4 * round(RATIO * ffn.d_ff) * ffn.d_model)


def bytes_of_estimate(ffn: FFN) -> float:
    """Read for one mask's estimate: G once and the removed rows twice in each step, in float32."""
    return 4 * STEPS * (ffn.d_model**2 + 2 * round(RATIO * ffn.d_ff) * ffn.d_model)


def spectral_floors(
    route: str, ffns: Sequence[FFN], rates: dict[str, float], device: str
) -> tuple[float, float]:
    """Seconds at least of what a route computes once, and of one mask of every layer."""
    if route == "exact":
        once = sum(f.d_ff * f.d_model**2 + spectrum(f) for f in ffns) / rates["float64"]
        return once, sum(downdate(f) + spectrum(f) for f in ffns) / rates[solver(device)]
    once = sum(f.d_ff * f.d_model**2 + estimate(f) for f in ffns) / rates["float32"]
    return once, sum(
        max(estimate(f) / rates["float32"], bytes_of_estimate(f) / rates["read_bytes"])
        for f in ffns
    )


def floor(phase: str, model: Any, saved: int, rates: dict[str, float]) -> float:
    """Seconds that a phase takes at least; see the module."""
    ffns = list(iter_ffns(model))
    if phase == "score":
        return (sum(map(flops_of_statistics, ffns)) + flops_of_tables(model)) / rates["float32"]
    if phase in ("spectral setup", "spectral mask"):
        return spectral_floors("exact", ffns, rates, str(model.device))[phase == "spectral mask"]
    return saved / rates["disk_bytes"]


def recipe_floors(
    route: str, model: Any, saved: int, masks: int, rates: dict[str, float], device: str
) -> dict[str, float]:
    """Seconds that each phase of the published recipe takes at least: training with that many masks
    a layer, and a cut.
    """
    ffns = list(iter_ffns(model))
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    reading = floor("score", model, saved, rates)
    dense, mask = spectral_floors(route, ffns, rates, device)
    return {
        "hash of the weights": held / rates["hash_bytes"],
        "statistics": reading,
        "dense spectra": dense,
        "episodes": masks * mask,
        "prune": reading,
        "save, reload and compare": saved / rates["disk_bytes"],
    }


def speeds(device: str, scratch: Path, clock: Callable[[], float]) -> dict[str, float]:
    """FLOPs a second of a product in each dtype; bytes a second of reading 4 MB over and over (a
    GPU: 1 GB), of a hash, and of a file copied down to the disk."""
    side, rates = 8192 if torch.device(device).type == "cuda" else 1536, {}
    for name in ("float32", "float64"):
        square = torch.randn(side, side, device=device, dtype=getattr(torch, name))
        rates[name] = 2 * side**3 / best(lambda square=square: square @ square, clock)
    block = torch.ones(2**28 if torch.device(device).type == "cuda" else 2**20, device=device)
    rates["read_bytes"] = (
        100 * block.nbytes / best(lambda: [block.sum() for _ in range(100)], clock)
    )
    content = os.urandom(2**27)
    rates["hash_bytes"] = len(content) / best(lambda: hashlib.sha256(content).digest(), clock)
    source = scratch / "bytes"
    source.write_bytes(content)

    def copied() -> None:
        shutil.copyfile(source, scratch / "copy")
        with (scratch / "copy").open("rb") as file:
            os.fsync(file.fileno())

    return rates | {"disk_bytes": len(content) / best(copied, clock)}


def best(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the fastest of four calls."""
    found = []
    for _ in range(4):
        start = clock()
        call()
        found.append(clock() - start)
    return min(found)
