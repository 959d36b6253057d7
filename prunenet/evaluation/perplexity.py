"""What a model is worth and what it costs: perplexity, parameters, bytes, tokens per second -> one
frozen `Result`.

Perplexity follows the WikiText protocol (METHODS.md section 10). It depends on the window, so the
window goes with it. Speed and greedy continuations live in `latency` and are offered here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.evaluation.speed import (
    Speed,
    check_positions,
    evaluating,
    generate_sentence,
    last_logits,
    speed,
    speed_side_by_side,
)
from prunenet.models.layers import check_tokens, count_parameters
from prunenet.runtime.placement import home, parameters, where
from prunenet.text.corpora import TestText, TextError, content_sha256, token_windows, tokenise

__all__ = [
    "Perplexity",
    "Result",
    "Speed",
    "bytes_on_disk",
    "generate_sentence",
    "perplexity",
    "speed",
    "speed_side_by_side",
    "summarise",
]

# Rows of logits whose loss is computed at once: 256 x 256 000 (Gemma's vocabulary) x 4 bytes = 262
# MB.
_LOSS_ROWS = 256


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity of a model on a text.

    Attributes:
        value: exp of the mean loss, at least 1; infinite when that overflows.
        loss: mean negative log-likelihood per scored token, nats.
        tokens: tokens scored.
        window, stride: tokens.
        text: name of the text.
        text_sha256: hexadecimal, of its UTF-8 bytes.
        starts_with_bos: whether the tokenizer put a BOS token in front of the whole text (windows
            never get their own).
    """

    value: float
    loss: float
    tokens: int
    window: int
    stride: int
    text: str
    text_sha256: str
    starts_with_bos: bool


@dataclass(frozen=True, slots=True)
class Result:
    """Everything measured on one model. Fields of what was not measured are None.

    Attributes:
        parameters: all of them, tied tensors once.
        non_embedding_parameters: without token embedding and LM head.
        bytes: of the safetensors files on disk when a folder was given, else of the parameters in
            memory.
        dtype, device: of the parameters; several devices as in `cuda:0+cpu+disk`.
        threads: CPU threads that torch uses.
        perplexity, loss, tokens, window, stride, text, text_sha256, starts_with_bos: see
        `Perplexity`. prefill_tokens_per_second, decode_tokens_per_second, prefill_spread,
        decode_spread, prompt, new_tokens, batch, repeats,
            compiled: see `Speed`.
    """

    parameters: int
    non_embedding_parameters: int
    bytes: int
    dtype: str
    device: str
    threads: int
    perplexity: float | None = None
    loss: float | None = None
    tokens: int | None = None
    window: int | None = None
    stride: int | None = None
    text: str | None = None
    text_sha256: str | None = None
    starts_with_bos: bool | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    prefill_spread: float | None = None
    decode_spread: float | None = None
    prompt: int | None = None
    new_tokens: int | None = None
    batch: int | None = None
    repeats: int | None = None
    compiled: bool | None = None

    def as_dict(self) -> dict[str, float | int | str | bool | None]:
        """Flat, for one JSON line; a value that JSON cannot hold (an infinite perplexity) becomes
        None.
        """
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in asdict(self).items()
        }


def summarise(
    model: PreTrainedModel,
    *,
    perplexity: Perplexity | None = None,
    speed: Speed | None = None,
    folder: str | Path | None = None,
) -> Result:
    """Puts measurements, parameter counts and size together.

    Args:
        model: the model measured.
        perplexity, speed: of this model, where measured.
        folder: the checkpoint's folder, to count bytes on disk.

    Raises:
        ValueError: the folder holds no safetensors file.
    """
    parameters, non_embedding = count_parameters(model)
    quality = {} if perplexity is None else asdict(perplexity)
    pace = {} if speed is None else asdict(speed)
    for fields, old, new in (
        (quality, "value", "perplexity"),
        (pace, "prefill", "prefill_tokens_per_second"),
        (pace, "decode", "decode_tokens_per_second"),
    ):
        if fields:
            fields[new] = fields.pop(old)
    return Result(
        parameters=parameters,
        non_embedding_parameters=non_embedding,
        bytes=_bytes_in_memory(model) if folder is None else bytes_on_disk(folder),
        dtype=str(model.dtype).removeprefix("torch."),
        device=where(model),
        threads=torch.get_num_threads(),
        **quality,
        **pace,
    )


