"""Says which files of a folder make a model, and what its `config.json` may say.

Loading, streaming, hashing and counting bytes all ask here, so that what is named is what is read.
Names inside a file are names of files in the same folder, never paths.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypedDict

from transformers import CONFIG_MAPPING

from prunenet.checkpoints.shards import StoredTensor, read_header
from prunenet.models.architectures import Architecture, architecture_for
from prunenet.runtime.files import CheckpointError
from prunenet.runtime.json_files import Count, Positive, Within, read_json, shown

CONFIG, GENERATION, INDEX = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
RECORD, MASKS = "prunenet.json", "prunenet_masks.safetensors"
TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "tekken.json",
)
"""Names of the files that a tokenizer is read from; `*` stands for any text."""
_NO_TOKENIZER = {".py", ".so", ".pkl", ".pickle", ".bin", ".pt", ".pth", ".safetensors", ".gguf"}
"""Endings of code, pickles and weights, whatever their names begin with."""
_REMEDY = "correct it, or fetch it again"

_Name = Annotated[str, Within(1, 100)]
_Dtype = Literal["float32", "bfloat16", "float16", "float64"]


class _Structure(TypedDict):
    """Where the parts of differing width are, see `prunenet.models.modeling`."""

    layers: _Name
    inputs: list[_Name]
    output: _Name
    width: _Name


class ConfigFields(TypedDict, total=False):
    """The fields of `config.json` that are read here; transformers checks those of its classes."""

    model_type: _Name
    architectures: list[_Name] | None
    dtype: _Dtype | None
    torch_dtype: _Dtype | None
    num_hidden_layers: Positive
    num_labels: Annotated[int, Within(0, 1_000_000)] | None
    max_position_embeddings: Annotated[int, Within(1, 2**40)] | None
    tie_word_embeddings: bool
    auto_map: dict[str, Any] | None
    per_layer_ffn: _Structure
    per_layer_heads: _Structure
    per_layer_config: dict[str, dict[str, Any]] | None
    residual_widths: list[Count]


class _Index(TypedDict):
    weight_map: dict[str, str]


# How a model is run and not what it is, or taken from elsewhere: the same model without them.
# `attn_implementation` may name code on the hub.
_DROPPED = (
    "attn_implementation",
    "experts_implementation",
    "distributed_config",
    "fusion_config",
    "gradient_checkpointing",
    "use_kernels",
    "name_or_path",
    "return_dict",
    "use_return_dict",
    "output_attentions",
    "output_hidden_states",
)
# Other files, or a form of the weights that is not plain numbers.
_QUANTISED = ("quantization_config", "compression_config")
DEQUANTISED = ("mxfp4", "fp8")
"""Values of `quantization_config.quant_method` of which transformers makes plain numbers."""
_ELSEWHERE = ("transformers_weights", "configuration_files")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files that make a model, and what they say short of the weights.

    Attributes:
        folder: they are all in.
        fields: of `config.json`, without those that say how a model is run.
        generation: fields of `generation_config.json`; None where there is none.
        weights: the safetensors files, in the order of their names.
        stored: every tensor in them, by its name there.
        sharded: whether an index names them.
    """

    folder: Path
    fields: dict[str, Any]
    generation: dict[str, Any] | None
    weights: tuple[Path, ...]
    stored: dict[str, StoredTensor]
    sharded: bool

    @property
    def paths(self) -> tuple[Path, ...]:
        """All that is read: configuration, generation defaults, index, weights."""
        names = [CONFIG]
        names += [GENERATION] if self.generation is not None else []
        names += [INDEX] if self.sharded else []
        return (*(self.folder / name for name in names), *self.weights)

    @property
    def quantised(self) -> dict[str, Any] | None:
        """How the weights are stored, of `DEQUANTISED`; None where they are plain numbers."""
        found: dict[str, Any] | None = self.fields.get("quantization_config")
        return found or None

    @property
    def architecture(self) -> Architecture:
        """The row of the model's type."""
        return architecture_for(SimpleNamespace(**self.fields))  # type: ignore[arg-type]


def model_files(folder: Path) -> ModelFiles:
    """The files that make the model of a folder; reads configuration, index and headers, no weight.

    Raises:
        UnsupportedArchitecture: the model's type has no row in the table.
        CheckpointError: a file is missing or damaged, names another folder, or says what is not
            understood; the folder holds an adapter; or the model is quantised.
    """
    fields = config_fields(folder)
    generation = None
    if (folder / GENERATION).exists():
        generation = _read(folder / GENERATION, dict[str, Any])
    weights = tuple(folder / name for name in weight_names(folder))
    stored: dict[str, StoredTensor] = {}
    for path in weights:
        header = read_header(path)
        if twice := sorted(stored.keys() & header.keys()):
            raise CheckpointError(
                f"{folder} holds tensor {twice[0][:80]} twice, in {stored[twice[0]].path.name} and"
                f" in {path.name}; fetch it again"
            )
        stored |= header
    sharded = not (folder / SINGLE).exists()
    files = ModelFiles(folder, fields, generation, weights, stored, sharded)
    _check_layers(files)
    return files


