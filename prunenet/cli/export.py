"""The command `prunenet export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunenet.checkpoints.exports.choices import GgufType
from prunenet.cli import tables
from prunenet.cli.console import one_process, show
from prunenet.cli.options import Json, Out


def export(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, dense or pruned.")],
    out: Out,
    pad: Annotated[
        bool, typer.Option("--pad", help="Fill every layer with zeros to the widest.")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write one GGUF file, for llama.cpp and its like.")
    ] = False,
    nemotron: Annotated[
        bool,
        typer.Option("--nemotron", help="Write the Nemotron-NAS form, for vLLM, SGLang, mlx-lm."),
    ] = False,
    type_: Annotated[
        GgufType | None,
        typer.Option("--type", help="Of the matrices in a GGUF file; default: f16."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into a form that other loaders read: padded, GGUF or Nemotron-NAS."""
    with one_process(out):
        if pad + gguf + nemotron != 1:
            raise ValueError(
                "export knows three ways: say --pad (every layer filled with zeros to the widest),"
                " --gguf (one file for llama.cpp) or --nemotron (for vLLM)"
            )
        if type_ is not None and not gguf:
            raise ValueError(f"--type {type_} belongs to --gguf: add that, or leave it out")
        if gguf:
            facts, title = _gguf(model, out, type_ or "f16"), "GGUF file"
        elif nemotron:
            facts, title = _nemotron(model, out), "Nemotron-NAS"
        else:
            facts, title = _padded(model, out), "padded model"
        show(facts, as_json, lambda: tables.facts(title, facts))


def _padded(model: str, out: Path) -> dict[str, Any]:
    from prunenet.checkpoints.records import find_provenance, how_to_load
    from prunenet.checkpoints.save import export_padded

    export_padded(model, out)
    made = find_provenance(out)
    if made is None:
        return {"folder": str(out), "load": how_to_load(out)}
    return tables.provenance_facts(made, out)


def _nemotron(model: str, out: Path) -> dict[str, Any]:
    from prunenet.checkpoints.exports.nemotron import export_nemotron

    every = export_nemotron(model, out)
    readers = "vLLM, SGLang, mlx-lm and llama.cpp's converter" if every else "vLLM and SGLang"
    note = "" if every else ": others need widths of a multiple of 256 (--round 256)"
    return {"folder": str(out), "readers": f"{readers}, by their code; not run here{note}"}


def _gguf(model: str, out: Path, type_: GgufType) -> dict[str, Any]:
    from prunenet.checkpoints.exports.gguf import export_gguf

    made = export_gguf(model, out, type_)
    facts: dict[str, Any] = {
        "file": str(made.path),
        "architecture": made.architecture,
        "type": made.type,
        "bytes": made.bytes,
        "tensors": made.tensors,
    }
    if made.unquantised:
        facts["kept_in_f16"] = f"{made.unquantised} matrices: rows are no multiple of 32"
    if made.proof is None:
        facts["checked"] = "no: pip install 'prunenet[gguf]' to compare with llama.cpp here"
        return facts
    same = "the same" if made.proof.same_text else "another"
    return facts | {
        "checked": "by llama.cpp",
        "log_probabilities_differ_by": made.proof.difference,
        "divergence_in_nats": made.proof.divergence,
        "greedy_text": f"{same} over {made.proof.steps} tokens",
    }
