"""Says which model a checkpoint or a model in memory is, by its bytes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.contents import CONFIG, TOKENIZER, model_files, tokenizer_files
from prunenet.checkpoints.skeleton import Stored
from prunenet.checkpoints.sources import find_folder, local_folder
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.layers import structure
from prunenet.runtime.files import CheckpointError
from prunenet.runtime.placement import is_placed, parameters, tensor_of

_log = logging.getLogger(__name__)


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


def base_of(model: PreTrainedModel) -> dict[str, str]:
    """Base model and revision, for `Provenance`: what the model's configuration says it comes from.

    The revision is "unknown" where the weights are not those that are stored there: a model that
    was trained, changed or never loaded has the name of its configuration all the same. On the
    "meta" device, as of a streamed checkpoint, there is nothing to compare.
    """
    source = model.config._name_or_path
    commit = getattr(model.config, "_commit_hash", None)
    streamed = not is_placed(model) and next(model.parameters()).is_meta
    folder = None if streamed else _stored_in(source, commit)
    local = bool(source) and local_folder(source) is not None
    name, revision = identify(source) if local else (source or type(model).__name__, commit)
    if folder is not None and not _as_stored(model, folder):
        _log.warning("the weights are not those stored in %s, so no revision is recorded", folder)
        revision = None
    return {"base_model": name, "revision": revision or "unknown"}


def _stored_in(source: str, commit: str | None) -> Path | None:
    """The folder of a source, if it is on this machine; nothing is fetched."""
    if not source:
        return None
    if (folder := local_folder(source)) is not None:
        return folder
    try:
        return Path(snapshot_download(source, revision=commit, local_files_only=True))
    except (OSError, HFValidationError) as error:  # of a listing that names more than is there
        found = getattr(error, "snapshot_path", None)
        return None if found is None else Path(found)


def _as_stored(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the parameters have the values of the files, rounded to their dtype; true of what no
    file states in plain numbers, and false of what cannot be read any more.
    """
    try:
        stored = StreamedCheckpoint.open(folder).stored
    except (CheckpointError, UnsupportedArchitecture):  # quantised, pickled or gone
        return True
    try:
        return all(
            _same(tensor_of(model, name), stored[name])
            for name, _ in parameters(model)
            if name in stored
        )
    except CheckpointError:  # damaged since, or not finite
        return False


def _same(tensor: Tensor, stored: Stored) -> bool:
    """Whether a parameter holds the rows of a file."""
    if tensor.shape != stored.shape:
        return False
    rows = tensor.view(len(stored), *stored.shape[1:])
    return all(
        torch.equal(rows[start : start + len(slab)].cpu(), slab.to(tensor.dtype))
        for start, slab in stored.slabs()
    )
