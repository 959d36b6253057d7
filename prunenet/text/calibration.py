"""Token blocks to measure activations on: written by the model itself (cached on disk), or drawn
from external text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.identity import weights_sha256
from prunenet.checkpoints.regimes import TextRegime
from prunenet.runtime import parallel
from prunenet.runtime.files import cache_folder, write_atomic
from prunenet.text.corpora import (
    CalibrationText,
    TextError,
    calibration_blocks,
    content_sha256,
    load_text,
)
from prunenet.text.generate import document_start, generate_blocks
from prunenet.text.random_tokens import random_blocks

# raise when generate_blocks samples differently: cached text is then written anew
_GENERATOR_VERSION = 2
PREFIX = 4
"""First tokens of a document that the model goes on from."""


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token ids without padding, and where they come from.

    Attributes:
        ids: (n, tokens).
        regime: "self" (the model's own text) or "data" (external text); see DESIGN section 1.
        source: how they were made, for the record.
    """

    ids: Int[Tensor, "n tokens"]
    regime: TextRegime
    source: Mapping[str, Any]


def self_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int = 160,
    tokens: int = 256,
    seed: int = 0,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Text that the model writes by itself, half of it from the document start, half from a random
    token behind it.

    The two halves alternate. From the start alone, with a temperature that begins high, the text is
    nearest to technical prose; opened by uniformly random tokens and sampled as it is (temperature
    1, no nucleus), nearest to encyclopedias and news (benchmarks/README.md, "Self-written text").
    Of each half a fifth, the least likely, is dropped.

    Args:
        model: a causal LM.
        tokenizer: only its document-start token and the number of its tokens are used.
        sequences: how many are sampled, before the filter, at least 2.
        tokens: length of each.
        seed: of the sampling.
        cache: folder; default `<cache>/self-generated`. The file's name is a hash of the weights
            and of every setting.
        progress: called with (tokens sampled, tokens in all) of each sequence.

    Raises:
        ValueError: the tokenizer has no token to start from.
    """
    source = {
        "sequences": sequences,
        "tokens": tokens,
        "seed": seed,
        "start": document_start(tokenizer),
        "version": _GENERATOR_VERSION,
    }
    ids = _cached(
        model, source, cache, lambda: _written(model, tokenizer, sequences, tokens, seed, progress)
    )
    return CalibrationSet(ids, "self", {"text": "self-generated", **source})


def prefix_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    *,
    sequences: int = 80,
    tokens: int = 256,
    prefix: int = PREFIX,
    seed: int = 0,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Text that the model writes behind the first tokens of documents (METHODS.md 4, after arXiv
    2410.17711); regime "data".

    The nucleus and the filter are those of `generate_blocks`; temperature 0.7 and repetition
    penalty 1.1 from the start. A document is what stands between blank lines, or a line where a
    text has too few of those.

    Args:
        model, tokenizer: as for `self_blocks`.
        text: whose documents' openings are taken, drawn without replacement; in turn where there
            are fewer than sequences.
        sequences: how many are sampled, before the filter.
        tokens: length of each.
        prefix: first tokens of a document; shorter documents are left out.
        seed: of the draw and of the sampling.
        cache, progress: as for `self_blocks`.

    Raises:
        TypeError: the text is not a `CalibrationText`.
        TextError: no document has so many tokens.
        ValueError: the tokenizer has no token to start from, or sequences that are too short.
    """
    start = document_start(tokenizer)
    opening = openings(tokenizer, text, sequences, prefix=prefix, seed=seed)
    sampling: dict[str, Any] = {
        "sequences": sequences,
        "tokens": tokens,
        "seed": seed,
        "temperature": 0.7,
        "penalty": 1.1,
    }
    source = {
        "prefixes": Path(text.name).name,
        "sha256": content_sha256(text),
        "prefix": prefix,
        **sampling,
    }
    source |= {"start": start, "version": _GENERATOR_VERSION}
    sampling |= {"hot": sampling["temperature"], "prefixes": opening, "progress": progress}
    ids = _cached(model, source, cache, lambda: generate_blocks(model, start, **sampling).cpu())
    return CalibrationSet(ids, "data", {"text": "self-generated from document prefixes", **source})


def openings(
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    count: int,
    *,
    prefix: int = PREFIX,
    seed: int = 0,
) -> Int[Tensor, "n prefix"]:
    """The first `prefix` tokens of up to `count` documents, drawn without replacement. Raises as
    `prefix_blocks`.
    """
    if not isinstance(text, CalibrationText):
        raise TypeError(
            f"prefixes are taken from a CalibrationText, got a {type(text).__name__}: test text is"
            " only ever scored"
        )
    documents = [part.strip() for part in text.content.split("\n\n") if part.strip()]
    if len(documents) < count:
        documents = [line.strip() for line in text.content.splitlines() if line.strip()]
    found = []
    for number in torch.randperm(
        len(documents), generator=torch.Generator().manual_seed(seed)
    ).tolist():
        # A token takes no more than 64 characters as a rule: long documents need not be read whole.
        ids = tokenizer(documents[number][: 64 * prefix], add_special_tokens=False, verbose=False)[
            "input_ids"
        ][:prefix]
        if len(ids) == prefix:
            found.append(ids)
        if len(found) == count:
            break
    if not found:
        raise TextError(
            f"text {text.name!r} has no document of {prefix} tokens or more to take the first"
            " tokens of; give more text"
        )
    return torch.tensor(found)


