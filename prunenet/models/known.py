"""Which model types are known: rows by hand, and discoveries.

Discoveries of all types of one version of transformers ship with the package. Others are cached in
`PRUNENET_CACHE/architectures`, by type, class and version.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from prunenet.models.discovery import Discovery, discover
from prunenet.runtime.files import CheckpointError, write_atomic
from prunenet.runtime.json_files import read_json
from prunenet.runtime.paths import cache_folder

_MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
RULES = 4
"""Version of the rules of discovery; raise it when they change, so that nothing cached is used."""
SHIPPED = Path(__file__).with_name("known_types.json")
"""Written by `benchmarks/coverage.py`."""


def class_names(model_type: str) -> tuple[str, ...]:
    """Returns the classes of transformers that compute logits of text for a model type, causal
    language models first; none where it has none.
    """
    found: dict[str, None] = {}
    for mapping in _MAPPINGS:
        names: Any = mapping.get(model_type, ())
        found |= dict.fromkeys((names,) if isinstance(names, str) else names)
    return tuple(found)


def class_of(model_type: str, named: Any = None) -> type[PreTrainedModel] | None:
    """Returns the class that a checkpoint is loaded as.

    Args:
        model_type: `config.model_type`.
        named: `architectures` of its configuration; a class among them is preferred.
    """
    names = class_names(model_type)
    preferred = [name for name in named or () if name in names]
    chosen = next(iter((*preferred, *names)), None)
    found: type[PreTrainedModel] | None = chosen and getattr(transformers, chosen, None)
    return found


def all_types() -> list[str]:
    """Returns all decoder types of transformers, in alphabetical order."""
    return sorted({name for mapping in _MAPPINGS for name in mapping})


def all_entries() -> list[tuple[str, str]]:
    """Returns (type, name of a class that reads its text) of all decoder types of transformers."""
    return [(name, kind) for name in all_types() for kind in class_names(name)]


def discovered_anew(model_type: str, name: str) -> Discovery:
    """Returns what a discovery finds now, whatever ships or is cached.

    Args:
        model_type, name: an entry of `all_entries`.
    """
    return discover(model_type, getattr(transformers, name), CONFIG_MAPPING[model_type])


@cache
def discovered(model_type: str, kind: type[PreTrainedModel]) -> Discovery:
    """Returns what is known of a class without a row: what ships with the package for this version
    of transformers, from the cache, or found now in some seconds.

    Args:
        model_type: `config.model_type`.
        kind: class of the model.
    """
    if (ready := shipped().get(f"{model_type} {kind.__name__}")) is not None:
        return ready
    path = _folder() / f"{model_type} {kind.__name__}.json"
    try:
        found: Discovery = read_json(path, Discovery, remedy="remove it")
    except (FileNotFoundError, ValueError):  # a damaged cache is made again
        found = discover(model_type, kind, CONFIG_MAPPING[model_type])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(asdict(found), indent=1).encode())
        except (OSError, CheckpointError):  # a cache that cannot be written is done without
            pass
    return found


def recorded(*, cached: bool = True) -> list[tuple[str, str, Discovery]]:
    """Returns (type, name of the class, what is known) of all discoveries that are at hand.

    Args:
        cached: with those made on this machine; else those that ship.
    """
    found = dict(shipped())
    for path in sorted(_folder().glob("* *.json")) if cached else ():
        with suppress(OSError, ValueError):
            found[path.stem] = read_json(path, Discovery, remedy="remove it")
    return [(*name.split(" ", 1), known) for name, known in found.items()]  # type: ignore[misc]


@cache
def shipped() -> dict[str, Discovery]:
    """Returns what ships of all types, by "type class"; nothing where transformers has another
    version.
    """
    try:
        found: _Shipped = read_json(SHIPPED, _Shipped, remedy="install prunenet again")
    except FileNotFoundError:
        return {}
    same = (found.transformers, found.rules) == (transformers.__version__, RULES)
    return dict(found.types) if same else {}


def _folder() -> Path:
    return cache_folder() / "architectures" / f"{transformers.__version__}-{RULES}"


@dataclass(frozen=True, slots=True)
class _Shipped:
    """The file `SHIPPED`: discoveries by type and class, a blank between."""

    transformers: str
    rules: int
    types: dict[str, Discovery]
