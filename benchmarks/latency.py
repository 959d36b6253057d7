r"""Measures how much faster a pruned model runs, against the share of FLOPs that is gone.

    python benchmarks/latency.py MODEL --out benchmarks/results/latency.jsonl
    python benchmarks/latency.py llama-2-7b --device cuda --dtype bfloat16 \
        --out benchmarks/results/latency.jsonl
    python benchmarks/latency.py MODEL --part widths --out benchmarks/results/latency.jsonl

MODEL is a checkpoint, or a shape of `shapes.py` with random weights (which channels go does not
matter for speed). Measures in turn, repeat by repeat: the dense model, and cuts at each ratio to
uniform widths and, where a policy ships for the family, to the widths that it learned. One JSON
line for each batch size, plain and compiled.

FLOPs are those of the matrix products of linear layers and attention, two for a multiplication with
its addition. Prefill computes the logits of the last token alone. "speedup" divides medians;
"ceiling" is 1 / (1 - share of FLOPs removed). Peak memory is what a prefill and the decoding after
it add to the weights: the rise of resident memory's high-water mark on a CPU (Linux only), of
allocated memory on a GPU.

`--part widths`: seconds of one FFN of the model at widths around (1 - ratio) d_ff, for 1, 32 and
1024 tokens: which multiple a width must be for the time to follow it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import Clock, append_line, is_measured, parser, read_lines, setting
from shapes import SHAPES, random_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.checkpoints.load import load_model
from prunenet.compare.machine import synchronise
from prunenet.evaluation.options import SpeedOptions
from prunenet.evaluation.speed import speed, speed_side_by_side
from prunenet.models.heads import out_linears
from prunenet.models.layers import ffn_widths, iter_ffns
from prunenet.models.masks import top_channels, width_at, widths_for_budget
from prunenet.models.surgery import narrowed
from prunenet.policies.artifact import policy_for

MULTIPLES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    arguments = asked()
    dense = the_model(arguments)
    shared = {"model": Path(arguments.model).name, "dtype": arguments.dtype}
    shared |= setting(arguments.device)
    if arguments.part == "widths":
        rows = around(dense, arguments.ratios, arguments.repeats)
        append_line(arguments.out, shared | {"part": "widths", "rows": rows})
        return
    models = {"dense": dense} | cut(dense, arguments.ratios, arguments.round)
    for model in models.values():
        model.to(arguments.device, getattr(torch, arguments.dtype))
    for compiled in {"off": [False], "on": [True], "both": [False, True]}[arguments.compile]:
        for batch in arguments.batches:
            key = shared | {"part": "models", "batch": batch, "compiled": compiled}
            key |= {
                name: getattr(arguments, name)
                for name in ("round", "prompt", "new_tokens", "repeats", "ratios")
            }
            if not is_measured(read_lines(arguments.out), key):
                found = measured(models, arguments, batch, compiled)
                append_line(arguments.out, key | {"rows": found})


def asked() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("model")
    made.add_argument("--part", choices=("models", "widths"), default="models")
    made.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    made.add_argument("--round", type=int, default=32, help="widths are multiples of this")
    made.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    made.add_argument("--compile", choices=("off", "on", "both"), default="both")
    made.add_argument("--prompt", type=int, default=128)
    made.add_argument("--new-tokens", type=int, default=32)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    return made.parse_args()


def the_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """In the dtype asked for; a checkpoint on the CPU, where it is scored, a random model where it
    will run.
    """
    if arguments.model in SHAPES:
        return random_model(
            arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype)
        )
    return load_model(arguments.model, dtype=arguments.dtype)


def cut(
    dense: PreTrainedModel, ratios: Sequence[float], multiple: int
) -> dict[str, PreTrainedModel]:
    """Narrow models by name; a random one is cut to its first channels."""
    widths, models = ffn_widths(dense), {}
    policy = (
        None if dense.config._name_or_path == "" else policy_for(None, dense.config.model_type)[0]
    )
    first = [torch.arange(d_ff, 0, -1) for d_ff in widths]
    scores, offsets = (first, []) if policy is None else policy.read(dense)
    for ratio in ratios:
        ways = {f"uniform {ratio:g}": [width_at(d_ff, ratio, multiple) for d_ff in widths]}
        if policy is not None:
            ways[f"per-layer {ratio:g}"] = widths_for_budget(widths, offsets, ratio, multiple)
        for name, way in ways.items():
            models[name] = narrowed(
                dense, [top_channels(*pair) for pair in zip(scores, way, strict=True)]
            )
    return models


def measured(
    models: dict[str, PreTrainedModel], arguments: argparse.Namespace, batch: int, compiled: bool
) -> dict[str, Any]:
    """Speed, FLOPs and memory of each model, and its speed over the dense one's."""
    asked = SpeedOptions(
        prompt=arguments.prompt,
        new_tokens=arguments.new_tokens,
        batch=batch,
        repeats=arguments.repeats,
        compiled=compiled,
    )
    memory = {name: added(model, arguments.device, asked) for name, model in models.items()}
    paces = speed_side_by_side(models, asked)
    work = {
        name: flops(model, arguments.prompt, arguments.new_tokens) for name, model in models.items()
    }
    rows = {}
    for name, model in models.items():
        pace, found = paces[name], dict[str, Any]()
        for phase in ("prefill", "decode"):
            found[phase] = {
                "tokens_per_second": getattr(pace, phase),
                "spread": getattr(pace, f"{phase}_spread"),
                "speedup": getattr(pace, phase) / getattr(paces["dense"], phase),
                "flops_removed": 1 - work[name][phase] / work["dense"][phase],
                "ceiling": work["dense"][phase] / work[name][phase],
            }
        held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        found |= {"parameter_megabytes": held / 1e6, "added_megabytes": memory[name]}
        widths = ffn_widths(model)
        rows[name] = found | {"widths": widths if len(set(widths)) > 1 else widths[0]}
        show = {
            phase: {key: round(value, 3) for key, value in found[phase].items()}
            for phase in ("prefill", "decode")
        }
        print(f"batch {batch}, {'compiled' if compiled else 'plain'}, {name}: {show}", flush=True)
    return rows


