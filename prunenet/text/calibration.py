"""Makes calibration sets: token blocks to measure activations on, written by the model itself
(cached on disk), drawn from external text, or drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.regimes import TextRegime
from prunenet.models.layers import positions, text_config
from prunenet.runtime import parallel
from prunenet.runtime.choices import check_fields
from prunenet.text.cached import Wanted, cached_text
from prunenet.text.choices import Bos
from prunenet.text.corpora import CalibrationText, content_sha256, load_text
from prunenet.text.generate import BLOCK, SamplingOptions, document_start, generate_blocks
from prunenet.text.kinds import KINDS, Kind, written
from prunenet.text.random_tokens import random_blocks
from prunenet.text.windows import PREFIX, bos_token, calibration_blocks, openings

# raise when generate_blocks samples differently: cached text is then written anew
_GENERATOR_VERSION = 2
SEQUENCES = 160
"""Sequences that a model writes for itself, before the filter."""
DATA_BLOCKS = 32
"""Windows drawn from external text."""
RANDOM_BLOCKS = 64
"""Blocks of random tokens."""
SHORTEST = 4
"""Tokens of the shortest block that is written: start, opening, and text behind them."""
PREFIX_SAMPLING = SamplingOptions(sequences=80, hot=0.7, temperature=0.7, penalty=1.1)
"""How text behind document prefixes is sampled (arXiv 2410.17711)."""


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token ids without padding, and where they come from.

    Attributes:
        ids: (n, tokens). With `bos`, that token stands in the first column.
        regime: "self" (the model's own text) or "data" (external text); docs/design.md, section 1.
        source: how they were made, for the record.
        bos: id of the BOS token that every row begins with; None where rows begin otherwise. What
            judges a model on the rows leaves this position out, and a shorter piece of a row gets
            the token in front; see `prunenet.text.windows`.
        kinds: (n,) integers: rows of equal number are of one kind of writing. None: all are.
            Self-written text has those of `prunenet.text.kinds`, in turn; folds
            (`prunenet.refit.folds`) fit on one half of them and judge on the other.
    """

    ids: Int[Tensor, "n tokens"]
    regime: TextRegime
    source: Mapping[str, Any]
    bos: int | None = None
    kinds: Int[Tensor, " n"] | None = None

    @property
    def window(self) -> int:
        """Tokens of a row as it was written or drawn: without a BOS token put in front."""
        said = (self.source.get(name) for name in ("tokens", "window"))
        return next((int(tokens) for tokens in said if tokens), self.ids.shape[1])

    def rows(self, which: slice) -> CalibrationSet:
        """Some of the rows, with their kinds."""
        kinds = None if self.kinds is None else self.kinds[which]
        return replace(self, ids=self.ids[which], kinds=kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """How `calibration_for` makes a calibration set.

    Attributes:
        seed: of the sampling, or of the windows drawn; in [0, 2^32).
        tokens: in all, of self-written text before its filter; None: 160 blocks of self-written
            text, 32 of external text.
        window: tokens of a block; None: 256, or as many as the model has positions for.
        bos: whether blocks begin with the BOS token, see `prunenet.text.windows`.
        column: of external text in rows, see `prunenet.text.corpora.load_text`.

    Raises:
        ValueError: the seed or the window is out of range.
    """

    seed: int = 0
    tokens: int | None = None
    window: int | None = None
    bos: Bos = "auto"
    column: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_seed(self.seed)
        check_window(self.window)


def self_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int = SEQUENCES,
    tokens: int = BLOCK,
    seed: int = 0,
    kinds: tuple[Kind, ...] = KINDS,
    bos: Bos = "auto",
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Has the model write text by itself, as much of each kind (`prunenet.text.kinds`), in turn.

    Of each kind a fifth, the least likely, is dropped (docs/methods.md, section 17).

    Args:
        model: a causal LM.
        tokenizer: only its document-start token and the number of its tokens are used.
        sequences: how many are sampled, before the filter, at least as many as kinds.
        tokens: length of each, the document start included.
        seed: of the sampling.
        kinds: which; part of the cached file's name.
        bos: rows begin with the document start, which is the BOS token where `bos_token` says so;
            "no" drops it from the rows where it is the BOS token.
        cache: folder; default `<cache>/self-generated`. The file's name is a hash of the weights
            and of every setting.
        progress: called with (tokens sampled, tokens in all) of each sequence.

    Raises:
        ValueError: the tokenizer has no token to start from, or a number is out of range.
    """
    start, each = document_start(tokenizer, bos), max(sequences // len(kinds), 1)
    sampling = SamplingOptions(sequences=each, tokens=tokens, seed=seed, batch=each)
    source: dict[str, Any] = {
        "sequences": sequences,
        "tokens": tokens,
        "seed": seed,
        "start": start,
        "version": _GENERATOR_VERSION,
    }
    if kinds != KINDS:  # cached text keeps its name
        source["kinds"] = list(kinds)
    known = min(len(tokenizer), text_config(model).vocab_size)

    def write() -> Int[Tensor, "n tokens"]:
        return written(model, start, known, sampling, kinds, progress)

    wanted = Wanted(len(kinds) * sampling.kept, tokens, start, text_config(model).vocab_size)
    ids = cached_text(model, source, wanted, cache, write)
    source = {"text": "self-generated", **source}
    return _written(ids, "self", source, tokenizer, bos, kinds=len(kinds))


def prefix_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    sampling: SamplingOptions = PREFIX_SAMPLING,
    *,
    prefix: int = PREFIX,
    bos: Bos = "auto",
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Has the model write text behind the first tokens of documents (docs/methods.md, section 4,
    after arXiv 2410.17711); regime "data".

    A document is what stands between blank lines, or a line where a text has too few of those.

    Args:
        model, tokenizer: as for `self_blocks`.
        text: whose documents' openings are taken, drawn without replacement; in turn where there
            are fewer than sequences.
        sampling: of the text; its seed also draws the documents.
        prefix: first tokens of a document; shorter documents are left out.
        bos, cache, progress: as for `self_blocks`.

    Raises:
        TypeError: the text is not a `CalibrationText`.
        TextError: no document has so many tokens.
        ValueError: the tokenizer has no token to start from, or sequences that are too short.
    """
    start = document_start(tokenizer, bos)
    opening = openings(tokenizer, text, sampling.sequences, prefix=prefix, seed=sampling.seed)
    settings = asdict(sampling)
    # What is as by default is not recorded: cached text keeps its name when options are added.
    named = ("sequences", "tokens", "seed", "temperature", "penalty")
    usual = asdict(replace(PREFIX_SAMPLING, hot=sampling.temperature))
    source = {
        "prefixes": Path(text.name).name,
        "sha256": content_sha256(text),
        "prefix": prefix,
        **{name: value for name, value in settings.items() if name in named},
        **{name: v for name, v in settings.items() if name not in named and v != usual[name]},
        "start": start,
        "version": _GENERATOR_VERSION,
    }

    def write() -> Int[Tensor, "n tokens"]:
        return generate_blocks(model, start, sampling, prefixes=opening, progress=progress).cpu()

    wanted = Wanted(sampling.kept, sampling.tokens, start, text_config(model).vocab_size)
    ids = cached_text(model, source, wanted, cache, write)
    source = {"text": "self-generated from document prefixes", **source}
    return _written(ids, "data", source, tokenizer, bos)


def token_blocks(
    model: PreTrainedModel,
    *,
    count: int = RANDOM_BLOCKS,
    window: int = BLOCK,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bos: Bos = "auto",
) -> CalibrationSet:
    """Draws token ids uniformly (docs/methods.md, section 3, `tokens`). Nothing is external, so the
    regime is "self".

    Args:
        model: causal LM.
        count, window: blocks, and tokens drawn for each.
        seed: of the draw.
        tokenizer: the model's own, to begin blocks with BOS as it does; None: no BOS.
        bos: see `prunenet.text.windows`.

    Raises:
        ValueError: see `prunenet.text.random_tokens.random_blocks` and `bos_token`.
    """
    begins = None if tokenizer is None else bos_token(tokenizer, bos)
    ids = random_blocks(model, count, window, torch.Generator().manual_seed(seed), bos=begins)
    source = {"text": "random tokens", "count": count, "window": window, "seed": seed}
    return CalibrationSet(ids, "self", source | {"bos": begins is not None}, begins)


def data_blocks(
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    *,
    count: int = DATA_BLOCKS,
    window: int = BLOCK,
    seed: int = 0,
    bos: Bos = "auto",
) -> CalibrationSet:
    """Draws windows from external text. Arguments and errors:
    `prunenet.text.windows.calibration_blocks`; `seed`: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = calibration_blocks(
        tokenizer, text, count=count, window=window, generator=generator, bos=bos
    )
    begins = bos_token(tokenizer, bos)
    source = {
        "text": Path(text.name).name,
        "sha256": content_sha256(text),
        "count": count,
        "window": window,
        "seed": seed,
        "bos": begins is not None,
    }
    return CalibrationSet(ids, "data", source, begins)


def check_seed(seed: int) -> int:
    """Returns the seed. Raises ValueError where it is not in [0, 2^32), which every generator
    takes.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be in [0, 2^32), got {seed}")
    return seed


def check_window(window: int | None, name: str = "window") -> None:
    """Raises ValueError, by the name of the option, where blocks of so many tokens are too short to
    be written.
    """
    if window is not None and window < SHORTEST:
        raise ValueError(f"`{name}` must be at least {SHORTEST}, got {window}")


def block_tokens(model: PreTrainedModel, front: int = 0, window: int | None = None) -> int:
    """Tokens of a calibration block: `window`, by default 256 or as many as the model has positions
    for behind `front` others.

    Raises:
        ValueError: the model has not so many positions.
    """
    most = positions(model)
    if window is None:
        return BLOCK if most is None else min(BLOCK, most - front)
    if most is not None and window > most - front:
        raise ValueError(
            f"`window` must be at most {most - front}, what the model has positions for, got"
            f" {window}"
        )
    return window


def calibration_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    moments: TextRegime,
    text: str,
    options: CalibrationOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Makes the calibration set that a command asks for: `self_blocks`, or `data_blocks` of a text
    by its name.

    Of several processes (`prunenet.runtime.parallel`) the first writes or reads, and the others are
    given the same.

    Args:
        model, tokenizer: of the model to calibrate.
        moments: "self" or "data".
        text: for "data", see `prunenet.text.corpora.load_text`.
        options: amount, length of a block, seed, BOS, column.
        progress: as for `self_blocks`.

    Raises:
        ValueError: fewer tokens than 2 blocks, or blocks that the model cannot read; see also
            `self_blocks` and `data_blocks`.
    """
    options = options or CalibrationOptions()
    seed, bos = options.seed, options.bos
    begins = moments == "data" and bos_token(tokenizer, bos) is not None
    block, total = block_tokens(model, int(begins), options.window), options.tokens
    if total is not None and total < 2 * block:
        raise ValueError(f"`tokens` must be at least {2 * block}, 2 blocks of {block}, got {total}")
    count = None if total is None else total // block

    def made() -> CalibrationSet:
        if moments == "self":
            many = count or SEQUENCES
            return self_blocks(
                model,
                tokenizer,
                sequences=many,
                tokens=block,
                seed=seed,
                bos=bos,
                progress=progress,
            )
        external, many = load_text(text, CalibrationText, options.column), count or DATA_BLOCKS
        return data_blocks(tokenizer, external, count=many, window=block, seed=seed, bos=bos)

    asked: dict[str, str] = {} if bos == "auto" else {"bos_asked": bos}
    asked |= {} if options.column is None else {"column": options.column}
    found = blocks_from(0, made)
    return replace(found, source={**found.source, **asked})


def blocks_from(source: int, make: Callable[[], CalibrationSet]) -> CalibrationSet:
    """Calls `make` on one of several processes, and gives its result to all of them."""
    made = [make()] if parallel.rank() == source else []

    def facts() -> tuple[Any, ...]:
        found = made[0]
        kinds = None if found.kinds is None else found.kinds.tolist()
        return found.regime, dict(found.source), found.bos, kinds

    ids = parallel.broadcast(source, lambda: made[0].ids)
    regime, how, bos, kinds = parallel.broadcast_object(source, facts)
    return CalibrationSet(ids, regime, how, bos, None if kinds is None else torch.tensor(kinds))


def _written(
    ids: Int[Tensor, "n tokens"],
    regime: TextRegime,
    source: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    bos: Bos,
    kinds: int = 1,
) -> CalibrationSet:
    """The set of self-written rows, of so many kinds in turn; without the document start where it
    is the BOS token and rows are to begin without it.
    """
    begins = bos_token(tokenizer, bos)
    if bos == "no" and source["start"] == tokenizer.bos_token_id:
        ids = ids[:, 1:]
    which = None if kinds == 1 else torch.arange(len(ids)) % kinds
    return CalibrationSet(ids, regime, {**source, "bos": begins is not None}, begins, which)
