"""Perplexity of the trained policy beside masks that need no training, at equal widths. One JSON
line per cell; resumable.

    python benchmarks/quality.py MODEL --text ../shared/data/wikitext2/wiki.test.raw --out
    benchmarks/results/quality.jsonl

Uniform widths, no refit, so that every row at one ratio has the same parameters. Policies are
trained on the model with their preset (`spectral` with 8 updates in place of 20, for time);
`default` reads text that the model writes, the others nothing. All are applied from weights alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunenet import __version__
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.evaluation.perplexity import perplexity
from prunenet.models.layers import iter_ffns
from prunenet.models.masks import top_channels, width_at
from prunenet.models.surgery import masking
from prunenet.policies.artifact import Policy
from prunenet.policies.training.recipe import PRESETS
from prunenet.policies.training.train import train
from prunenet.text.calibration import self_blocks
from prunenet.text.corpora import TestText, load_text

Scores = Callable[[int], list[Tensor]]


def methods(model: Any, source: str) -> dict[str, tuple[str, Scores]]:
    """Name -> (regime, seed -> one score per channel of each layer)."""

    @cache
    def policy(preset: str, seed: int) -> Policy:
        blocks = (
            self_blocks(model, load_tokenizer(source), seed=seed) if preset == "default" else None
        )
        recipe = replace(
            PRESETS[preset],
            seed=seed,
            updates=8 if preset == "spectral" else PRESETS[preset].updates,
        )
        return train(model, recipe, blocks=blocks).policy

    def random(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(ffn.d_ff, generator=generator) for ffn in iter_ffns(model)]

    def norms(_seed: int) -> list[Tensor]:
        gated = [ffn for ffn in iter_ffns(model) if ffn.gate is not None]
        return [ffn.gate.norm(dim=1) * ffn.up.norm(dim=1) * ffn.down.norm(dim=0) for ffn in gated]

    return {
        "policy, default": (
            "trained: self, applied: weights",
            lambda seed: policy("default", seed).scores(model),
        ),
        "random": ("weights", random),
        "product of norms": ("weights", norms),
        "policy, spectral": ("weights", lambda seed: policy("spectral", seed).scores(model)),
        "policy, paper": ("weights", lambda seed: policy("paper", seed).scores(model)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=10)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", help="names; default all")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    text = load_text(arguments.text, TestText)
    options = {"window": arguments.window, "max_windows": arguments.max_windows}
    lines = [json.loads(line) for line in arguments.out.open()] if arguments.out.exists() else []
    done = {(line["text"], line["method"], line["ratio"], line["seed"]) for line in lines}

    def record(method: str, regime: str, ratio: float, seed: int, score: Callable[[], Any]) -> None:
        if (Path(text.name).name, method, ratio, seed) in done:
            return
        start = time.perf_counter()
        value = score()
        line = {
            "model": Path(arguments.model).name,
            "method": method,
            "regime": regime,
            "ratio": ratio,
            "seed": seed,
            "perplexity": value,
            "text": Path(text.name).name,
            **options,
            "seconds": time.perf_counter() - start,
            "prunenet": __version__,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(method, ratio, seed, round(value, 2), flush=True)

    def masked(scores: list[Tensor], ratio: float) -> float:
        with masking(model, [top_channels(row, width_at(len(row), ratio)) for row in scores]):
            return perplexity(model, tokenizer, text, **options).value

    record("dense", "-", 0.0, 0, lambda: perplexity(model, tokenizer, text, **options).value)
    for name, (regime, scores_of) in methods(model, arguments.model).items():
        if arguments.methods and name not in arguments.methods:
            continue
        for seed in range(1 if name == "product of norms" else arguments.seeds):
            for ratio in arguments.ratios:
                record(
                    name,
                    regime,
                    ratio,
                    seed,
                    lambda seed=seed, ratio=ratio, f=scores_of: masked(f(seed), ratio),
                )


if __name__ == "__main__":
    main()
