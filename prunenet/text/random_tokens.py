"""Draws token ids uniformly: inputs for moments where there is no text (docs/methods.md,
section 3).
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.layers import check_tokens, text_config


def random_blocks(
    model: PreTrainedModel,
    count: int,
    window: int,
    generator: torch.Generator,
    *,
    bos: int | None = None,
) -> Int[Tensor, "count length"]:
    """Draws token ids uniformly (docs/methods.md, section 3, `tokens`).

    Args:
        model: causal LM; ids are of its vocabulary.
        count, window: blocks, and tokens drawn for each.
        generator: of the draw.
        bos: id of the BOS token in front of each; None: none, and `length` is the window.

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
        text_config(model).vocab_size, model.get_input_embeddings().get_parameter("weight").shape[0]
    )
    blocks = torch.randint(rows, (count, window), generator=generator, device=generator.device)
    if bos is not None:
        blocks = torch.cat((torch.full_like(blocks[:, :1], bos), blocks), 1)
    check_tokens(model, blocks)
    return blocks
