"""The command `prunenet recover`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from prunenet.cli import tables
from prunenet.cli.compare import listed
from prunenet.cli.console import errors, one_job, show
from prunenet.cli.options import Json, OneDevice, Out, Running, trackers
from prunenet.cli.recovering import say_estimate
from prunenet.recover.options import RecoverText, Tuning

Pruned = Annotated[
    str, typer.Argument(help="Folder of a pruned checkpoint, or its id on the Hugging Face hub.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """By which model is taught, and in how many amounts."""

    teacher: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="The dense model: samples the text, and teaches."),
    ] = None
    rungs: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS,...",
            help="In place of --tokens, as in 100000,400000: one training for each amount, each"
            " into a folder of its own (OUT-100k, OUT-400k).",
        ),
    ] = None


def recover(
    pruned: Pruned,
    out: Out,
    teaching: Teaching,
    tuning: Tuning,
    text: RecoverText,
    loading: OneDevice,
    running: Running,
    as_json: Json = False,
) -> None:
    """Train a pruned model to predict what the dense one does, by default without external data."""
    with one_job(loading.device, out) as place:
        from prunenet.checkpoints.options import LoadOptions
        from prunenet.checkpoints.save import load_provenance
        from prunenet.recover.ladder import recover_rungs
        from prunenet.recover.record import Watch
        from prunenet.recover.record import recover as run
        from prunenet.runtime import parallel

        rungs, told = teaching.rungs, trackers(running.report_to)
        how: dict[str, Any] = {
            "teacher": teaching.teacher,
            "text": text,
            "resume": running.resume,
            "loading": LoadOptions(device=place, dtype=loading.dtype),
        }
        with tables.stages(errors) as advance:
            how["watch"] = Watch(estimate=say_estimate, progress=advance, report_to=told)
            if rungs is not None:
                amounts = listed("rungs", rungs, int)
                ladder = recover_rungs(pruned, out, amounts, tuning, **how)
            else:
                found = run(pruned, out, tuning, **how)
        if not parallel.is_first():
            return
        if rungs is not None:
            show({"rungs": tables.rungs_of(ladder)}, as_json, lambda: tables.rungs(ladder))
            return
        if found.best_step == 0:
            errors.print(
                "note: nothing was better on the text held back; the weights are those of the"
                " pruned model"
            )
        facts = tables.provenance_facts(load_provenance(out), out)
        facts |= {"loss_before": found.before, "loss_after": found.after}
        facts["best_step"] = found.best_step
        show(facts, as_json, lambda: tables.facts("recovered model", facts))
