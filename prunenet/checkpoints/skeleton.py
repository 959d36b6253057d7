"""Builds a model without its weights, and says where each of its tensors is stored.

A loaded and a streamed checkpoint both begin here: one configuration, one set of names, one set of
sentences about what is missing, unknown or of another shape.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from prunenet.checkpoints.contents import CONFIG, GENERATION, INDEX, ModelFiles
from prunenet.checkpoints.converted import ConvertedTensor
from prunenet.checkpoints.shards import StoredTensor
from prunenet.checkpoints.sources import loading
from prunenet.models import modeling, sliced_modeling
from prunenet.models.known import class_of
from prunenet.models.text_part import config_for
from prunenet.runtime.files import CheckpointError
from prunenet.runtime.passing import passing_folder

Stored = StoredTensor | ConvertedTensor
"""A tensor on the disk, as it is or as it will be when it is loaded."""
# Tensors that older versions stored and newer ones compute: rotary frequencies, causal masks.
_COMPUTED = re.compile(
    r"(^|\.)(rotary(_emb|_embeddings)?\.inv_freq|(attention|attn)\.(masked_)?bias|position_ids)$"
)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device, and where its weights lie.

    Attributes:
        config: of the checkpoint, as no model has touched it.
        kind: class of the model.
        model: in eval mode, in the dtype that its weights are going to have.
        stored: where each tensor of the model's state lies, by its name there; tied tensors by
            every name.
    """

    config: PretrainedConfig
    kind: Any
    model: PreTrainedModel
    stored: dict[str, Stored]


@contextmanager
def staged(files: ModelFiles, place: str | None = None) -> Iterator[Path]:
    """Yields a folder with links to the files of a model and nothing else, for transformers.

    What else lies beside a model, such as an adapter, other shards or code, it never sees.

    Args:
        files: of the model.
        place: a folder to make it in, and to leave it in; default one that is removed.
    """
    with passing_folder() if place is None else nullcontext(Path(mkdtemp(dir=place))) as folder:
        _write(folder / CONFIG, files.fields)
        if files.generation is not None:
            _write(folder / GENERATION, files.generation)
        for path in files.weights:
            (folder / path.name).symlink_to(path.absolute())
        if files.sharded:
            names = {name: tensor.path.name for name, tensor in files.stored.items()}
            _write(folder / INDEX, {"metadata": {}, "weight_map": names})
        yield folder


def config_and_class(files: ModelFiles) -> tuple[PretrainedConfig, Any]:
    """The configuration of a checkpoint and the class of its causal LM, ours where widths differ or
    the stream is sliced.

    Raises:
        CheckpointError: the configuration cannot be read.
    """
    with loading(files.folder), staged(files) as folder:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind: Any = class_of(config.model_type, files.fields.get("architectures"))
        config = config_for(kind, config)
        vars(config).pop("quantization_config", None)
        if hasattr(config, modeling.FFN) or hasattr(config, modeling.HEADS):
            kind = getattr(modeling, modeling.PREFIX + kind.__name__)
        elif hasattr(config, "residual_widths"):
            kind = getattr(sliced_modeling, sliced_modeling.PREFIX + kind.__name__)
    config._name_or_path = str(files.folder)
    return config, kind


def name_after(model: PreTrainedModel, folder: Path) -> None:
    """Records the folder that a model comes from, which transformers believes to be another one."""
    model.config._name_or_path = model.name_or_path = str(folder)


def skeleton_of(files: ModelFiles, dtype: str = "auto") -> Skeleton:
    """What loading would build, without weights.

    Raises:
        CheckpointError: the configuration is not understood, or does not belong to the weights:
            tensors are missing, unknown or of another shape.
    """
    config, kind = config_and_class(files)
    config.dtype = _stored_dtype(files, config.dtype) if dtype == "auto" else getattr(torch, dtype)
    with loading(files.folder), staged(files) as folder:
        with torch.device("meta"):
            model = kind(copy.deepcopy(config))
        model.to(config.dtype).eval().tie_weights()
        if model.can_generate():
            model.adjust_generation_fn(
                *(None, False, False, folder),
                revision="main",
                subfolder="",
                trust_remote_code=False,
                cache_dir=None,
                force_download=False,
                proxies=None,
                local_files_only=True,
                token=None,
            )
    assert isinstance(model, PreTrainedModel)
    # what is dequantised when it is loaded has other names in the files
    return Skeleton(config, kind, model, {} if files.quantised else _located(model, files))


