"""Finds a checkpoint, in a folder or on the hub, and says in one sentence what is wrong with it
before its weights are read.

Only safetensors and JSON are read; no code of a checkpoint's folder is ever run.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

from prunenet.models import modeling, sliced_modeling
from prunenet.models.architectures import architecture_for
from prunenet.runtime.files import CheckpointError

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What transformers raises when weights and configuration are damaged or do not belong together.
UNLOADABLE = (
    OSError,
    SafetensorError,
    StrictDataclassError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    TypeError,
)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_checkpoint(source: str | Path, dtype: str = "auto") -> Path:
    """The local folder of a checkpoint, complete and of a supported family; a hub id's files are
    fetched first.

    Args:
        source: folder with `config.json` and safetensors weights, or `owner/name` on the hub.
        dtype: one of `DTYPES`, checked before anything else.

    Raises:
        UnsupportedArchitecture: the model's type has no row in the table; checked before any weight
            is read or fetched.
        CheckpointError: nothing there, hub unreachable, quantised, or damaged or missing weights.
        ValueError: unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    fields = _read_json(find_folder(source, "config.json") / "config.json")
    if "model_type" not in fields:
        raise CheckpointError(
            f"{source} is not a language model: its config.json has no model_type"
        )
    architecture_for(SimpleNamespace(**fields))  # type: ignore[arg-type]
    if fields.get("quantization_config"):
        raise CheckpointError(
            f"{source} is quantised, and channels of quantised layers cannot be cut; give the"
            " original model"
        )
    folder = find_folder(source, "*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged ({in_short(error)}); fetch it again"
            ) from error
    return folder


def find_folder(source: str | Path, *patterns: str) -> Path:
    """The local folder of a source; files of a hub id that match the patterns are fetched, or found
    in the cache.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{source} is a file; give the folder that holds config.json and model.safetensors"
        )
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"folder {source} does not exist; check the path")
    try:
        return Path(
            snapshot_download(source, allow_patterns=list(patterns), ignore_patterns=["*/*"])
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(
            f"{source!r} is neither a folder here nor available from the Hugging Face hub"
            f" ({in_short(error)}); check the spelling and the connection, or give the path of a"
            " downloaded checkpoint"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names.

    Raises:
        CheckpointError: one is missing.
    """
    names = [_WEIGHTS]
    if (folder / _INDEX).exists() and not (folder / _WEIGHTS).exists():
        names = sorted(set(_read_json(folder / _INDEX).get("weight_map", {}).values()))
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}; only complete safetensors checkpoints are read"
            )
    return [folder / name for name in names]


def config_and_class(folder: Path) -> tuple[PretrainedConfig, Any]:
    """The configuration of a checkpoint and the class of its causal LM, ours where widths differ or
    the stream is sliced.

    Raises:
        CheckpointError: the configuration cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except UNLOADABLE as error:
        raise CheckpointError(f"{folder} cannot be loaded: {in_short(error)}") from error
    if hasattr(config, modeling.FFN) or hasattr(config, modeling.HEADS):
        kind = getattr(modeling, modeling.PREFIX + kind.__name__)
    elif hasattr(config, "residual_widths"):
        kind = getattr(sliced_modeling, sliced_modeling.PREFIX + kind.__name__)
    return config, kind


def check_device(device: str) -> None:
    """Raises CheckpointError for a device that this machine has not, or that holds no numbers."""
    try:
        found = torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"weights cannot be put on device {device!r}: {in_short(error)}"
        ) from error
    if found.is_meta:
        raise CheckpointError(
            "weights cannot be put on device 'meta', which holds shapes alone: give cpu or cuda"
        )


def in_short(error: BaseException) -> str:
    """The message on one line; libraries write paragraphs."""
    return (
        textwrap.shorten(str(error), 240, placeholder=" ...").rstrip(".: ") or type(error).__name__
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a checkpoint: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {in_short(error)}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is damaged: it does not hold a JSON object")
    return fields
