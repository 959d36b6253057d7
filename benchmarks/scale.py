r"""Measures time and memory of each phase against the size of the model, on random weights.

    python benchmarks/scale.py --shapes smollm2-135m llama-3.2-1b llama-2-7b \
        --out benchmarks/results/scale.jsonl
    python benchmarks/scale.py --recipe llama-2-7b --device cuda \
        --out benchmarks/results/scale.jsonl
    python benchmarks/scale.py --figure scale.png --out benchmarks/results/scale.jsonl

Builds a model of each shape with 1 and with 2 layers (`--layers`), each in a process of its own. A
whole model's cost is the line through those points at its own number of layers; a third number of
layers shows the error of that. The figure draws what the file holds. Phases:

* score: the shipped policy reads the weights (`Policy.read`: statistics of every channel,
  embeddings included);
* spectral setup: Gram matrix and spectrum of the dense gate matrix, once a training;
* spectral mask: the published reward of one mask of every layer, exact; d_model^3, so it is fitted
  apart;
* cut and save: `prune` at ratio 0.3 with those scores, `save_pretrained`, reload and comparison.

Costs are seconds of all threads together (CPU) or of the clock (GPU), and the peak of memory over
that of a process that has loaded the libraries: resident (Linux only) or allocated on the GPU.
Exponents are the slopes of least squares lines through the logarithms of cost and parameters.
Floors are FLOPs at the rate of one large product of the same dtype, measured in the same process,
and bytes written or hashed at the measured rate.

`--recipe SHAPE` trains a policy by the published recipe (arXiv 2501.15296: gate matrix, 20 updates,
one mask of each layer), prunes by it and saves; all layers unless `--layers` says fewer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from _common import Clock, Line, append_line, is_measured, parser, read_lines, setting
from floors import RATIO, floor, recipe_floors, speeds
from recipe_clock import (
    SAVE,
    cost_clock,
    in_a_process,
    masks_of,
    pruned_and_saved,
    timing,
)
from scale_report import PHASES, draw, report
from shapes import SHAPES, parameters_of, random_model

from prunenet.envs.rewards import EXACT_UP_TO
from prunenet.models.layers import iter_ffns
from prunenet.policies.apply import prune
from prunenet.policies.artifact import policy_for
from prunenet.policies.training.recipe import PRESETS
from prunenet.policies.training.reports import Reports
from prunenet.spectra.exact import SpectralReference


def main() -> None:
    arguments = asked()
    if arguments.job:
        shape, layers = arguments.job
        run = recipe if arguments.recipe else measure
        print(json.dumps(run(shape, int(layers), arguments)))
        return
    for shape in [arguments.recipe] if arguments.recipe else arguments.shapes:
        own = [SHAPES[shape]["num_hidden_layers"]] if arguments.recipe else [1, 2]
        for layers in arguments.layers or own:
            key: Line = {
                "part": "recipe" if arguments.recipe else "phases",
                "shape": shape,
                "layers": layers,
                "device": arguments.device,
                "dtype": arguments.dtype,
            }
            key |= {"updates": arguments.updates} if arguments.recipe else {}
            if not is_measured(read_lines(arguments.out), key):
                append_line(arguments.out, key | in_a_process(shape, layers))
    wanted = {"part": "phases", "device": arguments.device}
    fits = report([line for line in read_lines(arguments.out) if wanted.items() <= line.items()])
    if arguments.figure:
        draw(fits, arguments.figure)


def asked() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=[], help="none: only report what --out holds"
    )
    made.add_argument(
        "--layers",
        type=int,
        nargs="+",
        help="built of each shape; default 1 2, with --recipe the shape's own",
    )
    made.add_argument(
        "--recipe", choices=SHAPES, help="train as published on this shape, prune and save"
    )
    made.add_argument("--updates", type=int, default=20, help="of --recipe")
    made.add_argument("--device", default="cpu")
    made.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights"
    )
    made.add_argument("--scratch", type=Path, help="folder for pruned checkpoints")
    made.add_argument("--figure", type=Path, help="PNG to draw")
    made.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    return made.parse_args()


def measure(shape: str, layers: int, arguments: argparse.Namespace) -> Line:
    """Costs of each phase of a model with this many layers."""
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
    facts: Line = {
        "parameters": parameters,
        "layer_parameters": layer,
        "rewards": rewards,
        "rates": rates,
    }
    facts |= {"phases": clock.phases, "floor_seconds": floors}
    return facts | setting(arguments.device)


def recipe(shape: str, layers: int, arguments: argparse.Namespace) -> Line:
    """Costs of the published recipe, with the seconds of its parts taken inside the training."""
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
        timing(training, "weights_sha256", "hash of the weights", parts, ticks),
        timing(training, "SpectralReward", "dense spectra", parts, ticks),
        timing(View, "of", "statistics", parts, ticks),
    ):
        trained = training.train(
            model, chosen, reports=Reports(progress=lambda *_: marks.append(ticks()))
        )
    parts["episodes"] = marks[-1] - marks[0]
    saved, rates = pruned_and_saved(clock, model, trained.policy, ticks, arguments.scratch)
    route = "stochastic" if next(iter_ffns(model)).d_model > EXACT_UP_TO else "exact"
    floors = recipe_floors(route, model, saved, masks_of(chosen), rates, arguments.device)
    facts: Line = {
        "spectrum": route,
        "phases": clock.phases,
        "parts_of_train": parts,
        "floor_seconds": floors,
        "rates": rates,
    }
    unit = "cpu_seconds" if arguments.device == "cpu" else "seconds"
    for name, seconds in (
        parts | {name: clock.phases[name][unit] for name in ("prune", SAVE)}
    ).items():
        print(f"{name}: {seconds:.2f} {unit}, floor {floors[name]:.2f}", flush=True)
    facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return facts | setting(arguments.device)


if __name__ == "__main__":
    main()
