"""Writes what was measured as one HTML page that needs no network: tables, charts, and where the
policy cut, with a slider over ratios.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.records import find_provenance
from prunenet.runtime.files import CheckpointError, make_folders, write_atomic

_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
"""What could end the element of the page that holds the data."""
_START = 0.3
"""Ratio near which the slider stands first."""
_FACTS = ("base_model", "revision", "policy", "policy_sha256", "regime", "ratio", "seed")


@dataclass(frozen=True, slots=True)
class Size:
    """What stays at a ratio.

    Attributes:
        label: as the slider says it.
        ratio: share of FFN channels removed.
        kept, whole: channels of each layer, and those of the dense model.
        groups, whole_groups: the same of attention heads; None where they are whole.
    """

    label: str
    ratio: float
    kept: tuple[int, ...]
    whole: tuple[int, ...]
    groups: tuple[int, ...] | None = None
    whole_groups: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """A reward over the training; `points` are (step, value)."""

    title: str
    xlabel: str
    points: tuple[tuple[int, float], ...]

    @property
    def sentence(self) -> str:
        """What the curve shows, for those who do not see it."""
        (_, first), (last, end) = self.points[0], self.points[-1]
        place, best = max(self.points, key=lambda point: point[1])
        return (
            f"From {first:.4g} to {end:.4g} over {last:,} {self.xlabel}; the best of"
            f" {len(self.points)} evaluations is {best:.4g}, at {place:,}."
        )


@dataclass(frozen=True, slots=True)
class Extras:
    """What a page shows besides the measured rows.

    Attributes:
        sizes: of the slider; empty: those of the models.
        curves: of the policy's training.
        texts: for each prompt, (model, text).
    """

    sizes: tuple[Size, ...] = ()
    curves: tuple[Curve, ...] = ()
    texts: tuple[tuple[tuple[str, str], ...], ...] = ()


def write_page(rows: Sequence[Mapping[str, Any]], path: str | Path, extras: Extras) -> None:
    """Writes the page; the same arguments give the same bytes.

    Args:
        rows: of `prunenet eval`, the dense model first.
        path: of the file; replaced if it exists, its folder is made.
        extras: what else it shows.

    Raises:
        ValueError: no rows, or one without `parameters` and `bytes`.
    """
    text = files("prunenet.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(page_data(rows, extras), allow_nan=False)
    for character, escape in _ESCAPED.items():
        data = data.replace(character, escape)
    make_folders(Path(path).parent)
    write_atomic(Path(path), text.replace("__DATA__", data).encode())


def page_data(rows: Sequence[Mapping[str, Any]], extras: Extras) -> dict[str, Any]:
    """Returns what the page's script reads. Arguments and errors as `write_page`."""
    if not rows:
        raise ValueError("a report needs at least one row, got none")
    for row in rows:
        if not (row.get("parameters") and row.get("bytes")):
            raise ValueError(
                "a row of the report has parameters and bytes, as 'prunenet eval --json' prints"
                f" them; one has {', '.join(map(str, list(row)[:8])) or 'nothing'}"
            )
    made = [_provenance(row) for row in rows]
    models = [_model(row, rows, record) for row, record in zip(rows, made, strict=True)]
    sizes = extras.sizes or _sizes(models, made)
    texts = [list(map(list, block)) for block in extras.texts]
    said = [
        [m["label"], row["sentence"]]
        for m, row in zip(models, rows, strict=True)
        if row.get("sentence")
    ]
    named = next((record.base_model for record in made if record is not None), models[0]["label"])
    return {
        "title": f"{Path(named).name}, pruned",
        "conditions": _conditions(rows[0]),
        "note": _note(rows),
        "models": models,
        "sizes": [asdict(size) for size in sizes],
        "start": min(range(len(sizes)), key=lambda i: abs(sizes[i].ratio - _START), default=0),
        "curves": [asdict(c) | {"said": c.sentence} for c in extras.curves if c.points],
        "texts": [*texts, *([said] if said else [])],
    }


def _provenance(row: Mapping[str, Any]) -> Provenance | None:
    """Of a row's folder; None where it has none any more."""
    try:
        return find_provenance(str(row.get("folder") or "."))
    except CheckpointError:
        return None


