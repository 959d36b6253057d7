"""Builds tiny random models of any class of transformers, on which a discovery can compute.

A twin has the class of the real model and a configuration made from the class's defaults: every
size is replaced by a small one that its field's name asks for. Widths of feed-forward networks get
sizes that no other field has, and none twice another, so that a shape tells the field behind it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from prunenet.models.text_part import config_for

D_MODEL, LAYERS, VOCABULARY = 32, 4, 128
_LARGEST = 120_000_000  # parameters: a size that no rule here has made small
_TEXT = (3, 60)  # token ids of text; those of images and the like are set above
_WIDTHS = (40, 56, 88, 104, 136, 152, 184, 232, 248, 296)

# name of a field -> its size, None: the default's; the first match counts
_SIZES: tuple[tuple[str, int | None], ...] = (
    (r"vocab$|vocab_size|vocabulary_size|codebook_size|^num_embeddings$", VOCABULARY),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start|n_dense_layers|dense_layers$", 1),
    (r"attn_layer_period", 2),
    (r"attn_layer_offset", 1),
    (r"kv_shared|nextn|mtp", 0),
    (r"^(n_group|num_expert_group|topk_group|n_expert_groups?|num_groups_experts)$", 2),
    (r"experts_per_tok|moe_top_?k|top_k_experts|experts_per_token|moe_k$|selected_experts", 2),
    (r"shared_experts?$|num_shared_expert|n_shared", 2),
    (r"zero_expert", 2),
    (r"(num|n)(_local|_routed|_moe)?_experts$|moe_num_experts|^num_experts$", 6),
    (r"rank$|lora", 16),
    (r"kernel|patch|temporal|stride", None),
    (r"mamba_d_ssm", 64),
    (r"^d_head$", 8),
    (r"mamba_d_head|mamba_head_dim|index_head_dim|qk_head_dim", 16),
    (r"linear_num_value_heads|mamba_(n|num)_heads|^mamba_heads$", 4),
    (r"linear_num_key_heads|num_key_value_heads|num_kv_heads|n_kv_heads|kv_heads|query_group", 2),
    (r"index_n_heads|(^|_)(num_)?(attention_)?heads?$|n_heads?$|num_heads?$", 4),
    (r"rotary_dim|head_dim|head_size|kv_channels|d_head|d_kv$|key_size|headdim|_dim_per_head", 8),
    (r"mamba_expand|^expand$", 2),
    (r"state_size|d_state|ssm_state", 8),
    (r"n_groups$|ngroups|num_groups", 1),
    (r"(hidden_)?layers?$|^n_layers?$|^depth$|num_blocks|n_blocks", LAYERS),
    (r"max_position|max_seq|n_positions|n_ctx|seq_length|max_source|max_target|max_length", 256),
    (r"sliding_window|window_size|chunk_size|local_window|attention_window", 16),
)
# fields without a default, which every real configuration gives
_MISSING = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 2,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "video_temporal_patch_size": 2,
}
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"rope.mrope_section": [2, 1, 1]},
    {"rope.mrope_section": [1, 1, 0]},
    {"rope.mrope_section": [1, 1, 2]},
    {"rope.partial_rotary_factor": 1.0},
    {"num_key_value_heads": 4},
    {"sliding_window": 16},
    {"head_dim": 16},
    {"qk_head_dim": 16, "head_dim": 16, "num_key_value_heads": 4},
    {"n_group": 1, "topk_group": 1, "num_expert_group": 1},
    {"is_decoder": True},
    {"rope_parameters": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        }
    },
)
_OWN: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_head": 16},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "xmod": {"default_language": "en_XX"},
    "chameleon": {"vocabulary_map": {"<image>": 99}},
    "emu3": {"vocabulary_map": {"<image>": 99}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local"] * 4},
    "qwen4_exp_text": {"indexer_kv_heads": 1},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 3},
    "radio": {"video_temporal_patch_size": 2},
    "gemma3n_vision": {"architecture": "test_efficientnet"},  # of timm; the default has 300 M
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": 32,
            "patch_size": 8,
        },
    },
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4},
        }
    },
}
_HIDDEN = re.compile(
    r"^(hidden_size|d_model|n_embd|dim|hidden_dim|embed_dim|model_dim|embedding_size|d_embed"
    r"|word_embed_proj_dim|.*_hidden_size|output_dim|out_hidden_size|projection_dim|.*embed_dim"
    r"|hidden_size_per_layer_input|lru_width|attention_hidden_size|emb_dim|input_dim|.*_d_model"
    r"|adapter_(in_dim|out_dim|input_size))$"
)
_WIDTH = re.compile(
    r"intermediate|ffn_(hidden_)?(dim|size)|n_inner|d_ff|dim_ff|^dff$|mlp_(dim|hidden)|inner_dim"
    r"|feed_?forward|ffn_hidden|ffn_size|moe_.*_size|expert_(dim|size)|^ffn_dim$|expert_hidden"
)
_PLACES = re.compile(
    r"feature_layers?$|deepstack\w*ind|out_indices|vit_layers"
)  # of a tower's layers
_TOKEN = re.compile(r"(_token_(id|index)|(?<!per)_token|_id)$")


class NoTwin(ValueError):
    """No tiny model of a class could be built, or it does not read text alone."""


def twin(
    kind: type[PreTrainedModel], config: type[PretrainedConfig]
) -> tuple[PreTrainedModel, Tensor]:
    """Returns a tiny random model of a class, and token ids of text that it reads.

    Args:
        kind: class of the model.
        config: class of its configuration.

    Raises:
        NoTwin: no variant of a tiny configuration gives a model that reads text alone.
    """
    reasons = []
    trials = [(variant, torch.float64) for variant in _VARIANTS]
    for variant, dtype in (*trials, ({}, torch.float32)):
        try:
            made = config_for(kind, twin_config(config, variant))
            model = twin_model(kind, made, dtype)
            logits_of(model, ids := twin_tokens(made))
        except NoTwin as error:
            reasons.append(str(error))
        except Exception as error:  # whatever a class's code raises on a tiny model
            reasons.append(_short(error))
        else:
            return model, ids
    raise NoTwin(reasons[0])


def twin_config(
    kind: type[PretrainedConfig], variant: Mapping[str, Any] | None = None
) -> PretrainedConfig:
    """Returns a tiny configuration.

    Args:
        kind: class of the configuration.
        variant: values of fields, or of `rope_parameters` by "rope.NAME".

    Raises:
        NoTwin: the class refuses it.
    """
    try:
        return _tiny(kind(), iter(_WIDTHS), count(64), variant or {})
    except Exception as error:  # each class has its own checks
        raise NoTwin(f"no tiny {kind.__name__}: {_short(error)}") from error


def twin_model(
    kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """Returns a random model in eval mode whose every parameter differs from its
    initial value.

    Raises:
        NoTwin: the class refuses the configuration.
    """
    make: Any = kind
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in make(copy.deepcopy(config)).parameters())
        if size > _LARGEST:
            raise NoTwin(f"its tiny model has {size:,} parameters")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = make._from_config(
                config, dtype=dtype, attn_implementation="eager"
            )
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
    except NoTwin:
        raise
    except Exception as error:
        raise NoTwin(f"no tiny {kind.__name__}: {_short(error)}") from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)
        for module in model.modules():
            # some classes do so whenever they are loaded
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    nn.Module.to(model, dtype).train(False)
    return model


def twin_tokens(config: PretrainedConfig) -> Tensor:
    """Returns token ids of text, (4, 12), that mean nothing special to the model."""
    return torch.randint(*_TEXT, (4, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Returns what a model computes of text alone.

    Raises:
        NoTwin: it does not, or not in finite numbers.
    """
    logits = computed(model, ids)
    if not bool(torch.isfinite(logits).all()):
        raise NoTwin("its tiny model computes numbers that are not finite")
    return logits


