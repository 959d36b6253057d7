"""Does training learn, and which algorithm learns best? One JSON line per run; finished runs are
skipped.

    python benchmarks/training.py MODEL --out benchmarks/results/training.jsonl

Two parts. `spectral`: the spectral reward of trained masks against uniformly random masks, 5 seeds,
at ratio 0.3. `algorithms`: the reconstruction reward (on text that the model writes) after the same
number of sweeps, for each choice of the recipe, 3 seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.regimes import Regime
from prunenet.envs import SpectralReward
from prunenet.envs.rewards import ReconstructionReward, Reward
from prunenet.envs.sweep import View
from prunenet.models.masks import top_channels
from prunenet.policies.training.recipe import PRESETS, Recipe
from prunenet.policies.training.train import train
from prunenet.text.calibration import self_blocks

RATIO = 0.3
CHOICES: dict[str, dict[str, Any]] = {
    "default: a2c, fixed width, group baseline, gamma 0": {},
    "ppo, 4 epochs": {"algorithm": "ppo", "learning_rate": 3e-3},
    "bernoulli": {"subset": "bernoulli"},
    "value baseline": {"baseline": "value"},
    "gamma 0.99": {"gamma": 0.99},
    "no baseline": {"baseline": "none"},
    "linear scorer": {"hidden": ()},
    "learning rate 3e-3": {"learning_rate": 3e-3},
}


def random_reward(reward: Reward, view: View, seed: int) -> float:
    """Reward per layer of uniformly random masks."""
    generator = torch.Generator().manual_seed(seed)
    width = round((1 - RATIO) * view.d_ff)
    paid = [
        sum(
            reward.layer(
                layer, top_channels(torch.rand(1, view.d_ff, generator=generator), width)
            ).values()
        )
        for layer in range(view.layers)
    ]
    return float(torch.stack([torch.as_tensor(value) for value in paid]).mean())


def spectral(model: Any, view: View, seeds: int) -> Iterator[tuple[str, Any]]:
    """Random and trained masks under the spectral reward; KS distance of all three matrices."""
    reward = SpectralReward(model)
    for seed in range(seeds):
        yield (
            f"spectral random {seed}",
            lambda seed=seed: {"reward": random_reward(reward, view, seed)},
        )
    for seed in range(seeds):
        recipe = replace(
            PRESETS["spectral"],
            updates=8,
            evaluate_every=4,
            evaluate_at=(RATIO,),
            ratio=(RATIO, RATIO),
            seed=seed,
        )
        yield (
            f"spectral trained {seed}",
            lambda recipe=recipe: trained(model, recipe, reward, "weights"),
        )


def algorithms(model: Any, source: str, seeds: int) -> Iterator[tuple[str, Any]]:
    """Each choice of the recipe, with everything else as in the default."""
    reward = ReconstructionReward(model, self_blocks(model, load_tokenizer(source)).ids)
    for name, changes in CHOICES.items():
        for seed in range(seeds):
            recipe = replace(Recipe(), seed=seed, **changes)
            yield f"{name} / {seed}", lambda recipe=recipe: trained(model, recipe, reward, "self")


def trained(model: Any, recipe: Recipe, reward: Reward, regime: Regime) -> dict[str, Any]:
    """Trains, and says what came out."""
    start = time.perf_counter()
    history = train(model, recipe, reward=reward, regime=regime).history
    return {
        "reward": max(value for _, value in history),
        "seconds": time.perf_counter() - start,
        "history": history,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=("spectral", "algorithms"), action="append")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    done = (
        {json.loads(line)["run"] for line in arguments.out.open()}
        if arguments.out.exists()
        else set()
    )
    parts = arguments.part or ["spectral", "algorithms"]
    runs: list[tuple[str, Any]] = []
    if "spectral" in parts:
        runs += spectral(model, View.of(model), 5)
    if "algorithms" in parts:
        runs += algorithms(model, arguments.model, 3)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name, run in runs:
        if name in done:
            continue
        line = {
            "run": name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **run(),
        }
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(name, round(line["reward"], 4), flush=True)
    rows = [json.loads(line) for line in arguments.out.open()]
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["run"].rsplit(" ", 1)[0].rstrip(" /"), []).append(row["reward"])
    for name, values in groups.items():
        print(
            f"{name}: mean {statistics.mean(values):.4f}, sd {statistics.stdev(values):.4f}, n"
            f" {len(values)}"
        )


if __name__ == "__main__":
    main()
