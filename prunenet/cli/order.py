"""The command `prunenet order`."""

from __future__ import annotations

from prunenet.cli import tables
from prunenet.cli.console import one_process, show
from prunenet.cli.inputs import Checkpoint
from prunenet.cli.options import Json, Model, OneDevice, Out, PolicyName


def order(
    model: Model, out: Out, place: OneDevice, policy: PolicyName = None, as_json: Json = False
) -> None:
    """Sort a dense model's channels by a policy: every uniform size is then a prefix."""
    with one_process(out):
        from prunenet.checkpoints.load import load_model
        from prunenet.checkpoints.records import check_not_padded, load_provenance
        from prunenet.policies.order import save_ordered
        from prunenet.runtime.files import check_absent

        check_absent(out)
        check_not_padded(model, "which would count as channels; sort the dense model")
        source = Checkpoint(model)
        trained, name = source.policy(policy)
        if trained is None:
            raise ValueError("no policy to sort the channels by: give one with --policy")
        dense = load_model(model, dtype=place.dtype, device=place.device)
        save_ordered(dense, out, trained, policy_name=name)
        source.note_tokenizer()
        facts = tables.provenance_facts(load_provenance(out), out)
        show(facts, as_json, lambda: tables.facts("sorted model", facts))
