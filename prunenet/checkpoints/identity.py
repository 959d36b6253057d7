"""Says which model a checkpoint or a model in memory is, by its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.contents import CONFIG, TOKENIZER, model_files, tokenizer_files
from prunenet.checkpoints.sources import find_folder, local_folder
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.models.layers import structure
from prunenet.runtime.placement import parameters, tensor_of


def identify(source: str | Path) -> tuple[str, str]:
    """(base_model, revision) for `Provenance`: hub id and commit, or folder name and `sha256:...`
    of every file that makes the model, see `prunenet.checkpoints.contents.model_files`.

    Raises:
        UnsupportedArchitecture, CheckpointError: as `model_files`.
    """
    if (folder := local_folder(source)) is None:
        return str(source), find_folder(source, CONFIG).name
    return folder.resolve().name, f"sha256:{_files_sha256(model_files(folder).paths)}"


def tokenizer_sha256(source: str | Path) -> str | None:
    """Hash of the files that a tokenizer is read from; None where there are none.

    Raises:
        CheckpointError: there is no such folder or hub id.
    """
    files = tokenizer_files(find_folder(source, CONFIG, *TOKENIZER))
    return _files_sha256(files) if files else None


def _files_sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def weights_sha256(model: PreTrainedModel | StreamedCheckpoint) -> str:
    """Hash of what the model computes with: its parameters and its configuration, less the path it
    came from.
    """
    digest = hashlib.sha256()
    skeleton = structure(model)
    fields = {
        k: v
        for k, v in skeleton.config.to_dict().items()
        if k not in ("_name_or_path", "transformers_version")
    }
    digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, _ in parameters(skeleton):
        digest.update(name.encode())
        pieces: Iterable[Tensor]
        if isinstance(model, PreTrainedModel):
            pieces = (tensor_of(model, name),)
        else:
            pieces = (rows for _, rows in model.stored[name].slabs())
        for piece in pieces:
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_of(model: PreTrainedModel) -> dict[str, Any]:
    """Base model and revision, for `Provenance`."""
    source = model.config._name_or_path
    if source and local_folder(source) is not None:
        name, revision = identify(source)
        return {"base_model": name, "revision": revision}
    return {
        "base_model": source or type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None) or "unknown",
    }
