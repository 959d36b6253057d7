r"""Measures whether a reward tracks quality: its rank correlation with perplexity over many masks.

    python benchmarks/reward_correlation.py MODEL --data ../shared/data --policy runs/seed0 \
        --out benchmarks/results/reward_correlation.jsonl
    python benchmarks/reward_correlation.py --figure benchmarks/results/reward_correlation.png \
        --out benchmarks/results/reward_correlation.jsonl

All masks remove the same share of channels. A mask ranks channels by a score with added noise:
random, a weight norm in either direction, activation energy on self-written text, or the policy's.
Widths are uniform or random. Perplexity is that of WikiText-2 validation; rewards read the model's
own text.

With `--tasks ../shared/data/tasks` and another --out it measures, of the same masks, KL, total
variation and flips on the model's own text, and zero-shot accuracy on the first --questions of
every task: which of the three ranks masks as accuracy does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Line, append_line, is_measured, opened, parser, read_lines
from scipy.stats import spearmanr
from torch import Tensor

from prunenet.envs.divergence import DivergenceReward
from prunenet.envs.rewards import ReconstructionReward, Reward, SpectralReward
from prunenet.evaluation.divergence import mask_distances
from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.perplexity import perplexity
from prunenet.evaluation.zeroshot import zero_shot
from prunenet.models.layers import down_linears, ffn_widths, iter_ffns
from prunenet.models.masks import top_channels, width_at, widths_for_budget
from prunenet.models.surgery import masking
from prunenet.policies.artifact import Policy
from prunenet.refit.moments import ffn_moments
from prunenet.text.calibration import self_blocks
from prunenet.text.corpora import TestText, load_text

NOISES = (0.0, 0.5, 1.0, 2.0)
DISTANCE_ROWS = 6
NAMES = ("KL", "total variation", "flips")


class Masks:
    """Mask number n of the study, whatever was drawn before it."""

    def __init__(self, model: Any, policy: Policy, blocks: Tensor, ratio: float) -> None:
        self.d_ff, self.ratio = ffn_widths(model), ratio
        ffns, downs = (
            list(iter_ffns(model)),
            [linear.weight.detach() for linear in down_linears(model)],
        )
        energy = [
            m.second.diagonal() * w.square().sum(0)
            for m, w in zip(ffn_moments(model, blocks), downs, strict=True)
        ]
        norms = {
            "gate norm": [ffn.gate.norm(dim=1) for ffn in ffns if ffn.gate is not None],
            "up norm": [ffn.up.norm(dim=1) for ffn in ffns],
            "down norm": [down.norm(dim=0) for down in downs],
        }
        self.scores = {
            "policy": policy.scores(model),
            "energy": [row.clamp_min(1e-30).log() for row in energy],
        }
        self.scores |= norms | {
            f"low {name}": [-row for row in rows] for name, rows in norms.items()
        }

    def draw(self, number: int) -> tuple[str, list[Tensor]]:
        generator = torch.Generator().manual_seed(number)
        names = ["random", *self.scores, "policy", "energy"]
        name = names[number % len(names)]
        noise = NOISES[int(torch.randint(len(NOISES), (1,), generator=generator))]
        rows = []
        for layer, d_ff in enumerate(self.d_ff):
            blur = torch.randn(d_ff, generator=generator)
            if name == "random":
                rows.append(blur)
                continue
            score = self.scores[name][layer]
            rows.append((score - score.mean()) / score.std() + noise * blur)
        widths = [width_at(d_ff, self.ratio) for d_ff in self.d_ff]
        if number % 2:
            widths = widths_for_budget(
                self.d_ff,
                torch.randn(len(self.d_ff), generator=generator).mul(0.7).tolist(),
                self.ratio,
            )
        kind = f"{name}, noise {noise:g}, {'random' if number % 2 else 'uniform'} widths"
        return kind, [top_channels(row, width) for row, width in zip(rows, widths, strict=True)]


def study(arguments: argparse.Namespace) -> None:
    model, tokenizer = opened(arguments.model)
    blocks = self_blocks(model, tokenizer).ids
    text = load_text(str(arguments.data / "wikitext2" / "wiki.valid.tokens"), TestText)
    masks = Masks(model, Policy.from_pretrained(arguments.policy), blocks, arguments.ratio)
    rewards = {
        "spectral, KS, gate (published)": SpectralReward(model, matrices=("gate",)),
        "spectral, Wasserstein, gate": SpectralReward(
            model, matrices=("gate",), distance="wasserstein"
        ),
        "spectral, energy, all matrices": SpectralReward(model, distance="energy"),
        "reconstruction": ReconstructionReward(model, blocks),
        "divergence": DivergenceReward(model, blocks[:4, :128]),
    }
    done = {line["mask"] for line in read_lines(arguments.out)}
    left = [number for number in range(arguments.masks) if number not in done]
    for numbers in (left[i : i + 8] for i in range(0, len(left), 8)):
        kinds, drawn = zip(*(masks.draw(number) for number in numbers), strict=True)
        keep = [torch.stack(layer) for layer in zip(*drawn, strict=True)]
        paid = {name: _paid(reward, keep).tolist() for name, reward in rewards.items()}
        for index, number in enumerate(numbers):
            with masking(model, drawn[index]):
                options = EvaluationOptions(window=768, max_windows=1)
                value = perplexity(model, tokenizer, text, options).value
            line = {
                "mask": number,
                "kind": kinds[index],
                "ratio": arguments.ratio,
                "perplexity": value,
                "rewards": {name: values[index] for name, values in paid.items()},
            }
            append_line(arguments.out, line)
            print(number, kinds[index], round(value, 1), flush=True)


def accuracies(arguments: argparse.Namespace) -> None:
    """Distances and accuracy of the first masks, one line each."""
    model, tokenizer = opened(arguments.model)
    text = self_blocks(model, tokenizer)
    masks = Masks(model, Policy.from_pretrained(arguments.policy), text.ids, arguments.ratio)
    front, held = int(text.bos is not None), text.ids[-DISTANCE_ROWS:]
    for number in range(arguments.masks):
        place: Line = {"mask": number, "ratio": arguments.ratio, "questions": arguments.questions}
        if is_measured(read_lines(arguments.out), place):
            continue
        kind, keep = masks.draw(number)
        found = mask_distances(model, [(keep, None)], held, unscored=front)
        with masking(model, keep):
            results = zero_shot(model, tokenizer, arguments.tasks, limit=arguments.questions)
        right = sum(result.accuracy * result.n for result in results)
        asked = sum(result.n for result in results)
        line = {**place, "kind": kind, "accuracy": right / asked}
        line["rewards"] = {name: -float(value[0]) for name, value in zip(NAMES, found, strict=True)}
        append_line(arguments.out, line)
        print(number, kind, round(line["accuracy"], 3), flush=True)


def _paid(reward: Reward, keep: list[Tensor]) -> Tensor:
    """The layers' mean plus the sweep's, for each mask."""
    layers = [
        term / len(keep) for i, masks in enumerate(keep) for term in reward.layer(i, masks).values()
    ]
    return torch.stack([*layers, *reward.sweep(keep).values()]).sum(0)


def summary(lines: Sequence[Line]) -> dict[str, float]:
    """Spearman's rank correlation of each reward with accuracy, or with minus the perplexity."""
    quality = [line.get("accuracy", -line.get("perplexity", 0.0)) for line in lines]
    return {
        name: float(spearmanr([line["rewards"][name] for line in lines], quality)[0])
        for name in lines[0]["rewards"]
    }


