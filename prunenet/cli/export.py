"""The command `prunenet export`."""

from __future__ import annotations

from typing import Annotated

import typer

from prunenet.cli import tables
from prunenet.cli.console import one_process, show
from prunenet.cli.options import Json, Out


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
    with one_process(out):
        from prunenet.checkpoints.records import find_provenance, how_to_load
        from prunenet.checkpoints.save import export_padded

        if not pad:
            raise ValueError(
                "export knows one way, zero-padding every layer to the widest: say --pad"
            )
        export_padded(model, out)
        made = find_provenance(out)
        facts = (
            {"folder": str(out), "load": how_to_load(out)}
            if made is None
            else tables.provenance_facts(made, out)
        )
        show(facts, as_json, lambda: tables.facts("padded model", facts))
