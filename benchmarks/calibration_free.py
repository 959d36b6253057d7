r"""Measures pruning without data beside pruning with data, at equal parameters.

    python benchmarks/calibration_free.py MODEL --data ../shared/data \
        --policies runs/seed0 runs/seed1 runs/seed2 --out benchmarks/results/calibration_free.jsonl

Every cell cuts the model to the same number of FFN channels and scores it on WikiText-2 test and on
the built-in test text, or on zero-shot tasks (`--tasks ../shared/data/tasks`, another `--out`).
`prunenet train MODEL --seed N` writes the policies; a row with a policy has one line for each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from _common import (
    Line,
    append_line,
    is_measured,
    parser,
    read_lines,
    scored,
    setting,
    table_head,
)
from calibration_free_rows import Bench, Row
from transformers import PreTrainedModel

from prunenet.evaluation.zeroshot import task_files, zero_shot
from prunenet.models.layers import count_parameters

GROUPS = ("dense", "self", "data", "ablation", "weights", "recovered")


def main() -> None:
    arguments = asked()
    if arguments.table:
        lines = [
            line for line in read_lines(arguments.out) if amount(arguments).items() <= line.items()
        ]
        print(table(lines))
        return
    bench = Bench(arguments)
    wanted = [
        row
        for row in bench.rows()
        if row.group in arguments.groups and (arguments.only or "") in row.method
    ]
    for ratio in (0.0, *arguments.ratios):
        for row in wanted:
            if (row.group == "dense") == (ratio == 0):
                measure(bench, row, ratio, arguments)


def asked() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("model")
    made.add_argument("--data", type=Path, default=Path("../shared/data"))
    made.add_argument("--policies", type=Path, nargs="*", default=[])
    made.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.2, 0.4])
    made.add_argument(
        "--windows",
        type=int,
        default=8,
        help="of 1024 tokens of WikiText-2 test, 0 for the whole split",
    )
    made.add_argument(
        "--tasks", type=Path, help="folder of <task>.jsonl: measure accuracy in place of perplexity"
    )
    made.add_argument("--limit", type=int, help="first questions of each task; default all")
    made.add_argument("--tokens", type=int, default=16384, help="of external calibration text")
    made.add_argument("--device", default="cpu")
    made.add_argument(
        "--batch", type=int, default=1, help="windows (questions: at least 16) in one forward pass"
    )
    made.add_argument(
        "--tf32", action="store_true", help="score (not prune) with TF32 products, on a GPU"
    )
    made.add_argument(
        "--sequences",
        type=int,
        default=160,
        help="that the model writes, a fifth of which is dropped",
    )
    made.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS[:-1]))
    made.add_argument("--only", help="rows whose name holds this")
    made.add_argument(
        "--table",
        action="store_true",
        help="print what --out holds of --windows (or --limit) as Markdown, measure nothing",
    )
    return made.parse_args()


def amount(arguments: argparse.Namespace) -> Line:
    """What a line says of how much was scored."""
    if arguments.tasks is None:
        return {"windows": arguments.windows}
    return {"limit": arguments.limit}


def measure(bench: Bench, row: Row, ratio: float, arguments: argparse.Namespace) -> None:
    """Prunes, scores and writes one line, unless the file has it already."""
    place: Line = {"method": row.method, "regime": row.regime, "ratio": ratio, "seed": row.seed}
    place |= {"sequences": arguments.sequences} if row.regime == "self" else {}
    place |= amount(arguments)
    if is_measured(read_lines(arguments.out), place):
        return
    start = time.perf_counter()
    with torch.no_grad():
        narrow = row.make(ratio)
    pruned = time.perf_counter()
    line: Line = {"model": Path(arguments.model).name, **place}
    line["parameters"] = count_parameters(narrow)[0]
    torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    found = quality(bench, narrow, arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    line |= found | {
        "seconds_pruning": pruned - start,
        "seconds": time.perf_counter() - start,
        "tf32": arguments.tf32,
    }
    append_line(arguments.out, line | setting(arguments.device))
    shown = {name: round(value, 3) for name, value in found.items() if not name.startswith("tok")}
    print(row.regime, row.method, ratio, row.seed, shown, f"{line['seconds']:.0f} s", flush=True)


def quality(
    bench: Bench, narrow: PreTrainedModel, arguments: argparse.Namespace
) -> dict[str, float]:
    """Perplexity on the test texts, or accuracy on the tasks and its mean."""
    if arguments.tasks is None:
        return scored(
            narrow,
            bench.tokenizer,
            arguments.data,
            windows=arguments.windows or None,
            batch_size=arguments.batch,
        )
    files, many = task_files(arguments.tasks), max(16, arguments.batch)
    results = zero_shot(narrow, bench.tokenizer, files, limit=arguments.limit, batch_size=many)
    found = {f"accuracy_{result.task}": result.accuracy for result in results}
    return found | {"accuracy": sum(found.values()) / len(found)}


def table(lines: Sequence[Line]) -> str:
    """Markdown: perplexity on WikiText-2 test / built-in text, or accuracy on each task and on
    average; over several seeds the mean and the standard deviation.
    """
    names = [name for name in lines[0] if name.startswith(("perplexity_", "accuracy"))]
    ratios = sorted({line["ratio"] for line in lines if line["ratio"]})
    found: dict[tuple[str, str], dict[float, list[Line]]] = {}
    for line in lines:
        twice = "" if line.get("sequences", 160) == 160 else f", {line['sequences']} sequences"
        cells = found.setdefault((line["regime"], line["method"] + twice), {})
        cells.setdefault(line["ratio"], []).append(line)
    rows = table_head(ratios)
    for (regime, method), cells in found.items():
        every = [cells.get(0.0) or cells.get(ratio, []) for ratio in ratios]
        columns = " | ".join(cell_of(some, names) for some in every)
        rows.append(f"| {method} | {regime} | {columns} |")
    return "\n".join(rows)


def cell_of(lines: Sequence[Line], names: Sequence[str]) -> str:
    """The mean of each measure over the seeds, with the standard deviation."""
    digits = 1 if names[0].startswith("perplexity_") else 3
    parts = []
    for name in names if lines else ():
        values = torch.tensor([line[name] for line in lines], dtype=torch.float64)
        spread = f" ± {float(values.std()):,.{digits}f}" if len(values) > 1 else ""
        parts.append(f"{float(values.mean()):,.{digits}f}{spread}")
    return " / ".join(parts) or "-"


if __name__ == "__main__":
    main()
