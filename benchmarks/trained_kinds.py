"""Trains a tiny model of each kind on real text, some minutes on one core: a mixture of experts, a
hybrid with experts and a shared one, the text tower of a multimodal model; and dense ones of three
families and sizes (`DENSE`).

Text is WikiText-2 validation: nine tenths to train on, the last tenth held out (`held_out.txt`).
Nothing is tuned on it. Folders lie in the cache folder's `kinds` and are made once.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerFast

from prunenet.models.known import class_of
from prunenet.runtime.paths import cache_folder

VOCABULARY, POSITIONS, D_MODEL = 1024, 512, 128
EXPERTS, TOP_K = 10, 2  # 0.3 of the experts is a whole number
_BLOCK, _BATCH, _RATE = 128, 8, 3e-3
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}
_EXPERTS = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 160}
_SPECIAL = {"image_token_index": 2, "boi_token_index": 3, "eoi_token_index": 4}
_SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
# kind -> (type, fields, steps)
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "experts": ("qwen3_moe", _SIZES | _EXPERTS | {"head_dim": 32, "norm_topk_prob": True}, 400),
    "hybrid": (
        "granitemoehybrid",
        _SIZES
        | {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "intermediate_size": 160,
            "shared_intermediate_size": 160,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_chunk_size": 64,
        },
        150,
    ),
    "wrapper": (
        "gemma3",
        {
            "text_config": _SIZES
            | {"intermediate_size": 320, "head_dim": 32, "query_pre_attn_scalar": 32},
            "vision_config": _SMALL_VISION,
            "mm_tokens_per_image": 4,
            **_SPECIAL,
        },
        250,
    ),
}

_LARGER = _SIZES | {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8}
DENSE: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", _LARGER | {"num_key_value_heads": 4, "intermediate_size": 704}, 400),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": 192, "n_layer": 6}
        | {"n_head": 6, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0},
        400,
    ),
    "qwen3": (
        "qwen3",
        _LARGER
        | {"hidden_size": 192, "num_hidden_layers": 10, "intermediate_size": 512}
        | {"num_attention_heads": 6, "head_dim": 32},
        400,
    ),
    "gemma3": (
        "gemma3_text",
        _LARGER
        | {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6}
        | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
        400,
    ),
    "olmo2": (
        "olmo2",
        _LARGER
        | {"hidden_size": 160, "num_hidden_layers": 12, "intermediate_size": 448}
        | {"num_attention_heads": 5, "num_key_value_heads": 5},
        400,
    ),
    "phi3": (
        "phi3",
        _LARGER | {"num_hidden_layers": 6, "intermediate_size": 704},
        400,
    ),
}


def has_experts(kind: str) -> bool:
    """Whether a kind's model has experts."""
    return kind in ("experts", "hybrid")


def trained(kind: str, data: Path) -> Path:
    """The folder of a kind's model, trained the first time.

    Args:
        kind: a key of `KINDS` or `DENSE`.
        data: folder that holds `wikitext2/wiki.valid.tokens`.
    """
    target = home() / kind.replace(" ", "-")
    if target.is_dir():
        return target
    text, _ = texts(data)
    tokenizer = _tokenizer(text)
    ids = torch.tensor(tokenizer.encode(text))
    model = _model(kind)
    _train(model, ids, (KINDS | DENSE)[kind][2], experts=has_experts(kind))
    with tempfile.TemporaryDirectory(dir=home()) as scratch:
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.move(made, target)
    return target


def home() -> Path:
    """The folder of all of them."""
    folder = cache_folder() / "kinds"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def texts(data: Path) -> tuple[str, Path]:
    """The text to train on, and the file that holds the rest."""
    lines = (data / "wikitext2" / "wiki.valid.tokens").read_text(encoding="utf-8").splitlines()
    cut = len(lines) * 9 // 10
    held_out = home() / "held_out.txt"
    if not held_out.exists():
        held_out.write_text("\n".join(lines[cut:]), encoding="utf-8")
    return "\n".join(lines[:cut]), held_out


def _tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level pairs, learned on the text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<image>", "<begin_image>", "<end_image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<s>", pad_token="<pad>"
    )


def _model(kind: str) -> PreTrainedModel:
    model_type, fields, _ = (KINDS | DENSE)[kind]
    config = CONFIG_MAPPING[model_type](**fields)
    made: Any = class_of(model_type)
    torch.manual_seed(0)
    model: PreTrainedModel = made(config)
    return model


def _train(model: PreTrainedModel, ids: torch.Tensor, steps: int, *, experts: bool) -> None:
    """AdamW on random blocks; the routers' balancing loss counts as in the type's default."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.05)
    schedule = transformers.get_cosine_schedule_with_warmup(optimiser, 30, steps)
    generator = torch.Generator().manual_seed(0)
    balanced = {"output_router_logits": True} if experts else {}
    model.train()
    for step in range(steps):
        starts = torch.randint(len(ids) - _BLOCK, (_BATCH,), generator=generator)
        block = ids[starts[:, None] + torch.arange(_BLOCK)]
        loss = model(input_ids=block, labels=block, **balanced).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()
