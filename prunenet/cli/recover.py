"""The subcommand `prunenet recover`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunenet.cli import tables
from prunenet.cli.console import errors, one_job, show
from prunenet.cli.inputs import blocks_for, check_text, tokenizer_of
from prunenet.cli.options import (
    Bos,
    CalibrationSource,
    Dtype,
    Json,
    OneDevice,
    Out,
    TextColumn,
)
from prunenet.runtime import parallel
from prunenet.runtime.placement import AUTO

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunenet.checkpoints.provenance import Provenance
    from prunenet.recover.training import Recovered, Tuning
    from prunenet.text.calibration import CalibrationSet

Pruned = Annotated[
    str, typer.Argument(help="Folder of a pruned checkpoint, or its id on the Hugging Face hub.")
]
Teacher = Annotated[
    str | None,
    typer.Option(
        metavar="DENSE",
        help="The model that was pruned: writes the text, and what is learned from it.",
    ),
]
RecoverMoments = Annotated[
    Literal["self", "data"],
    typer.Option(
        "--moments",
        help="Text to learn from: self (the dense model writes it) or data (see --text).",
    ),
]
Tokens = Annotated[
    int,
    typer.Option(
        help="Tokens of text to learn from, in blocks of 256; a fifth is held back to judge by."
    ),
]
Batch = Annotated[int, typer.Option(help="CalibrationSet of a step.")]
MicroBatch = Annotated[int, typer.Option(help="CalibrationSet in memory at once.")]


def recover(
    pruned: Pruned,
    out: Out,
    teacher: Teacher = None,
    moments: RecoverMoments = "self",
    text: CalibrationSource = None,
    text_column: TextColumn = None,
    bos: Bos = "auto",
    tokens: Tokens = 40960,
    steps: Annotated[int, typer.Option(help="Of training.")] = 100,
    batch: Batch = 8,
    micro_batch: MicroBatch = 4,
    rank: Annotated[int, typer.Option(help="Of the updates.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, at the first step.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Of the text and of the training.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run beside --out.")
    ] = False,
    device: OneDevice = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Train a pruned model to do again what the dense one does (LoRA, merged), by default without
    any data from outside.
    """
    with one_job(device) as place:
        from prunenet.checkpoints.load import load_model
        from prunenet.checkpoints.save import load_provenance
        from prunenet.checkpoints.sources import find_folder
        from prunenet.recover.lora import load_peft
        from prunenet.recover.training import STATE, Tuning, tuned
        from prunenet.text.calibration import CalibrationOptions

        tuning = Tuning(
            steps=steps,
            batch=batch,
            micro_batch=micro_batch,
            rank=rank,
            learning_rate=learning_rate,
            seed=seed,
        )
        check_asked(teacher, moments, text, device)
        run = check_places(out, resume)
        load_peft()
        folder = find_folder(pruned, "prunenet*")
        story = load_provenance(folder)
        check_recoverable(pruned, story)
        if teacher is not None:
            check_base(teacher, story)
        model = load_model(pruned, dtype=dtype, device=place)
        dense = None if teacher is None else load_model(teacher, dtype=dtype, device=place)
        if dense is not None:
            check_shapes(str(teacher), dense, story)
        writer, source = (model, pruned) if dense is None else (dense, str(teacher))
        asked = CalibrationOptions(seed=seed, total=tokens, bos=bos, column=text_column)
        blocks = blocks_for(writer, source, moments, text or "builtin", asked)
        with tables.progress(errors, "recovering", "loss") as advance:
            found = tuned(
                model, blocks, tuning, teacher=dense, folder=run, resume=resume, progress=advance
            )
        story = recovered(story, found, tuning, blocks, taught=dense is not None)
        if parallel.is_first():
            save(found, out, folder, story, pruned)
            (run / STATE).unlink()
        if found.best_step == 0:
            errors.print(
                "note: nothing was better on the text held back; the weights are those of the"
                " pruned model"
            )
        facts = tables.provenance_facts(story, out) | {
            "loss_before": found.before,
            "loss_after": found.after,
        }
        facts["best_step"] = found.best_step
        show(facts, as_json, lambda: tables.facts("recovered model", facts))


