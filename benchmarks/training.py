"""Measures whether training learns, and which choice of the recipe learns best.

    python benchmarks/training.py MODEL --out benchmarks/results/training.jsonl

Part `spectral` compares the spectral reward of trained masks with that of uniformly random masks, 5
seeds, at ratio 0.3. Part `algorithms` compares the reconstruction reward (on text that the model
writes) after the same number of sweeps, for each choice of the recipe, 3 seeds. Part `gradients`
compares what the scorer learns from the divergence by REINFORCE and by the pathwise gradient, at as
many forward passes, with the default's reward: KL at uniform widths on other self-written text, 3
seeds. A model of `stories` in place of MODEL is stories15M.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _common import Line, append_line, opened, parser, read_lines, setting
from stories import stories_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.regimes import Regime
from prunenet.envs import SpectralReward
from prunenet.envs.rewards import ReconstructionReward, Reward
from prunenet.envs.sweep import View
from prunenet.evaluation.divergence import mask_divergences
from prunenet.models.masks import top_channels
from prunenet.policies.training.recipe import PRESETS, Recipe
from prunenet.policies.training.train import train
from prunenet.text.calibration import self_blocks

PARTS = ("spectral", "algorithms", "gradients")
RATIO, HELD = 0.3, 12
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


def spectral(model: PreTrainedModel, view: View, seeds: int) -> Iterator[tuple[str, Any]]:
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


def algorithms(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seeds: int
) -> Iterator[tuple[str, Any]]:
    """Each choice of the recipe, with everything else as in the default."""
    reward = ReconstructionReward(model, self_blocks(model, tokenizer).ids)
    for name, changes in CHOICES.items():
        for seed in range(seeds):
            recipe = replace(Recipe(), seed=seed, **changes)
            yield f"{name} / {seed}", lambda recipe=recipe: trained(model, recipe, reward, "self")


def gradients(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seeds: int
) -> Iterator[tuple[str, Any]]:
    """Stage one by each gradient; a backward pass costs what two forward passes do."""
    text = self_blocks(model, tokenizer)
    fit = text.rows(slice(0, -HELD))
    held, front = text.ids[-HELD:], int(text.bos is not None)
    pathwise = PRESETS["pathwise"]
    masks = Recipe().masks
    played = 3 * pathwise.updates // masks
    ways = {
        "reconstruction by reinforce, no forward pass": replace(Recipe(), allocation=None),
        f"divergence by reinforce, {played * masks} forward passes": replace(
            Recipe(), reward="divergence", updates=played, allocation=None
        ),
        f"divergence by pathwise, {pathwise.updates} forward and backward passes": pathwise,
    }

    def run(recipe: Recipe) -> Line:
        start = time.process_time()
        policy = train(model, recipe, blocks=fit).policy
        line: Line = {"cpu_seconds": time.process_time() - start}
        scores = policy.scores(model)
        for ratio in (0.2, RATIO, 0.5):
            keep = [top_channels(row, round(len(row) * (1 - ratio))) for row in scores]
            line[f"kl_{ratio:g}"] = float(
                mask_divergences(model, [(keep, None)], held, unscored=front)[0]
            )
        return line | {"reward": -line[f"kl_{RATIO:g}"]}

    for name, recipe in ways.items():
        for seed in range(seeds):
            yield f"{name} / {seed}", partial(run, replace(recipe, seed=seed))


def trained(model: PreTrainedModel, recipe: Recipe, reward: Reward, regime: Regime) -> Line:
    """Trains a policy: its best reward, seconds and learning curve."""
    start = time.perf_counter()
    history = train(model, recipe, reward=reward, regime=regime).history
    return {
        "reward": max(value for _, value in history),
        "seconds": time.perf_counter() - start,
        "history": history,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("model")
    made.add_argument("--part", choices=PARTS, action="append")
    arguments = made.parse_args()
    source = stories_model() if arguments.model == "stories" else arguments.model
    model, tokenizer = opened(source)
    done = {line["run"] for line in read_lines(arguments.out)}
    parts = arguments.part or PARTS
    runs: list[tuple[str, Any]] = []
    if "spectral" in parts:
        runs += spectral(model, View.of(model), 5)
    if "algorithms" in parts:
        runs += algorithms(model, tokenizer, 3)
    if "gradients" in parts:
        runs += gradients(model, tokenizer, 3)
    for name, run in runs:
        if name in done:
            continue
        line = {"run": name, **setting(), **run()}
        append_line(arguments.out, line)
        print(name, round(line["reward"], 4), flush=True)
    groups: dict[str, list[float]] = {}
    for row in read_lines(arguments.out):
        groups.setdefault(row["run"].rsplit(" ", 1)[0].rstrip(" /"), []).append(row["reward"])
    for name, values in groups.items():
        spread = f", sd {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{name}: mean {statistics.mean(values):.4f}{spread}, n {len(values)}")


if __name__ == "__main__":
    main()
