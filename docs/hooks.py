"""Makes the reference of the command line, and takes in the figures of `benchmarks/results`.

The reference is made from the typer application. mkdocs-click 0.9 takes commands of click, and
typer 0.29 has a copy of click of its own, so a plugin would be no shorter.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

APP = "prunenet.cli.app:app"
ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
MARK = "<!-- commands -->"
TYPES = "<!-- types -->"


def on_files(files: Files, config: Any) -> Files:
    """Puts figures, JSON lines and the table of `benchmarks/results` under `data/`."""
    folder = ROOT / RESULTS
    for path in sorted(found for found in folder.rglob("*") if found.is_file()):
        name = f"data/{path.relative_to(folder).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links into `benchmarks/results` at their copies; puts commands and types in."""
    markdown = markdown.replace(f"../{RESULTS}/", "data/")
    if TYPES in markdown:
        markdown = markdown.replace(TYPES, _types().table_of(_types().known_types(cached=False)))
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def _types() -> Any:
    sys.path.insert(0, str(ROOT))
    return import_module("prunenet.models.listing")


def commands() -> str:
    """Every command of the application, as Markdown."""
    os.environ.setdefault("COLUMNS", "200")
    sys.path.insert(0, str(ROOT))
    from typer import Context
    from typer.main import get_command

    module, _, name = APP.partition(":")
    group: Any = get_command(getattr(import_module(module), name))
    parent = Context(group, info_name="prunenet")
    sections = [_command(group, parent, command) for command in group.list_commands(parent)]
    return "\n".join(line for section in sections for line in section)


def _command(group: Any, parent: Any, name: str) -> Iterator[str]:
    from typer import Context

    command = group.get_command(parent, name)
    context = Context(command, info_name=name, parent=parent)
    usage = " ".join(["prunenet", name, *command.collect_usage_pieces(context)])
    yield f"## {name}\n\n{_escaped(command.help)}\n\n```console\n{usage}\n```\n"
    parameters = [p for p in command.get_params(context) if "--help" not in p.opts]
    for kind in ("argument", "option"):
        found = [p.get_help_record(context) for p in parameters if p.param_type_name == kind]
        if rows := [row for row in found if row]:
            yield f"| {kind.capitalize()} | |\n|---|---|"
            yield from (f"| `{_flat(left)}` | {_escaped(_flat(right))} |" for left, right in rows)
            yield ""


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _escaped(text: str | None) -> str:
    return re.sub(r"([<*_\[|])", r"\\\1", text or "")
