"""Loads a model and its tokenizer from a folder or the hub. Reads safetensors and JSON, and runs no
code of a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.offload import read_placed
from prunenet.checkpoints.sources import (
    UNLOADABLE,
    check_device,
    config_and_class,
    find_folder,
    in_short,
    open_checkpoint,
)
from prunenet.runtime.files import CheckpointError
from prunenet.runtime.placement import AUTO


def load_model(
    source: str | Path, *, dtype: str = "auto", device: str = "cpu", max_memory: str | None = None
) -> PreTrainedModel:
    """A causal LM in eval mode, from a local folder or a hub id. Runs no code from the checkpoint,
    reads no pickle.

    Args:
        source: folder with `config.json` and safetensors weights, or `owner/name` on the hub.
        dtype: one of `prunenet.checkpoints.sources.DTYPES`; `auto` keeps the stored one.
        device: a torch device; or "auto", all there are: accelerators first, then the CPU, then the
            disk, see `prunenet.runtime.placement`.
        max_memory: with "auto", how much of the weights each may hold, as in
            "cuda:0=20GiB,cpu=60GiB"; default what is free.

    Raises:
        UnsupportedArchitecture: the model's type has no row in the table; checked before any weight
            is read or fetched.
        CheckpointError: nothing there, hub unreachable, quantised, damaged or incomplete weights,
            or no such device.
        ValueError: unknown dtype, or a `max_memory` that is not understood or not asked for.
        ImportError: "auto" without accelerate.
    """
    if max_memory is not None and device != AUTO:
        raise ValueError(
            f"--max-memory says how --device auto places weights, and the device is {device}: leave"
            " one out"
        )
    folder = open_checkpoint(source, dtype)
    if device != AUTO:
        check_device(device)
    read = partial(read_model, folder, dtype)
    model = (
        read_placed(lambda placing: read(placing=placing), max_memory) if device == AUTO else read()
    )
    # what provenance records; loaded from the cache, the model would name a folder there
    if not Path(source).is_dir():
        model.config._name_or_path, model.config._commit_hash = str(source), folder.name
    if device != AUTO:
        try:
            model.to(device)  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            raise  # said with its remedies: `console.one_sentence`
        except RuntimeError as error:  # MPS: no room, or no such dtype
            raise CheckpointError(
                f"the model cannot be put on device {device!r}: {in_short(error)}"
            ) from error
    return model


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub id.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    folder = find_folder(source, "*.json", "*.jinja", "*.txt", "tokenizer.model")
    # transformers would make an empty one up
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise CheckpointError(
            f"{source} has no tokenizer that can be read: it holds no tokenizer file"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(
            f"{source} has no tokenizer that can be read: {in_short(error)}"
        ) from error
    return tokenizer


def read_model(
    folder: Path, dtype: str, attention: str | None = None, placing: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The model of an opened folder, in eval mode; `placing`: arguments of accelerate's placement.

    Raises:
        CheckpointError: damaged or incomplete weights.
    """
    config, kind = config_and_class(folder)
    try:
        model, found = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            attn_implementation=attention,
            **placing or {},
        )
    except UNLOADABLE as error:
        raise CheckpointError(f"{folder} cannot be loaded: {in_short(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's tensors, e.g. {missing[0]}; fetch it"
            " again"
        )
    assert isinstance(model, PreTrainedModel)
    return model
