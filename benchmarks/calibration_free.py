"""The table of issue 3: pruning without data beside pruning with data, at equal parameters. One
JSON line per cell; resumable.

    python benchmarks/calibration_free.py MODEL --data ../shared/data --policies runs/seed0
    runs/seed1 runs/seed2 \
        --out benchmarks/results/calibration_free.jsonl

Every cell cuts the model to the same number of FFN channels and scores it on WikiText-2 test and on
the built-in test text; or, with `--tasks ../shared/data/tasks --limit 100` and another --out, on
zero-shot tasks. Policies are folders written by `prunenet train MODEL --seed N`; a row with a
policy has one line for each.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from calibration_free_rows import Pruner, Row, rows
from transformers import PreTrainedModel

from prunenet import __version__
from prunenet.evaluation.perplexity import perplexity
from prunenet.evaluation.zeroshot import task_files, zero_shot
from prunenet.models.layers import count_parameters
from prunenet.text.corpora import TestText, load_text

TESTS = {"wikitext2": ("wikitext2/wiki.test.raw", 1024), "builtin": ("builtin", 512)}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: perplexity on WikiText-2 test / built-in text, or accuracy on each task and on
    average; over several seeds the mean and the standard deviation."""
    names = [name for name in lines[0] if name.startswith(("perplexity_", "accuracy"))]
    digits = 1 if names[0].startswith("perplexity_") else 3
    ratios = sorted({line["ratio"] for line in lines if line["ratio"]})
    found: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for line in lines:
        twice = "" if line.get("sequences", 160) == 160 else f", {line['sequences']} sequences"
        found.setdefault((line["regime"], line["method"] + twice), {}).setdefault(
            line["ratio"], []
        ).append(line)

    def shown(cells: list[dict[str, Any]]) -> str:
        parts = []
        for name in names:
            values = torch.tensor([cell[name] for cell in cells], dtype=torch.float64)
            spread = f" ± {float(values.std()):,.{digits}f}" if len(values) > 1 else ""
            parts.append(f"{float(values.mean()):,.{digits}f}{spread}")
        return " / ".join(parts)

    rows = [
        f"| | regime | {' | '.join(f'{ratio:g}' for ratio in ratios)} |",
        "|---" * (2 + len(ratios)) + "|",
    ]
    for (regime, method), cells in found.items():
        at = cells.get(0.0)
        rows.append(
            f"| {method} | {regime} | "
            + " | ".join(shown(at or cells[r]) if at or r in cells else "-" for r in ratios)
            + " |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--policies", type=Path, nargs="*", default=[])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.2, 0.4])
    parser.add_argument(
        "--windows",
        type=int,
        default=8,
        help="of 1024 tokens of WikiText-2 test, 0 for the whole split",
    )
    parser.add_argument(
        "--tasks", type=Path, help="folder of <task>.jsonl: measure accuracy in place of perplexity"
    )
    parser.add_argument("--limit", type=int, help="first questions of each task; default all")
    parser.add_argument("--tokens", type=int, default=16384, help="of external calibration text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        help="windows (of questions: at least 16) in one forward pass",
    )
    parser.add_argument(
        "--tf32", action="store_true", help="score (not prune) with TF32 products, on a GPU"
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=160,
        help="that the model writes, a fifth of which is dropped",
    )
    parser.add_argument(
        "--groups", nargs="+", default=["dense", "self", "data", "ablation", "weights"]
    )
    parser.add_argument("--only", help="rows whose name holds this")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--table",
        action="store_true",
        help="print what --out holds of --windows (or --limit) as Markdown",
    )
    arguments = parser.parse_args()
    if arguments.table:
        asked = (
            {"windows": arguments.windows}
            if arguments.tasks is None
            else {"limit": arguments.limit}
        )
        lines = [json.loads(line) for line in arguments.out.open()]
        print(table([line for line in lines if asked.items() <= line.items()]))
        return
    shop = Pruner(arguments)
    wanted = [
        row
        for row in rows(shop)
        if row.group in arguments.groups and (arguments.only or "") in row.method
    ]
    for ratio in (0.0, *arguments.ratios):
        for row in wanted:
            if (row.group == "dense") == (ratio == 0):
                cell(shop, row, ratio, arguments)


def quality(
    shop: Pruner, narrow: PreTrainedModel, arguments: argparse.Namespace
) -> dict[str, float]:
    """Perplexity on the test texts."""
    found: dict[str, float] = {}
    for name, (text, window) in TESTS.items():
        path = text if text == "builtin" else str(arguments.data / text)
        most = arguments.windows or None
        if name == "builtin":
            most = min(most or 6, 6)
        test = load_text(path, TestText)
        scored = perplexity(
            narrow,
            shop.tokenizer,
            test,
            window=window,
            max_windows=most,
            batch_size=arguments.batch,
        )
        found |= {f"perplexity_{name}": scored.value, f"tokens_{name}": scored.tokens}
    return found


def accuracy(
    shop: Pruner, narrow: PreTrainedModel, arguments: argparse.Namespace
) -> dict[str, float]:
    """Zero-shot accuracy on the tasks, lm-eval's prompts, and its mean."""
    files, many = task_files(arguments.tasks), max(16, arguments.batch)
    results = zero_shot(narrow, shop.tokenizer, files, limit=arguments.limit, batch_size=many)
    found = {f"accuracy_{result.task}": result.accuracy for result in results}
    return found | {"accuracy": sum(found.values()) / len(found)}


def cell(shop: Pruner, row: Row, ratio: float, arguments: argparse.Namespace) -> None:
    """Prunes, scores and writes one line, unless the file has it already."""
    place: dict[str, Any] = {
        "method": row.method,
        "regime": row.regime,
        "ratio": ratio,
        "seed": row.seed,
    }
    place |= {"sequences": arguments.sequences} if row.regime == "self" else {}
    place |= (
        {"windows": arguments.windows} if arguments.tasks is None else {"limit": arguments.limit}
    )
    done = [json.loads(line) for line in arguments.out.open()] if arguments.out.exists() else []
    if any(all(line.get(key) == value for key, value in place.items()) for line in done):
        return
    start = time.perf_counter()
    with torch.no_grad():
        narrow = row.make(ratio)
    pruned = time.perf_counter()
    line: dict[str, Any] = {
        "model": Path(arguments.model).name,
        **place,
        "parameters": count_parameters(narrow)[0],
    }
    torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    line |= (
        quality(shop, narrow, arguments)
        if arguments.tasks is None
        else accuracy(shop, narrow, arguments)
    )
    torch.backends.cuda.matmul.allow_tf32 = False
    line |= {"seconds_pruning": pruned - start, "seconds": time.perf_counter() - start}
    line |= {"device": arguments.device, "tf32": arguments.tf32, "prunenet": __version__}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    shown = {
        name: round(value, 3)
        for name, value in line.items()
        if name.startswith(("perplexity_", "accuracy"))
    }
    print(row.regime, row.method, ratio, row.seed, shown, f"{line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
