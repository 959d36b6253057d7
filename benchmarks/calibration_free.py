"""The table of issue 3: pruning without data beside pruning with data, at equal parameters. One JSON line per cell; resumable.

    python benchmarks/calibration_free.py MODEL --data ../shared/data --policies runs/seed0 runs/seed1 runs/seed2 \
        --out benchmarks/results/calibration_free.jsonl

Every cell cuts the model to the same number of FFN channels and scores it on WikiText-2 test and on the built-in test text; or,
with `--tasks ../shared/data/tasks --limit 100` and another --out, on zero-shot tasks. Policies are folders written by
`prunenet train MODEL --seed N`; a row with a policy has one line for each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunenet import __version__
from prunenet.calibration import Blocks, data_blocks, self_blocks
from prunenet.checkpoint import load_model, load_tokenizer
from prunenet.compensate import Cut, cut_layers, refit_sequentially
from prunenet.envs.divergence import DivergenceReward
from prunenet.evaluate import perplexity
from prunenet.layers import count_parameters, ffn_widths
from prunenet.masks import top_channels, width_at, widths_for_budget
from prunenet.policies.apply import MEASURED, prune
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.methods import Evidence, pruned_model
from prunenet.recover.training import Tuning, tuned
from prunenet.text import CalibrationText, TestText, load_text
from prunenet.zeroshot import task_files, zero_shot

Make = Callable[[float], PreTrainedModel]
CALIBRATION = {"ptb": "ptb/ptb.valid.txt", "wikitext2": "wikitext2/wiki.valid.tokens"}
TESTS = {"wikitext2": ("wikitext2/wiki.test.raw", 1024), "builtin": ("builtin", 512)}


@dataclass(frozen=True)
class Row:
    """A way to prune: `make` gives the narrow model at a ratio."""

    group: str
    method: str
    regime: str
    seed: int
    make: Make


class Workshop:
    """What rows share: the model, text, policies."""

    def __init__(self, source: str, data: Path, policies: list[Path], tokens: int, device: str) -> None:
        self.model, self.tokenizer = load_model(source, device=device), load_tokenizer(source)
        self.data, self.tokens = data, tokens
        self.policies = [Policy.from_pretrained(folder) for folder in policies]
        self._cuts: dict[Any, Any] = {}
        self._evidence: dict[Any, Evidence] = {}

    def external(self, name: str, seed: int = 0) -> Blocks:
        text = load_text(str(self.data / CALIBRATION[name]), CalibrationText)
        return data_blocks(self.tokenizer, text, count=self.tokens // 512, window=512, seed=seed)

    def written(self, seed: int = 0) -> Blocks:
        return self_blocks(self.model, self.tokenizer, sequences=self.sequences, seed=seed)

    def dense(self, _ratio: float) -> PreTrainedModel:
        return self.model

    def baseline(self, name: str, blocks: Callable[[], Blocks] | None, seed: int, **options: Any) -> Make:
        def make(ratio: float) -> PreTrainedModel:
            text = None if blocks is None else blocks()
            key = (None if text is None else text.source["text"], seed)
            if key not in self._evidence:
                self._evidence[key] = Evidence(self.model, text, seed)
            return pruned_model(self._evidence[key], name, ratio, **options)

        return make

    def weights(self, policy: Policy, widths: str) -> Make:
        return lambda ratio: prune(self.model, policy, ratio=ratio, widths=widths).model

    def measured(
        self,
        blocks: Callable[[], Blocks],
        *,
        channels: Policy | None,
        widths: Policy | None,
        refit: str = "layerwise",
        measured: float = MEASURED,
    ) -> Make:
        """A policy's channels, blended with measured energies (None: elimination's), refitted on blocks.

        widths: as a policy learned (None: uniform).
        """

        def make(ratio: float) -> PreTrainedModel:
            source = blocks().source
            key = (source["text"], source["seed"], channels, refit == "off", measured)
            if key not in self._cuts:  # all ratios and both kinds of widths from one walk
                learned = channels or next(iter(self.policies), None)
                kinds = [(kind, r) for kind in dict.fromkeys((None, learned)) for r in self.ratios]
                scores = None if channels is None else channels.scores(self.model)
                ways = [self._widths(kind, r) for kind, r in kinds]
                cuts = cut_layers(self.model, blocks().ids, ways, scores=scores, measured=measured, refit=refit != "off")
                self._cuts[key] = dict(zip(kinds, cuts, strict=True))
            cut: Cut = self._cuts[key][widths, ratio]
            if refit == "sequential":
                cut = refit_sequentially(self.model, cut, blocks().ids, dense_targets=False)
            return cut.model(self.model)

        return make

    def best_of(self, n: int, policy: Policy | None) -> Make:
        """What chance finds at the cost of a stage of training: n random cuts at ratio 0.3, judged as training judges them.

        Random widths; a policy's channels, or random ones. Other ratios take the best one's log-odds and channels.
        """

        def make(ratio: float) -> PreTrainedModel:
            if (n, policy) not in self._cuts:
                generator = torch.Generator().manual_seed(0)
                d_ff = ffn_widths(self.model)
                known = None if policy is None else policy.scores(self.model)
                draws = []
                for _ in range(n):
                    offsets = torch.randn(len(d_ff), generator=generator).mul(0.5).tolist()
                    draws.append((offsets, known or [torch.rand(width, generator=generator) for width in d_ff]))
                keeps = [self._keep(offsets, scores, 0.3) for offsets, scores in draws]
                reward = DivergenceReward(self.model, self.written().ids[:4, :128])
                paid = reward.sweep([torch.stack(layer) for layer in zip(*keeps, strict=True)])["divergence"]
                self._cuts[n, policy] = draws[int(paid.argmax())]
            offsets, scores = self._cuts[n, policy]
            return Cut(self._keep(offsets, scores, ratio), None).model(self.model)

        return make

    def recovered(self, make: Make) -> Make:
        """What `make` cuts, trained for 100 steps on the dense model's predictions on its own text (`prunenet recover`)."""

        def trained(ratio: float) -> PreTrainedModel:
            with torch.enable_grad():
                return tuned(make(ratio), self.written(), Tuning(), teacher=self.model).model

        return trained

    def _keep(self, offsets: list[float], scores: list[Tensor], ratio: float) -> list[Tensor]:
        widths = widths_for_budget(ffn_widths(self.model), offsets, ratio)
        return [top_channels(row, width) for row, width in zip(scores, widths, strict=True)]

    ratios: tuple[float, ...] = ()
    sequences: int = 160

    def _widths(self, policy: Policy | None, ratio: float) -> list[int]:
        if policy is None:
            return [width_at(d_ff, ratio) for d_ff in ffn_widths(self.model)]
        return policy.widths(self.model, ratio, per_layer=True)