def added(model: PreTrainedModel, device: str, asked: SpeedOptions) -> float:
    """Megabytes that one prefill and its decoding hold beside the weights; plain, for compiled code
    reuses its buffers.
    """
    gc.collect()
    # what earlier models let go of goes back to the system, or it would hide what this one takes
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
    clock = Clock(device)
    with clock.phase("nothing"):
        pass
    with clock.phase("memory"):
        speed(model, replace(asked, repeats=1, compiled=False))
    return clock.phases["memory"]["peak_megabytes"] - clock.phases["nothing"]["peak_megabytes"]


def flops(model: PreTrainedModel, prompt: int, new_tokens: int) -> dict[str, float]:
    """Of one sequence: of prefill and of all decoding steps."""
    head = model.get_output_embeddings()
    linears = [
        module for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    ]
    linear = 2 * sum(module.in_features * module.out_features for module in linears)
    # Query by key and weights by value, each 2 d_attention FLOPs for a pair of positions.
    pair = 4 * sum(out.in_features for out in out_linears(model))
    last = 2 * head.in_features * head.out_features
    steps = range(prompt + 1, prompt + new_tokens + 1)
    return {
        "prefill": prompt * linear + pair * prompt * (prompt + 1) / 2 + last,
        "decode": sum(linear + pair * position + last for position in steps),
    }


def around(dense: PreTrainedModel, ratios: Sequence[float], repeats: int) -> list[dict[str, Any]]:
    """Median microseconds of the first layer's FFN, width by width in turn; narrower copies, as
    surgery makes them.
    """
    ffn = next(iter_ffns(dense))
    inputs = [matrix for matrix in (ffn.gate, ffn.up) if matrix is not None]
    rows = []
    for ratio in ratios:
        exact = ffn.d_ff * (1 - ratio)
        # odd multiples: of n, and of no more
        multiples = {n * (2 * round((exact / n - 1) / 2) + 1): n for n in MULTIPLES}
        for tokens in (1, 32, 1024):
            x = torch.randn(tokens, ffn.d_model, generator=torch.Generator().manual_seed(0)).to(
                ffn.up
            )
            cuts = {
                width: ([m[:width].contiguous() for m in inputs], ffn.down[:, :width].contiguous())
                for width in multiples
            }
            times: dict[int, list[float]] = {width: [] for width in multiples}
            inner = max(1, 4096 // tokens) if tokens < 1024 else 4
            for repeat in range(repeats + 1):
                for width, (ins, down) in cuts.items():
                    passed = timed(
                        lambda ins=ins, down=down, x=x: through(x, ins, down), inner, x.device
                    )
                    if repeat:
                        times[width].append(passed * 1e6)
            for width, found in times.items():
                row: dict[str, Any] = {
                    "ratio": ratio,
                    "tokens": tokens,
                    "width": width,
                    "multiple_of": multiples[width],
                }
                row |= {"microseconds": statistics.median(found), "fastest": min(found)}
                rows.append(row | {"nanoseconds_per_channel": 1e3 * row["microseconds"] / width})
                print({key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
    return rows


@torch.inference_mode()
def through(x: Tensor, inputs: Sequence[Tensor], down: Tensor) -> Tensor:
    hidden = nn.functional.silu(x @ inputs[0].T)
    return (hidden if len(inputs) == 1 else hidden * (x @ inputs[1].T)) @ down.T


def timed(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of one call, mean of several; of the process where it runs on a CPU, so that
    neighbours count less.
    """
    clock = (
        time.perf_counter
        if device.type == "cuda" or torch.get_num_threads() > 1
        else time.process_time
    )
    start = clock()
    for _ in range(times):
        call()
    synchronise(device)
    return (clock() - start) / times


if __name__ == "__main__":
    main()
