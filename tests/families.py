"""Tiny random models of every supported family, for tests: d_model 32, d_ff 48, 3 layers,
vocabulary 64, float32.

A new row of `ARCHITECTURES` is covered as soon as its configuration understands the fields below.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prunenet.checkpoints.provenance import Provenance
from prunenet.models.architectures import ARCHITECTURES

FAMILIES = sorted(ARCHITECTURES)
D_MODEL, D_FF, LAYERS, VOCABULARY = 32, 48, 3, 64

# The same thing under each name that a family may use; a configuration takes the fields it has.
_FIELDS = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "word_embed_proj_dim": D_MODEL,
    "original_max_position_embeddings": 64,
    "query_pre_attn_scalar": 8,
    "new_decoder_architecture": True,
}
_BIASES = ("mlp_bias", "attention_bias", "bias", "enable_bias", "use_qkv_bias")
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_model(
    model_type: str, *, bias: bool = False, tied: bool | None = None, seed: int = 0
) -> PreTrainedModel:
    """A random model in eval mode whose every parameter, biases and norms included, differs from
    its initial value.

    Weights are large enough for each FFN channel to move the logits, so that a wrong cut shows.

    Args:
        model_type: a key of `ARCHITECTURES`.
        bias: sets every bias flag that the family's configuration has; Phi and GPT-NeoX always have
            FFN biases.
        tied: whether input and output embeddings are one tensor; None takes the family's default.
        seed: of the weights.
    """
    blank = AutoConfig.for_model(model_type)
    known = {field.name for field in dataclasses.fields(blank)}
    wanted = _FIELDS | {ARCHITECTURES[model_type].width: D_FF} | dict.fromkeys(_BIASES, bias)
    if tied is not None:
        wanted["tie_word_embeddings"] = tied
    settings = {name: value for name, value in wanted.items() if name in known}
    if not getattr(blank, "sliding_window", None):
        settings.pop("sliding_window", None)
    config = AutoConfig.for_model(model_type, **_SPECIAL_TOKENS, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(0.25 * noise)
    return model


def variants() -> list[tuple[str, bool, bool | None]]:
    """(model_type, bias, tied): each family as it comes, with the embeddings tied the other way,
    and with biases if it can.
    """
    found: list[tuple[str, bool, bool | None]] = []
    for model_type in FAMILIES:
        blank = AutoConfig.for_model(model_type)
        found += [(model_type, False, None), (model_type, False, not blank.tie_word_embeddings)]
        if any(hasattr(blank, name) for name in _BIASES):
            found.append((model_type, True, None))
    return found


def token_ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random ids of ordinary tokens, (batch, length)."""
    return torch.randint(
        3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def random_keep(widths: list[int], d_ff: int = D_FF, seed: int = 0) -> list[torch.Tensor]:
    """One random keep mask of length d_ff for each layer, with the given number of channels
    left.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for width in widths:
        keep = torch.zeros(d_ff, dtype=torch.bool)
        keep[torch.randperm(d_ff, generator=generator)[:width]] = True
        masks.append(keep)
    return masks


def provenance(dense: PreTrainedModel, narrow: PreTrainedModel, **known: Any) -> Provenance:
    """Where a cut model of a test comes from; `known`: fields that matter there."""
    fields = {"base_model": "tiny", "revision": "sha256:0", "policy": "test", "policy_sha256": None}
    fields |= {"regime": "weights", "ratio": 0.3, "seed": 0}
    return Provenance.of(dense, narrow, **fields | known)