def figure(lines: Sequence[Line], path: Path) -> None:
    from matplotlib import pyplot

    correlations = summary(lines)
    count, judge = len(lines[0]["rewards"]), "accuracy" if "accuracy" in lines[0] else "perplexity"
    sheet, axes = pyplot.subplots(
        1, count, figsize=(3.6 * count, 4.2), sharey=True, constrained_layout=True
    )
    colours = {"random": "tab:grey", "policy": "tab:red", "energy": "tab:blue"}
    for axis, (name, value) in zip(axes.flat, correlations.items(), strict=True):
        for line in lines:
            colour = colours.get(line["kind"].split(",")[0], "tab:green")
            axis.scatter(line["rewards"][name], line[judge], s=9, color=colour, alpha=0.7)
        axis.set(title=f"{name}\nrank correlation {value:.2f}", xlabel="reward")
        if judge == "perplexity":
            axis.set_yscale("log")
    where = "zero-shot" if judge == "accuracy" else "WikiText-2 validation"
    axes[0].set_ylabel(f"{judge} ({where})")
    sheet.suptitle(
        f"{len(lines)} masks at ratio {lines[0]['ratio']:g}. Grey: random; green: norms; blue:"
        " activation energy; red: policy"
    )
    sheet.savefig(path, dpi=130)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("model", nargs="?")
    made.add_argument("--data", type=Path)
    made.add_argument("--policy")
    made.add_argument("--ratio", type=float, default=0.3)
    made.add_argument("--masks", type=int, default=200)
    made.add_argument("--tasks", type=Path, help="folder of <task>.jsonl: accuracy, not perplexity")
    made.add_argument("--questions", type=int, default=100, help="of each task, the first")
    made.add_argument("--figure", type=Path, help="draw what --out holds, measure nothing")
    arguments = made.parse_args()
    if arguments.figure is None and None in (arguments.model, arguments.data, arguments.policy):
        made.error("give MODEL, --data and --policy, or --figure")
    if arguments.figure is None:
        (study if arguments.tasks is None else accuracies)(arguments)
    lines = read_lines(arguments.out)
    if arguments.figure is not None:
        figure(lines, arguments.figure)
    print(json.dumps({"masks": len(lines), "rank_correlation": summary(lines)}))


if __name__ == "__main__":
    main()