def _model(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], made: Provenance | None
) -> dict[str, Any]:
    ratio, dense = row.get("ratio"), row.get("ratio") == 0
    alike = [other for other in rows if other.get("ratio") == ratio]
    name = str(row.get("name") or Path(str(row.get("folder"))).name)
    tag = "dense" if dense and len(alike) == 1 else f"{ratio:g}" if ratio is not None else name
    if len(alike) > 1:
        tag = name
    known = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
    return known | {
        "label": "dense" if tag == "dense" else f"{name} ({ratio:g})" if ratio else name,
        "tag": tag if len(tag) < 18 else f"{tag[:17]}…",
        "dense": dense,
        "series": None if made is None else made.how.get("widths"),
        "facts": _facts(row, made),
    }


def _facts(row: Mapping[str, Any], made: Provenance | None) -> dict[str, str]:
    facts = {"folder": str(row.get("folder"))}
    if made is None:
        return facts | {"record": "none: the model as it was given"}
    for name in _FACTS:
        if (value := getattr(made, name)) is not None:
            facts[name.replace("_", " ")] = str(value)
    facts |= {
        name.replace("_", " "): str(value) for name, value in made.how.items() if value is not None
    }
    facts["parameters"] = f"{made.parameters_before:,} before, {made.parameters_after:,} after"
    for number, step in enumerate(made.recovered, 1):
        facts[f"recovery {number}"] = (
            f"{step['steps']} steps, {step['loss_before']:.4f} to {step['loss_after']:.4f} nats"
        )
    return facts


def _sizes(models: Sequence[Mapping[str, Any]], made: Sequence[Provenance | None]) -> list[Size]:
    """The models themselves, by rising ratio; the dense one comes first."""
    found = [
        Size(
            model["label"],
            m.ratio,
            _of_all(m, m.widths, 0),
            _of_all(m, m.dense_widths, max(m.dense_widths)),
            m.groups and _of_all(m, m.groups, 0),
            m.dense_groups and _of_all(m, m.dense_groups, max(m.dense_groups)),
        )
        for model, m in zip(models, made, strict=True)
        if m is not None
    ]
    if not found:
        return []
    whole = found[0].whole
    heads = next((size.whole_groups for size in found if size.whole_groups), None)
    if heads is not None:
        found = [
            s if s.groups else Size(s.label, s.ratio, s.kept, s.whole, heads, heads) for s in found
        ]
    return sorted(
        [Size("dense", 0.0, whole, whole, heads, heads), *found], key=lambda size: size.ratio
    )


def _of_all(made: Provenance, numbers: tuple[int, ...], gone: int) -> tuple[int, ...]:
    """Numbers of the layers that stay, as numbers of all layers of the base model."""
    if made.layers is None:
        return numbers
    left = dict(zip(made.layers, numbers, strict=True))
    return tuple(left.get(layer, gone) for layer in range(made.dense_layers or 0))


def _conditions(row: Mapping[str, Any]) -> str:
    said = []
    if row.get("text"):
        said.append(
            f"perplexity on {row['text']}, {row.get('tokens') or 0:,} tokens in windows of"
            f" {row.get('window')}{' behind BOS' if row.get('bos') else ''}"
        )
    if row.get("prompt"):
        said.append(
            f"speed of {row['prompt']} tokens read and {row.get('new_tokens')} written, batch"
            f" {row.get('batch')}, {row.get('threads')} thread(s) on {row.get('device')},"
            f" {row.get('dtype')}"
        )
    return "; ".join(said)


def _note(rows: Sequence[Mapping[str, Any]]) -> str:
    said, row = [], rows[0]
    if row.get("perplexity_low") is not None:
        said.append(f"[..]: 95 % bootstrap interval over {row['windows']} windows.")
    spreads = [
        row[name]
        for row in rows
        for name in (
            *("prefill_spread", "decode_spread"),
            *("served_prefill_spread", "served_decode_spread"),
        )
        if row.get(name) is not None
    ]
    if spreads:
        said.append(
            f"Speeds are medians of {row.get('repeats')}; ± is half of what lies between fastest"
            " and slowest."
        )
        if max(spreads) > 0.2:
            said.append("The machine was busy: differences in speed below that are noise.")
    if kind := row.get("served_type"):
        said.append(f"llama.cpp reads each model as a {kind} file, one sequence.")
    if row.get("peak_bytes"):
        said.append("Memory: parameters, and the most that reading and writing adds to them.")
    return " ".join(said)
