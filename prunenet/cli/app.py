"""The command line: train, prune, eval, compare, recover, export, report, demo. Every command takes
--json, for machines.

Results go to standard output, progress and errors to standard error. A user's mistake is one
sentence and exit code 1 (2 where the command line itself is off); PRUNENET_DEBUG=1 shows the
traceback.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from prunenet.cli import tables
from prunenet.cli.compare import compare
from prunenet.cli.console import errors, one_job, one_process, show
from prunenet.cli.inputs import (
    blocks_for,
    check_reward_inputs,
    check_streamable,
    check_text,
    open_model,
    tokenizer_of,
)
from prunenet.cli.options import (
    Algorithm,
    CalibrationSource,
    Channels,
    Device,
    Dtype,
    Features,
    Json,
    Masks,
    MaxMemory,
    Model,
    Moments,
    Out,
    Params,
    PolicyName,
    Preset,
    PruneMoments,
    PruneTokens,
    Ratio,
    Ratios,
    Refit,
    RewardName,
    SpectralDistance,
    Spectrum,
    Stream,
    Text,
    TrainWidths,
    Updates,
    Widths,
    Window,
)
from prunenet.cli.recover import recover
from prunenet.runtime import parallel

Sizes = Annotated[list[float], typer.Option("--ratio", help="Repeat for several sizes.")]
app = typer.Typer(
    help=(
        "Learns once per model family which FFN channels matter, and cuts any model of that family"
        " to any size."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def train(
    model: Model,
    out: Out,
    preset: Preset = "default",
    updates: Updates = None,
    masks: Masks = None,
    ratio: Ratios = None,
    algorithm: Algorithm = None,
    reward: RewardName = None,
    features: Features = None,
    moments: Moments = None,
    text: CalibrationSource = None,
    distance: SpectralDistance = None,
    spectrum: Spectrum = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of AdamW, in the first stage.")
    ] = None,
    widths: TrainWidths = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run in --out.")
    ] = False,
    stream: Stream = False,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Train a policy on a model; apply it afterwards, by default from weights alone, at any
    ratio.
    """
    with one_job(device) as place:
        from dataclasses import replace

        from prunenet.policies.training.recipe import recipe_for, widths_recipe
        from prunenet.policies.training.train import check_run
        from prunenet.policies.training.train import train as learn

        given: dict[str, Any] = {
            "updates": updates,
            "masks": masks,
            "ratio": ratio,
            "algorithm": algorithm,
            "reward": reward,
        }
        given |= {"features": features, "learning_rate": learning_rate, "seed": seed}
        given |= {"distance": distance, "spectrum": spectrum}
        recipe = recipe_for(
            preset, {name: value for name, value in given.items() if value is not None}
        )
        where = (
            None
            if widths == "uniform" or (widths is None and preset != "default")
            else widths_recipe(seed)
        )
        check_reward_inputs(
            recipe.reward,
            recipe.features,
            moments,
            text,
            {"--distance": distance, "--spectrum": spectrum},
        )
        reads = {recipe.reward, "spectral" if where is None else where.reward} != {
            "spectral"
        } or recipe.features == "moments"
        check_streamable(
            stream, reads, "say --preset spectral, without --features moments or --widths per-layer"
        )
        check_run(out, resume)
        dense = open_model(model, stream, dtype=dtype, device=place, max_memory=max_memory)
        blocks = (
            blocks_for(dense, model, moments or "self", text or "builtin", 0) if reads else None
        )
        with tables.progress(errors, "training", "reward") as advance:
            trained = learn(
                dense,
                replace(recipe, allocation=where),
                out=out,
                resume=resume,
                blocks=blocks,
                progress=advance,
            )
        (_, first), best = trained.history[0], max(reward for _, reward in trained.history)
        facts = {
            "policy": str(out),
            "regime": trained.policy.config.regime,
            "updates": recipe.updates,
        }
        facts |= {"reward_untrained": first, "reward": best}
        if where is not None:
            facts |= {
                "width_updates": where.updates,
                "predicted_gain_of_widths": trained.policy.config.gain,
            }
        show(facts, as_json, lambda: tables.facts("policy", facts))


