"""The command `prunenet prune`."""

from __future__ import annotations

from functools import partial

from prunenet.cli import tables
from prunenet.cli.console import errors, one_job, show
from prunenet.cli.inputs import Checkpoint, check_streamable, check_text, note_overflow, open_model
from prunenet.cli.options import Calibration, Json, Model, Out, PolicyName, Reading
from prunenet.policies.options import PruneOptions


def prune(
    model: Model,
    out: Out,
    options: PruneOptions,
    calibration: Calibration,
    reading: Reading,
    policy: PolicyName = None,
    as_json: Json = False,
) -> None:
    """Cut a model to any size into an ordinary checkpoint, by default without external data."""
    with one_job(reading.device, out) as place:
        from prunenet.checkpoints.streaming import StreamedCheckpoint
        from prunenet.policies import apply
        from prunenet.policies.artifact import policy_for
        from prunenet.policies.stream import prune_streamed
        from prunenet.refit.blocks import forget_blocks
        from prunenet.runtime import parallel
        from prunenet.runtime.files import check_absent, check_room

        measured = calibration.moments != "none"
        check_absent(out)
        check_text(calibration.moments, calibration.text, calibration.tokens)
        check_streamable(reading, measured, "say --moments none as well")
        source = Checkpoint(model)
        trained, name = policy_for(policy, source.model_type)
        options.filled(trained, measured)
        dense = open_model(model, reading, place)
        ratio = apply.ratio_of(dense, options)
        check_room(out, apply.bytes_left(dense, ratio, options.round_to))
        if isinstance(dense, StreamedCheckpoint):
            assert trained is not None, "PruneOptions.filled"
            with tables.stages(errors) as advance:
                provenance = prune_streamed(
                    dense, out, trained, options, policy_name=name, progress=advance
                )
            note_overflow(dense)
        else:
            blocks = calibration.blocks(dense, source)
            folder = out.with_name(f"{out.name}.blocks")
            cut = partial(apply.prune, dense, trained, options, blocks=blocks, policy_name=name)
            with tables.stages(errors) as advance:
                pruned = cut(folder=folder, progress=advance)
            if parallel.is_first():
                pruned.save_pretrained(out)
                forget_blocks(folder)
            provenance = pruned.provenance
        if not parallel.is_first():
            return
        source.note_tokenizer()
        facts = tables.provenance_facts(provenance, out)
        show(facts, as_json, lambda: tables.facts("pruned model", facts))
