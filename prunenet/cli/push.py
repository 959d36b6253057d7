"""The commands `prunenet card` and `prunenet push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunenet.cli.console import one_process, path, show
from prunenet.cli.inputs import printed_rows
from prunenet.cli.options import Json

Pruned = Annotated[str, typer.Argument(help="Folder of a checkpoint that prunenet wrote.")]


def card(
    model: Pruned,
    results: Annotated[
        Path | None, typer.Option(parser=path, help="JSON written by 'prunenet eval --json'.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Folder of the base model, for its licence; default: as it stands."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint's model card anew, with measured results."""
    with one_process(Path(model)):
        from prunenet.checkpoints.hub import write_card

        rows = [] if results is None else printed_rows(results)
        written = write_card(model, rows, base)
        show({"card": str(written)}, as_json, lambda: f"wrote {written}")


def push(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint or of a GGUF file.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub, owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Close a new repository.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub."""
    with one_process():
        from prunenet.checkpoints.hub import push as upload

        url = upload(model, repo, private=private)
        show({"url": url}, as_json, lambda: f"uploaded to {url}")