@app.command()
def prune(
    model: Model,
    out: Out,
    ratio: Ratio = None,
    params: Params = None,
    policy: PolicyName = None,
    widths: Widths = "auto",
    moments: PruneMoments = "self",
    text: CalibrationSource = None,
    tokens: PruneTokens = None,
    channels: Channels = None,
    refit: Refit = None,
    round_to: Annotated[int, typer.Option("--round", help="Widths are multiples of this.")] = 8,
    seed: Annotated[
        int, typer.Option(help="Of the text that the model writes, or of the windows drawn.")
    ] = 0,
    stream: Stream = False,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Cut a model to any size into an ordinary checkpoint, by default without any data from
    outside.
    """
    with one_job(device) as place:
        from prunenet.checkpoints.streaming import StreamedCheckpoint
        from prunenet.models.layers import structure
        from prunenet.policies import apply
        from prunenet.policies.artifact import policy_for
        from prunenet.policies.stream import prune_streamed
        from prunenet.runtime.files import check_absent

        apply.check_amount(ratio, params)
        check_absent(out)
        check_text(moments, text, tokens)
        check_streamable(stream, moments != "none", "say --moments none as well")
        dense = open_model(model, stream, dtype=dtype, device=place, max_memory=max_memory)
        trained, name = policy_for(policy, structure(dense).config.model_type)
        apply.check_choices(trained, moments != "none", widths, channels, refit)
        apply.check_size(structure(dense), ratio, params, round_to)
        same: dict[str, Any] = {
            "ratio": ratio,
            "params": params,
            "round_to": round_to,
            "widths": widths,
            "policy_name": name,
        }
        if isinstance(dense, StreamedCheckpoint):
            assert trained is not None, "check_choices"
            with tables.stages(errors) as advance:
                story = prune_streamed(
                    dense, out, trained, tokenizer=tokenizer_of(model), progress=advance, **same
                )
        else:
            blocks = (
                None
                if moments == "none"
                else blocks_for(dense, model, moments, text or "builtin", seed, tokens)
            )
            with tables.stages(errors) as advance:
                pruned = apply.prune(
                    dense,
                    trained,
                    blocks=blocks,
                    channels=channels,
                    refit=refit,
                    progress=advance,
                    **same,
                )
            if parallel.is_first():
                pruned.save_pretrained(out, tokenizer=tokenizer_of(model))
            story = pruned.provenance
        facts = tables.provenance_facts(story, out)
        show(facts, as_json, lambda: tables.facts("pruned model", facts))


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints; the first is the one to compare with.")
    ],
    text: Text = "builtin",
    window: Window = 1024,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows; default: no overlap.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Score only the first windows.")] = None,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure tokens per second.")
    ] = True,
    batch: Annotated[int, typer.Option(help="Sequences at once when measuring speed.")] = 1,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Measure the speed of what torch.compile makes of them."),
    ] = False,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity, size and speed of models, side by side."""
    with one_process():
        from prunenet.evaluation.side_by_side import measure
        from prunenet.text.corpora import TestText, load_text

        scored = load_text(text, TestText)
        with tables.progress(errors, "scoring") as advance:
            rows = measure(
                models,
                scored,
                window=window,
                stride=stride,
                max_windows=max_windows,
                speed=speed,
                batch=batch,
                compiled=compiled,
                device=device,
                max_memory=max_memory,
                dtype=dtype,
                progress=advance,
            )
        show({"models": rows}, as_json, lambda: tables.comparison(rows))


app.command()(compare)
app.command()(recover)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="Folder of a pruned checkpoint with per-layer widths.")
    ],
    out: Out,
    pad: Annotated[
        bool, typer.Option("--pad", help="Fill every layer with zeros to the widest.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint with per-layer widths into one that every loader reads."""
    with one_process():
        from prunenet.checkpoints.save import export_padded, load_provenance

        if not pad:
            raise ValueError(
                "export knows one way, zero-padding every layer to the widest: say --pad"
            )
        export_padded(model, out)
        facts = tables.provenance_facts(load_provenance(out), out)
        show(facts, as_json, lambda: tables.facts("padded model", facts))


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="JSON written by 'prunenet eval --json'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write.")],
    as_json: Json = False,
) -> None:
    """Draw perplexity and speed against size."""
    with one_process():
        from prunenet.evaluation.report import draw_report

        try:
            rows = list(json.loads(results.read_text(encoding="utf-8"))["models"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{results} is not what 'prunenet eval --json' prints ({error}); make it anew"
            ) from None
        draw_report(rows, out)
        show({"figure": str(out)}, as_json, lambda: f"drew {out}")


@app.command()
def demo(
    out: Out = Path("demo"),
    ratios: Sizes = [0.2, 0.3, 0.4],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Fetch a real model, train a policy on it, cut it to several sizes, and compare."""
    with one_process():
        from prunenet.cli.demo import run_demo

        rows = run_demo(out, ratios, errors)
        show({"models": rows}, as_json, lambda: tables.comparison(rows))
        places = {"figure": out / "report.png", "policy": out / "policy"}
        places |= {f"checkpoint {row['ratio']:g}": row["folder"] for row in rows[1:]}
        for name, place in places.items():
            errors.print(f"{name}: {escape(str(place))}")


def main() -> None:
    """Entry point of the `prunenet` command."""
    # Quiet libraries: their warnings and bars are not results. Set here, where the process is ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    app()
