"""The command `prunenet models`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from prunenet.cli import tables
from prunenet.cli.console import one_process, show
from prunenet.cli.options import Json


def models(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub id: say what would be cut of it, group by group."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the known types as a table in Markdown.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the model types that are known, or what can be cut of one model."""
    with one_process():
        if model is None and markdown:
            from prunenet.models.listing import known_types, table_of

            typer.echo(table_of(known_types()), nl=False)
        elif markdown:
            raise ValueError("--markdown is of the list of known types: leave it or the model out")
        elif model is None:
            _show_types(as_json)
        else:
            _show_model(model, as_json)


def _show_types(as_json: bool) -> None:
    from prunenet.models.listing import known_types

    types = known_types()
    show(
        {"models": [asdict(one) for one in types]},
        as_json,
        lambda: tables.grid(
            ["type", "class", "channels of", "fields", "widths"],
            [[one.model_type, one.kind, one.forms, one.fields, one.widths] for one in types],
            "other types are discovered when they are met, in some seconds",
        ),
        only_here=True,
    )


def _show_model(model: str, as_json: bool) -> None:
    from prunenet.checkpoints.skeleton import skeleton_of
    from prunenet.checkpoints.sources import open_checkpoint
    from prunenet.models.listing import structures

    skeleton = skeleton_of(open_checkpoint(model)).model
    kind, found = type(skeleton).__name__, structures(skeleton)
    rows = [
        [s.path, s.form, s.knob, f"{s.groups:,}", s.widths, f"{s.parameters:,}", s.share]
        for s in found
    ]
    columns = ["channels", "form", "width in", "groups", "width", "parameters", "of all"]
    show(
        {"model": model, "class": kind, "groups": [asdict(s) for s in found]},
        as_json,
        lambda: tables.grid(columns, rows, f"{kind}: all else stays as it is"),
        only_here=True,
    )