def recovered(
    provenance: Provenance,
    found: Recovered,
    tuning: Tuning,
    blocks: CalibrationSet,
    *,
    taught: bool,
) -> Provenance:
    """The story of a pruned model with its recovery; the regime is the most that any step looked
    at.
    """
    from prunenet.checkpoints.regimes import most

    step = dataclasses.asdict(tuning) | {
        "loss": "KL(dense || pruned)" if taught else "next token",
        "loss_before": found.before,
        "loss_after": found.after,
        "best_step": found.best_step,
        "regime": blocks.regime,
        "text": dict(blocks.source),
    }
    regime = most([provenance.regime, blocks.regime])
    return dataclasses.replace(provenance, regime=regime, recovered=(*provenance.recovered, step))


def save(found: Recovered, out: Path, folder: Path, story: Provenance, source: str) -> None:
    """Writes the checkpoint: the masks of the pruned one in `folder`, and its tokenizer."""
    from prunenet.checkpoints.save import load_head_masks, load_masks, save_pruned

    masks, groups = load_masks(folder), load_head_masks(folder)
    save_pruned(found.model, out, masks, story, groups=groups, tokenizer=tokenizer_of(source))


def check_asked(teacher: str | None, moments: str, text: str | None, device: str) -> None:
    """Raises ValueError for options that contradict each other."""
    check_text(moments, text)
    if teacher is None and moments == "self":
        raise ValueError(
            "a pruned model learns nothing from text of its own: give the dense model, which writes"
            " the text and teaches (--teacher DENSE), or text from outside (--moments data --text"
            " FILE)"
        )
    if device == AUTO:
        raise ValueError(
            "recovery trains a model that is on one device: give that, such as --device cuda, in"
            " place of auto"
        )


def check_places(out: Path, resume: bool) -> Path:
    """The folder beside `out` for the run's state and its log.

    Raises:
        CheckpointError: `out` or the folder cannot be made, or `out` exists.
        ValueError: an unfinished run is there and `resume` is not set, or none and it is.
    """
    from prunenet.recover.training import STATE
    from prunenet.runtime.files import check_absent

    check_absent(out)
    run = out.absolute().with_name(f"{out.absolute().name}.recovery")
    unfinished = (run / STATE).exists()
    if unfinished and not resume:
        raise ValueError(
            f"{run} holds an unfinished run; say --resume, remove it, or give another --out"
        )
    if resume and not unfinished:
        raise ValueError(f"nothing to resume in {run}; start the run without --resume")
    return run


def check_recoverable(source: str, provenance: Provenance) -> None:
    """Raises ValueError where training would undo what the story says of the checkpoint."""
    if provenance.padded_to is not None or provenance.padded_groups is not None:
        raise ValueError(
            f"{source} is filled up with zeros, which training would not keep; recover the"
            " checkpoint that it was exported from, and export that"
        )


def check_base(teacher: str, provenance: Provenance) -> None:
    """Raises ValueError where the teacher is known not to be the base model: before any weight is
    loaded.
    """
    from prunenet.checkpoints.identity import identify

    name, revision = identify(teacher)
    known = provenance.revision
    comparable = known != "unknown" and known.startswith("sha256:") == revision.startswith(
        "sha256:"
    )
    if comparable and known != revision:
        raise ValueError(
            f"the teacher {name} ({revision[:19]}) is not the model that was pruned,"
            f" {provenance.base_model} ({known[:19]}); give that one"
        )


def check_shapes(teacher: str, dense: PreTrainedModel, provenance: Provenance) -> None:
    """Raises ValueError where the teacher has other sizes than the base model: a hub's revision
    says nothing of a folder's.
    """
    from prunenet.models.layers import count_parameters, ffn_widths

    said: tuple[Any, ...] = (list(provenance.dense_widths), provenance.parameters_before)
    if (ffn_widths(dense), count_parameters(dense)[0]) != said:
        raise ValueError(
            f"the teacher {teacher} has other sizes than the model that was pruned,"
            f" {provenance.base_model}: {count_parameters(dense)[0]:,} parameters and not"
            f" {provenance.parameters_before:,}; give that one"
        )
