"""The command `prunenet prune`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from prunenet.cli import tables
from prunenet.cli.console import errors, one_job, show
from prunenet.cli.inputs import Checkpoint, check_streamable, check_text, note_overflow, open_model
from prunenet.cli.options import Calibration, Json, Model, Out, PolicyName, Reading
from prunenet.cli.recovering import Recovering, Unfinished, check_recoverable
from prunenet.policies.options import PruneOptions


def prune(
    model: Model,
    out: Out,
    options: PruneOptions,
    calibration: Calibration,
    recovering: Recovering,
    reading: Reading,
    policy: PolicyName = None,
    as_json: Json = False,
) -> None:
    """Cut a model to any size into an ordinary checkpoint, by default without external data."""
    with one_job(reading.device, out) as place:
        from prunenet.checkpoints.records import load_provenance
        from prunenet.runtime import parallel
        from prunenet.runtime.files import check_absent

        if parallel.is_first():
            Unfinished.beside(out, model).forget_made()
        check_absent(out)
        check_text(
            calibration.moments,
            calibration.text,
            calibration.text_column,
            calibration.tokens,
            # what recovery reads begins so too
            calibration.bos if recovering.recover == "off" else "auto",
        )
        measured = calibration.moments != "none"
        check_streamable(reading, measured, "say --moments none as well")
        source, facts = Checkpoint(model), dict[str, Any]()
        check_recoverable(recovering, reading, source, calibration)
        if recovering.recover == "off":
            _cut(source, out, options, calibration, reading, place, policy)
        else:
            left = Unfinished.of(out, source, options, calibration, recovering, policy)
            if not left.has_cut():
                _cut(source, left.cut, options, calibration, reading, place, policy)
            facts = left.train(calibration, place, reading.dtype)
        if not parallel.is_first():
            return
        source.note_tokenizer()
        facts = tables.provenance_facts(load_provenance(out), out) | facts
        show(facts, as_json, lambda: tables.facts("pruned model", facts))


def _cut(
    source: Checkpoint,
    out: Path,
    options: PruneOptions,
    calibration: Calibration,
    reading: Reading,
    device: str,
    policy: str | None,
) -> None:
    """Writes the pruned checkpoint."""
    from prunenet.checkpoints.streaming import StreamedCheckpoint
    from prunenet.policies import apply
    from prunenet.policies.refine import check_refined
    from prunenet.policies.stream import prune_streamed
    from prunenet.refit.blocks import forget_blocks
    from prunenet.runtime import parallel
    from prunenet.runtime.files import check_home, check_room

    folder = out.with_name(f"{out.name}.blocks")
    check_home(folder)
    trained, name = source.policy(policy)
    options.filled(trained, calibration.moments != "none")
    dense = open_model(source.source, reading, device)
    ratio = apply.ratio_of(dense, options)
    check_refined(dense, options, ratio)
    check_room(out, apply.bytes_left(dense, ratio, options.round_to))
    if isinstance(dense, StreamedCheckpoint):
        assert trained is not None, "PruneOptions.filled"
        with tables.stages(errors) as advance:
            prune_streamed(dense, out, trained, options, policy_name=name, progress=advance)
        note_overflow(dense)
        return
    blocks = calibration.blocks(dense, source)
    cut = partial(apply.prune, dense, trained, options, blocks=blocks, policy_name=name)
    with tables.stages(errors) as advance:
        pruned = cut(folder=folder, progress=advance)
    if parallel.is_first():
        pruned.save_pretrained(out)
        forget_blocks(folder)