def rows(shop: Workshop) -> Iterator[Row]:
    """Every row of the table."""
    yield Row("dense", "dense", "-", 0, shop.dense)
    for seed, policy in enumerate(shop.policies):
        make = shop.measured(shop.written, channels=policy, widths=policy)
        yield Row("self", "default: blend + refit, learned widths", "self", seed, make)
        make = shop.measured(shop.written, channels=policy, widths=None)
        yield Row("self", "blend + refit, uniform", "self", seed, make)
    for calibration in CALIBRATION:
        text = lambda name=calibration: shop.external(name)  # noqa: E731
        for name in ("wanda_sp", "flap", "llm_pruner_element1"):
            yield Row("data", f"{name}, own allocation, {calibration}", "data", 0, shop.baseline(name, text, 0))
        for name in ("flap", "llm_pruner_element1"):
            make = shop.baseline(name, text, 0, allocation="uniform")
            yield Row("data", f"{name}, uniform, {calibration}", "data", 0, make)
        make = shop.measured(text, channels=None, widths=None)
        yield Row("data", f"elimination + refit, uniform, {calibration}", "data", 0, make)
    yield from ablations(shop)
    for seed, policy in enumerate(shop.policies):
        make = shop.recovered(shop.measured(shop.written, channels=policy, widths=policy))
        yield Row("recovered", "default, then recovered", "self", seed, make)
    for seed, policy in enumerate(shop.policies):
        yield Row("weights", "policy, learned widths", "weights", seed, shop.weights(policy, "per-layer"))
        yield Row("weights", "policy, uniform", "weights", seed, shop.weights(policy, "uniform"))
    yield Row("weights", "untrained policy", "weights", 0, shop.weights(Policy.untrained(PolicyConfig()), "uniform"))
    if shop.policies:
        yield Row("weights", "untrained scores, learned widths", "weights", 0, shop.weights(untrained(shop), "per-layer"))
    for seed in range(5):
        yield Row("weights", "random", "weights", seed, shop.baseline("random", None, seed))
    for name in ("magnitude", "lila", "folding", "prunenet_published", "prunenet_published_trained"):
        yield Row("weights", name, "weights", 0, shop.baseline(name, None, 0))


