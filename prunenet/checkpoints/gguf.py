"""GGUF files, the form of llama.cpp, made into ordinary checkpoints once: transformers dequantises
them. They are kept in `PRUNENET_CACHE/gguf` by the sha256 of the file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunenet.models.rebuilt import rebuilt
from prunenet.runtime.files import CheckpointError, new_folder
from prunenet.runtime.paths import cache_folder

ENDING = ".gguf"


def gguf_file(source: Path) -> Path | None:
    """Returns the GGUF file that a path names, or the only one of a folder without a model."""
    if source.is_file():
        return source if source.suffix == ENDING else None
    if not source.is_dir() or (source / "config.json").exists():
        return None
    found = sorted(source.glob(f"*{ENDING}"))
    if len(found) > 1:
        raise CheckpointError(
            f"{source} holds {len(found)} GGUF files, e.g. {found[0].name}; give one of them"
        )
    return found[0] if found else None


def checkpoint_of(path: Path) -> Path:
    """Returns a folder with the dequantised model of a GGUF file, in bfloat16, and its tokenizer.

    Raises:
        CheckpointError: the file cannot be read, or needs the package gguf.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    out = cache_folder() / "gguf" / digest
    if (out / "config.json").exists():
        return out
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
    except Exception as error:  # transformers promises no types
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read as GGUF: {why}; give the original model"
        ) from error
    config = model.config
    vars(config).pop("quantization_config", None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out, 2 * sum(p.numel() for p in model.parameters())) as folder:
        rebuilt(model, config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out
