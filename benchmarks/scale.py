"""Time and memory of each phase against the size of the model: random weights in the shapes of real
models.

    python benchmarks/scale.py --shapes smollm2-135m llama-3.2-1b llama-2-7b --out
    benchmarks/results/scale.jsonl python benchmarks/scale.py --figure scale.png --out
    benchmarks/results/scale.jsonl    # of what the file holds python benchmarks/scale.py --recipe
    llama-2-7b --device cuda --out benchmarks/results/scale.jsonl

A model of each shape is built with 1 and with 2 layers (`--layers`), in a process of its own each;
one JSON line each, and what `--out` has already is not measured again. A whole model's cost is the
line through those points at its own number of layers; a third number of layers says how far off
that is. Phases:

* score: the shipped policy reads the weights (`Policy.read`: statistics of every channel,
  embeddings included);
* spectral setup: Gram matrix and spectrum of the dense gate matrix, once a training;
* spectral mask: the published reward of one mask of every layer, exact; d_model^3, so it is fitted
  apart;
* cut and save: `prune` at ratio 0.3 with those scores, `save_pretrained`, reload and comparison.

Costs are seconds of all threads together (CPU) or of the clock (GPU), and the peak of memory over
that of a process that has loaded the libraries: resident (Linux only) or allocated on the GPU.
Exponents are the slopes of least squares lines through the logarithms of cost and parameters.
Floors: FLOPs of the phase, at the rate of one large product of the same dtype measured in the same
process; of what is written or hashed, bytes at the measured rate.

All take `--device cuda`. `--recipe SHAPE`: the published recipe (arXiv 2501.15296: gate matrix, 20
updates, one mask of each layer) from weights in memory to a policy, then pruned by it and saved;
all layers unless `--layers` says fewer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from floors import RATIO, floor, recipe_floors, speeds
from phases import Clock
from scale_report import PHASES, draw, report
from shapes import SHAPES, parameters_of, random_model

from prunenet import __version__
from prunenet.envs.rewards import EXACT_UP_TO
from prunenet.models.layers import iter_ffns
from prunenet.policies.apply import prune
from prunenet.policies.artifact import policy_for
from prunenet.policies.training.recipe import PRESETS, Recipe
from prunenet.spectra.exact import SpectralReference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=[], help="none: only report what --out holds"
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        help="built of each shape; default 1 2, with --recipe the shape's own",
    )
    parser.add_argument(
        "--recipe", choices=SHAPES, help="train as published on this shape, prune and save"
    )
    parser.add_argument("--updates", type=int, default=20, help="of --recipe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights"
    )
    parser.add_argument("--scratch", type=Path, help="folder for pruned checkpoints")
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.job:
        shape, layers = arguments.job
        job = recipe if arguments.recipe else measure
        print(json.dumps(job(shape, int(layers), arguments)))
        return
    for shape in [arguments.recipe] if arguments.recipe else arguments.shapes:
        own = [SHAPES[shape]["num_hidden_layers"]] if arguments.recipe else [1, 2]
        for layers in arguments.layers or own:
            key = {
                "part": "recipe" if arguments.recipe else "phases",
                "shape": shape,
                "layers": layers,
            }
            key |= {"device": arguments.device, "dtype": arguments.dtype} | (
                {"updates": arguments.updates} if arguments.recipe else {}
            )
            if not any(key.items() <= line.items() for line in lines(arguments.out)):
                write(arguments.out, key | in_a_process(shape, layers))
    fits = report(
        [
            line
            for line in lines(arguments.out)
            if line["part"] == "phases" and line["device"] == arguments.device
        ]
    )
    if arguments.figure:
        draw(fits, arguments.figure)


def measure(shape: str, layers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Each phase of a model with this many layers."""
    clock = Clock(arguments.device)
    with clock.phase("libraries"):
        torch.ones(8, 8, device=arguments.device) @ torch.ones(8, 8, device=arguments.device)
    with clock.phase("build"):
        model = random_model(
            shape, layers, device=arguments.device, dtype=getattr(torch, arguments.dtype)
        )
    policy, name = policy_for(None, "llama")
    assert policy is not None
    with clock.phase("score"):
        scores, _ = policy.read(model)
    gates = [ffn.gate.float() for ffn in iter_ffns(model) if ffn.gate is not None]
    with clock.phase("spectral setup"):
        references = [SpectralReference.of(gate) for gate in gates]
    keep = torch.rand(
        1, len(gates[0]), generator=torch.Generator().manual_seed(0)
    ).argsort() >= int(RATIO * len(gates[0]))
    with clock.phase("spectral mask"):
        rewards = [
            float(1 - reference.distance(keep.to(arguments.device))) for reference in references
        ]
    del references, gates
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        with clock.phase("cut and save"):
            pruned = prune(
                model, policy, ratio=RATIO, widths="uniform", scores=scores, policy_name=name
            )
            pruned.save_pretrained(Path(scratch) / "pruned")
        saved = sum(path.stat().st_size for path in (Path(scratch) / "pruned").iterdir())
        # Floors in the unit of the costs: seconds of all threads together on a CPU.
        rates = speeds(arguments.device, Path(scratch), cost_clock(arguments.device))
    floors = {phase: floor(phase, model, saved, rates) for phase in PHASES}
    parameters, layer = parameters_of(shape)
    facts = {
        "parameters": parameters,
        "layer_parameters": layer,
        "rewards": rewards,
        "rates": rates,
    }
    return facts | {
        "phases": clock.phases,
        "floor_seconds": floors,
        "threads": torch.get_num_threads(),
    }


