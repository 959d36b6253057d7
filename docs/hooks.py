"""What mkdocs does for this site besides rendering: the command line's reference, and the figures of `benchmarks/results`.

The reference is made from the typer application itself. mkdocs-click 0.9 takes click commands only, and typer carries its own
copy of click since 0.26 or so; a plugin is therefore no shorter than this.
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

APP = "prunenet.cli:app"
ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
MARK = "<!-- commands -->"


def on_files(files: Files, config: Any) -> Files:
    """Puts figures, JSON lines and the table of `benchmarks/results` under `data/`."""
    for path in sorted(p for p in (ROOT / RESULTS).rglob("*") if p.is_file()):
        name = f"data/{path.relative_to(ROOT / RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links into `benchmarks/results` at their copies, and writes the commands where `MARK` stands."""
    markdown = markdown.replace(f"../{RESULTS}/", "data/")
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def commands() -> str:
    """Every command of the application, as Markdown."""
    os.environ.setdefault("COLUMNS", "200")
    sys.path.insert(0, str(ROOT))
    module, _, name = APP.partition(":")
    from typer import Context
    from typer.main import get_command

    group: Any = get_command(getattr(import_module(module), name))
    context = Context(group, info_name="prunenet")
    return "\n".join(
        line
        for command in group.list_commands(context)
        for line in _command(group, context, command)
    )


def _command(group: Any, parent: Any, name: str) -> Iterator[str]:
    from typer import Context

    command = group.get_command(parent, name)
    context = Context(command, info_name=name, parent=parent)
    usage = " ".join(["prunenet", name, *command.collect_usage_pieces(context)])
    yield f"## {name}\n\n{_escaped(command.help)}\n\n```console\n{usage}\n```\n"
    records = [(p.param_type_name, p.get_help_record(context)) for p in command.get_params(context)]
    for kind, title in (("argument", "Argument"), ("option", "Option")):
        rows = [
            record
            for found, record in records
            if found == kind and record and not record[0].startswith("--help")
        ]
        if rows:
            yield f"| {title} | |\n|---|---|"
            yield from (f"| `{_flat(left)}` | {_escaped(_flat(right))} |" for left, right in rows)
            yield ""


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _escaped(text: str | None) -> str:
    return re.sub(r"([<*_\[|])", r"\\\1", text or "")
