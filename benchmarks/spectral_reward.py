r"""Measures the exact spectral reward per mask against a full SVD of the same masked matrices.

    OMP_NUM_THREADS=2 python benchmarks/spectral_reward.py MODEL \
        --out benchmarks/results/spectral_reward.jsonl

Measures time and agreement, one JSON line a case: SmolLM2 with the gate matrix only (as published),
SmolLM2 with gate, up and down, and one random 11008 x 4096 layer (the shape of Llama-2-7B). Both
routes run interleaved in one process, on the same masks; the SVD route is `torch.linalg.svdvals` of
W[K] in the weights' float32, then `scipy.stats.ks_2samp`. `setup_s` is the time of the Gram matrix
and the spectrum of the dense matrix, computed once in a training run. Agreement is measured on
rewards 1 - KS, against an SVD in float64 too. Take one thread on a machine that others use.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from _common import append_line, parser, setting
from scipy.stats import ks_2samp
from torch import Tensor
from transformers import AutoModelForCausalLM

from prunenet.models.layers import iter_ffns
from prunenet.spectra.exact import SpectralReference

RATIO = 0.3


def main() -> None:
    made = parser(__doc__)
    made.add_argument("model", help="folder of SmolLM2-135M")
    made.add_argument("--layers", type=int, nargs="+", default=[0, 6, 12, 18, 24, 29])
    made.add_argument("--repeats", type=int, default=5, help="masks of each SmolLM2 layer")
    made.add_argument(
        "--large-repeats", type=int, default=2, help="masks of the 11008 x 4096 layer"
    )
    made.add_argument("--only", choices=["smollm2", "large"], help="leave the other cases out")
    arguments = made.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    ffns = [ffn for ffn in iter_ffns(model) if ffn.index in arguments.layers]
    gates = [[ffn.gate] for ffn in ffns]
    every = [[ffn.gate, ffn.up, ffn.down.T] for ffn in ffns]
    cases = [
        ("SmolLM2-135M, gate", gates, arguments.repeats),
        ("SmolLM2-135M, gate + up + down", every, arguments.repeats),
    ]
    if arguments.only == "large":
        cases.clear()
    if arguments.only != "smollm2":
        large = torch.randn(11008, 4096, generator=torch.Generator().manual_seed(0)) / 64
        cases.append(("random 11008 x 4096, one matrix", [[large]], arguments.large_repeats))
    for name, layers, repeats in cases:
        line = compare(name, layers, repeats)
        print(line, flush=True)
        append_line(arguments.out, line)


def compare(name: str, layers: list[list[Tensor]], repeats: int) -> dict[str, object]:
    """Times both routes on `repeats` masks of every layer; a sample is one mask of one layer."""
    generator = torch.Generator().manual_seed(0)
    setup = time.perf_counter()
    references = [[SpectralReference.of(weight) for weight in matrices] for matrices in layers]
    setup = time.perf_counter() - setup
    # agreement with an SVD of W is checked below
    dense = [[reference.values for reference in ready] for ready in references]
    ours, full, gaps, gaps64 = [], [], [], []
    for repeat in range(repeats):
        for layer, (matrices, ready, spectra) in enumerate(
            zip(layers, references, dense, strict=True)
        ):
            keep = (
                torch.rand(matrices[0].shape[0], generator=generator)
                .argsort()
                .ge(int(RATIO * matrices[0].shape[0]))
            )
            routes = [
                (ours, lambda ready=ready, keep=keep: gram_reward(ready, keep)),
                (
                    full,
                    lambda matrices=matrices, spectra=spectra, keep=keep: svd_reward(
                        matrices, spectra, keep
                    ),
                ),
            ]
            first = (repeat + layer) % 2  # neither route always runs on the other's warm caches
            rewards = {}
            for times, route in (routes[first], routes[1 - first]):
                rewards[id(times)] = timed(times, route)
            gaps.append(abs(rewards[id(ours)] - rewards[id(full)]))
            # a float64 SVD of the large matrix takes minutes
            if repeat == 0 and matrices[0].shape[1] < 2048:
                exact = [weight.double() for weight in matrices]
                exact_dense = [torch.linalg.svdvals(weight) for weight in exact]
                gaps64.append(abs(rewards[id(ours)] - svd_reward(exact, exact_dense, keep)))
    ratios = [b / a for a, b in zip(ours, full, strict=True)]
    return {
        "benchmark": "spectral_reward",
        "case": name,
        "ratio": RATIO,
        "samples": len(ours),
        "gram_s_per_mask": summary(ours),
        "svd_s_per_mask": summary(full),
        "speedup": summary(ratios),
        "setup_s": round(setup, 4),
        "largest_reward_gap_to_float32_svd": max(gaps),
        "largest_reward_gap_to_float64_svd": max(gaps64, default=None),
        **setting(),
        "machine": platform.processor() or platform.machine(),
        "command": " ".join(["python", *sys.argv]),
    }


def gram_reward(references: list[SpectralReference], keep: Tensor) -> float:
    return float(np.mean([1 - float(reference.distance(keep[None])) for reference in references]))


def svd_reward(matrices: list[Tensor], dense: list[Tensor], keep: Tensor) -> float:
    kept = [torch.linalg.svdvals(weight[keep]) for weight in matrices]
    return float(
        np.mean(
            [1 - ks_2samp(a, b, method="asymp").statistic for a, b in zip(dense, kept, strict=True)]
        )
    )


def timed(times: list[float], route: Callable[[], float]) -> float:
    start = time.perf_counter()
    reward = route()
    times.append(time.perf_counter() - start)
    return reward


def summary(values: list[float]) -> dict[str, float]:
    """Median and the quartiles around it."""
    low, _, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {
        "median": round(statistics.median(values), 5),
        "q1": round(low, 5),
        "q3": round(high, 5),
    }


if __name__ == "__main__":
    main()
