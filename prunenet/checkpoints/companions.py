"""Writes what travels beside the weights, as the source checkpoint has it: configuration,
generation defaults, tokenizer.

A cut changes widths, so a cut checkpoint differs from its source in widths and in nothing else:
config.json keeps every other field, and the files of the tokenizer are copied byte for byte. What
transformers would write instead is in the layout of its own version, which older loaders misread.

A model says where it comes from by `config._name_or_path`. One that never was on disk is written as
transformers writes it, with the fields of version 4 beside those of 5.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prunenet.checkpoints.contents import CONFIG, GENERATION, config_fields, tokenizer_files
from prunenet.checkpoints.load import load_tokenizer
from prunenet.checkpoints.older_loaders import (
    ROPE_FIELDS,
    config_from,
    state_tokenizer_class,
    with_v4_fields,
)
from prunenet.checkpoints.sources import loading
from prunenet.models import modeling, sliced_modeling
from prunenet.runtime.files import CheckpointError
from prunenet.runtime.passing import passing_folder

_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_CODE = ("auto_map", "custom_pipelines")
"""Fields that name code, which does not travel."""
_READ_ANEW = {"transformers_version", "_name_or_path"}
"""Fields by which two readings of one configuration may differ."""


def source_folder(config: PretrainedConfig) -> Path | None:
    """Returns the folder on this machine that a model was loaded from; None where there is none."""
    return _folder_of(config._name_or_path, getattr(config, "_commit_hash", None))


def carried_tokenizer(folder: Path) -> list[Path]:
    """Returns the files of a folder's tokenizer, and of what makes images into tokens, that travel:
    regular ones that lie inside it.
    """
    files = [*tokenizer_files(folder), *(folder / name for name in _PROCESSOR)]
    return [path for path in files if _is_inside(path)]


def companion_bytes(model: PreTrainedModel) -> int:
    """Returns how many bytes `write_companions` copies."""
    source = source_folder(model.config)
    return 0 if source is None else sum(path.stat().st_size for path in carried_tokenizer(source))


def write_companions(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Completes what `save_pretrained` has written to a folder: configuration, generation defaults
    and tokenizer become those of the source, but for what the model itself changed.

    Args:
        folder: that a model was saved to.
        model: the one that was saved.
        tokenizer: saved where it is not the source's own, unchanged. None: the source's is copied,
            unless the model has another vocabulary.
    """
    source = source_folder(model.config)
    said = None if source is None else _stated(source, model.config)
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if said is not None:
        fields = _merged(said, model.config)
    fields = {name: value for name, value in fields.items() if name not in _CODE}
    fields = with_v4_fields(fields) | _needs_code(model)
    text = json.dumps(fields, indent=2, sort_keys=said is None) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if source is not None:
        _copy_generation(source, folder, model)
    files = [] if source is None else carried_tokenizer(source)
    whole = said is not None and said.get("vocab_size") == fields.get("vocab_size")
    if files and (whole if tokenizer is None else _is_of(tokenizer, files[0].parent)):
        _copy_tokenizer(files, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
        state_tokenizer_class(folder)


def _folder_of(name: str | None, revision: str | None = None) -> Path | None:
    if not name:
        return None
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    try:
        found = try_to_load_from_cache(name, CONFIG, revision=revision)
    except HFValidationError:  # the path of a folder that is gone
        return None
    return Path(found).parent if isinstance(found, str) else None


def _is_inside(path: Path) -> bool:
    """Whether a regular file lies in its folder, or in the hub's cache that the folder is of."""
    if not path.is_file():
        return False
    homes = [path.parent.resolve()]
    if path.parent.parent.name == "snapshots":
        homes.append(path.parent.parent.parent.resolve() / "blobs")
    return any(path.resolve().is_relative_to(home) for home in homes)


def _stated(source: Path, config: PretrainedConfig) -> dict[str, Any] | None:
    """The fields of the source's config.json; None where it states no such model any more."""
    try:
        fields = config_fields(source) if _is_inside(source / CONFIG) else {}
    except ValueError:
        return None
    return fields if fields.get("model_type") == config.model_type else None


def _merged(said: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """What the source said, with the fields in which a model's configuration differs from it."""
    source = config_from(type(config), said)
    fields, before, after = dict(said), _as_json(source), _as_json(config)
    names = (before.keys() | after.keys()) - _READ_ANEW
    changed = sorted(name for name in names if before.get(name) != after.get(name))
    for name in changed:
        # under another name the field would contradict itself
        aliases = [alias for alias, own in config.attribute_map.items() if own == name]
        for alias in (*aliases, *(ROPE_FIELDS if name == "rope_parameters" else ())):
            fields.pop(alias, None)
        fields[name] = _changed(fields.get(name), before.get(name), after.get(name))
        if name not in after:
            del fields[name]
    if "dtype" in changed and "torch_dtype" in said:
        fields["torch_dtype"] = fields["dtype"]
        if "dtype" not in said:
            del fields["dtype"]
    return fields


def _changed(said: Any, before: Any, after: Any) -> Any:
    """What a part of a composite configuration said, with the fields that changed."""
    if not all(isinstance(part, dict) for part in (said, before, after)):
        return after
    changed = {k: v for k, v in after.items() if k not in before or before[k] != v}
    gone = before.keys() - after.keys()
    kept = {k: v for k, v in said.items() if k not in gone}
    return kept | {
        k: _changed(kept.get(k), before.get(k), v)
        for k, v in changed.items()
        if k not in _READ_ANEW
    }


def _as_json(config: PretrainedConfig) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return fields


def _needs_code(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of a model that needs code beside it: `auto_map`, and what refuses stock code."""
    kind: type = type(model)
    refused = {"attn_implementation": modeling.UNTRUSTED}
    if issubclass(kind, sliced_modeling.SlicedResiduals):
        return {"auto_map": {"AutoModelForCausalLM": f"sliced_modeling.{kind.__name__}"}} | refused
    if not issubclass(kind, modeling.PerLayerWidths):
        return {}
    names = {"AutoModelForCausalLM": kind.__name__}
    mappings: dict[str, Any] = {
        "AutoModel": MODEL_MAPPING,
        "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }
    for name, mapping in mappings.items():
        if type(model.config) in mapping:
            names[name] = modeling.PREFIX + mapping[type(model.config)].__name__
    return {"auto_map": {name: f"modeling.{names[name]}" for name in sorted(names)}} | refused


def _copy_generation(source: Path, folder: Path, model: PreTrainedModel) -> None:
    """Copies generation_config.json where it is sound and the model still has those defaults."""
    path, own = source / GENERATION, getattr(model, "generation_config", None)
    if own is None or not _is_inside(path):
        return
    try:
        with loading(source):
            stated = GenerationConfig.from_pretrained(source)
    except CheckpointError:
        return
    if stated.to_dict() == own.to_dict():
        shutil.copyfile(path, folder / GENERATION)


def _copy_tokenizer(files: list[Path], folder: Path) -> None:
    for path in files:
        if path.name == "tokenizer_config.json":
            content = path.read_bytes()
            if b'"auto_map"' in content:  # names code, which does not travel
                content = _without_auto_map(content)
            (folder / path.name).write_bytes(content)
        else:
            shutil.copyfile(path, folder / path.name)


def _without_auto_map(content: bytes) -> bytes:
    try:
        fields = json.loads(content)
        del fields["auto_map"]
    except (ValueError, KeyError, TypeError):  # not its own, or it cannot be read: as it came
        return content
    return (json.dumps(fields, indent=2) + "\n").encode()


def _is_of(tokenizer: PreTrainedTokenizerBase, source: Path) -> bool:
    """Whether a tokenizer is the one that a folder holds, unchanged."""
    home = _folder_of(tokenizer.name_or_path)
    if home is None or not home.samefile(source):
        return False
    try:
        return _as_saved(load_tokenizer(source)) == _as_saved(tokenizer)
    except CheckpointError:
        return False


def _as_saved(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that a tokenizer would be saved as, less what its calls leave behind in it."""
    twin = copy.deepcopy(tokenizer)
    if (backend := getattr(twin, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    with passing_folder() as folder:
        twin.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}
