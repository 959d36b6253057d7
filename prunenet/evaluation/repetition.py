"""Repetition in greedy text: perplexity hides a collapse (docs/methods.md, section 18)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.evaluation.speed import continued, evaluating
from prunenet.models.layers import positions
from prunenet.runtime.placement import home
from prunenet.runtime.products import with_fast_products
from prunenet.text.choices import Bos
from prunenet.text.generate import SamplingOptions, document_start, generate_blocks

_TEXTS, _OPENING, _TOKENS, _GRAM = 8, 8, 128, 4


@dataclass(frozen=True, slots=True)
class Repetition:
    """Of greedy texts of 128 tokens.

    Attributes:
        distinct_4: different 4-grams over all 4-grams, of all texts together; in (0, 1].
        repetition_rate: share of the 4-grams that occurred before in the same text; in [0, 1).
    """

    distinct_4: float
    repetition_rate: float


def sampled_openings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto"
) -> Int[Tensor, "texts tokens"]:
    """Has a model open 8 documents: the document start and 8 sampled tokens each.

    Raises:
        ValueError: the tokenizer has no token that starts a document.
    """
    options = SamplingOptions(sequences=_TEXTS, tokens=1 + _OPENING, keep=1.0, batch=_TEXTS)
    with evaluating(model):
        return generate_blocks(model, document_start(tokenizer, bos), options).cpu()


@with_fast_products
def repetition(model: PreTrainedModel, openings: Int[Tensor, "texts tokens"]) -> Repetition:
    """Continues each opening greedily by 128 tokens (or what the model has positions for), and
    counts 4-grams of what is written.

    Raises:
        ValueError: the model has positions for fewer than 4 tokens more.
    """
    most = positions(model)
    tokens = _TOKENS if most is None else min(_TOKENS, most - openings.shape[1])
    if tokens < _GRAM:
        raise ValueError(
            f"repetition counts {_GRAM}-grams of greedy text, and this model has positions for"
            f" {tokens} tokens behind an opening; leave `repetition` out"
        )
    return counted(continued(model, openings.to(home(model)), tokens).cpu())


def counted(texts: Int[Tensor, "texts tokens"]) -> Repetition:
    """The figures of texts of at least 4 tokens."""
    grams = [list(map(tuple, text.unfold(0, _GRAM, 1).tolist())) for text in texts]
    total = sum(map(len, grams))
    return Repetition(
        distinct_4=len(set().union(*grams)) / total,
        repetition_rate=(total - sum(len(set(found)) for found in grams)) / total,
    )
