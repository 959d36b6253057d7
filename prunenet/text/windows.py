"""Cuts a text into token windows, to score or to calibrate on.

**How a window counts.** A window of n tokens is n tokens of the text. Where windows begin with the
BOS token, it stands in front of these n, and neither window, stride nor the tokens scored count it:
the model reads n + 1 tokens, and the same tokens of the text are scored, or drawn, with and without
it. The BOS token itself is never scored, and nor is the first token of a text window.

**Which windows begin with BOS** (`Bos`). With "auto", those of a model whose own tokenizer begins a
text with it, as lm-evaluation-harness does; such models (Gemma, Llama, Mistral, OPT, ...) were
trained with BOS in front of every text and predict poorly without it.

WikiText protocol (docs/methods.md, section 10): rows of a dataset joined by blank lines, tokenised
once, non-overlapping windows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prunenet.text.choices import Bos, check_bos, check_window
from prunenet.text.corpora import CalibrationText, TestText, TextError, content_sha256

PREFIX = 4
"""First tokens of a document that a model goes on from."""
_KEPT = 4  # texts whose tokens are kept for each tokenizer
_Tokens = OrderedDict[tuple[str, int], Tensor]
_tokens: WeakKeyDictionary[PreTrainedTokenizerBase, _Tokens] = WeakKeyDictionary()


def bos_token(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> int | None:
    """Id of the token that every window begins with; None: windows are tokens of the text alone.

    Raises:
        ValueError: an unknown choice, or "yes" for a tokenizer without BOS token.
    """
    if check_bos(bos) == "no":
        return None
    token: int | None = tokenizer.bos_token_id
    if bos == "yes" and token is None:
        raise ValueError(
            "the tokenizer has no BOS token for windows to begin with; leave `bos` at 'auto'"
        )
    if bos == "auto" and list(tokenizer("x")["input_ids"][:1]) != [token]:
        return None
    return token


def tokenise(
    tokenizer: PreTrainedTokenizerBase, text: CalibrationText | TestText
) -> Int[Tensor, " tokens"]:
    """Token ids of the whole text, without special tokens in front or behind.

    The last 4 texts of a tokenizer are kept, so that every model of a comparison reads the same
    tokens and none waits for them. Do not write into the result.
    """
    known = _tokens.setdefault(tokenizer, OrderedDict())
    # A tokenizer that was given more tokens is another one.
    key = (content_sha256(text), len(tokenizer))
    if key not in known:
        ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
        with torch.inference_mode(False):  # a gradient may be asked of what is kept
            known[key] = torch.tensor(ids, dtype=torch.long)
        if len(known) > _KEPT:
            known.popitem(last=False)
    return known[key]


def token_windows(
    ids: Int[Tensor, " tokens"], window: int, stride: int | None = None, bos: int | None = None
) -> Iterator[tuple[Int[Tensor, " length"], int]]:
    """Cuts a token sequence into windows for scoring; each token is scored at most once.

    A window's last `scored` tokens are scored, the ones before are context. Tokens after the last
    whole window are left out.

    Args:
        ids: (tokens,), of the text.
        window: tokens of the text in a window, at least 2.
        stride: tokens between the starts of two windows, in [1, window]; default `window`: no
            overlap.
        bos: id of the token in front of every window, see `bos_token`; None: no such token.

    Yields:
        (token ids, number of scored tokens). (window,) ids are a view on `ids`; with `bos` they are
        (window + 1,) and a copy. Scored are `window - 1` of the first window, then min(stride,
        window - 1).

    Raises:
        ValueError: window or stride out of range.
        TextError: fewer tokens than one window.
    """
    check_window(window, stride)
    stride = stride or window
    if len(ids) < window:
        raise TextError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}; give more text or"
            " a smaller `window`"
        )
    front = ids.new_tensor([] if bos is None else [bos])
    starts = range(0, len(ids) - window + 1, stride)
    return (
        (
            behind(front, ids[start : start + window]),
            window - 1 if start == 0 else min(stride, window - 1),
        )
        for start in starts
    )


def behind(front: Int[Tensor, " bos"], part: Int[Tensor, " _"]) -> Int[Tensor, " _"]:
    """The tokens with those of `front` before them; a view where there are none."""
    return torch.cat((front, part)) if len(front) else part


def calibration_blocks(
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    *,
    count: int,
    window: int,
    generator: torch.Generator,
    bos: Bos = "auto",
) -> Int[Tensor, "count length"]:
    """Draws distinct, non-overlapping windows of a calibration text, uniformly.

    Args:
        tokenizer: of the model to calibrate.
        text: never a `TestText`.
        count: windows to draw, at least 1.
        window: tokens of the text in each, at least 2.
        generator: makes the draw reproducible (on the CPU).
        bos: whether every window begins with the BOS token; `length` is then window + 1.

    Raises:
        TypeError: the text is not a `CalibrationText`.
        TextError: the text has fewer than `count` windows.
        ValueError: see `bos_token`.
    """
    if not isinstance(text, CalibrationText):
        raise TypeError(
            f"calibration needs a CalibrationText, got a {type(text).__name__}: test text is only"
            " ever scored"
        )
    begins = bos_token(tokenizer, bos)
    ids = tokenise(tokenizer, text)
    cut = token_windows(ids, window, bos=begins) if len(ids) >= window else ()
    windows = [part for part, _ in cut]
    if len(windows) < count:
        raise TextError(
            f"text {text.name!r} has {len(windows)} windows of {window} tokens, fewer than the"
            f" {count} asked for; give more text, fewer windows or a smaller window"
        )
    chosen = torch.randperm(len(windows), generator=generator)[:count]
    return torch.stack([windows[i] for i in chosen.tolist()])


def openings(
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    count: int,
    *,
    prefix: int = PREFIX,
    seed: int = 0,
) -> Int[Tensor, "n prefix"]:
    """Draws up to `count` documents without replacement; returns the first `prefix` tokens of each.

    Raises:
        TypeError: the text is not a `CalibrationText`.
        TextError: no document has so many tokens.
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
