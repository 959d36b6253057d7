"""Allocates by block influence: layers that change the residual stream little lose more channels.

Sources: the measure is that of Men et al., "ShortGPT: Layers in Large Language Models are More
Redundant Than You Expect", arXiv 2403.03853, section 3; the softmax over layers is that of Lin et
al., "MoDeGPT: Modular Decomposition for Large Language Model Compression", ICLR 2025, arXiv
2408.09632.

What differs:
- [rec] the softmax temperature: the text of the second paper was not available;
- FFN channels only: a layer's influence is that of its attention too, which stays whole;
- channels that a layer cannot lose, because none would be left, are taken from the others
  (`allocation.fitted`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from prunenet.models.layers import check_tokens, decoder_layers
from prunenet.policies.methods.widths.allocation import Budget, fitted
from prunenet.runtime.placement import home


def by_influence(
    budget: Budget, influence: Sequence[float], *, temperature: float = 0.1
) -> list[int]:
    """Removes the share L ratio softmax(-influence / temperature)_l of the channels of layer l.

    That is the ratio on average, and more where influence is low.

    Args:
        budget: of all layers.
        influence: of each layer, see `block_influence`.
        temperature: above 0; the higher, the more equal the shares.

    Raises:
        ValueError: a temperature that is not positive, not one influence a layer, or one that is
            not finite.
    """
    whole = [float(cost * d_ff) for cost, d_ff in zip(budget.costs, budget.d_ff, strict=True)]
    gone = float(budget.cost(budget.d_ff) - budget.parameters)
    removed = influence_shares(whole, gone, influence, temperature=temperature)
    return fitted(
        budget,
        [(1 - share) * d_ff for share, d_ff in zip(removed.tolist(), budget.d_ff, strict=True)],
    )


def influence_shares(
    whole: Sequence[float], removed: float, influence: Sequence[float], *, temperature: float = 0.1
) -> Float[Tensor, " layers"]:
    """Returns the share of each layer that block influence removes; it may exceed 1.

    Args:
        whole: cost of each layer.
        removed: cost that goes, in all.
        influence, temperature: as for `by_influence`, which says the errors too.
    """
    if temperature <= 0:
        raise ValueError(f"the temperature of a softmax must be above 0, got {temperature}")
    found = torch.tensor(influence, dtype=torch.float64)
    if len(found) != len(whole) or not bool(torch.isfinite(found).all()):
        raise ValueError(f"{len(whole)} layers need one finite influence each, got {[*influence]}")
    weights = (-found / temperature).softmax(0)
    # Layers of equal size: their mean removed share is the budget's, whatever the weights.
    return weights * removed / (weights @ torch.tensor(whole).double())


@torch.no_grad()
def block_influence(
    model: PreTrainedModel, ids: Int[Tensor, "n tokens"], *, batch: int = 4
) -> list[float]:
    """Returns 1 - cosine of the hidden states in front of and behind each decoder layer.

    Averages over tokens; in [0, 2].

    Args:
        model: in eval mode.
        ids: token blocks.
        batch: blocks in one forward pass.

    Raises:
        ValueError: blocks that the model cannot read.
    """
    check_tokens(model, ids)
    layers = list(decoder_layers(model))
    sums = torch.zeros(len(layers), dtype=torch.float64)

    def measure(index: int) -> Any:
        def hook(
            _module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any
        ) -> None:
            before = inputs[0] if inputs else named["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines = F.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += (1 - cosines).cpu().sum(dtype=torch.float64)

        return hook

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_hook(measure(index), with_kwargs=True))
        for part in torch.split(ids.to(home(model)), batch):
            model(input_ids=part, use_cache=False)
    return (sums / ids.numel()).tolist()
