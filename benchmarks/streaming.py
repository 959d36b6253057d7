r"""Measures peak memory and time of `prunenet prune MODEL --moments none --stream`.

    python benchmarks/streaming.py --shape llama-2-7b --layers 2 \
        --out benchmarks/results/streaming.jsonl

Makes a sharded checkpoint of random weights in bfloat16 (written a slab at a time), then prunes it
and copies it as it is (`shutil.copyfile` and fsync), in turn, each in a process of its own. Peak
memory is resident memory of that process, libraries included (VmHWM, Linux only). Pages of files
that the kernel caches do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from _common import Line, append_line, job, parser, setting
from huggingface_hub import split_torch_state_dict_into_shards
from shapes import SHAPES, config_of
from transformers import LlamaForCausalLM

from prunenet.checkpoints.shards import SLAB, write_shard
from prunenet.runtime.memory import peak_memory


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


def prune(source: Path, out: Path, ratio: float, device: str) -> Line:
    """Does what the command does; seconds until each stage is done."""
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


def copy(source: Path, out: Path) -> Line:
    """Copies every file as it is, down to the disk."""
    start = time.perf_counter()
    out.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
        with (out / path.name).open("rb") as file:
            os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - start}


def in_a_process(what: str, source: Path, scratch: Path, arguments: argparse.Namespace) -> Line:
    """Runs one job afresh, and removes the folder that it writes."""
    out = scratch / what
    command = [sys.executable, __file__, "--job", what, "--source", str(source), "--out", str(out)]
    command += ["--ratio", str(arguments.ratio), "--device", arguments.device]
    _, result = job(command)
    result["gigabytes_written"] = sum(path.stat().st_size for path in out.iterdir()) / 1e9
    shutil.rmtree(out)
    print(what, result, flush=True)
    return result


def asked() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    made.add_argument("--layers", type=int, help="in place of the shape's")
    made.add_argument("--ratio", type=float, default=0.3)
    made.add_argument(
        "--repeats", type=int, default=1, help="of each job, one after the other in turn"
    )
    made.add_argument("--device", default="cpu")
    made.add_argument("--seed", type=int, default=0, help="of the random weights")
    made.add_argument(
        "--scratch", type=Path, help="folder for the checkpoints, thrice the model's size"
    )
    made.add_argument("--job", choices=("prune", "copy"), help=argparse.SUPPRESS)
    made.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    return made.parse_args()


def run_job(arguments: argparse.Namespace) -> None:
    """Prints what one job took, as JSON."""
    source, out = arguments.source, arguments.out
    with peak_memory(torch.device("cpu")) as peak:
        if arguments.job == "prune":
            facts = prune(source, out, arguments.ratio, arguments.device)
        else:
            facts = copy(source, out)
    facts |= {"cpu_seconds": time.process_time(), "peak_gigabytes": peak["host_bytes"] / 1e9}
    print(json.dumps(facts))


def main() -> None:
    arguments = asked()
    if arguments.job:
        run_job(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        source = Path(scratch) / "dense"
        make_checkpoint(source, arguments.shape, arguments.layers, arguments.seed)
        size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
        runs: dict[str, list[Line]] = {"prune": [], "copy": []}
        for _ in range(arguments.repeats):
            for what, results in runs.items():
                results.append(in_a_process(what, source, Path(scratch), arguments))
    line: Line = {
        "shape": arguments.shape,
        "layers": arguments.layers or SHAPES[arguments.shape]["num_hidden_layers"],
        "gigabytes": size,
        "ratio": arguments.ratio,
        "seed": arguments.seed,
        **setting(arguments.device),
        **runs,
    }
    line["throughput_gigabytes_per_second"] = {
        what: size * len(results) / sum(result["seconds"] for result in results)
        for what, results in runs.items()
    }
    append_line(arguments.out, line)


if __name__ == "__main__":
    main()
