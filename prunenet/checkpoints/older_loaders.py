"""States configurations and tokenizers in the words of transformers 4, beside those of 5.

transformers 5 keeps rotary embeddings in `rope_parameters`. Version 4, and the servers and
converters written for it, read `rope_theta`, `rope_scaling` and a family's own fields; where these
are missing they compute with a default, without a word. transformers 5 reads both.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

_IN_BOTH = ("rope_theta", "partial_rotary_factor")
"""Entries of `rope_parameters` that are fields of their own in transformers 4."""
_TWO_FIELDS = ("type", "factor")
_STRICT = {"olmo2": _TWO_FIELDS, "phi3": ("type", "short_factor", "long_factor")}
"""Families of transformers 4 that refuse a `rope_scaling` with other keys than these."""
ROPE_FIELDS = (
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rotary_pct",
    "rotary_emb_base",
)
"""All fields in which transformers 4 states rotary embeddings."""


def config_from(kind: type[PretrainedConfig], fields: dict[str, Any]) -> PretrainedConfig:
    """Returns the configuration that the fields of a config.json state.

    Args:
        kind: its class.
        fields: left as they are; transformers writes infinity as an object there.
    """
    plain: dict[str, Any] = kind._decode_special_floats(copy.deepcopy(fields))
    return kind.from_dict(plain)


def with_v4_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config.json with those of transformers 4 that say the same.

    Fields that are there already stay as they are. Nothing is added for embeddings that version 4
    cannot state, such as a scaled local one in Gemma 3.

    Args:
        fields: of a `config.json`, as transformers 5 writes it; left as they are.
    """
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict) and not str(fields.get("transformers_version")).startswith("5."):
        return fields  # in the words of version 4
    added = _rope(fields, rope) if isinstance(rope, dict) else {}
    if fields.get("dtype") is not None:
        added["torch_dtype"] = fields["dtype"]
    both = added | fields
    return both if _rope_read(both) == _rope_read(fields) else fields


def state_tokenizer_class(folder: Path) -> None:
    """Names, in a tokenizer that transformers 5 has saved, a class that version 4 knows, too."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") != "TokenizersBackend":
        return
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):  # a dictionary in version 4
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rope(fields: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """The fields of transformers 4 for `rope_parameters`; none where it has no words for them."""
    local = rope.get("sliding_attention")
    if isinstance(local, dict) and isinstance(rope.get("full_attention"), dict):
        if fields.get("model_type") != "gemma3_text" or local.get("rope_type") != "default":
            return {}
        return _rope(fields, rope["full_attention"]) | {
            "rope_local_base_freq": local.get("rope_theta")
        }
    added = {name: rope[name] for name in _IN_BOTH if rope.get(name) is not None}
    if fields.get("model_type") == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        added = {names[name]: value for name, value in added.items()}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return added
    scaling = {name: value for name, value in rope.items() if name not in _IN_BOTH}
    if kind == "longrope" and "original_max_position_embeddings" in scaling:
        added["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    if strict := _STRICT.get(str(fields.get("model_type"))):
        scaling = {
            name: value for name, value in {**scaling, "type": kind}.items() if name in strict
        }
    return added | {"rope_scaling": scaling}


def _rope_read(fields: dict[str, Any]) -> Any:
    """What transformers 5 makes of the rotary fields; the older name of `rope_type` left out."""
    config = config_from(CONFIG_MAPPING[fields["model_type"]], fields)
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return None
    return {name: value for name, value in rope.items() if name != "type"}
