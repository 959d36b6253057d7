"""The command `prunenet recover`."""

from __future__ import annotations

from typing import Annotated

import typer

from prunenet.cli import tables
from prunenet.cli.console import errors, one_job, show
from prunenet.cli.options import Json, OneDevice, Out, Running, trackers
from prunenet.cli.recovering import say_estimate
from prunenet.recover.options import RecoverText, Tuning

Pruned = Annotated[
    str, typer.Argument(help="Folder of a pruned checkpoint, or its id on the Hugging Face hub.")
]
Teacher = Annotated[
    str | None,
    typer.Option(metavar="DENSE", help="The dense model: samples the text, and teaches."),
]


def recover(
    pruned: Pruned,
    out: Out,
    tuning: Tuning,
    text: RecoverText,
    loading: OneDevice,
    running: Running,
    teacher: Teacher = None,
    as_json: Json = False,
) -> None:
    """Train a pruned model to predict what the dense one does (LoRA, merged, or full), by default
    without external data.
    """
    with one_job(loading.device, out) as place:
        from prunenet.checkpoints.options import LoadOptions
        from prunenet.checkpoints.save import load_provenance
        from prunenet.recover.record import recover as run
        from prunenet.runtime import parallel

        with tables.stages(errors) as advance:
            found = run(
                pruned,
                out,
                tuning,
                teacher=teacher,
                text=text,
                resume=running.resume,
                loading=LoadOptions(device=place, dtype=loading.dtype),
                progress=advance,
                report_to=trackers(running.report_to),
                estimate=say_estimate,
            )
        if not parallel.is_first():
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
