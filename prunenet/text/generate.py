"""Text that a model writes by itself: calibration without data (docs/methods.md, section 4).

After Ji et al., "Beware of Calibration Data for Pruning Large Language Models", ICLR 2025, arXiv
2410.17711 (self-generated calibration, perplexity filter), and arXiv 2410.17170 (from the document
start alone, with a temperature that begins high).
What differs:

- strictly data-free by default: prefixes of documents, the first paper's way, are an option;
- the nucleus is that of top-p, among the 4096 likeliest tokens in place of 50; the share dropped by
  the filter and the temperatures are arguments;
- sequences that repeat an earlier one, or open like it, can be written anew (off by default;
  neither paper does so).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.models.layers import check_tokens
from prunenet.runtime.choices import check_fields
from prunenet.runtime.placement import home
from prunenet.text.choices import Bos
from prunenet.text.windows import bos_token

KEEP = 0.8
"""Share of self-written sequences that the filter keeps."""
BLOCK = 256
"""Tokens of a block of calibration text, where the model reads as many."""
# times that sequences too much like others are written anew, before they are given up
_REWRITES = 4
_MOST = 4096  # sorting a whole vocabulary of 49 152 takes a third as long as the model's own step
# Tokens that stand between documents in pre-training; an instruct model's BOS is often a chat
# token, so these go first.
_DOCUMENT_STARTS = ("<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>", "</s>")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How sequences are sampled from a model, and which of them are kept.

    Attributes:
        sequences: how many to sample, before the filter.
        tokens: length of each, the start and the prefix included.
        seed: of the sampling.
        keep: share of the sequences kept, those with the lowest perplexity under the model, in (0,
            1].
        hot, temperature, cooling: the temperature falls from `hot` to `temperature` linearly over
            the first `cooling` tokens.
        top_p: nucleus of the distribution that is sampled, in (0, 1]; never more than the 4096
            likeliest tokens.
        penalty: repetition penalty (Keskar et al., arXiv 1909.05858): the logits of tokens that the
            sequence already has are divided by it where positive and multiplied where negative;
            above 0, and 1 is none.
        overlap: largest share of a sequence's sampled 8-grams that an earlier one may have, in (0,
            1]; 1 allows copies.
        openings: no two sequences have the same first `openings` sampled tokens behind the same
            prefix; 0 allows it.
        batch: sequences at once.

    Raises:
        ValueError: one is out of range.
    """

    sequences: int = 40
    tokens: int = BLOCK
    seed: int = 0
    keep: float = KEEP
    hot: float = 2.5
    temperature: float = 0.9
    cooling: int = 8
    top_p: float = 0.95
    penalty: float = 1.0
    overlap: float = 1.0
    openings: int = 0
    batch: int = 40

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("keep", "top_p", "overlap"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in (0, 1], got {getattr(self, name)}")
        for name in ("sequences", "tokens", "temperature", "penalty", "batch"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}")

    @property
    def kept(self) -> int:
        """Sequences that the filter leaves of all."""
        return self.kept_of(self.sequences)

    def kept_of(self, written: int) -> int:
        """Sequences that the filter leaves of so many: at least one."""
        return max(1, round(self.keep * written))


def document_start(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> int:
    """Id of the token with which documents began in pre-training: the BOS token where the tokenizer
    begins a text with it, or with `bos` "yes".

    Raises:
        ValueError: the tokenizer has none of the usual ones, no BOS and no EOS; or see `bos_token`.
    """
    begins = bos_token(tokenizer, bos)
    if begins is not None:
        return begins
    vocabulary = tokenizer.get_vocab()
    # A BOS that is one of them is meant; OPT's vocabulary also has others, which its training never
    # saw.
    usual = (tokenizer.bos_token,) if tokenizer.bos_token in _DOCUMENT_STARTS else _DOCUMENT_STARTS
    for name in (*usual, tokenizer.bos_token, tokenizer.eos_token):
        if name in vocabulary:
            return int(vocabulary[name])
    raise ValueError(
        "the tokenizer has no token that starts a document, so the model cannot write text of"
        " its own"
    )


@torch.no_grad()
def generate_blocks(
    model: PreTrainedModel,
    start: int,
    options: SamplingOptions | None = None,
    *,
    prefixes: Int[Tensor, "n k"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "kept tokens"]:
    """Samples sequences from the document start, and drops the least likely.

    With `overlap` or `openings`, sequences too much like an earlier one are written anew up to 4
    times, so that as many are left as without; those that still repeat are dropped, and the result
    has fewer rows. The filter (`keep`) comes last.

    Args:
        model: a causal LM.
        start: id of the first token, see `document_start`; never sampled.
        options: how to sample; default `SamplingOptions()`.
        prefixes: (n, k) token ids behind the start, in turn: sequence i has row i modulo n.
            docs/methods.md, section 4, takes the first 1 to 4 tokens of documents, with hot =
            temperature; text from them is no longer the model's alone.
        progress: called with (tokens sampled, tokens in all), counted over the batches; what is
            written anew adds to both.

    Raises:
        ValueError: too many tokens for the model's positions, prefixes that do not suit them, or
            logits that are not finite.
    """
    options = options or SamplingOptions()
    sequences = options.sequences
    check_tokens(model, torch.full((1, options.tokens), start))
    prompts = _prompts(model, start, prefixes, sequences, options.tokens)
    generator = torch.Generator(device=home(model)).manual_seed(options.seed)
    writer = _Writer(model, options, generator, progress)
    ids, losses = prompts.new_empty(0, options.tokens), torch.zeros(0, device=home(model))
    # whose prompt each row has; the prompts without a row
    origin, missing = torch.arange(0), torch.arange(sequences)
    for _ in range(1 + _REWRITES):
        block, loss = writer.write(prompts, missing)
        ids, losses, origin = (
            torch.cat((ids, block)),
            torch.cat((losses, loss)),
            torch.cat((origin, missing)),
        )
        fine = distinct(
            ids, prompt=prompts.shape[1], overlap=options.overlap, openings=options.openings
        )
        ids, losses, origin = ids[fine.to(ids.device)], losses[fine.to(ids.device)], origin[fine]
        missing = torch.arange(sequences)[torch.isin(torch.arange(sequences), origin, invert=True)]
        if not len(missing):
            break
    order = losses.argsort(stable=True)[: options.kept_of(len(ids))]
    return ids[order.sort().values]


def distinct(
    ids: Int[Tensor, "n tokens"],
    *,
    prompt: int = 1,
    overlap: float = 0.5,
    openings: int = 0,
    ngram: int = 8,
) -> Bool[Tensor, " n"]:
    """Which sequences are new: True unless an earlier one that is True opens alike or shares too
    many n-grams.

    Args:
        ids: token ids.
        prompt: tokens at the start of each that were not sampled: they are no part of the n-grams.
        overlap: largest share of a sequence's different n-grams that any one earlier sequence may
            have, in (0, 1].
        openings: tokens behind the prompt that, together with it, must differ from every earlier
            sequence's; 0: none.
        ngram: tokens of an n-gram, at least 1; shorter sequences are compared whole.
    """
    # n-gram -> the sequences that have it
    owners: dict[tuple[int, ...], list[int]] = defaultdict(list)
    heads: set[tuple[int, ...]] = set()
    new = []
    for index, row in enumerate(ids.tolist()):
        sampled, head = row[prompt:], tuple(row[: prompt + openings])
        grams = {tuple(sampled[i : i + ngram]) for i in range(max(1, len(sampled) - ngram + 1))}
        shared = Counter(owner for gram in grams for owner in owners.get(gram, ()))
        new.append(
            max(shared.values(), default=0) <= overlap * len(grams)
            and not (openings and head in heads)
        )
        if new[-1]:
            heads.add(head)
            for gram in grams:
                owners[gram].append(index)
    return torch.tensor(new, dtype=torch.bool)


def _prompts(
    model: PreTrainedModel,
    start: int,
    prefixes: Int[Tensor, "n k"] | None,
    sequences: int,
    tokens: int,
) -> Int[Tensor, "sequences prompt"]:
    """What each sequence begins with: the start, and its prefix."""
    prompts = torch.full((sequences, 1), start, device=home(model))
    if prefixes is None:
        return prompts
    count, length = prefixes.shape
    if not (count and 0 < length < tokens - 1):
        raise ValueError(
            f"prefixes of shape {(count, length)} do not suit sequences of {tokens} tokens; "
            f"give at least one row, of 1 to {tokens - 2} tokens"
        )
    check_tokens(model, prefixes)
    return torch.cat((prompts, prefixes.to(prompts)[torch.arange(sequences) % count]), 1)


@dataclass(slots=True)
class _Writer:
    """Samples sequences, batch by batch, and counts what it has done."""

    model: PreTrainedModel
    options: SamplingOptions
    generator: torch.Generator
    progress: Callable[[int, int], None] | None
    done: int = 0
    planned: int = 0

    def write(
        self, prompts: Int[Tensor, "sequences prompt"], which: Int[Tensor, " n"]
    ) -> tuple[Int[Tensor, "n tokens"], Float[Tensor, " n"]]:
        """Samples a sequence from each of the prompts asked for; returns them and minus the
        log-likelihood of what was sampled.
        """
        parts = torch.split(which, self.options.batch)
        self.planned += len(parts) * self.options.tokens
        blocks, losses = zip(
            *(self._batch(prompts[part.to(prompts.device)]) for part in parts), strict=True
        )
        return torch.cat(blocks), torch.cat(losses)

    def _batch(
        self, prompts: Int[Tensor, "n prompt"]
    ) -> tuple[Int[Tensor, "n tokens"], Float[Tensor, " n"]]:
        block, cache, start = prompts, None, prompts[0, 0]
        loss = torch.zeros(len(block), device=block.device)
        for sampled in range(self.options.tokens - prompts.shape[1]):
            out = self.model(
                input_ids=block if cache is None else block[:, -1:],
                past_key_values=cache,
                use_cache=True,
            )
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(
                    "the model's logits are not finite: its weights are damaged, or"
                    f" {self.model.dtype} overflows"
                )
            # Another start would open a new document in the middle of a block.
            logits[:, start] = -torch.inf
            token = self._sample(logits, block, sampled)
            # Of the model as it is, whatever the temperature and the penalty made of it.
            loss -= logits.log_softmax(-1).gather(1, token).squeeze(1)
            block = torch.cat((block, token), 1)
            if self.progress is not None:
                self.progress(self.done + block.shape[1], self.planned)
        self.done += self.options.tokens
        return block, loss

    def _sample(
        self, logits: Float[Tensor, "n vocabulary"], block: Int[Tensor, "n so_far"], sampled: int
    ) -> Int[Tensor, "n 1"]:
        asked = self.options
        if asked.penalty != 1:
            seen = logits.gather(1, block)
            logits = logits.scatter(
                1, block, torch.where(seen > 0, seen / asked.penalty, seen * asked.penalty)
            )
        heat = max(
            asked.temperature,
            asked.hot + (asked.temperature - asked.hot) * sampled / max(asked.cooling, 1),
        )
        nucleus, candidates = _nucleus(logits / heat, asked.top_p)
        return candidates.gather(1, torch.multinomial(nucleus, 1, generator=self.generator))


def _nucleus(
    logits: Float[Tensor, "n vocabulary"], top_p: float
) -> tuple[Float[Tensor, "n candidates"], Int[Tensor, "n candidates"]]:
    """Probabilities (falling; 0 outside) and ids of the most likely tokens that together reach
    `top_p`, at most _MOST.
    """
    probabilities, order = logits.softmax(-1).topk(min(_MOST, logits.shape[-1]))
    before = probabilities.cumsum(-1) - probabilities
    return probabilities.masked_fill(before >= top_p, 0), order
