"""Measures tokens per second of prefill and decoding, side by side, and writes greedy
continuations.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median, quantiles
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from prunenet.evaluation.options import SPEED, SpeedOptions
from prunenet.models.layers import check_positions
from prunenet.runtime.memory import added_memory
from prunenet.runtime.placement import home

_NARROW = 0.1
"""Of the median: how far apart the quartiles of a speed may be."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, medians over the repeats.

    Attributes:
        prefill: prompt tokens read per second, over the batch.
        decode: new tokens written per second with the KV cache, over the batch.
        prefill_spread, decode_spread: (fastest - slowest) / median of the repeats.
        prompt, new_tokens, batch, compiled: see `SpeedOptions`.
        repeats: measurements that were made.
        forward_bytes: memory that reading the prompt and writing adds to the weights, KV cache
            included, the most of all repeats; None where the system does not count it.
    """

    prefill: float
    decode: float
    prefill_spread: float
    decode_spread: float
    prompt: int
    new_tokens: int
    batch: int
    repeats: int
    compiled: bool = False
    forward_bytes: int | None = None


def speed(model: PreTrainedModel, options: SpeedOptions = SPEED) -> Speed:
    """Measures prefill and decode speed of one model. Errors: `speed_side_by_side`."""
    return speed_side_by_side({"": model}, options)[""]


@torch.inference_mode()
def speed_side_by_side(
    models: Mapping[str, PreTrainedModel], options: SpeedOptions = SPEED
) -> dict[str, Speed]:
    """Measures prefill and decode speed of several models; each repeat measures all of them in
    turn, so noise hits them alike.

    A plain greedy loop over `model(...)` with the KV cache, so that the overhead of `generate` is
    not what is measured. One warm-up per model is thrown away.

    Args:
        models: name -> causal LM.
        options: how.

    Raises:
        ValueError: more tokens than a model has positions for, or a model that cannot be compiled
            here.
    """
    for model in models.values():
        check_positions(model, options.prompt + options.new_tokens, "prompt + new_tokens")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    held: dict[str, list[int]] = {name: [] for name in models}
    with _callables(models, options.compiled) as callables:
        for repeat in range((options.most or options.repeats) + 1):
            if repeat > options.repeats and all(map(is_narrow, times.values())):
                break
            for name, model in models.items():
                with evaluating(model), added_memory(home(model)) as added:
                    measured = _time_once(
                        model, options.prompt, options.new_tokens, options.batch, callables[name]
                    )
                if repeat > 0:
                    times[name].append(measured)
                    held[name] += [] if added["bytes"] is None else [added["bytes"]]
    return {
        name: replace(medians(pairs, options), forward_bytes=max(held[name], default=None))
        for name, pairs in times.items()
    }


def medians(pairs: Sequence[tuple[float, float]], options: SpeedOptions) -> Speed:
    """Speed from the seconds of each (prefill, decoding)."""
    prefill = [options.batch * options.prompt / seconds for seconds, _ in pairs]
    decode = [options.batch * options.new_tokens / seconds for _, seconds in pairs]
    return Speed(
        prefill=median(prefill),
        decode=median(decode),
        prefill_spread=(max(prefill) - min(prefill)) / median(prefill),
        decode_spread=(max(decode) - min(decode)) / median(decode),
        **{name: value for name, value in asdict(options).items() if name != "most"}
        | {"repeats": len(pairs)},
    )


def is_narrow(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether the middle half of the measurements lies within a tenth of their median."""
    if len(pairs) < 2:
        return False
    for seconds in zip(*pairs, strict=True):
        low, middle, high = quantiles(seconds, n=4)
        if high - low > _NARROW * middle:
            return False
    return True


@contextmanager
def _callables(
    models: Mapping[str, PreTrainedModel], compiled: bool
) -> Iterator[Mapping[str, Callable[..., Any]]]:
    """Yields what to call for each model, which itself stays as it is."""
    if not compiled:
        yield models
        return
    # Models of one class share one cache of compiled code. Beyond its limit torch would go on
    # uncompiled without a word.
    room = torch._dynamo.config.patch(recompile_limit=16 * (len(models) + 1))
    try:
        with room:
            yield {name: torch.compile(model, dynamic=False) for name, model in models.items()}
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"torch.compile failed ({reason}); install a C++ compiler (g++), or measure code"
            " that is not compiled"
        ) from error


@torch.inference_mode()
def continued(
    model: PreTrainedModel, ids: Int[Tensor, "n prompt"], new_tokens: int
) -> Int[Tensor, "n new_tokens"]:
    """What a model writes greedily behind each prompt, past any end of sequence."""
    written, cache, token = [], None, ids
    with evaluating(model):
        for _ in range(new_tokens):
            cache, token = _step(model, token, cache, model)
            written.append(token)
    return torch.cat(written, 1)


@torch.inference_mode()
def generate_sentence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 32
) -> str:
    """Continues a prompt greedily, up to the end-of-sequence token; returns both as text, without
    special tokens.

    Raises:
        ValueError: new_tokens below 1, an empty prompt, or more tokens than the model has positions
            for.
    """
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long, device=home(model))
    if new_tokens < 1 or ids.shape[1] < 1:
        raise ValueError(
            f"generation needs a prompt and 1 new token or more, got {prompt!r} and {new_tokens}"
        )
    check_positions(model, ids.shape[1] + new_tokens, "prompt + new_tokens")
    written = ids[0].tolist()
    with evaluating(model):
        cache, token = _step(model, ids, None, model)
        for step in range(new_tokens):
            if int(token) == tokenizer.eos_token_id:
                break
            written.append(int(token))
            if step < new_tokens - 1:
                cache, token = _step(model, token, cache, model)
    return str(tokenizer.decode(written, skip_special_tokens=True))


def _step(
    model: PreTrainedModel, ids: Int[Tensor, "batch new"], cache: object, call: Callable[..., Any]
) -> tuple[object, Int[Tensor, "batch 1"]]:
    """Reads `ids` after what the cache holds; returns the cache and the most likely next token.
    `call`: the model's code.
    """
    output = call(input_ids=ids, past_key_values=cache, use_cache=True, **last_logits(model, 1))
    return output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)


def _time_once(
    model: PreTrainedModel, prompt: int, new_tokens: int, batch: int, call: Callable[..., Any]
) -> tuple[float, float]:
    """Times one prefill and `new_tokens` decoding steps, in seconds."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        model.config.get_text_config().vocab_size, (batch, prompt), generator=generator
    ).to(home(model))
    # Compiled code is made for shapes, and those of an ordinary cache grow.
    cache: object = (
        None
        if call is model
        else StaticCache(config=model.config, max_cache_len=prompt + new_tokens)
    )
    start = _now(home(model))
    cache, token = _step(model, ids, cache, call)
    middle = _now(home(model))
    for _ in range(new_tokens):
        cache, token = _step(model, token, cache, call)
    return middle - start, _now(home(model)) - middle


def last_logits(model: PreTrainedModel, rows: int) -> dict[str, int]:
    """Arguments that run the LM head on the last `rows` positions alone, where the model takes
    them.
    """
    return (
        {"logits_to_keep": rows}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model in evaluation mode (no dropout), and back into the mode that it had."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
