"""Finds the configuration field that holds the width of a pattern: by changing one field at a time
and building the model on the meta device, where shapes cost nothing.

A field is the width's if exactly the tensors of some patterns change, along their channels, in
proportion to it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from prunenet.models.candidates import Found
from prunenet.models.groups import Part, starred
from prunenet.models.knobs import set_field

Shapes = dict[str, tuple[int, ...]]
_COUNTS = re.compile(
    r"(^|_)(num|n)_(?!inner)|_heads$|_layers$|vocab|token|_id$|layer_types|position"
)
_LOW_RANK = re.compile(r"rank|lora|laurel|head|hyper|state|conv|router|adapter|hc_|mamba|_ple_|mhc")
_SWITCH = re.compile(r"auto|adjust")


def with_knobs(
    kind: type[PreTrainedModel], config: PretrainedConfig, found: Sequence[Found]
) -> tuple[list[Found], list[str]]:
    """The patterns whose width a field holds, with their knobs; and why others have none.

    Args:
        kind: class of the model.
        config: of its twin, on which the patterns were found.
        found: patterns without knobs.
    """
    before = shapes(kind, config)
    assert before is not None
    held: dict[int, list[tuple[int, int, str, tuple[tuple[str, bool], ...]]]] = {}
    for rank, (path, new, companions) in enumerate(_trials(config, [f.width for f in found])):
        changed = copy.deepcopy(config)
        for name, value in companions:
            set_field(changed, name, value)
        set_field(changed, path, new)
        after = shapes(kind, changed)
        if after is None:
            continue
        places = _explained(before, after, found)
        for place in places:
            held.setdefault(place, []).append((-len(places), rank, path, companions))
        if len(held) == len(found):
            break
    made, reasons = [], []
    for place, one in enumerate(found):
        if place not in held:
            reasons.append(_no_field(one))
            continue
        _, _, path, companions = min(held[place])
        if _LOW_RANK.search(path.rpartition(".")[2]):
            reasons.append(f"{one.pattern.down.tensor} is a low-rank pair of {path}")
            continue
        pattern = replace(one.pattern, knob=path, companions=companions)
        made.append(replace(one, pattern=pattern))
    return made, reasons


def shapes(kind: type[PreTrainedModel], config: PretrainedConfig) -> Shapes | None:
    """Shapes of a model's parameters by name; None where the class refuses the configuration."""
    make: Any = kind
    try:
        with torch.device("meta"):
            model = make(copy.deepcopy(config))
    except Exception:  # each class has its own checks
        return None
    return {
        name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)
    }


def _no_field(one: Found) -> str:
    why = "no field of the configuration holds its width"
    if one.width % 32 == 0:
        why = f"the width is {one.width // 32} x hidden in the code"
    return f"{one.pattern.down.tensor}: {why}"


def _trials(
    config: PretrainedConfig, widths: Sequence[int]
) -> Iterator[tuple[str, Any, tuple[tuple[str, bool], ...]]]:
    """(field, new value, companions), the likeliest first."""
    fields = list(_fields(config, ""))
    numbers = [(p, v) for p, v in fields if _is_number(v) and not _COUNTS.search(_own(p))]
    for width in widths:
        equal = [(p, v) for p, v in numbers if v == width]
        yield from ((path, value - 8, ()) for path, value in equal)
    related = [
        (path, value)
        for path, value in numbers
        if value > 8 and value not in widths and any(_related(value, width) for width in widths)
    ]
    yield from ((path, value // 2, ()) for path, value in related if value % 2 == 0)
    few = [(p, v) for p, v in numbers if 1 < v <= 8 and re.search(r"inter|ffn|mlp|mult", _own(p))]
    yield from ((path, value * 2, ()) for path, value in few)
    lists = [(p, v) for p, v in fields if _is_list(v)]
    yield from ((path, type(v)([*v[:-1], v[-1] - 8]), ()) for path, v in lists)
    empty = [p for p, v in fields if v is None and re.search(r"inner|ffn|intermediate|d_ff|mlp", p)]
    yield from ((path, 24, ()) for path in empty)
    floats = [
        (p, v) for p, v in fields if isinstance(v, float) and re.search("ffn|mlp|inter|fact", p)
    ]
    yield from ((path, value * 2, ()) for path, value in floats)
    switches = [(p, v) for p, v in fields if isinstance(v, bool) and _SWITCH.search(_own(p))]
    likely = [p for p, v in numbers if re.search(r"ffn|intermediate|ff_dim|d_ff", p)]
    for name, value in switches:
        yield from ((path, 24, ((name, not value),)) for path in likely)


def _related(value: int, width: int) -> bool:
    return width % value == 0 or value % width == 0


def _own(path: str) -> str:
    """Name of the field at a path, without its place in a list."""
    return re.sub(r"(\.\d+)+$", "", path).rpartition(".")[2]


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(map(_is_number, value))
        and (value[-1] > 8)
    )


def _fields(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """All fields and those of configurations inside, by dotted paths; the vision's last."""
    held = config if isinstance(config, dict) else vars(config)
    inner = []
    for name, value in held.items():
        if name.startswith("_") or name == "rope_parameters":
            continue
        if isinstance(value, PretrainedConfig) or (isinstance(value, dict) and "config" in name):
            inner.append((name, value))
        else:
            yield f"{prefix}{name}", value
            if isinstance(value, list | tuple) and all(map(_is_number, value)) and len(value) < 4:
                yield from ((f"{prefix}{name}.{i}", entry) for i, entry in enumerate(value))
    for name, value in sorted(inner, key=lambda pair: "text" not in pair[0]):
        yield from _fields(value, f"{prefix}{name}.")


def _explained(before: Shapes, after: Shapes, found: Sequence[Found]) -> list[int]:
    """The patterns whose tensors are all that changed; none where other tensors did."""
    if before.keys() != after.keys():
        return []
    changed = {name for name in before if before[name] != after[name]}
    if not changed:
        return []
    places, explained = [], set()
    for place, one in enumerate(found):
        own = {part.tensor: part for part in one.pattern.parts}
        mine = {name for name in before if starred(name)[0] in own}
        touched = mine & changed
        if not touched:
            continue
        layers = {starred(name)[1] for name in touched}
        whole = {name for name in mine if starred(name)[1] in layers}
        if whole == touched and _along(before, after, own, touched):
            places.append(place)
            explained |= touched
    return places if explained == changed else []


def _along(before: Shapes, after: Shapes, parts: dict[str, Part], names: set[str]) -> bool:
    """Whether tensors changed along their channels and no other axis, all by the same factor."""
    factors = set()
    for name in names:
        axis = parts[starred(name)[0]].axis
        old, new = before[name], after[name]
        others = [place for place in range(len(old)) if place != axis]
        if any(old[place] != new[place] for place in others):
            return False
        factors.add(new[axis] / old[axis])
    return len(factors) == 1


def list_that_separates(config: PretrainedConfig, one: Found) -> str | None:
    """A field that holds one value a layer, 0 in exactly the layers in which a pattern passed."""
    passed, failed = ({n[0] for n in numbers} for numbers in (one.passed, one.failed))
    for path, value in _fields(config, ""):
        long = isinstance(value, list | tuple) and len(value) > max(passed | failed)
        if long and not any(value[i] for i in passed) and all(value[i] for i in failed):
            return path
    return None
