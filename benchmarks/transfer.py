"""Does a policy trained on one model cut another one? One JSON line per cell; resumable.

    python benchmarks/transfer.py --policy llama --data ../shared/data --out
    benchmarks/results/transfer.jsonl

The other model is `stories15M` (see `stories`): 6 layers of d_ff 768 in place of the 30 layers of
d_ff 1536 of SmolLM2-135M, on which the policy was trained, another tokenizer, another kind of text.
Two texts: what the dense model writes by itself, of a seed that nothing else uses (its own domain),
and WikiText-2 test (foreign to it); windows of 256. Ratios reach beyond those of the training (0.1
to 0.6 for the scores, 0.2 to 0.4 for the widths).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stories import stories_model
from transformers import PreTrainedModel

from prunenet import __version__
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.evaluation.perplexity import perplexity
from prunenet.models.layers import count_parameters
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.methods import Evidence, pruned_model
from prunenet.text.calibration import self_blocks
from prunenet.text.corpora import TestText, load_text
from prunenet.text.generate import document_start, generate_blocks

Make = Callable[[float], PreTrainedModel]
WINDOW, STORIES, STORY_SEED = 256, 64, 1_000_003


class Bench:
    """The other model, its text and what cuts it."""

    def __init__(self, policy: str, data: Path) -> None:
        folder = stories_model()
        self.model, self.tokenizer = load_model(folder), load_tokenizer(folder)
        self.policy = Policy.from_pretrained(policy)
        self.blocks = self_blocks(self.model, self.tokenizer)
        self.evidence = [Evidence(self.model, self.blocks, seed) for seed in range(5)]
        self.texts = {
            "stories": self._stories(),
            "wikitext2": load_text(str(data / "wikitext2/wiki.test.raw"), TestText),
        }

    def _stories(self) -> TestText:
        """Plain samples of the dense model: temperature 1, no nucleus, no filter."""
        plain: dict[str, Any] = {"hot": 1.0, "temperature": 1.0, "top_p": 1.0, "keep": 1.0}
        start = document_start(self.tokenizer)
        ids = generate_blocks(
            self.model, start, sequences=STORIES, tokens=WINDOW, seed=STORY_SEED, **plain
        )
        return TestText(
            "stories15M writes", "\n\n".join(self.tokenizer.decode(row[1:]) for row in ids)
        )

    def rows(self) -> Iterator[tuple[str, str, int, Make]]:
        """(method, regime, seed, what makes the narrow model)."""
        policy, none = self.policy, Policy.untrained(PolicyConfig())
        yield "policy, learned widths", "weights", 0, self._pruned(policy, widths="per-layer")
        yield "policy, uniform", "weights", 0, self._pruned(policy, widths="uniform")
        yield "untrained policy", "weights", 0, self._pruned(none, widths="uniform")
        for seed, evidence in enumerate(self.evidence):
            yield "random", "weights", seed, partial(pruned_model, evidence, "random")
        for name in ("magnitude", "lila", "folding", "prunenet_published"):
            yield name, "weights", 0, partial(pruned_model, self.evidence[0], name)
        yield (
            "default: policy + refit",
            "self",
            0,
            self._pruned(policy, widths="auto", blocks=self.blocks),
        )
        yield "elimination + refit, uniform", "self", 0, self._pruned(None, blocks=self.blocks)
        for name in ("wanda_sp", "flap"):
            yield name, "self", 0, partial(pruned_model, self.evidence[0], name)
        # The published widths leave four layers at one end and two at the other whole: all six of
        # them.
        yield (
            "llm_pruner_element1, uniform",
            "self",
            0,
            partial(pruned_model, self.evidence[0], "llm_pruner_element1", allocation="uniform"),
        )

    def _pruned(self, policy: Policy | None, **options: Any) -> Make:
        return lambda ratio: prune(self.model, policy, ratio=ratio, **options).model

    def scored(self, model: PreTrainedModel, windows: int) -> dict[str, float]:
        found = {}
        for name, text in self.texts.items():
            found[f"perplexity_{name}"] = perplexity(
                model, self.tokenizer, text, window=WINDOW, max_windows=windows, batch_size=8
            ).value
        return found


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: perplexity on the model's own text / WikiText-2; over several seeds the mean."""
    ratios = sorted({line["ratio"] for line in lines if line["ratio"]})
    rows = [
        f"| | regime | {' | '.join(f'{ratio:g}' for ratio in ratios)} |",
        "|---" * (2 + len(ratios)) + "|",
    ]
    for method, regime in dict.fromkeys((line["method"], line["regime"]) for line in lines):
        mine = [line for line in lines if line["method"] == method]
        cells = []
        for ratio in ratios:
            found = [line for line in mine if line["ratio"] in (ratio, 0.0)]
            means = [
                sum(line[f"perplexity_{text}"] for line in found) / len(found)
                for text in ("stories", "wikitext2")
            ]
            cells.append(" / ".join(f"{mean:,.1f}" for mean in means))
        rows.append(f"| {method} | {regime} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="llama", help="name of a shipped policy, or a folder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.1, 0.5, 0.7])
    parser.add_argument("--windows", type=int, default=48, help="of 256 tokens, of each text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--table", action="store_true", help="print what --out holds as Markdown, measure nothing"
    )
    arguments = parser.parse_args()
    done = [json.loads(line) for line in arguments.out.open()] if arguments.out.exists() else []
    if arguments.table:
        print(table(done))
        return
    bench = Bench(arguments.policy, arguments.data)
    jobs = [("dense", "-", 0, lambda _: bench.model, 0.0)]
    jobs += [
        (method, regime, seed, make, ratio)
        for ratio in arguments.ratios
        for method, regime, seed, make in bench.rows()
    ]
    for method, regime, seed, make, ratio in jobs:
        place = {
            "method": method,
            "regime": regime,
            "ratio": ratio,
            "seed": seed,
            "windows": arguments.windows,
        }
        if any(all(line[key] == value for key, value in place.items()) for line in done):
            continue
        with torch.no_grad():
            narrow = make(ratio)
        line = {"model": "stories15M", **place, "parameters": count_parameters(narrow)[0]}
        line |= bench.scored(narrow, arguments.windows) | {
            "policy": bench.policy.sha256,
            "prunenet": __version__,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            regime,
            method,
            ratio,
            seed,
            {key: round(line[key], 2) for key in line if key.startswith("perp")},
            flush=True,
        )


if __name__ == "__main__":
    main()
