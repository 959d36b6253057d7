"""Writes a checkpoint as one GGUF file, which llama.cpp and all that is built on it read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from prunenet.checkpoints.contents import CONFIG
from prunenet.checkpoints.exports import gguf_sentencepiece
from prunenet.checkpoints.exports.choices import GgufType
from prunenet.checkpoints.exports.gguf_form import (
    Form,
    Part,
    Value,
    form_of,
    hyperparameters,
    parts,
)
from prunenet.checkpoints.exports.gguf_tokenizer import content, vocabulary
from prunenet.checkpoints.exports.llama_cpp import Proof, prove, sentence
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.model_card import CARD, gguf_card, inherited_fields
from prunenet.checkpoints.records import find_provenance
from prunenet.checkpoints.sources import find_folder
from prunenet.runtime.files import CheckpointError, new_folder
from prunenet.runtime.paths import named

_ROOM = 64_000_000
"""Bytes for tokens, merges and names, at most."""
_LARGEST = 65504
_OF_PHI_3 = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5}


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """A GGUF file.

    Attributes:
        path: of the file.
        architecture: by which llama.cpp computes the model.
        type: of the matrices.
        bytes: of the file.
        tensors: how many.
        unquantised: matrices that are stored in f16, because their rows are no multiple of 32.
        proof: what llama.cpp computed with it; None where xllamacpp is not installed.
    """

    path: Path
    architecture: str
    type: GgufType
    bytes: int
    tensors: int
    unquantised: int
    proof: Proof | None


def export_gguf(source: str | Path, out: str | Path, type: GgufType = "f32") -> Exported:
    """Writes a checkpoint, dense or pruned, as a folder that holds one GGUF file.

    The file is named after the source. Where `xllamacpp` is installed, llama.cpp reads the file,
    and its log-probabilities and its text are compared with those of transformers; the folder
    appears only if they agree.

    Args:
        source: folder or hub id.
        out: folder to create; it may exist if it is empty.
        type: of matrices.

    Raises:
        CheckpointError: as `load_model`; no architecture of llama.cpp computes the model, or its
            tokenizer is none of llama.cpp's; or what llama.cpp computes differs.
        ImportError: `gguf` is not installed.
    """
    _library()
    model = load_model(source, dtype="float32")
    tokenizer = load_tokenizer(source)
    form = form_of(model)
    made = parts(model, form)
    name = named(source)
    words = vocabulary(tokenizer, model.config.vocab_size)
    called = _called(name, form, words["ggml.tokens"])
    stated: dict[str, Value] = {"general.name": called, "general.type": "model"}
    facts = hyperparameters(model, form)
    stated |= {f"{form.name}.{key}": value for key, value in facts.items()}
    limit = gguf_sentencepiece.limits(content(tokenizer))
    stated |= {f"tokenizer.{key}": value for key, value in words.items()}
    numbers = sum(math.prod(part.shape) for part in made)
    with new_folder(Path(out), int(numbers * _BITS[type] / 8) + _ROOM) as folder:
        path = folder / f"{name}-{type.upper()}.gguf"
        plain = write_gguf(path, form.name, stated, made, type)
        proof = prove(
            path,
            model,
            tokenizer,
            close=form.close if type == "f32" else None,
            context=cast(int, facts["context_length"]),
            plain_start=bool(limit),
        )
        size = path.stat().st_size
        said = gguf_card(
            path.name,
            f"{sentence(proof)} {limit}".strip(),
            find_provenance(source),
            inherited_fields(find_folder(source, CONFIG)),
        )
        (folder / CARD).write_text(said, encoding="utf-8")
    return Exported(Path(out) / path.name, form.name, type, size, len(made), plain, proof)


def _called(name: str, form: Form, tokens: Value) -> str:
    """The model's name. By that of Phi-3 llama.cpp knows that blanks behind special tokens go."""
    assert isinstance(tokens, list)
    phi_3 = form.name == "phi3" and _OF_PHI_3.issubset(tokens)
    return f"{name} (phi-3)" if phi_3 and "phi-3" not in name.lower() else name


def write_gguf(
    path: Path, architecture: str, stated: Mapping[str, Value], made: list[Part], type: GgufType
) -> int:
    """Writes a GGUF file, one tensor in memory at a time.

    Args:
        path: of the file.
        architecture: of llama.cpp.
        stated: keys and values.
        made: the tensors.
        type: of matrices.

    Returns:
        How many matrices are stored in f16, because their rows are no multiple of 32.

    Raises:
        CheckpointError: a number is too large for f16.
    """
    library = _library()
    types = [_type_of(part.shape, type) for part in made]
    with closing(library.GGUFWriter(path, architecture)) as writer:
        writer.add_file_type(_file_type(type))
        writer.add_quantization_version(library.GGML_QUANT_VERSION)
        for key, value in stated.items():
            _add(writer, key, value)
        for part, kind in zip(made, types, strict=True):
            row = _stored(torch.zeros((1, *part.shape[1:])), part.name, kind)
            raw = library.GGMLQuantizationType[kind.upper()]
            rows = part.shape[0]
            shape = (rows, *row.shape[1:])
            writer.add_tensor_info(part.name, shape, row.dtype, row.nbytes * rows, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part, kind in zip(made, types, strict=True):
            writer.write_tensor_data(_stored(part.read(), part.name, kind))
    return types.count("f16") if type == "q8_0" else 0


def _file_type(type: GgufType) -> Any:
    kinds = _library().LlamaFileType
    return kinds.ALL_F32 if type == "f32" else kinds[f"MOSTLY_{type.upper()}"]


def _type_of(shape: tuple[int, ...], type: GgufType) -> GgufType:
    """What a tensor is stored in: vectors exactly, rows that Q8_0 cannot divide in f16."""
    if len(shape) == 1:
        return "f32"
    return "f16" if type == "q8_0" and shape[-1] % 32 else type


def _stored(tensor: Tensor, name: str, type: GgufType) -> Any:
    """The array of a tensor, as the file holds it."""
    library, exact = _library(), tensor.float().numpy()
    if type == "f32":
        return exact
    if type == "f16":
        if (largest := np.abs(exact).max()) > _LARGEST:
            raise CheckpointError(
                f"{name} holds numbers up to {largest:.3g}, and f16 ends at {_LARGEST}: say --type"
                " bf16"
            )
        return exact.astype(np.float16)
    return library.quants.quantize(exact, library.GGMLQuantizationType[type.upper()])


def _add(writer: Any, key: str, value: Value) -> None:
    """Adds a key; counts are unsigned, as llama.cpp asks for them."""
    kinds = _library().GGUFValueType
    if isinstance(value, list):
        own = {int: kinds.INT32, float: kinds.FLOAT32, str: kinds.STRING}[value[0].__class__]
        writer.add_key_value(key, value, kinds.ARRAY, sub_type=own)
    else:
        own = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
        writer.add_key_value(key, value, own[value.__class__])


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"GGUF files are written by the package gguf ({error}): pip install 'prunenet[gguf]'"
        ) from error
    return gguf