def _stored_dtype(files: ModelFiles, stated: torch.dtype | str | None) -> torch.dtype:
    """The dtype that config.json states, but for one that is wider than anything in the files:
    float32 beside bfloat16 weights would double a checkpoint and add nothing to it.
    """
    stored = (tensor.stored for tensor in files.stored.values())
    floats = [dtype for dtype in stored if dtype.is_floating_point and dtype.itemsize > 1]
    widest = max(floats, key=lambda dtype: dtype.itemsize, default=torch.float32)
    if stated is None:
        return floats[0] if floats else widest
    named = getattr(torch, stated) if isinstance(stated, str) else stated
    return widest if named.itemsize > widest.itemsize else named


def check_names(
    files: ModelFiles, model: PreTrainedModel, missing: set[str], unknown: set[str]
) -> None:
    """Raises CheckpointError for tensors that are missing, or that the model does not have.

    Args:
        files: of the model.
        model: of the class that its weights are for.
        missing, unknown: names of tensors.
    """
    named = next(iter(files.fields.get("architectures") or []), None)
    kind = type(model).__name__
    what = f" (config.json names {named}, read as {kind})" if named not in (None, kind) else ""
    if unknown := {name for name in unknown if not _COMPUTED.search(name)}:
        raise CheckpointError(
            f"{files.folder} stores {len(unknown)} tensors that a {kind} does not have, e.g."
            f" {min(unknown)[:80]}{what}; give a plain causal language model"
        )
    if missing:
        raise CheckpointError(
            f"{files.folder} lacks {len(missing)} of the model's tensors, e.g."
            f" {min(missing)}{what}; fetch it again"
        )


def _located(model: PreTrainedModel, files: ModelFiles) -> dict[str, Stored]:
    """Where each tensor of the model lies, under any name that `from_pretrained` knows; one of
    several tied is enough.
    """
    state = model.state_dict(keep_vars=True)
    here = _renamed(model, files)
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    found: dict[str, Stored] = {}
    missing = set()
    for names in tied.values():
        entries = [here[name] for name in names if name in here]
        if not entries:
            missing.add(names[0])
            continue
        expected = state[names[0]]
        for entry in entries:
            if entry.shape != tuple(expected.shape):
                raise CheckpointError(
                    f"{files.folder} cannot be loaded: {entry.name} is {list(entry.shape)},"
                    f" config.json says {list(expected.shape)}"
                )
        _check_tied(files, entries)
        found |= dict.fromkeys(names, replace(entries[0], dtype=expected.dtype))
    check_names(files, model, missing, here.keys() - state.keys())
    return found


def _renamed(model: PreTrainedModel, files: ModelFiles) -> dict[str, Stored]:
    """The stored tensors by their names in the model; those that are converted as they will be."""
    state = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    here: dict[str, Stored] = {}
    parts: dict[str, list[tuple[str, str, StoredTensor]]] = {}
    for name, tensor in sorted(files.stored.items(), key=lambda item: dot_natural_key(item[0])):
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if pattern is not None:
            parts.setdefault(renamed, []).append((name, pattern, tensor))
        elif renamed in here:
            raise CheckpointError(
                f"{files.folder} holds tensor {renamed} twice, as {here[renamed].name} and as"
                f" {name}; fetch it again"
            )
        else:
            here[renamed] = tensor
    by_pattern = {pattern: made for made in converters for pattern in made.source_patterns}
    for name, sources in parts.items():
        converter, first = by_pattern[sources[0][1]], sources[0][2]
        # a converter names its first target; the others stand beside it
        for target in converter.target_patterns:
            own = name.replace(converter.target_patterns[0], target)
            if own in state:
                expected = state[own]
                here[own] = ConvertedTensor(
                    own,
                    tuple(sources),
                    converter,
                    model,
                    tuple(expected.shape),
                    expected.dtype,
                    first.stored,
                    first.device,
                )
    return here


def _check_tied(files: ModelFiles, entries: list[Stored]) -> None:
    """Raises CheckpointError where tensors that are one in the model differ in the files."""
    for first, second in pairwise(entries):
        slabs = zip(first.slabs(), second.slabs(), strict=True)
        if not all(torch.equal(a, b) for (_, a), (_, b) in slabs):
            raise CheckpointError(
                f"{files.folder} stores {first.name} and {second.name} with different numbers,"
                " though config.json ties them; correct its tie_word_embeddings to false"
            )


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields), encoding="utf-8")
