"""Zero-shot accuracy of saved models on local task files. One JSON line per model and task;
resumable.

    python benchmarks/zeroshot.py MODEL... --tasks ../shared/data/tasks --limit 200 --out
    benchmarks/results/zeroshot.jsonl

Prompts and metrics are lm-eval's (`prunenet.evaluation.zeroshot`), needs `pip install
'prunenet[eval]'`. Tasks are <task>.jsonl in the folder. A model is known by its name and the sha256
of its weights, a task by the sha256 of its file: what changes is measured again, what was measured
is skipped. Name folders so that a line can be told from another, for example llama-0.3-seed1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from prunenet.checkpoints.identity import identify
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.evaluation.zeroshot import task_files, zero_shot
from prunenet.models.layers import count_parameters


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of saved models")
    parser.add_argument("--tasks", required=True, help="folder with <task>.jsonl files")
    parser.add_argument("--only", nargs="+", help="names of tasks; default all in the folder")
    parser.add_argument("--limit", type=int, help="first questions of each task; default all")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="questions in one forward pass at most"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    files = task_files(arguments.tasks)
    if absent := set(arguments.only or ()) - files.keys():
        parser.error(
            f"{arguments.tasks} has no {', '.join(sorted(absent))}; it has {', '.join(files)}"
        )
    files = {task: file for task, file in files.items() if task in (arguments.only or files)}
    lines = (
        [json.loads(line) for line in arguments.out.read_text().splitlines()]
        if arguments.out.exists()
        else []
    )
    done = {
        (line["model"], line["weights"], line["dtype"], line["task"], line["sha256"], line["limit"])
        for line in lines
    }
    for source in arguments.models:
        name, weights = identify(source)
        sums = {task: hashlib.sha256(file.read_bytes()).hexdigest() for task, file in files.items()}
        key = (name, weights, arguments.dtype)
        left = [task for task in files if (*key, task, sums[task], arguments.limit) not in done]
        if not left:
            continue
        model, tokenizer = (
            load_model(source, dtype=arguments.dtype, device=arguments.device),
            load_tokenizer(source),
        )
        parameters, non_embedding = count_parameters(model)
        for task in left:
            start = time.perf_counter()
            (result,) = zero_shot(
                model,
                tokenizer,
                {task: files[task]},
                limit=arguments.limit,
                batch_size=arguments.batch_size,
            )
            line = {
                "model": name,
                "weights": weights,
                "dtype": arguments.dtype,
                "parameters": parameters,
                "non_embedding_parameters": non_embedding,
                **asdict(result),
                "seconds": time.perf_counter() - start,
                "device": arguments.device,
                "threads": torch.get_num_threads(),
                **{
                    package: version(package)
                    for package in ("prunenet", "lm_eval", "transformers", "torch")
                },
            }
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(name, task, round(result.accuracy, 4), f"{line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
