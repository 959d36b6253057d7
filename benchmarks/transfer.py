r"""Measures what a policy trained on one model does to another one.

    python benchmarks/transfer.py --policy llama --data ../shared/data \
        --out benchmarks/results/transfer.jsonl

Cuts `stories15M` (see `stories.py`): 6 layers of d_ff 768, where SmolLM2-135M, on which the policy
was trained, has 30 of 1536; another tokenizer, another kind of text. Scores on text that the dense
model writes, with a seed that nothing else uses (its own domain), and on WikiText-2 test (foreign
to it), in windows of 256. Ratios reach beyond those of training (0.1 to 0.6 for the scores, 0.2 to
0.4 for the widths).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import append_line, is_measured, opened, parser, read_lines, table_head
from stories import stories_model
from transformers import PreTrainedModel

from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.perplexity import perplexity
from prunenet.models.layers import count_parameters
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.methods import Evidence, pruned_model
from prunenet.text.calibration import self_blocks
from prunenet.text.corpora import TestText, load_text
from prunenet.text.generate import SamplingOptions, document_start, generate_blocks

Make = Callable[[float], PreTrainedModel]
WINDOW, STORIES, STORY_SEED = 256, 64, 1_000_003


class Bench:
    """The other model, its text and what cuts it."""

    def __init__(self, policy: str, data: Path) -> None:
        self.model, self.tokenizer = opened(stories_model())
        self.policy = Policy.from_pretrained(policy)
        self.blocks = self_blocks(self.model, self.tokenizer)
        self.evidence = [Evidence(self.model, self.blocks, seed) for seed in range(5)]
        self.texts = {
            "stories": self._stories(),
            "wikitext2": load_text(str(data / "wikitext2/wiki.test.raw"), TestText),
        }

    def _stories(self) -> TestText:
        """Plain samples of the dense model: temperature 1, no nucleus, no filter."""
        plain = SamplingOptions(
            sequences=STORIES,
            tokens=WINDOW,
            seed=STORY_SEED,
            hot=1.0,
            temperature=1.0,
            top_p=1.0,
            keep=1.0,
        )
        ids = generate_blocks(self.model, document_start(self.tokenizer), plain)
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
            options = EvaluationOptions(window=WINDOW, max_windows=windows, batch_size=8)
            found[f"perplexity_{name}"] = perplexity(model, self.tokenizer, text, options).value
        return found


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: perplexity on the model's own text / WikiText-2; over several seeds the mean."""
    ratios = sorted({line["ratio"] for line in lines if line["ratio"]})
    rows = table_head(ratios)
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
    made = parser(__doc__)
    made.add_argument("--policy", default="llama", help="name of a shipped policy, or a folder")
    made.add_argument("--data", type=Path, default=Path("../shared/data"))
    made.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.1, 0.5, 0.7])
    made.add_argument("--windows", type=int, default=48, help="of 256 tokens, of each text")
    made.add_argument(
        "--table", action="store_true", help="print what --out holds as Markdown, measure nothing"
    )
    arguments = made.parse_args()
    done = read_lines(arguments.out)
    if arguments.table:
        print(table(done))
        return
    bench = Bench(arguments.policy, arguments.data)
    dense: list[tuple[str, str, int, Make]] = [("dense", "-", 0, lambda _: bench.model)]
    jobs = [(0.0, *row) for row in dense]
    jobs += [(ratio, *row) for ratio in arguments.ratios for row in bench.rows()]
    for ratio, method, regime, seed, make in jobs:
        place = {
            "method": method,
            "regime": regime,
            "ratio": ratio,
            "seed": seed,
            "windows": arguments.windows,
        }
        if is_measured(done, place):
            continue
        with torch.no_grad():
            narrow = make(ratio)
        found = bench.scored(narrow, arguments.windows)
        line = {"model": "stories15M", **place, "parameters": count_parameters(narrow)[0]}
        append_line(arguments.out, line | found | {"policy": bench.policy.sha256})
        shown = {name: round(value, 2) for name, value in found.items()}
        print(regime, method, ratio, seed, shown, flush=True)


if __name__ == "__main__":
    main()