def recipe(shape: str, layers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The published recipe end to end; seconds of its parts (of the processor on a CPU), taken
    inside the training itself.
    """
    from prunenet.envs.sweep import View
    from prunenet.policies.training import train as training

    clock, parts, ticks = Clock(arguments.device), dict[str, float](), cost_clock(arguments.device)
    with clock.phase("build (not counted)"):
        model = random_model(
            shape, layers, device=arguments.device, dtype=getattr(torch, arguments.dtype)
        )
    marks: list[float] = []
    chosen = replace(PRESETS["paper"], updates=arguments.updates)
    with (
        clock.phase("train"),
        timing(training, "weights_sha256", "hash of the weights", parts, arguments.device, ticks),
        timing(training, "SpectralReward", "dense spectra", parts, arguments.device, ticks),
        timing(View, "of", "statistics", parts, arguments.device, ticks),
    ):
        trained = training.train(model, chosen, progress=lambda *_: marks.append(ticks()))
    policy = trained.policy
    parts["episodes"] = marks[-1] - marks[0]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        with clock.phase("prune"):
            pruned = prune(model, policy, ratio=RATIO, widths="uniform")
        with clock.phase("save, reload and compare"):
            pruned.save_pretrained(Path(scratch) / "pruned")
        saved = sum(path.stat().st_size for path in (Path(scratch) / "pruned").iterdir())
        rates = speeds(arguments.device, Path(scratch), ticks)
    route = "stochastic" if next(iter_ffns(model)).d_model > EXACT_UP_TO else "exact"
    floors = recipe_floors(route, model, saved, masks_of(chosen), rates, arguments.device)
    facts = {
        "spectrum": route,
        "phases": clock.phases,
        "parts_of_train": parts,
        "floor_seconds": floors,
        "rates": rates,
    }
    unit = "cpu_seconds" if arguments.device == "cpu" else "seconds"
    for name, seconds in (
        parts | {name: clock.phases[name][unit] for name in ("prune", "save, reload and compare")}
    ).items():
        print(f"{name}: {seconds:.2f} {unit}, floor {floors[name]:.2f}", flush=True)
    return facts | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
    }


def masks_of(chosen: Recipe) -> int:
    """Of each layer, once the untrained policy has been judged: those played, and one at each
    evaluation.
    """
    return chosen.updates * chosen.masks + -(-chosen.updates // chosen.evaluate_every)


@contextmanager
def timing(
    where: Any,
    name: str,
    part: str,
    into: dict[str, float],
    device: str,
    clock: Callable[[], float] | None = None,
) -> Iterator[None]:
    """Inside, each call of a function of a module or class adds its seconds, of the wall clock
    unless another is given.
    """
    original, clock = getattr(where, name), clock or partial(now, device)

    def timed(*given: Any, **named: Any) -> Any:
        start = clock()
        result = original(*given, **named)
        into[part] = into.get(part, 0.0) + clock() - start
        return result

    with patch.object(where, name, timed):
        yield


def now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cost_clock(device: str) -> Callable[[], float]:
    return time.process_time if torch.device(device).type == "cpu" else partial(now, device)


def in_a_process(shape: str, layers: int) -> dict[str, Any]:
    """Runs one job afresh, with the arguments of this one; memory of a job is not the next
    one's.
    """
    command = [sys.executable, *sys.argv, "--job", shape, str(layers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    *shown, last = done.stdout.splitlines()
    print(f"{shape}, {layers} layers", *shown, sep="\n  ", flush=True)
    result: dict[str, Any] = json.loads(last)
    return result


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, line: dict[str, Any]) -> None:
    line |= {"torch": torch.__version__, "prunenet": __version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
