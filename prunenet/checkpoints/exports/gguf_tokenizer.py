"""States a tokenizer in the words of llama.cpp: tokens, merges or scores, special tokens, chat
templates, and of a byte-level BPE which of llama.cpp's expressions splits a text into words.

llama.cpp names these expressions after models, and converters recognise a tokenizer by the hash of
a text in its token ids. Here the rule itself is recognised, as `tokenizer.json` states it, so that
a tokenizer with another vocabulary is read too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from prunenet.checkpoints.exports import gguf_sentencepiece
from prunenet.checkpoints.exports.gguf_form import Value
from prunenet.runtime.files import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""llama.cpp's kinds of tokens."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    (): "gpt-2",
    ("digits",): "smollm",
    (_WORDS % r"\p{N}{1,3}" + _BLANKS,): "llama-bpe",
    (_WORDS % r"\p{N}" + _BLANKS,): "qwen2",
}
"""Rules in front of the byte level -> llama.cpp's name; "digits" stands for one digit a word."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unknown": "unk_token_id",
    "padding": "pad_token_id",
}


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Value]:
    """Returns what a GGUF file says of a tokenizer.

    Args:
        tokenizer: of the fast kind.
        size: rows of the model's embedding; ids without a token get one that is unused.

    Raises:
        CheckpointError: llama.cpp has no such tokenizer, with the reason.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise CheckpointError(
            f"a {type(tokenizer).__name__} is not written to GGUF: it has no tokenizer.json; save"
            " it as a fast tokenizer"
        )
    said = content(tokenizer)
    pieces = gguf_sentencepiece.is_sentencepiece(said)
    pre = "default" if pieces else _splitting(said)
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [UNUSED] * size
    for token, index in said["model"]["vocab"].items():
        tokens[_inside(index, size)], kinds[index] = token, NORMAL
        if pieces and _BYTE.fullmatch(token):
            kinds[index] = gguf_sentencepiece.BYTE
    for added in said["added_tokens"]:
        index = _inside(added["id"], size)
        tokens[index] = added["content"]
        kinds[index] = CONTROL if added["special"] else USER_DEFINED
    stated: dict[str, Value] = {
        "ggml.model": "llama" if pieces else "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        "ggml.add_space_prefix": pieces and gguf_sentencepiece.adds_blank(said),
    }
    for name, field in _SPECIAL.items():
        if (number := getattr(tokenizer, field)) is not None:
            stated[f"ggml.{name}_token_id"] = _inside(number, size)
    if pieces:
        stated["ggml.scores"] = gguf_sentencepiece.scores(said, tokens)
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = UNKNOWN
    else:
        merges = said["model"]["merges"]
        stated["ggml.merges"] = [p if isinstance(p, str) else " ".join(p) for p in merges]
    framed = tokenizer("a")["input_ids"]
    stated["ggml.add_bos_token"] = framed[0] == tokenizer.bos_token_id
    stated["ggml.add_eos_token"] = framed[-1] == tokenizer.eos_token_id
    return stated | _templates(tokenizer)


def content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `tokenizer.json` says of a tokenizer of the fast kind."""
    said: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return said


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Value]:
    """The chat template, and others by name."""
    given = tokenizer.chat_template
    templates = given if isinstance(given, dict) else {"default": given} if given else {}
    others = {name: text for name, text in templates.items() if name != "default"}
    stated: dict[str, Value] = {f"chat_template.{name}": text for name, text in others.items()}
    if others:
        stated["chat_templates"] = sorted(others)
    if "default" in templates:
        stated["chat_template"] = templates["default"]
    return stated


def _splitting(said: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rule by which a text is split."""
    if (kind := said["model"]["type"]) != "BPE":
        raise CheckpointError(
            f"only BPE tokenizers are written to GGUF, and this one is {kind}; take llama.cpp's own"
            " converter (convert_hf_to_gguf.py) for a checkpoint cut with --widths uniform"
        )
    rules = said["pre_tokenizer"] or {}
    rules = rules["pretokenizers"] if rules.get("type") == "Sequence" else [rules]
    *first, last = rules
    keys = tuple(_rule(rule) for rule in first)
    whole = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    split_by_bytes = bool(last.get("use_regex", True))
    plain = (said["normalizer"] or {"type": "NFC"})["type"] == "NFC"
    name = _SPLITS.get(keys)
    if not whole or not plain or name is None or split_by_bytes != (keys in ((), ("digits",))):
        raise CheckpointError(
            f"llama.cpp splits texts by {', '.join(_SPLITS.values())}, and this tokenizer by"
            f" another rule: {json.dumps(said['pre_tokenizer'])[:200]}; give --pad or cut with"
            " --widths uniform, and take llama.cpp's own converter"
        )
    return name


def _rule(rule: Mapping[str, Any]) -> str:
    if rule["type"] == "Digits" and rule["individual_digits"]:
        return "digits"
    if rule["type"] == "Split" and rule["behavior"] == "Isolated" and not rule["invert"]:
        return str(rule["pattern"].get("Regex", rule["pattern"]))
    return json.dumps(rule, sort_keys=True)


def _inside(index: int, size: int) -> int:
    if not 0 <= index < size:
        raise CheckpointError(
            f"the tokenizer has a token {index:,}, and the model's embedding {size:,} rows; give"
            " the tokenizer that belongs to the model"
        )
    return index
