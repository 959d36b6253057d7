"""Loads a model and its tokenizer from a folder or the hub. Reads safetensors and JSON, and runs no
code of a folder.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.contents import (
    CONFIG,
    TOKENIZER,
    is_file_name,
    model_files,
    tokenizer_files,
)
from prunenet.checkpoints.offload import read_placed
from prunenet.checkpoints.options import AUTO
from prunenet.checkpoints.shards import is_finite, not_finite
from prunenet.checkpoints.skeleton import check_names, name_after, skeleton_of, staged
from prunenet.checkpoints.sources import (
    check_device,
    find_folder,
    in_short,
    loading,
    local_folder,
    open_checkpoint,
)
from prunenet.models.rebuilt import rebuilt
from prunenet.runtime.files import CheckpointError
from prunenet.runtime.json_files import read_json, shown
from prunenet.runtime.placement import parameters, tensor_of

_TOKENIZER_SIZE = 2**28
"""Largest file, in bytes; those of a quarter of a million tokens have 35 MB."""


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
    folder = open_checkpoint(source, dtype).folder
    if device != AUTO:
        check_device(device)
    read = partial(read_model, folder, dtype)
    model = (
        read_placed(lambda placing: read(placing=placing), max_memory) if device == AUTO else read()
    )
    _check_finite(model, folder)
    # what provenance records; loaded from the cache, the model would name a folder there
    if local_folder(source) is None:
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
    folder = find_folder(source, CONFIG, *TOKENIZER)
    # transformers would make an empty one up
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in tokenizer_files(folder)):
        raise CheckpointError(
            f"{source} has no tokenizer that can be read: it holds no tokenizer file"
        )
    _check_tokenizer(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
        _check_use(tokenizer)
    except Exception as error:  # tokenizers raises bare Exceptions
        why = in_short(error)
        if _lacks_sentencepiece(folder):  # else transformers takes the file for one of tiktoken
            why = "reading tokenizer.model needs sentencepiece: pip install sentencepiece"
        raise CheckpointError(f"{source} has no tokenizer that can be read: {why}") from error
    return tokenizer


def _check_use(tokenizer: PreTrainedTokenizerBase) -> None:
    """Uses a tokenizer as we do: some values of its files are looked at then, not before."""
    ids = tokenizer("a b", add_special_tokens=False, verbose=False)["input_ids"]
    tokenizer.decode(ids)
    if not isinstance(tokenizer.bos_token_id, int | None):
        raise TypeError(f"the BOS token has the id {shown(tokenizer.bos_token_id)}")


def _lacks_sentencepiece(folder: Path) -> bool:
    """Whether the tokenizer is in SentencePiece's form alone, and the library is missing."""
    stored = {path.name for path in tokenizer_files(folder)}
    alone = "tokenizer.model" in stored and "tokenizer.json" not in stored
    return alone and find_spec("sentencepiece") is None


def _check_tokenizer(folder: Path) -> None:
    """Raises CheckpointError for files that no tokenizer fills, or a configuration that names
    files elsewhere.
    """
    for path in tokenizer_files(folder):
        if (size := path.stat().st_size) > _TOKENIZER_SIZE:
            raise CheckpointError(
                f"{path} is damaged: it has {size:,} bytes, more than {_TOKENIZER_SIZE:,}; fetch it"
                " again"
            )
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    fields = read_json(
        path, dict[str, Any], error=CheckpointError, remedy="correct it, or fetch it again"
    )
    for name, value in fields.items():
        if name.endswith("_file") and value is not None and not is_file_name(value):
            raise CheckpointError(
                f"{path} is damaged: {name[:80]} is {shown(value)}, which is no file of its folder;"
                " correct it, or fetch it again"
            )


def read_model(
    folder: Path, dtype: str, attention: str | None = None, placing: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The model of an opened folder, in eval mode; `placing`: arguments of accelerate's placement.

    Raises:
        CheckpointError: damaged or incomplete weights.
    """
    files = model_files(folder)
    skeleton = skeleton_of(files, dtype)
    config = skeleton.config
    if files.quantised:
        if placing:
            raise CheckpointError(
                f"{folder} is stored as {files.quantised['quant_method']}, which is dequantised in"
                " the memory of one device: give a `device` other than auto"
            )
        config = copy.deepcopy(config)
        config.quantization_config = {**files.quantised, "dequantize": True}
    with loading(folder), staged(files, (placing or {}).get("offload_folder")) as place:
        model, found = skeleton.kind.from_pretrained(
            place,
            config=config,
            dtype=skeleton.model.dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            attn_implementation=attention,
            **placing or {},
        )
    assert isinstance(model, PreTrainedModel)
    check_names(files, model, set(found["missing_keys"]), set(found["unexpected_keys"]))
    if files.quantised:
        model = rebuilt(model, skeleton.config)
    name_after(model, folder)
    return model


def _check_finite(model: PreTrainedModel, folder: Path) -> None:
    """Raises CheckpointError for a weight that is not a finite number, named."""
    stored = model.state_dict(keep_vars=True)
    buffers = [name for name, _ in model.named_buffers() if name in stored]
    for name in [*dict(parameters(model)), *buffers]:
        tensor = tensor_of(model, name)
        if not is_finite(tensor):
            raise CheckpointError(not_finite(str(folder), name, tensor.dtype))