def token_blocks(
    model: PreTrainedModel, *, count: int = 64, window: int = 256, seed: int = 0
) -> CalibrationSet:
    """Uniformly drawn token ids (METHODS.md 3, `tokens`). Nothing is external, so the regime is
    "self".

    Raises:
        ValueError: see `prunenet.text.random_tokens.random_blocks`.
    """
    ids = random_blocks(model, count, window, torch.Generator().manual_seed(seed))
    return CalibrationSet(
        ids, "self", {"text": "random tokens", "count": count, "window": window, "seed": seed}
    )


def _cached(
    model: PreTrainedModel,
    source: Mapping[str, Any],
    cache: Path | None,
    write: Callable[[], Int[Tensor, "n tokens"]],
) -> Int[Tensor, "n tokens"]:
    """What was written before with these settings by a model of the same weights, or else what
    `write` writes now.
    """
    key = hashlib.sha256(
        (json.dumps(source, sort_keys=True) + weights_sha256(model)).encode()
    ).hexdigest()[:24]
    path = (cache or cache_folder() / "self-generated") / f"{key}.safetensors"
    try:
        return load_file(path)["ids"]
    except (FileNotFoundError, SafetensorError, KeyError):
        # a cache that refuses says so before the work, not after
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = write()
        write_atomic(path, save({"ids": ids.contiguous()}))
        return ids


def _written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    tokens: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> Int[Tensor, "n tokens"]:
    start, half = document_start(tokenizer), max(sequences // 2, 1)
    shared: dict[str, Any] = {"sequences": half, "tokens": tokens, "batch": half}

    def of_half(number: int) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, of: progress(number * of + done, 2 * of)

    from_start = generate_blocks(model, start, seed=seed, progress=of_half(0), **shared)
    known = min(len(tokenizer), model.config.vocab_size)
    opening = torch.randint(known, (half, 1), generator=torch.Generator().manual_seed(seed))
    plain: dict[str, Any] = {"hot": 1.0, "temperature": 1.0, "top_p": 1.0}
    opened = generate_blocks(
        model, start, seed=seed + 1, prefixes=opening, progress=of_half(1), **plain, **shared
    )
    return torch.stack((from_start, opened), 1).flatten(0, 1).cpu()


def data_blocks(
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    *,
    count: int = 32,
    window: int = 256,
    seed: int = 0,
) -> CalibrationSet:
    """Windows drawn from external text. Arguments and errors:
    `prunenet.text.corpora.calibration_blocks`.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = calibration_blocks(tokenizer, text, count=count, window=window, generator=generator)
    return CalibrationSet(
        ids,
        "data",
        {
            "text": Path(text.name).name,
            "sha256": content_sha256(text),
            "count": count,
            "window": window,
            "seed": seed,
        },
    )


def check_seed(seed: int) -> int:
    """Returns the seed. Raises ValueError where it is not in [0, 2^32), which every generator
    takes.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    return seed


def calibration_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    moments: TextRegime,
    text: str,
    *,
    seed: int = 0,
    total: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """`self_blocks`, or `data_blocks` of a text by its name; shorter where the model reads no 256
    tokens.

    `total`: tokens in all, of self-written text before its filter; the default is theirs.

    Of several processes (`prunenet.runtime.parallel`) the first writes or reads, and the others are
    given the same.

    Raises as those do, and ValueError for a seed out of range or a total of less than 2 blocks.
    """
    check_seed(seed)
    tokens = min(256, getattr(model.config, "max_position_embeddings", None) or 256)
    if total is not None and total < 2 * tokens:
        raise ValueError(
            f"--tokens must be at least {2 * tokens}, 2 blocks of {tokens}, got {total}"
        )
    count = None if total is None else total // tokens

    def made() -> CalibrationSet:
        if moments == "self":
            return self_blocks(
                model,
                tokenizer,
                sequences=count or 160,
                tokens=tokens,
                seed=seed,
                progress=progress,
            )
        return data_blocks(
            tokenizer, load_text(text, CalibrationText), count=count or 32, window=tokens, seed=seed
        )

    return blocks_from(0, made)


def blocks_from(source: int, make: Callable[[], CalibrationSet]) -> CalibrationSet:
    """What `make` gives on one of several processes, on all of them; it is not called on the
    others.
    """
    made = [make()] if parallel.rank() == source else []
    ids = parallel.broadcast(source, lambda: made[0].ids)
    regime, how = parallel.broadcast_object(source, lambda: (made[0].regime, dict(made[0].source)))
    return CalibrationSet(ids, regime, how)
