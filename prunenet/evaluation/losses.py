"""Losses of a causal language model on token blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel


def next_token_loss(
    model: PreTrainedModel, ids: Int[Tensor, "n tokens"], *, unscored: int = 0
) -> Float[Tensor, ""]:
    """Computes the mean negative log-likelihood of every token but the first of each sequence, in
    nats; differentiable.

    Args:
        model: a causal LM.
        ids: token blocks, without padding.
        unscored: positions at the start of each block whose predictions do not count: 1 where
            blocks begin with BOS (`CalibrationSet.bos`).
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, unscored:-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), ids[:, unscored + 1 :].flatten())
