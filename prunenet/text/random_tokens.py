"""Inputs for moments where there is no text: directions on a sphere, and uniformly drawn tokens
(METHODS.md 3).
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.layers import check_tokens


def random_blocks(
    model: PreTrainedModel, count: int, window: int, generator: torch.Generator
) -> Int[Tensor, "count window"]:
    """Uniformly drawn token ids (METHODS.md 3, `tokens`): (count, window).

    Raises:
        ValueError: fewer than one block or token, or blocks longer than the model reads.
    """
    if count < 1 or window < 1:
        raise ValueError(
            f"blocks of random tokens need a count and a window of at least 1, got {count} and"
            f" {window}"
        )
    # Rows of the embedding table beyond the vocabulary are padding that was never trained.
    rows = min(
        model.config.vocab_size, model.get_input_embeddings().get_parameter("weight").shape[0]
    )
    blocks = torch.randint(rows, (count, window), generator=generator, device=generator.device)
    check_tokens(model, blocks)
    return blocks
