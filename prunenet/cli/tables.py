"""What the command line prints: rich tables and progress bars, from plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from prunenet.checkpoints.provenance import Provenance
    from prunenet.recover.ladder import Rung


@contextmanager
def progress(console: Console, what: str, measured: str = "") -> Iterator[Callable[..., None]]:
    """A bar; call what it yields with (done, total) or (done, total, value of `measured`)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[value]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, value="")

        def advance(done: int, total: int, value: float | None = None, what: str = what) -> None:
            shown = "" if value is None else f"{measured} {value:.4f}"
            bar.update(task, description=what, completed=done, total=total, value=shown)

        yield advance


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for work in several stages; call what it yields with (stage, done, total)."""
    with progress(console, "") as advance:
        yield lambda what, done, total: advance(done, total, what=what)


def facts(title: str, values: dict[str, Any]) -> Table:
    """One name and value a line."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in values.items():
        table.add_row(name.replace("_", " "), escape(_text(value)))
    return table


def provenance_facts(provenance: Provenance, out: Path) -> dict[str, Any]:
    """What a user wants to know of a new checkpoint, and last how it is loaded."""
    from prunenet.checkpoints.records import how_to_load

    widths = sorted(set(provenance.widths))
    return {
        "folder": str(out),
        "base_model": provenance.base_model,
        "policy": provenance.policy,
        "regime": provenance.regime,
        **{
            name: value
            for name, value in provenance.how.items()
            if name not in ("text", "experts") and value is not None
        },
        "ratio": provenance.ratio,
        "width": widths[0] if len(widths) == 1 else list(provenance.widths),
        **({"padded_to": provenance.padded_to} if provenance.padded_to else {}),
        **({"layers": list(provenance.layers)} if provenance.layers else {}),
        "parameters_before": provenance.parameters_before,
        "parameters": provenance.parameters_after,
        "removed": 1 - provenance.parameters_after / provenance.parameters_before,
        "load": how_to_load(out),
    }


def rungs_of(ladder: Sequence[Rung]) -> list[dict[str, Any]]:
    """The rungs of a recovery as JSON has them."""
    return [asdict(rung) | {"folder": str(rung.folder)} for rung in ladder]


def rungs(ladder: Sequence[Rung]) -> Table:
    """One line a rung."""
    rows = [
        [r.folder.name, f"{r.tokens:,}", f"{r.loss_before:.4f}", f"{r.loss_after:.4f}"]
        for r in ladder
    ]
    note = "loss: nats per token on text held back, before the training and after it"
    return grid(["folder", "tokens", "before", "after"], rows, note)


_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("name", "model", lambda v: v if len(v) <= 24 else f"{v[:23]}…"),
    ("parameters", "params", lambda v: f"{v / 1e6:.1f} M"),
    ("non_embedding_parameters", "no embed.", lambda v: f"{v / 1e6:.1f} M"),
    ("bytes", "disk", lambda v: f"{v / 1e6:.0f} MB"),
    ("perplexity", "perplexity", lambda v: f"{v:,.1f}"),
    ("distinct_4", "distinct-4", lambda v: f"{v:.2f}"),
    ("repetition_rate", "repeats", lambda v: f"{v:.0%}"),
    ("prefill_tokens_per_second", "prefill tok/s", lambda v: f"{v:,.0f}"),
    ("decode_tokens_per_second", "decode tok/s", lambda v: f"{v:,.1f}"),
)


_NOISY = 0.2
"""Spread of a speed, of its median, above which the table says so."""
_SERVING: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    _COLUMNS[0],
    ("peak_bytes", "memory", lambda v: f"{v / 1e6:,.0f} MB"),
    ("kv_bytes_per_token", "KV cache/token", lambda v: f"{v / 1e3:,.1f} kB"),
    ("served_bytes", "GGUF", lambda v: f"{v / 1e6:,.0f} MB"),
    ("served_prefill_tokens_per_second", "llama.cpp prefill", lambda v: f"{v:,.0f}"),
    ("served_decode_tokens_per_second", "llama.cpp decode", lambda v: f"{v:,.1f}"),
)
_COMPARED = (
    "parameters",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    *(key for key, _, _ in _SERVING if key != "name"),
)
_SPREADS = tuple(
    f"{place}{phase}_spread" for place in ("", "served_") for phase in ("prefill", "decode")
)


def comparison(rows: Sequence[dict[str, Any]]) -> Group:
    """Models side by side; the first is what the others are compared with. Below them what they
    need to run, where that is known.
    """
    tables = [_side_by_side(rows, _COLUMNS, _doubt(rows, _scored(rows)))]
    if any(row.get(key) is not None for key, _, _ in _SERVING[1:] for row in rows):
        tables.append(_side_by_side(rows, _SERVING, _served(rows)))
    return Group(*tables)


def _scored(rows: Sequence[dict[str, Any]]) -> str:
    note = ""
    if rows[0].get("perplexity") is not None:
        first = rows[0]
        note = (
            f"perplexity: {first['text']}, windows of {first['window']}"
            f"{' behind BOS' if first.get('bos') else ''}, {first['tokens']:,} tokens"
        )
    return note


def _served(rows: Sequence[dict[str, Any]]) -> str:
    said = []
    if (prompt := rows[0].get("prompt")) is not None:
        tokens = f"{prompt} tokens are read and {rows[0].get('new_tokens')} written"
        said.append(f"memory: parameters, and the most that is added while {tokens}")
    if (kind := rows[0].get("served_type")) is not None:
        said.append(f"llama.cpp: tokens per second of the {kind} file, one sequence")
    return "\n".join(said)


def _side_by_side(
    rows: Sequence[dict[str, Any]],
    columns: Sequence[tuple[str, str, Callable[[Any], str]]],
    note: str,
) -> Table:
    shown = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    table = Table(caption=escape(note), caption_justify="left", box=box.SIMPLE_HEAD)
    for key, title, _ in shown:
        table.add_column(title, justify="left" if key == "name" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(_cell(row, rows[0], key, form)) for key, _, form in shown))
    return table


def _doubt(rows: Sequence[dict[str, Any]], note: str) -> str:
    """The note, with a warning where repeats of a speed lie far apart."""
    spreads = [row.get(name) or 0.0 for row in rows for name in _SPREADS]
    if max(spreads) <= _NOISY:
        return note
    said = (
        f"speeds of one model lie up to {max(spreads):.0%} apart: the machine is busy, so smaller"
        " differences mean nothing (--most-repeats 20 goes on until they are steady)"
    )
    return f"{note}\n{said}" if note else said


def grid(headings: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> Table:
    """Words to the left, numbers (under the fourth heading and all after it) to the right."""
    table = Table(caption=escape(note), caption_justify="left", box=box.SIMPLE_HEAD)
    for index, title in enumerate(headings):
        table.add_column(escape(title), justify="left" if index < 3 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _cell(row: dict[str, Any], first: dict[str, Any], key: str, form: Callable[[Any], str]) -> str:
    value, base = row.get(key), first.get(key)
    if value is None:
        return "-"
    if row is first or key not in _COMPARED or not base:
        return form(value)
    return f"{form(value)} ({value / base - 1:+.0%})"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(each)}" for name, each in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