def ablations(shop: Workshop) -> Iterator[Row]:
    """What each part brings; the first policy stands for all seeds."""
    elimination = partial(shop.measured, shop.written, channels=None)
    yield Row("ablation", "elimination + refit, uniform", "self", 0, elimination(widths=None))
    yield Row("ablation", "elimination, uniform, no refit", "self", 0, elimination(widths=None, refit="off"))
    if not shop.policies:
        return
    first = shop.policies[0]
    yield Row("ablation", "elimination, learned widths, no refit", "self", 0, elimination(widths=first, refit="off"))
    yield Row("ablation", "elimination + refit, learned widths", "self", 0, elimination(widths=first))
    ours = partial(shop.measured, shop.written, channels=first, widths=first)
    yield Row("ablation", "blend + sequential refit, learned widths", "self", 0, ours(refit="sequential"))
    yield Row("ablation", "blend, learned widths, no refit", "self", 0, ours(refit="off"))
    yield Row("ablation", "policy's channels + refit, learned widths", "self", 0, ours(measured=0.0))
    yield Row("ablation", "measured energies alone + refit, learned widths", "self", 0, ours(measured=1.0))
    make = shop.measured(lambda: shop.external("wikitext2"), channels=None, widths=first)
    yield Row("data", "elimination + refit, learned widths, wikitext2", "data", 0, make)
    yield Row("ablation", "policy's channels, best of 96 random widths", "self", 0, shop.best_of(96, first))
    yield Row("ablation", "best of 96 random masks and widths", "self", 0, shop.best_of(96, None))


