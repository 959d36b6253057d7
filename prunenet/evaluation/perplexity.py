"""Measures perplexity by the WikiText protocol (docs/methods.md, section 10).

It depends on how the text is cut, so window, stride and BOS go with every value; how a window
counts: `prunenet.text.windows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.evaluation.intervals import bootstrap
from prunenet.evaluation.options import EVALUATION, EvaluationOptions
from prunenet.evaluation.speed import evaluating, last_logits
from prunenet.models.layers import check_positions, check_tokens
from prunenet.runtime.placement import home
from prunenet.runtime.products import with_fast_products
from prunenet.text.corpora import TestText, TextError, content_sha256
from prunenet.text.windows import (
    bos_token,
    token_windows,
    tokenise,
)

# Rows of logits whose loss is computed at once: 256 x 256 000 (Gemma's vocabulary) x 4 bytes = 262
# MB.
_LOSS_ROWS = 256
_OVERFLOW = 700.0  # nats


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity of a model on a text.

    Attributes:
        value: exp of the mean loss, at least 1; infinite when that overflows.
        loss: mean negative log-likelihood per scored token, nats.
        tokens: tokens scored.
        window, stride: tokens of the text.
        text: name of the text.
        text_sha256: hexadecimal, of its UTF-8 bytes.
        bos: whether every window began with the BOS token.
        low, high: 95 % bootstrap interval of the value over windows; None for a single window,
            or where it overflows.
        windows: scored.
    """

    value: float
    loss: float
    tokens: int
    window: int
    stride: int
    text: str
    text_sha256: str
    bos: bool
    low: float | None = None
    high: float | None = None
    windows: int | None = None


@with_fast_products
@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TestText,
    options: EvaluationOptions = EVALUATION,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measures perplexity: exp of the mean negative log-likelihood of the scored tokens, all of
    equal weight.

    Args:
        model: causal LM; left as it was (mode, device).
        tokenizer: the model's own.
        text: what to score; never calibration text.
        options: how.
        progress: called with (windows done, windows in all) after each batch.

    Raises:
        TypeError: the text is not a `TestText`.
        TextError: the text is shorter than one window.
        ValueError: the window is longer than the model's positions, the tokenizer has no BOS token
            to begin it with, or the loss is not finite.
    """
    windows, begins = scored_windows(model, tokenizer, text, options)
    loss, tokens = 0.0, 0
    parts: list[float] = []
    with evaluating(model):
        for done in range(0, len(windows), options.batch_size):
            batch = windows[done : done + options.batch_size]
            parts += _loss_sums(
                model, torch.stack([part for part, _ in batch]), [scored for _, scored in batch]
            )
            loss += sum(parts[done:])
            tokens += sum(scored for _, scored in batch)
            if progress is not None:
                progress(done + len(batch), len(windows))
    mean = loss / tokens
    if not math.isfinite(mean):
        raise ValueError(
            f"the loss is {mean}: the model's weights are damaged, or {model.dtype} overflows; load"
            " it in float32"
        )
    interval = bootstrap(parts, [scored for _, scored in windows])
    if interval is not None and interval[1] >= _OVERFLOW:
        interval = None
    return Perplexity(
        value=math.exp(mean) if mean < _OVERFLOW else math.inf,
        loss=mean,
        tokens=tokens,
        window=options.window,
        stride=options.step,
        text=text.name,
        text_sha256=content_sha256(text),
        bos=begins,
        low=None if interval is None else math.exp(interval[0]),
        high=None if interval is None else math.exp(interval[1]),
        windows=len(windows),
    )


def scored_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TestText,
    options: EvaluationOptions,
) -> tuple[list[tuple[Int[Tensor, " length"], int]], bool]:
    """Cuts a text as `perplexity` scores it; a comparison does so before any work, to see that it
    can.

    Returns:
        (token ids, tokens scored) of each window, and whether windows begin with the BOS token.

    Raises:
        As `perplexity`, but for the loss.
    """
    if not isinstance(text, TestText):
        raise TypeError(
            f"perplexity is measured on a TestText, got a {type(text).__name__}; load the text as a"
            " TestText"
        )
    begins = check_fits(model, tokenizer, options)
    ids = tokenise(tokenizer, text)
    try:
        cut = token_windows(ids, options.window, options.stride, begins)
    except TextError as error:
        raise TextError(f"{text.name}: {error}") from None
    check_tokens(model, ids[:, None])
    return list(islice(cut, options.max_windows)), begins is not None


def check_fits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: EvaluationOptions
) -> int | None:
    """Checks that the model has positions for a window, with its BOS token where it gets one;
    returns the id of that token.

    Raises:
        ValueError: it has not, or see `prunenet.text.windows.bos_token`.
    """
    begins = bos_token(tokenizer, options.bos)
    if begins is None:
        check_positions(model, options.window, "window")
    else:
        check_positions(model, options.window + 1, "window with its BOS token")
    return begins


def _loss_sums(
    model: PreTrainedModel, ids: Int[Tensor, "batch window"], scored: list[int]
) -> list[float]:
    """Sums the negative log-likelihoods, nats, of the last `scored[i]` tokens of window i."""
    rows = max(scored) + 1
    ids = ids.to(home(model))
    logits = model(input_ids=ids, use_cache=False, **last_logits(model, rows)).logits[:, -rows:]
    return [
        float(_cross_entropy(window_logits[-count - 1 : -1], window[-count:]))
        for window, window_logits, count in zip(ids, logits, scored, strict=True)
    ]


def _cross_entropy(
    logits: Float[Tensor, "scored vocabulary"], targets: Int[Tensor, " scored"]
) -> Float[Tensor, ""]:
    """Sums float32 losses in float64, a block of rows at a time: float32 logits of all rows need
    not exist at once.
    """
    total = torch.zeros((), dtype=torch.float64)
    for row in range(0, len(targets), _LOSS_ROWS):
        block = slice(row, row + _LOSS_ROWS)
        total += (
            F.cross_entropy(logits[block].float(), targets[block], reduction="none")
            .sum(dtype=torch.float64)
            .cpu()
        )
    return total
