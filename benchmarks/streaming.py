"""Peak memory and time of `prunenet prune MODEL --moments none --stream`, whatever the model's
depth.

    python benchmarks/streaming.py --shape llama-2-7b --layers 2 --out
    benchmarks/results/streaming.jsonl

Makes a sharded checkpoint of random weights in bfloat16 (written a slab at a time), then, in a
process of its own each and in turn, prunes it and copies it as it is (`shutil.copyfile` and fsync).
Peak memory is the process's own high-water mark of resident memory (VmHWM, Linux only), libraries
included. Pages of files that the kernel caches are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from shapes import SHAPES, config_of
from transformers import LlamaForCausalLM

from prunenet import __version__
from prunenet.checkpoints.shards import SLAB, write_shard


def make_checkpoint(folder: Path, shape: str, layers: int | None, seed: int) -> None:
    """Random weights of standard deviation 0.02 (norms: 1), in shards of 2 GB."""
    config = config_of(shape, layers)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder.mkdir()
    model.save_pretrained(folder, state_dict={})
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size="2GB")
    generator = torch.Generator().manual_seed(seed)

    def rows(name: str) -> Iterator[torch.Tensor]:
        count, *rest = tensors[name].shape
        if not rest:
            yield torch.ones(count, dtype=torch.bfloat16)
            return
        step = max(SLAB // (4 * rest[0]), 1)
        for start in range(0, count, step):
            size = (min(step, count - start), *rest)
            yield torch.empty(size).normal_(std=0.02, generator=generator).bfloat16()

    for name, names in plan.filename_to_tensors.items():
        write_shard(folder / name, {tensor: tensors[tensor] for tensor in names}, rows)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def prune(source: Path, out: Path, ratio: float, device: str) -> dict[str, Any]:
    """What the command does; seconds of each stage."""
    from prunenet.checkpoints.streaming import StreamedCheckpoint
    from prunenet.policies.artifact import policy_for
    from prunenet.policies.stream import prune_streamed

    stages: dict[str, float] = {}
    start = time.perf_counter()

    def progress(stage: str, _done: int, _of: int) -> None:
        stages[stage] = time.perf_counter() - start

    opened = StreamedCheckpoint.open(source, device=device)
    policy, name = policy_for(None, opened.skeleton.config.model_type)
    assert policy is not None
    prune_streamed(opened, out, policy, ratio=ratio, policy_name=name, progress=progress)
    return {"seconds_until": stages, "seconds": time.perf_counter() - start}


def copy(source: Path, out: Path) -> dict[str, Any]:
    """Every file, as it is, down to the disk."""
    start = time.perf_counter()
    out.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
        with (out / path.name).open("rb") as file:
            os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - start}


def high_water() -> float:
    """Most resident memory that this process has held, in gigabytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e9


def in_a_process(
    what: str, source: Path, scratch: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Runs one job afresh; the folder that it writes is removed."""
    out = scratch / what
    command = [sys.executable, __file__, "--job", what, "--source", str(source), "--out", str(out)]
    command += ["--ratio", str(arguments.ratio), "--device", arguments.device]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["gigabytes_written"] = sum(path.stat().st_size for path in out.iterdir()) / 1e9
    shutil.rmtree(out)
    print(what, result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="in place of the shape's")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument(
        "--repeats", type=int, default=1, help="of each job, one after the other in turn"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument(
        "--scratch", type=Path, help="folder for the checkpoints, thrice the model's size"
    )
    parser.add_argument("--job", choices=("prune", "copy"), help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.job:
        source, out = arguments.source, arguments.out
        facts = (
            prune(source, out, arguments.ratio, arguments.device)
            if arguments.job == "prune"
            else copy(source, out)
        )
        print(
            json.dumps(facts | {"cpu_seconds": time.process_time(), "peak_gigabytes": high_water()})
        )
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        source = Path(scratch) / "dense"
        make_checkpoint(source, arguments.shape, arguments.layers, arguments.seed)
        size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
        runs: dict[str, list[dict[str, Any]]] = {"prune": [], "copy": []}
        for _ in range(arguments.repeats):
            for what, results in runs.items():
                results.append(in_a_process(what, source, Path(scratch), arguments))
    layers = arguments.layers or SHAPES[arguments.shape]["num_hidden_layers"]
    line: dict[str, Any] = {
        "shape": arguments.shape,
        "layers": layers,
        "gigabytes": size,
        "ratio": arguments.ratio,
    }
    line |= {
        "seed": arguments.seed,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        **runs,
    }
    line |= {
        "throughput_gigabytes_per_second": {
            w: size * len(r) / sum(x["seconds"] for x in r) for w, r in runs.items()
        }
    }
    line |= {"torch": torch.__version__, "prunenet": __version__}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
