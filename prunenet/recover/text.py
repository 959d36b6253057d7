"""The text that a pruned model learns from: as much as its training reads.

Self-written text is sampled and cached in parts of as many tokens as a calibration set has: longer
texts begin with shorter ones, and memory and what a kill loses are bounded by a part. In blocks of
as many tokens as those of a cut, the first part is the text that the cut was measured on. What is
held back is a part of its own, which no cut was measured on, and the same for all longer texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.recover.options import TOKENS, WINDOW, RecoverText, Tuning
from prunenet.text.calibration import (
    SEQUENCES,
    CalibrationOptions,
    CalibrationSet,
    block_tokens,
    calibration_for,
)
from prunenet.text.corpora import CalibrationText, load_text
from prunenet.text.generate import BLOCK, KEEP
from prunenet.text.windows import bos_token, tokenise

MOST_HELD = 4096
"""Tokens held back, at most: a fifth of all."""
_PART = round(KEEP * SEQUENCES) * BLOCK  # tokens that the filter leaves of a part
_EXTERNAL = "builtin"
_HELD = 2**31  # number of the part that is held back


def learning_text(
    writer: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: RecoverText,
    tuning: Tuning,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """The blocks that a training reads, and behind them those that are held back.

    Args:
        writer: the model that samples the text.
        tokenizer: its own.
        text: whose text, and how much of it.
        tuning: its steps, where the text says no amount; its seed.
        progress: called with (tokens, tokens in all) while text is sampled.

    Raises:
        ValueError: fewer tokens than 2 blocks, or as `prunenet.text.calibration.calibration_for`.
    """
    external = text.moments == "data"
    begins = external and bos_token(tokenizer, text.bos) is not None
    block = window_of(text, writer, front=int(begins))
    learned, held = blocks_wanted(text, tuning, block)
    size = max(1, _PART // block)
    count = learned + held
    there = len(tokenise(tokenizer, external_text(text))) // block if external else 0
    if external and text.tokens is None:
        count = max(2, min(count, there))
    elif external and there < count:
        raise ValueError(
            f"`tokens` {text.tokens} need {count * block} with those held back, and text"
            f" {_source(text)!r} has {there * block} in blocks of {block}; give more text, or"
            " smaller `tokens`"
        )

    def part(number: int, blocks: int) -> CalibrationSet:
        # so many that the filter leaves as many of each kind
        many = blocks if external else 2 * math.ceil((blocks + blocks % 2) / (2 * KEEP))
        seed = _seed(tuning.seed, number) if number else tuning.seed
        options = CalibrationOptions(
            seed=seed,
            tokens=max(2, many) * block,
            window=block,
            bos=text.bos,
            column=text.column,
        )
        before = learned if number == _HELD else number * size
        of = min(size, max(count - before, 1))
        told = None if progress is None else partial(_whole, progress, before, of, count, block)
        return calibration_for(
            writer, tokenizer, text.moments, _source(text), options, progress=told
        )

    if external:
        # the last of all are held back: longer trainings are judged by the same, and a cut was
        # measured on the first
        drawn, held = part(0, max(count, there)), blocks_held(count, block)
        ids = torch.cat((drawn.ids[: count - held], drawn.ids[-held:]))
        return replace(drawn, ids=ids, source=dict(drawn.source) | {"count": count})
    sizes = [min(size, learned - first) for first in range(0, learned, size)]
    parts = [part(number, many).rows(slice(many)) for number, many in enumerate(sizes)]
    return _joined([*parts, part(_HELD, held).rows(slice(held))])


def external_text(text: RecoverText) -> CalibrationText:
    """Reads the text of `moments` "data". Raises TextError as `load_text`."""
    return load_text(_source(text), CalibrationText, text.column)


def window_of(text: RecoverText, model: PreTrainedModel, front: int = 0) -> int:
    """Tokens of a block. Raises ValueError as `prunenet.text.calibration.block_tokens`."""
    if text.window is None and text.moments == "self":
        return min(WINDOW, block_tokens(model, front))
    return block_tokens(model, front, text.window)


def blocks_wanted(text: RecoverText, tuning: Tuning, block: int) -> tuple[int, int]:
    """Blocks of so many tokens to learn from, and those held back.

    Raises:
        ValueError: fewer tokens than 2 blocks.
    """
    if text.tokens is not None and text.tokens < 2 * block:
        raise ValueError(
            f"`tokens` must be at least {2 * block}, 2 blocks of {block}, got {text.tokens}"
        )
    batch = tuning.blocks_of_step(block)
    read = TOKENS // block if tuning.steps is None else tuning.steps * batch
    learned = read if text.tokens is None else text.tokens // block
    return learned, blocks_held(learned + max(1, round(learned / 4)), block)


def held_back(blocks: CalibrationSet) -> int:
    """How many of these blocks, the last ones, are held back to choose by."""
    return blocks_held(len(blocks.ids), blocks.window)


def blocks_held(blocks: int, window: int) -> int:
    """How many of so many blocks, of so many tokens, are held back to choose by."""
    return max(1, min(MOST_HELD // window, round(0.2 * blocks)))


def _joined(parts: list[CalibrationSet]) -> CalibrationSet:
    """The blocks of all parts as one set."""
    first, ids = parts[0], torch.cat([part.ids for part in parts])
    kinds = [part.kinds for part in parts if part.kinds is not None]
    return replace(
        first,
        ids=ids,
        kinds=torch.cat(kinds) if len(kinds) == len(parts) else None,
        source=dict(first.source) | {"parts": len(parts), "blocks": len(ids)},
    )


def _source(text: RecoverText) -> str:
    return _EXTERNAL if text.text is None else text.text


def _seed(seed: int, part: int) -> int:
    return int(np.random.SeedSequence([seed, part]).generate_state(1)[0])


def _whole(
    progress: Callable[[int, int], None],
    before: int,
    size: int,
    count: int,
    block: int,
    done: int,
    of: int,
) -> None:
    """Tells how much of the whole text is there, from what is of one part, of `size` blocks."""
    progress(round((before + size * done / max(of, 1)) * block), count * block)