def config_fields(folder: Path) -> dict[str, Any]:
    """The fields of a folder's `config.json`, without those that say how a model is run.

    Raises:
        UnsupportedArchitecture, CheckpointError: as `model_files`.
    """
    try:
        found: Any = _read(folder / CONFIG, ConfigFields)
    except FileNotFoundError:
        raise CheckpointError(_no_model(folder)) from None
    if "model_type" not in found:
        raise CheckpointError(
            f"{folder} is not a language model: its config.json has no model_type"
        )
    architecture_for(SimpleNamespace(**found))  # type: ignore[arg-type]
    quantised = found.get(_QUANTISED[0])
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if any(found.get(name) for name in _QUANTISED) and method not in DEQUANTISED:
        raise CheckpointError(
            f"{folder} is quantised, and channels of quantised layers cannot be cut; give the"
            " original model"
        )
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}) beside the model; merge it first (peft:"
            " merge_and_unload), or give the folder of the model alone"
        )
    for name in _ELSEWHERE:
        if found.get(name):
            raise CheckpointError(
                f"{folder / CONFIG} takes the model from other files, {name}:"
                f" {shown(found[name])}; give a folder with {SINGLE} or its shards"
            )
    return _kept(folder, found)


def _kept(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that say what a model is."""
    kind = CONFIG_MAPPING[fields["model_type"]]
    known = {field.name for field in dataclasses.fields(kind)}
    for name in sorted(fields.keys() - known):
        if callable(getattr(kind, name, None)) and not name.startswith("_"):
            raise CheckpointError(
                f"{folder / CONFIG} is damaged: {shown(name)} is no field of a configuration;"
                f" {_REMEDY}"
            )
    # transformers keeps notes of its own under names with an underscore, code on the hub included
    return {
        name: value
        for name, value in fields.items()
        if name not in _DROPPED and (name in known or not name.startswith("_"))
    }


def weight_names(folder: Path, *, missing: bool = False) -> list[str]:
    """The safetensors files of a checkpoint: one, or the shards that its index names.

    Args:
        folder: with the one file, or the index.
        missing: whether files may be missing, because they are going to be fetched.

    Raises:
        CheckpointError: one is missing, or the index names what is no file of the folder.
    """
    names = [SINGLE]
    if (folder / INDEX).exists() and not (folder / SINGLE).exists():
        index: Any = _read(folder / INDEX, _Index)
        names = sorted(set(index["weight_map"].values()))
        for name in names:
            if not (is_file_name(name) and name.endswith(".safetensors")):
                raise CheckpointError(
                    f"{folder / INDEX} is damaged: it names {shown(name)}, which is no"
                    " .safetensors file of its folder; fetch it again"
                )
        if not names:
            raise CheckpointError(f"{folder / INDEX} is damaged: it names no file; {_REMEDY}")
    for name in names:
        if not missing and not (folder / name).is_file():
            raise CheckpointError(_no_weights(folder, name))
    return names


def is_file_name(name: object) -> bool:
    """Whether a text from a file names another one in the same folder, by no way around."""
    return isinstance(name, str) and bool(re.fullmatch(r"(?!\.)[^/\\\0-\x1f]{1,200}", name))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that a tokenizer is read from, in the order of their names."""
    found = {path for pattern in TOKENIZER for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix not in _NO_TOKENIZER)


def _read(path: Path, schema: Any) -> Any:
    # transformers 4 writes time limits of state-space layers as Infinity, and 5 reads that
    return read_json(path, schema, error=CheckpointError, remedy=_REMEDY, infinite=True)


def _no_model(folder: Path) -> str:
    if (folder / ADAPTER).exists():
        return (
            f"{folder} holds an adapter and not a model: it has {ADAPTER} and no {CONFIG}; merge it"
            " into its base model first (peft: merge_and_unload)"
        )
    if any(folder.glob("*.gguf")):
        return (
            f"{folder} is not a checkpoint: it has no {CONFIG}, and GGUF files are not read; give"
            " the original model"
        )
    return f"{folder} is not a checkpoint: it has no {CONFIG}"


def _no_weights(folder: Path, name: str) -> str:
    said = f"{folder} has no {name}; only complete safetensors checkpoints are read"
    pickled = sorted(path.name for path in _pickled(folder))
    if pickled and name == SINGLE:
        said += (
            f", and {pickled[0]} is a pickle, which could run code: save it anew with transformers"
            " (from_pretrained, then save_pretrained), which writes safetensors"
        )
    elif any(folder.glob("*.gguf")):
        said += ", and no GGUF files: give the original model"
    return said


def _pickled(folder: Path) -> Iterator[Path]:
    for ending in ("bin", "pt", "pth"):
        yield from folder.glob(f"*.{ending}")


def _check_layers(files: ModelFiles) -> None:
    """Raises CheckpointError for more layers than are stored: building them takes for ever."""
    said = files.fields.get("num_hidden_layers")
    if said is None:
        return
    name = files.architecture.layers.rpartition(".")[2]
    layer = re.compile(rf"(?:^|\.){name}\.(\d{{1,9}})\.")
    found = [int(match[1]) for tensor in files.stored if (match := layer.search(tensor))]
    held = max(found) + 1 if found else len(files.stored)
    if said > held:
        raise CheckpointError(
            f"{files.folder} lacks layers: config.json says {said:,}, the files hold {held:,};"
            " fetch it again"
        )
