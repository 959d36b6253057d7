"""Which model types are known: rows by hand, and discoveries, cached for each version of
transformers in `PRUNENET_CACHE/architectures`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
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
RULES = 1
"""Version of the rules of discovery; raise it when they change, so that nothing cached is used."""


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


@cache
def discovered(model_type: str, kind: type[PreTrainedModel]) -> Discovery:
    """Returns what is known of a class without a row: from the cache, or found now in some seconds.

    Args:
        model_type: `config.model_type`.
        kind: class of the model.
    """
    name = f"{model_type}-{kind.__name__}-{transformers.__version__}-{RULES}.json"
    path = cache_folder() / "architectures" / name
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
