"""States a SentencePiece tokenizer, as `tokenizer.json` holds it, in the words of llama.cpp.

`tokenizer.json` lists pairs in the order in which they are merged; llama.cpp merges whatever two
neighbours spell a token, the one of the highest score first. Both are the same where every pair
that spells a token is listed, as conversions from SentencePiece do: the score is the place of a
token's pairs in that list.

llama.cpp, as SentencePiece, puts a blank in front of a text and of what follows a special token.
Some versions of transformers do so only where none is there, or only at the start (`limits`).

Source: docs/methods.md, section 20; llama.cpp of October 2026.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prunenet.runtime.files import CheckpointError

BYTE = 6
"""llama.cpp's kind of a token that stands for one byte."""
_BLANK = "▁"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
_PREPEND = {"type": "Prepend", "prepend": _BLANK}
# of Gemma: it splits at blanks, of which the normalizer has left none
_IDLE = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
_OTHERWISE = (
    "; take llama.cpp's own converter (convert_hf_to_gguf.py) for a checkpoint cut with --widths"
    " uniform"
)


def is_sentencepiece(said: Mapping[str, Any]) -> bool:
    """Whether a tokenizer, the content of `tokenizer.json`, spells unknown characters by bytes."""
    return said["model"]["type"] == "BPE" and bool(said["model"].get("byte_fallback"))


def adds_blank(said: Mapping[str, Any]) -> bool:
    """Whether a blank is put in front of a text.

    Raises:
        CheckpointError: llama.cpp has no such rule for blanks.
    """
    steps = _steps(said["normalizer"], "normalizers")
    splits = _steps(said["pre_tokenizer"], "pretokenizers")
    if steps in ([_REPLACE], [_PREPEND, _REPLACE]) and splits in ([], [{**_IDLE, "invert": False}]):
        return _PREPEND in steps
    if not steps and len(splits) == 1 and splits[0]["type"] == "Metaspace":
        rule = splits[0]
        if rule["replacement"] == _BLANK and not rule.get("split", True):
            return bool(rule["prepend_scheme"] != "never")
    stated = json.dumps([said["normalizer"], said["pre_tokenizer"]])
    raise CheckpointError(
        "llama.cpp writes the blanks of a SentencePiece tokenizer as ▁ and changes nothing else,"
        f" and this one does otherwise: {stated[:200]}{_OTHERWISE}"
    )


def limits(said: Mapping[str, Any]) -> str:
    """Where llama.cpp reads other tokens than transformers, as a sentence; "" for nowhere."""
    for rule in _steps(said["pre_tokenizer"], "pretokenizers"):
        if rule["type"] == "Metaspace" and rule["prepend_scheme"] != "never":
            behind = " or follows a special token" * (rule["prepend_scheme"] == "first")
            return (
                f"llama.cpp puts a blank in front of a text that begins with one{behind}, as"
                " SentencePiece does; transformers does not."
            )
    return ""


def scores(said: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Returns a score for each token, by which llama.cpp merges as the tokenizer does.

    Args:
        said: the content of `tokenizer.json`.
        tokens: by id.

    Raises:
        CheckpointError: no scores do so, with the reason.
    """
    vocabulary: Mapping[str, int] = said["model"]["vocab"]
    if said["model"].get("ignore_merges") or not vocabulary.keys() >= set(_BYTES):
        raise CheckpointError(
            "llama.cpp spells what no token spells by 256 tokens for bytes, and merges all others;"
            f" this tokenizer does otherwise{_OTHERWISE}"
        )
    pairs = [tuple(p.split(" ") if isinstance(p, str) else p) for p in said["model"]["merges"]]
    _check_complete(vocabulary, {token["content"] for token in said["added_tokens"]}, pairs)
    places: dict[str, tuple[int, int]] = {}
    for place, (left, right) in enumerate(pairs):
        first, _ = places.get(left + right, (place, place))
        places[left + right] = (first, place)
    found: dict[str, float] = {}
    score, end = 0.0, -1
    for token, (first, last) in sorted(places.items(), key=lambda item: item[1]):
        if first > end:  # else its pairs lie among those of others: SentencePiece has a tie there
            score -= 1.0
        found[token], end = score, max(end, last)
    return [found.get(token, score - 1.0) for token in tokens]


def _check_complete(
    vocabulary: Mapping[str, int], added: set[str], pairs: Sequence[tuple[str, ...]]
) -> None:
    """Raises CheckpointError where llama.cpp would merge a pair that the tokenizer does not."""
    listed, skipped = set(pairs), added | set(_BYTES)
    for token in vocabulary.keys() - skipped:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            both = left in vocabulary and right in vocabulary
            if both and not {left, right} & skipped and (left, right) not in listed:
                raise CheckpointError(
                    f"llama.cpp merges {left!r} and {right!r} to the token {token!r}, and this"
                    f" tokenizer does not{_OTHERWISE}"
                )


def _steps(rule: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if rule is None:
        return []
    return list(rule[name]) if rule["type"] == "Sequence" else [rule]