def untrained(shop: Workshop) -> Policy:
    """The first policy's widths, with the scores that training starts from."""
    policy, fresh = shop.policies[0], Policy.untrained(PolicyConfig())
    fresh.scorer.widths.load_state_dict(policy.scorer.widths.state_dict())
    return fresh


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: perplexity on WikiText-2 test / built-in text, or accuracy on each task and on average; over several seeds the
    mean and the standard deviation."""
    names = [name for name in lines[0] if name.startswith(("perplexity_", "accuracy"))]
    digits = 1 if names[0].startswith("perplexity_") else 3
    ratios = sorted({line["ratio"] for line in lines if line["ratio"]})
    found: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for line in lines:
        twice = "" if line.get("sequences", 160) == 160 else f", {line['sequences']} sequences"
        found.setdefault((line["regime"], line["method"] + twice), {}).setdefault(line["ratio"], []).append(line)

    def shown(cells: list[dict[str, Any]]) -> str:
        parts = []
        for name in names:
            values = torch.tensor([cell[name] for cell in cells], dtype=torch.float64)
            spread = f" ± {float(values.std()):,.{digits}f}" if len(values) > 1 else ""
            parts.append(f"{float(values.mean()):,.{digits}f}{spread}")
        return " / ".join(parts)

    rows = [f"| | regime | {' | '.join(f'{ratio:g}' for ratio in ratios)} |", "|---" * (2 + len(ratios)) + "|"]
    for (regime, method), cells in found.items():
        at = cells.get(0.0)
        rows.append(
            f"| {method} | {regime} | " + " | ".join(shown(at or cells[r]) if at or r in cells else "-" for r in ratios) + " |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--policies", type=Path, nargs="*", default=[])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.2, 0.4])
    parser.add_argument("--windows", type=int, default=8, help="of 1024 tokens of WikiText-2 test, 0 for the whole split")
    parser.add_argument("--tasks", type=Path, help="folder of <task>.jsonl: measure accuracy in place of perplexity")
    parser.add_argument("--limit", type=int, help="first questions of each task; default all")
    parser.add_argument("--tokens", type=int, default=16384, help="of external calibration text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1, help="windows (of questions: at least 16) in one forward pass")
    parser.add_argument("--tf32", action="store_true", help="score (not prune) with TF32 products, on a GPU")
    parser.add_argument("--sequences", type=int, default=160, help="that the model writes, a fifth of which is dropped")
    parser.add_argument("--groups", nargs="+", default=["dense", "self", "data", "ablation", "weights"])
    parser.add_argument("--only", help="rows whose name holds this")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print what --out holds of --windows (or --limit) as Markdown")
    arguments = parser.parse_args()
    if arguments.table:
        asked = {"windows": arguments.windows} if arguments.tasks is None else {"limit": arguments.limit}
        lines = [json.loads(line) for line in arguments.out.open()]
        print(table([line for line in lines if asked.items() <= line.items()]))
        return
    shop = Workshop(arguments.model, arguments.data, arguments.policies, arguments.tokens, arguments.device)
    shop.ratios, shop.sequences = tuple(arguments.ratios), arguments.sequences
    wanted = [row for row in rows(shop) if row.group in arguments.groups and (arguments.only or "") in row.method]
    for ratio in (0.0, *arguments.ratios):
        for row in wanted:
            if (row.group == "dense") == (ratio == 0):
                cell(shop, row, ratio, arguments)


def quality(shop: Workshop, narrow: PreTrainedModel, arguments: argparse.Namespace) -> dict[str, float]:
    """Perplexity on the test texts."""
    found: dict[str, float] = {}
    for name, (text, window) in TESTS.items():
        path = text if text == "builtin" else str(arguments.data / text)
        most = arguments.windows or None
        if name == "builtin":
            most = min(most or 6, 6)
        test = load_text(path, TestText)
        scored = perplexity(narrow, shop.tokenizer, test, window=window, max_windows=most, batch_size=arguments.batch)
        found |= {f"perplexity_{name}": scored.value, f"tokens_{name}": scored.tokens}
    return found


def accuracy(shop: Workshop, narrow: PreTrainedModel, arguments: argparse.Namespace) -> dict[str, float]:
    """Zero-shot accuracy on the tasks, lm-eval's prompts, and its mean."""
    files, many = task_files(arguments.tasks), max(16, arguments.batch)
    results = zero_shot(narrow, shop.tokenizer, files, limit=arguments.limit, batch_size=many)
    found = {f"accuracy_{result.task}": result.accuracy for result in results}
    return found | {"accuracy": sum(found.values()) / len(found)}


def cell(shop: Workshop, row: Row, ratio: float, arguments: argparse.Namespace) -> None:
    """Prunes, scores and writes one line, unless the file has it already."""
    place: dict[str, Any] = {"method": row.method, "regime": row.regime, "ratio": ratio, "seed": row.seed}
    place |= {"sequences": arguments.sequences} if row.regime == "self" else {}
    place |= {"windows": arguments.windows} if arguments.tasks is None else {"limit": arguments.limit}
    done = [json.loads(line) for line in arguments.out.open()] if arguments.out.exists() else []
    if any(all(line.get(key) == value for key, value in place.items()) for line in done):
        return
    start = time.perf_counter()
    with torch.no_grad():
        narrow = row.make(ratio)
    pruned = time.perf_counter()
    line: dict[str, Any] = {"model": Path(arguments.model).name, **place, "parameters": count_parameters(narrow)[0]}
    torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    line |= quality(shop, narrow, arguments) if arguments.tasks is None else accuracy(shop, narrow, arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    line |= {"seconds_pruning": pruned - start, "seconds": time.perf_counter() - start}
    line |= {"device": arguments.device, "tf32": arguments.tf32, "prunenet": __version__}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    shown = {name: round(value, 3) for name, value in line.items() if name.startswith(("perplexity_", "accuracy"))}
    print(row.regime, row.method, ratio, row.seed, shown, f"{line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
