"""Says which model a checkpoint or a model in memory is, by its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.sources import find_folder
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.models.layers import structure
from prunenet.runtime.placement import parameters, tensor_of


def identify(source: str | Path) -> tuple[str, str]:
    """(base_model, revision) for `Provenance`: hub id and commit, or folder name and `sha256:...`
    of config and weights.
    """
    folder = find_folder(source, "config.json")
    if not Path(source).is_dir():
        return str(source), folder.name
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("model*.safetensors")]):
        with path.open("rb") as file:
            digest.update(
                f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return folder.resolve().name, f"sha256:{digest.hexdigest()}"


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
