r"""Measures zero-shot accuracy of saved models on local task files.

    python benchmarks/zeroshot.py MODEL... --tasks ../shared/data/tasks --limit 200 \
        --out benchmarks/results/zeroshot.jsonl

Prompts and metrics are lm-eval's (`prunenet.evaluation.zeroshot`, extra `eval`). Tasks are
<task>.jsonl in the folder. The name of a model, the sha256 of its weights and that of a task's file
identify a line. Name folders so that lines differ, for example llama-0.3-seed1.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from importlib.metadata import version

import torch
from _common import Line, append_line, is_measured, opened, parser, read_lines, setting

from prunenet.checkpoints.identity import identify
from prunenet.evaluation.zeroshot import task_files, zero_shot
from prunenet.models.layers import count_parameters


def main() -> None:
    made = parser(__doc__)
    made.add_argument("models", nargs="+", metavar="MODEL", help="folders of saved models")
    made.add_argument("--tasks", required=True, help="folder with <task>.jsonl files")
    made.add_argument("--only", nargs="+", help="names of tasks; default all in the folder")
    made.add_argument("--limit", type=int, help="first questions of each task; default all")
    made.add_argument(
        "--batch-size", type=int, default=16, help="questions in one forward pass at most"
    )
    made.add_argument("--dtype", default="auto")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = made.parse_args()
    files = task_files(arguments.tasks)
    if absent := set(arguments.only or ()) - files.keys():
        made.error(
            f"{arguments.tasks} has no {', '.join(sorted(absent))}; it has {', '.join(files)}"
        )
    files = {task: file for task, file in files.items() if task in (arguments.only or files)}
    sums = {task: hashlib.sha256(file.read_bytes()).hexdigest() for task, file in files.items()}
    done = read_lines(arguments.out)
    for source in arguments.models:
        name, weights = identify(source)
        place = {"model": name, "weights": weights, "dtype": arguments.dtype}
        places = {
            task: place | {"task": task, "sha256": sums[task], "limit": arguments.limit}
            for task in files
        }
        left = {task: key for task, key in places.items() if not is_measured(done, key)}
        if left:
            model, tokenizer = opened(source, dtype=arguments.dtype, device=arguments.device)
        for task, key in left.items():
            start = time.perf_counter()
            (result,) = zero_shot(
                model,
                tokenizer,
                {task: files[task]},
                limit=arguments.limit,
                batch_size=arguments.batch_size,
            )
            parameters, non_embedding = count_parameters(model)
            line: Line = key | {
                "parameters": parameters,
                "non_embedding_parameters": non_embedding,
                **asdict(result),
                "seconds": time.perf_counter() - start,
                **setting(arguments.device),
                **{package: version(package) for package in ("lm_eval", "transformers")},
            }
            append_line(arguments.out, line)
            print(name, task, round(result.accuracy, 4), f"{line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
