"""The command `prunenet recover`."""

from __future__ import annotations

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
Teacher = Annotated[
    str | None,
    typer.Option(metavar="DENSE", help="The dense model: samples the text, and teaches."),
]
Rungs = Annotated[
    str | None,
    typer.Option(
        metavar="TOKENS,...",
        help="In place of --tokens, as in 100000,400000: one training for each amount, each into a"
        " folder of its own (OUT-100k, OUT-400k).",
    ),
]


def recover(
    pruned: Pruned,
    out: Out,
    tuning: Tuning,
    text: RecoverText,
    loading: OneDevice,
    running: Running,
    teacher: Teacher = None,
    rungs: Rungs = None,
    as_json: Json = False,
) -> None:
    """Train a pruned model to predict what the dense one does, by default without external data."""
    with one_job(loading.device, out) as place:
        from prunenet.checkpoints.options import LoadOptions
        from prunenet.checkpoints.save import load_provenance
        from prunenet.recover.ladder import recover_rungs
        from prunenet.recover.record import recover as run
        from prunenet.runtime import parallel

        how: dict[str, Any] = {
            "teacher": teacher,
            "text": text,
            "resume": running.resume,
            "loading": LoadOptions(device=place, dtype=loading.dtype),
            "report_to": trackers(running.report_to),
            "estimate": say_estimate,
        }
        with tables.stages(errors) as advance:
            if rungs is not None:
                amounts = listed("rungs", rungs, int)
                ladder = recover_rungs(pruned, out, amounts, tuning, progress=advance, **how)
            else:
                found = run(pruned, out, tuning, progress=advance, **how)
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
