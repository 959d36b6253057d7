"""Inputs for moments where there is no text: directions on a sphere, and uniformly drawn tokens (METHODS.md 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.layers import FFN, activation, check_tokens, iter_ffns
from prunenet.refit.moments import Moments


@torch.no_grad()
def sphere_moments(model: PreTrainedModel, *, samples: int = 4096, generator: torch.Generator) -> Iterator[Moments]:
    """The moments of each layer for isotropic inputs x = gamma * sqrt(d_model) z / |z|, z ~ N(0, I): from the weights alone.

    Source: METHODS.md 3, `sphere`. gamma is the scale of the norm in front of the FFN (1 where there is none); a LayerNorm's
    centring and bias are left out. In float32.

    Args:
        model: a causal LM, read one layer at a time.
        samples: inputs per layer, at least 1; drawn anew for each.
        generator: of the draws.
    """
    act = activation(model)
    for ffn in iter_ffns(model):
        z = torch.randn(samples, ffn.d_model, generator=generator, device=generator.device).to(ffn.up.device)
        x = torch.nn.functional.normalize(z, dim=-1) * ffn.d_model**0.5
        h = _activations(ffn, x if ffn.norm_scale is None else x * ffn.norm_scale.float(), act)
        yield Moments(h.T @ h / samples, h.mean(0), samples)


def random_blocks(model: PreTrainedModel, count: int, window: int, generator: torch.Generator) -> Int[Tensor, "count window"]:
    """Uniformly drawn token ids (METHODS.md 3, `tokens`): (count, window).

    Raises:
        ValueError: fewer than one block or token, or blocks longer than the model reads.
    """
    if count < 1 or window < 1:
        raise ValueError(f"blocks of random tokens need a count and a window of at least 1, got {count} and {window}")
    # Rows of the embedding table beyond the vocabulary are padding that was never trained.
    rows = min(model.config.vocab_size, model.get_input_embeddings().get_parameter("weight").shape[0])
    blocks = torch.randint(rows, (count, window), generator=generator, device=generator.device)
    check_tokens(model, blocks)
    return blocks


def _activations(ffn: FFN, x: Float[Tensor, "n d_model"], act: Callable[[Tensor], Tensor]) -> Float[Tensor, "n d_ff"]:
    """h of an FFN for the given inputs, in float32."""

    def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, weight.float(), None if bias is None else bias.float())

    up = linear(ffn.up, ffn.up_bias)
    return act(up) if ffn.gate is None else act(linear(ffn.gate, ffn.gate_bias)) * up
