"""Measures the published recipe phase by phase against the authors' package, `efficient-pruners`.

    OMP_NUM_THREADS=1 python benchmarks/speed.py MODEL --out benchmarks/results/speed.jsonl

MODEL: SmolLM2-135M. Each part runs in a process of its own:

* exact, stochastic: `--preset paper` (20 episodes of one mask of each of 30 layers; the gate
  matrix, 1 / KS), then prune at 0.3 and save, with the threads of the environment. Beside each
  phase its floor: FLOPs at the rate of one large product of the same dtype, bytes at the measured
  rate of a hash, of the disk or of reading (`floors.py`);
* efficient-pruners as it comes: 2 episodes, scaled to 20, with its default threads; and in float32
  with svdvals: 4, scaled, with the threads of the environment (`authors_package.py` makes its
  environment);
* agreement: exact rewards against float32 SVD and scipy; the estimate against exact, its bound, and
  the rank correlation of both over masks of one layer;
* large: one random 11008 x 4096 matrix, seconds a mask of the three routes.

CPU-seconds are of all threads together. Ratios are printed at the end, from what the file holds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _common import Clock, Line, append_line, is_measured, parser, read_lines, setting
from authors_package import peer_cuts
from floors import RATIO, recipe_floors
from recipe_clock import SAVE, in_a_process, masks_of, pruned_and_saved, timing
from scipy.stats import ks_2samp, spearmanr
from torch import Tensor

from prunenet.checkpoints.load import load_model
from prunenet.envs.sweep import View
from prunenet.models.layers import iter_ffns
from prunenet.policies.training import train as training
from prunenet.policies.training.recipe import PRESETS
from prunenet.policies.training.reports import Reports
from prunenet.spectra.estimated import SpectralSketch
from prunenet.spectra.exact import SpectralReference

EPISODES = 20
# as the peer: none on the way
PUBLISHED = replace(PRESETS["paper"], updates=EPISODES, evaluate_every=EPISODES)
PEERS = {"efficient-pruners as it comes": ["--episodes", "2"]}
PEERS["efficient-pruners, float32 and svdvals"] = ["--episodes", "4", "--float32", "--svdvals"]
OURS = ("exact", "stochastic")
OTHERS = ("agreement", "large")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("model", type=Path, help="folder of SmolLM2-135M")
    made.add_argument(
        "--parts", nargs="+", choices=[*OURS, *PEERS, *OTHERS], default=[*OURS, *PEERS, *OTHERS]
    )
    made.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.job:
        job, _ = arguments.job
        jobs = {"agreement": agreement, "large": large}
        found = jobs[job](arguments.model) if job in jobs else ours(job, arguments.model)
        print(json.dumps(found | setting() | {"load": os.getloadavg()[0]}))
        return
    for part in arguments.parts:
        if not is_measured(read_lines(arguments.out), {"part": part}):
            found = peer(part, arguments.model) if part in PEERS else in_a_process(part, 30)
            append_line(arguments.out, {"part": part, "model": arguments.model.name} | found)
    report({line["part"]: line for line in read_lines(arguments.out)})


def ours(route: str, folder: Path) -> Line:
    """Costs of the published recipe by one of our routes, from a dense to a pruned checkpoint."""
    clock, seconds, used, marks = Clock("cpu"), dict[str, float](), dict[str, float](), []
    with clock.phase("load"):
        model = load_model(folder)
    parts = [
        (training, "weights_sha256", "hash of the weights"),
        (View, "of", "statistics"),
        (training, "SpectralReward", "dense spectra"),
    ]
    with clock.phase("train"), ExitStack() as stack:
        for where, name, part in parts:
            stack.enter_context(timing(where, name, part, seconds, time.perf_counter))
            stack.enter_context(timing(where, name, part, used, time.process_time))
        recipe = replace(PUBLISHED, spectrum=route)
        mark = lambda *_: marks.append((time.perf_counter(), time.process_time()))  # noqa: E731
        trained = training.train(model, recipe, reports=Reports(progress=mark))
    # The first mark is after the untrained policy's evaluation, which is outside.
    seconds["episodes"], used["episodes"] = (
        float(b - a) for a, b in zip(marks[0], marks[-1], strict=True)
    )
    saved, rates = pruned_and_saved(clock, model, trained.policy, time.process_time)
    return {
        "episodes": EPISODES,
        "masks": masks_of(PUBLISHED) * len(list(iter_ffns(model))),
        "phases": clock.phases,
        "seconds": seconds,
        "cpu_seconds": used,
        "floor_cpu_seconds": recipe_floors(route, model, saved, masks_of(PUBLISHED), rates, "cpu"),
        "rates": rates,
        "history": trained.history,
    }


def peer(part: str, folder: Path) -> Line:
    """Costs of the authors' package; as it comes it has its default threads, whatever the
    environment says.
    """
    default = part.endswith("as it comes")
    with patch.dict(os.environ):
        threads = os.cpu_count() if default else torch.get_num_threads()
        if default:
            os.environ.pop("OMP_NUM_THREADS", None)
        load = os.getloadavg()[0]
        facts, _ = peer_cuts(folder, PEERS[part], [RATIO], 1)
    scale = EPISODES / facts["episodes"]
    for name in ("seconds", "cpu_seconds"):
        # Only episodes repeat, not the model's loading and the dense matrices' spectra.
        once, all_told = facts[f"{name}_setup"], facts[f"{name}_training"]
        facts[f"{name}_of_{EPISODES}_episodes"] = once + (all_told - once) * scale
    return facts | {"threads": threads, "load": load}


def agreement(folder: Path) -> Line:
    """Compares both routes on the same masks of every layer: random ones, and ones from random to
    sorted by the rows' norms.
    """
    generator = torch.Generator().manual_seed(0)
    gaps, off, bounds = list[float](), list[float](), list[float]()
    ranks: dict[str, list[float]] = {"random": [], "by norm": []}
    for ffn in iter_ffns(load_model(folder)):
        gate = ffn.gate.float()
        norm = gate.norm(dim=1)
        wanted = torch.linspace(0, 3, 10)[:, None] * ((norm - norm.mean()) / norm.std())
        noise = torch.randn(2, 10, ffn.d_ff, generator=generator)
        exact, sketch = SpectralReference.of(gate), SpectralSketch.of(gate)
        for kind, scores in (("random", noise[0]), ("by norm", noise[1] + wanted)):
            keep = scores.argsort(-1).argsort(-1) >= round(RATIO * ffn.d_ff)
            right, close = exact.distance(keep), sketch.distance(keep)
            off += (close - right).abs().tolist()
            bounds += sketch.bound(keep).tolist()
            ranks[kind].append(float(spearmanr(right, close).statistic))
        full = [torch.linalg.svdvals(matrix) for matrix in (gate, gate[keep[0]])]
        gaps.append(abs(1 / float(right[0]) - 1 / ks_2samp(*full, method="asymp").statistic))
    errors = torch.tensor(off)
    return {
        "masks": len(off),
        "largest_gap_of_exact_rewards_to_svd": max(gaps),
        "estimate_rms_error": float(errors.square().mean().sqrt()),
        "estimate_largest_error": float(errors.max()),
        "smallest_bound": min(bounds),
        "outside_bound": sum(e > b for e, b in zip(off, bounds, strict=True)),
        "rank_correlation": {
            kind: float(torch.tensor(found).mean()) for kind, found in ranks.items()
        },
    }


def large(_: Path) -> Line:
    """CPU-seconds of one mask of one random matrix in the shape of Llama-2-7B."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11008, 4096, generator=generator) / 64
    keep = torch.rand(4, 11008, generator=generator).argsort(-1) >= round(RATIO * 11008)
    times: dict[str, float] = {}

    def timed(name: str, call: Any, times_over: int = 1) -> Any:
        start = time.process_time()
        result = call()
        times[name] = (time.process_time() - start) / times_over
        print(name, round(times[name], 2), flush=True)
        return result

    sketch = timed("estimate, once", lambda: SpectralSketch.of(weight))
    close = timed("estimate, one mask alone", lambda: sketch.distance(keep[:1]))
    timed("estimate, a mask of four", lambda: sketch.distance(keep), len(keep))
    exact = timed("exact, once", lambda: SpectralReference.of(weight))
    right = timed("exact, one mask", lambda: exact.distance(keep[:1]))
    values: Tensor = timed("svdvals, one mask", lambda: torch.linalg.svdvals(weight[keep[0]]))
    full = ks_2samp(exact.values.float(), values, method="asymp").statistic
    found = {"ks_exact": float(right), "ks_svdvals": float(full), "ks_estimate": float(close)}
    return found | {"bound": float(sketch.bound(keep[:1])), "cpu_seconds": times}


def report(found: dict[str, Line]) -> None:
    """Prints each phase beside its floor, and the peers' CPU-seconds over ours."""
    for route in filter(found.__contains__, OURS):
        line = found[route]
        used = line["cpu_seconds"] | {
            name: line["phases"][name]["cpu_seconds"] for name in ("prune", SAVE)
        }
        for phase, seconds in used.items():
            print(
                f"{route}, {phase}: {seconds:.2f} CPU-s, floor"
                f" {line['floor_cpu_seconds'][phase]:.2f}"
            )
        for name in filter(found.__contains__, PEERS):
            theirs = found[name][f"cpu_seconds_of_{EPISODES}_episodes"]
            of_all = line["phases"]["train"]["cpu_seconds"]
            print(
                f"{name}: {theirs:.0f} CPU-s, {theirs / used['episodes']:.1f} x episodes,"
                f" {theirs / of_all:.1f} x all training"
            )
    for part in filter(found.__contains__, OTHERS):
        print(
            part, {key: value for key, value in found[part].items() if key not in ("part", "model")}
        )


if __name__ == "__main__":
    main()