def bytes_on_disk(folder: str | Path) -> int:
    """Bytes of a checkpoint's safetensors files, keep masks not counted.

    Raises:
        ValueError: there is none.
    """
    files = [
        file
        for file in Path(folder).glob("*.safetensors")
        if file.name != "prunenet_masks.safetensors"
    ]
    if not files:
        raise ValueError(
            f"{str(folder)!r} holds no .safetensors file; give the folder of a saved model"
        )
    return sum(file.stat().st_size for file in files)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TestText,
    *,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity: exp of the mean negative log-likelihood of the scored tokens, all of equal
    weight.

    Args:
        model: causal LM; left as it was (mode, device).
        tokenizer: the model's own.
        text: what to score; never calibration text.
        window: tokens the model sees at once, at least 2.
        stride: tokens between two windows, in [1, window]; default `window`, no overlap.
        max_windows: score only the first windows, at least 1; default all.
        batch_size: windows in one forward pass, at least 1.
        progress: called with (windows done, windows in all) after each batch.

    Raises:
        TypeError: the text is not a `TestText`.
        TextError: the text is shorter than one window.
        ValueError: an argument is out of range, the window is longer than the model's positions, or
            the loss is not finite.
    """
    if not isinstance(text, TestText):
        raise TypeError(
            f"perplexity is measured on a TestText, got a {type(text).__name__}; load the text as a"
            " TestText"
        )
    if batch_size < 1 or (max_windows is not None and max_windows < 1):
        raise ValueError(
            f"batch_size and max_windows must be 1 or more, got {batch_size} and {max_windows}"
        )
    check_positions(model, window, "window")
    ids = tokenise(tokenizer, text)
    try:
        windows = list(islice(token_windows(ids, window, stride), max_windows))
    except TextError as error:
        raise TextError(f"{text.name}: {error}") from None
    check_tokens(model, ids[:, None])
    loss, tokens = 0.0, 0
    with evaluating(model):
        for done in range(0, len(windows), batch_size):
            batch = windows[done : done + batch_size]
            loss += _loss_sum(
                model, torch.stack([part for part, _ in batch]), [scored for _, scored in batch]
            )
            tokens += sum(scored for _, scored in batch)
            if progress is not None:
                progress(done + len(batch), len(windows))
    mean = loss / tokens
    if not math.isfinite(mean):
        raise ValueError(
            f"the loss is {mean}: the model's weights are damaged, or {model.dtype} overflows; load"
            " it in float32"
        )
    return Perplexity(
        value=math.exp(mean) if mean < 700 else math.inf,
        loss=mean,
        tokens=tokens,
        window=window,
        stride=window if stride is None else stride,
        text=text.name,
        text_sha256=content_sha256(text),
        starts_with_bos=tokenizer.bos_token_id is not None
        and int(ids[0]) == tokenizer.bos_token_id,
    )


def _loss_sum(model: PreTrainedModel, ids: Int[Tensor, "batch window"], scored: list[int]) -> float:
    """Sum of the negative log-likelihoods, nats, of the last `scored[i]` tokens of each window."""
    rows = max(scored) + 1
    ids = ids.to(home(model))
    logits = model(input_ids=ids, use_cache=False, **last_logits(model, rows)).logits[:, -rows:]
    total = torch.zeros((), dtype=torch.float64)
    for window, window_logits, count in zip(ids, logits, scored, strict=True):
        total += _cross_entropy(window_logits[-count - 1 : -1], window[-count:])
    return float(total)


def _cross_entropy(
    logits: Float[Tensor, "scored vocabulary"], targets: Int[Tensor, " scored"]
) -> Float[Tensor, ""]:
    """Sum in float64 of float32 losses, a block of rows at a time: float32 logits of all rows need
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


def _bytes_in_memory(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for _, p in parameters(model))
