"""Text that a model writes by itself: calibration without data (METHODS.md 4).

After Ji et al., "Beware of Calibration Data for Pruning Large Language Models", ICLR 2025, arXiv 2410.17711 (self-generated
calibration, perplexity filter), and arXiv 2410.17170 (from the document start alone, with a temperature that begins high).
What differs: strictly data-free by default (no document prefixes); the share dropped by the filter and the schedule are
arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.layers import check_tokens

_MOST = 4096  # sorting a whole vocabulary of 49 152 takes a third as long as the model's own step
# Tokens that stand between documents in pre-training; an instruct model's BOS is often a chat token, so these go first.
_DOCUMENT_STARTS = ("<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>", "</s>")


def document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token with which documents began in pre-training.

    Raises:
        ValueError: the tokenizer has none of the usual ones, no BOS and no EOS.
    """
    vocabulary = tokenizer.get_vocab()
    # A BOS that is one of them is meant; OPT's vocabulary also has others, which its training never saw.
    usual = (tokenizer.bos_token,) if tokenizer.bos_token in _DOCUMENT_STARTS else _DOCUMENT_STARTS
    for name in (*usual, tokenizer.bos_token, tokenizer.eos_token):
        if name in vocabulary:
            return int(vocabulary[name])
    raise ValueError("the tokenizer has no token that starts a document, so the model cannot write text of its own")


@torch.no_grad()
def generate_blocks(
    model: PreTrainedModel,
    start: int,
    *,
    sequences: int = 40,
    tokens: int = 256,
    keep: float = 0.8,
    hot: float = 2.5,
    temperature: float = 0.9,
    cooling: int = 8,
    top_p: float = 0.95,
    batch: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "kept tokens"]:
    """Sequences sampled from the document start alone; the least likely are dropped.

    Args:
        model: a causal LM.
        start: id of the first token, see `document_start`.
        sequences: how many to sample.
        tokens: length of each, the start included.
        keep: share of the sequences kept, those with the lowest perplexity under the model, in (0, 1].
        hot, temperature, cooling: the temperature falls from `hot` to `temperature` linearly over the first `cooling` tokens.
        top_p: nucleus of the distribution that is sampled, in (0, 1].
        batch: sequences at once.
        seed: of the sampling.
        progress: called with (tokens sampled, tokens in all), counted over the batches.

    Raises:
        ValueError: a share out of range, too many tokens for the model's positions, or logits that are not finite.
    """
    for name, share in (("keep", keep), ("top_p", top_p)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {share}")
    check_tokens(model, torch.full((1, tokens), start))
    generator = torch.Generator(device=model.device).manual_seed(seed)
    ids, losses = [], []
    for first in range(0, sequences, batch):
        block = torch.full((min(batch, sequences - first), 1), start, device=model.device)
        loss = torch.zeros(len(block), device=model.device)
        cache = None
        for step in range(1, tokens):
            out = model(input_ids=block[:, -1:], past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(f"the model's logits are not finite: its weights are damaged, or {model.dtype} overflows")
            heat = max(temperature, hot + (temperature - hot) * (step - 1) / max(cooling, 1))
            # Another start would open a new document in the middle of a block.
            logits[:, start] = -torch.inf
            nucleus, candidates = _nucleus(logits / heat, top_p)
            token = candidates.gather(1, torch.multinomial(nucleus, 1, generator=generator))
            loss -= logits.log_softmax(-1).gather(1, token).squeeze(1)
            block = torch.cat((block, token), 1)
            if progress is not None:
                progress(first // batch * tokens + step + 1, -(-sequences // batch) * tokens)
        ids.append(block)
        losses.append(loss)
    order = torch.cat(losses).argsort(stable=True)[: max(1, round(keep * sequences))]
    return torch.cat(ids)[order.sort().values]


def _nucleus(
    logits: Float[Tensor, "n vocabulary"], top_p: float
) -> tuple[Float[Tensor, "n candidates"], Int[Tensor, "n candidates"]]:
    """Probabilities (falling; 0 outside) and ids of the most likely tokens that together reach `top_p`, at most _MOST."""
    probabilities, order = logits.softmax(-1).topk(min(_MOST, logits.shape[-1]))
    before = probabilities.cumsum(-1) - probabilities
    return probabilities.masked_fill(before >= top_p, 0), order