def computed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Returns the logits of text alone, with gradients where they are on.

    Raises:
        NoTwin: there are none.
    """
    with in_float64(model.dtype):
        try:
            found = model(input_ids=ids, use_cache=False)
        except TypeError:
            found = model(input_ids=ids)
    logits = getattr(found, "logits", None)
    if not isinstance(logits, Tensor):
        raise NoTwin("it returns no logits for text alone")
    return logits


@contextmanager
def in_float64(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Inside, tensors that code makes without saying their dtype have a twin's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tiny(
    config: PretrainedConfig,
    widths: Iterator[int],
    ids: Iterator[int],
    variant: Mapping[str, Any],
) -> PretrainedConfig:
    """A configuration of the same class with small sizes."""
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    layers = _layers(config)
    picked = _picked(fields, layers)
    made: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            made[name] = _tiny(value, widths, ids, variant)
        elif (small := _small(name, value, layers, picked, widths, ids)) is not None:
            made[name] = small
    if isinstance(fields.get("rope_parameters"), dict):
        added = {k[5:]: v for k, v in variant.items() if k.startswith("rope.")}
        made["rope_parameters"] = _rope(fields["rope_parameters"]) | added
    heads = made.get("num_attention_heads")
    if heads and fields.get("num_key_value_heads") == fields.get("num_attention_heads"):
        made["num_key_value_heads"] = heads
    made |= {name: value for name, value in variant.items() if name in fields}
    made |= _OWN.get(config.model_type, {})
    kept = set(getattr(type(config), "sub_configs", {}))
    inner = {k: v.to_dict() for k, v in made.items() if k in kept and not isinstance(v, dict)}
    return type(config)(**made | inner)


def _small(
    name: str,
    value: Any,
    layers: int,
    picked: list[int],
    widths: Iterator[int],
    ids: Iterator[int],
) -> Any:
    """The tiny value of a field; None where the default may stay."""
    if isinstance(value, list | tuple) and layers and len(value) == layers:
        chosen = [value[place] for place in picked]
        if _WIDTH.search(name):
            return [next(widths)] * len(chosen)
        return chosen
    if isinstance(value, list | tuple) and value and all(type(n) is int for n in value):
        if _WIDTH.search(name):
            return [next(widths) for _ in value]
        return [1] if _PLACES.search(name) else None
    if value is None:
        return _MISSING.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if _TOKEN.search(name):
        return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name) or (
            0 if name == "pad_token_id" else next(ids)
        )
    if _WIDTH.search(name) and value > 8:
        return next(widths)
    if _HIDDEN.search(name) and value > 1:
        return D_MODEL
    if name in ("encoder_layers", "decoder_layers"):  # one cache for both
        return LAYERS
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            return None if size is None or value <= 0 else min(size, value)
    return None


def _layers(config: PretrainedConfig) -> int:
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return 0


def _picked(fields: dict[str, Any], layers: int) -> list[int]:
    """Which layers stay: the first of every kind, and the first ones."""
    firsts: set[int] = set()
    for value in fields.values():
        if isinstance(value, list | tuple) and layers and len(value) == layers:
            seen = [repr(entry) for entry in value]
            firsts |= {seen.index(kind) for kind in set(seen)}
    chosen = sorted(firsts)[:LAYERS]
    rest = (place for place in range(layers) if place not in chosen)
    while len(chosen) < min(LAYERS, layers):
        chosen.append(next(rest))
    return sorted(chosen)


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters for heads of 8."""
    made: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            made[name] = _rope(value)
        elif name == "mrope_section":
            made[name] = [2, 1, 1]
        elif name in ("long_factor", "short_factor"):
            made[name] = [1.0] * 4
        elif name == "partial_rotary_factor":
            made[name] = value if value * 8 % 2 == 0 else 1.0
        else:
            made[name] = value
    return made


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
