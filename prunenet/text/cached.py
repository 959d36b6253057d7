"""Keeps on disk what a model has written, since writing takes minutes: one file an answer, checked
each time it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import weights_sha256
from prunenet.runtime.files import cache_folder, write_atomic
from prunenet.runtime.own_files import ContentError, check_layout, packed, unpacked
from prunenet.runtime.products import fast_products
from prunenet.text.formats import TextError

_FORMAT = "self-written text"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a cached file must hold.

    Attributes:
        rows: sequences, at most.
        tokens: of each.
        start: id of the token that each sequence begins with.
        vocabulary: token ids are in [0, vocabulary).
    """

    rows: int
    tokens: int
    start: int
    vocabulary: int


def cached_text(
    model: PreTrainedModel,
    source: Mapping[str, Any],
    wanted: Wanted,
    cache: Path | None,
    write: Callable[[], Int[Tensor, "n tokens"]],
) -> Int[Tensor, "n tokens"]:
    """Reads what a model of the same weights wrote before with the same settings, or has `write`
    write it now.

    A file that is damaged, altered or of an earlier version (without a hash of its content) is
    written anew, and the log says so.

    Args:
        model: its weights are part of the file's name.
        source: the settings, which are the rest of it.
        wanted: what the file must hold.
        cache: folder; default `<cache>/self-generated`.
        write: gives the token ids.

    Raises:
        TextError: the file's place is taken by something else.
        OSError: the folder cannot be made or written in; said before the work.
    """
    key = hashlib.sha256(
        (json.dumps(source, sort_keys=True) + weights_sha256(model)).encode()
    ).hexdigest()[:24]
    path = (cache or cache_folder() / "self-generated") / f"{key}.safetensors"
    if path.exists() and not path.is_file():
        raise TextError(f"{path} is no file, and cached text belongs there; remove it")
    if path.is_file():
        ids, fault = _read(path, wanted)
        if ids is not None:
            return ids
        _log.warning("note: the cached text %s is written anew: %s", path, fault)
    path.parent.mkdir(parents=True, exist_ok=True)
    with fast_products(model, unchanged=True):
        ids = write()
    write_atomic(path, packed({"ids": ids}, {"format": _FORMAT}))
    return ids


def _read(path: Path, wanted: Wanted) -> tuple[Tensor | None, str]:
    """The token ids of a file; or None, and what is wrong with it, as the end of a sentence."""
    try:
        tensors, facts = unpacked(path)
        # A file without a hash is one of an earlier version, or one that another hand wrote since.
        if facts.get("format") != _FORMAT:
            raise ContentError("it has no sha256 of its content, as earlier versions wrote it")
        ids = tensors["ids"] if "ids" in tensors else torch.empty(0)
        rows = min(max(*ids.shape[:1], 1), wanted.rows) if ids.dim() else 1
        check_layout(tensors, {"ids": (torch.int64, (rows, wanted.tokens))})
    except ContentError as error:
        return None, str(error)
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= wanted.vocabulary or not bool((ids[:, 0] == wanted.start).all()):
        return None, "it holds tokens that this model would not write"
    return ids, ""
