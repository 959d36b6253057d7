"""SAAP: scores structures by fused Taylor importances and their stability.

Source: Zheng et al., "Adaptive Pruning for Large Language Models with Structural Importance
Awareness", arXiv 2412.15127; docs/methods.md, section 8. Documented: vector-wise and element-wise
Taylor importances, fused as two outputs with homoscedastic Gaussian noise; an importance
fluctuation and a stability indicator make layers comparable; all structures are ranked together.
Its fine-tuning is in `saap_tuning`.

What differs. All formulas below are [rec], our reconstruction, and nothing measured with them is
the paper's number:
- fused_j = sum_m I_m,j / (2 s_m^2) + log s_m, over the two importances m, with s_m^2 = mean_j I_m,j
  of the layer: the optimum of the homoscedastic loss (Kendall, Gal and Cipolla, CVPR 2018, arXiv
  1705.07115) for structures that share s. I_m is measured in the unit of the layer where its mean
  is smallest, so that every log term is 0 or more and the logarithm of fused exists whatever the
  scale of the loss;
- fluctuation F_j = standard deviation / mean over calibration sequences of sum_m I_m,j / (2 s_m^2);
  the stability indicator A is F standardised within the layer; a channel's score is z(log fused) -
  beta A, z over all channels of the model. Fluctuating channels are removed, where FLAP removes
  stable ones: `removes` changes the sign, so that both can be measured;
- a layer has one type of structure, FFN channels, or with heads a second one, groups of heads
  (`with_heads`), with an s and a standardisation of F of its own, z over both; the first 3 and the
  last 2 layers are left whole; beta is 0.5;
- I_2 is LLM-Pruner's element-wise importance with both terms of the expansion ("mix").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from prunenet.policies.methods.evidence.gradients import TaylorSums
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.evidence.structures import Scores
from prunenet.policies.methods.papers.flap import zscore
from prunenet.runtime.choices import check_choice

Element = Literal["element1", "element2", "mix"]
Removes = Literal["unstable", "stable"]
"""Channels that the stability term removes first."""
# Least fused importance, whose mean in a layer is 1 or more: a dead channel must not dominate z.
_LEAST = 1e-6


def scores(
    evidence: Evidence,
    *,
    beta: float = 0.5,
    removes: Removes = "unstable",
    element: Element = "mix",
) -> list[Float[Tensor, " _"]]:
    """Returns z(log fused) - beta A of each channel, comparable between layers.

    With `removes="stable"` the score is z(log fused) + beta A.

    Args:
        evidence: gradients are measured on 10 sequences of 64 tokens of its text, together and one
            by one.
        beta: weight of the stability term, 0 or more (docs/methods.md, section 8: 0, 0.25, 0.5 and
            1).
        removes: see `Removes`.
        element: the element-wise importance, see `llm_pruner.Variant`.

    Raises:
        ValueError: a negative beta, an unknown name, or no text.
    """
    return _ranked(evidence, beta, removes, element, heads=False)


def with_heads(
    evidence: Evidence,
    *,
    beta: float = 0.5,
    removes: Removes = "unstable",
    element: Element = "mix",
) -> Scores:
    """Scores channels and groups of heads together; arguments and errors as for `scores`."""
    found = _ranked(evidence, beta, removes, element, heads=True)
    layers = len(evidence.taylor)
    return Scores(found[:layers], found[layers:])


def _ranked(
    evidence: Evidence, beta: float, removes: Removes, element: Element, *, heads: bool
) -> list[Float[Tensor, " _"]]:
    """Scores the channels of each layer, then the groups of each."""
    check_choice("removes", removes, Removes)
    check_choice("element", element, Element)
    if beta < 0:
        raise ValueError(
            f"beta must be 0 or more, got {beta}; to remove stable channels say removes='stable'"
        )
    together = [*evidence.taylor, *(evidence.group_taylor if heads else [])]
    importances = [_importances(sums, element) for sums in together]
    ranked = zscore(torch.cat(fused(importances)).clamp_min(_LEAST).log())
    found = list(torch.split(ranked, [row.shape[1] for row in importances]))
    if beta > 0:
        alone = evidence.taylor_by_sequence
        if heads:
            alone = [
                [*a, *b] for a, b in zip(alone, evidence.group_taylor_by_sequence, strict=True)
            ]
        sequences = [[_importances(sums, element) for sums in layers] for layers in alone]
        weight = -beta if removes == "unstable" else beta
        for layer, importance in enumerate(importances):
            each = torch.stack([layers[layer] for layers in sequences])
            found[layer] = found[layer] + weight * zscore(fluctuation(each, importance.mean(1)))
    return found


def fused(importances: Sequence[Float64[Tensor, "2 _"]]) -> list[Float64[Tensor, " _"]]:
    """Returns sum_m I_m / (2 s_m^2) + log s_m, at least 0.

    s_m^2 is the mean I_m of the layer, in units of the smallest such mean.

    Args:
        importances: of each layer, (2, d_ff), 0 or more.
    """
    means = torch.stack([importance.mean(1) for importance in importances])
    # A layer without any importance gets the smallest scale that does not swamp the others.
    means = means.maximum(1e-9 * means.amax(0)).clamp_min(torch.finfo(torch.float64).tiny)
    logs = (means / means.amin(0)).log().sum(1) / 2
    return [
        (importance / (2 * mean[:, None])).sum(0) + log
        for importance, mean, log in zip(importances, means, logs, strict=True)
    ]


def fluctuation(
    importances: Float64[Tensor, "sequences 2 d_ff"], means: Float64[Tensor, " 2"]
) -> Float64[Tensor, " d_ff"]:
    """Returns standard deviation / mean, over sequences, of sum_m I_m / (2 s_m^2).

    It is 0 for a channel whose importance is always 0.

    Args:
        importances: of one layer, measured on each sequence alone.
        means: s_m^2 of the layer.
    """
    tiny = torch.finfo(torch.float64).tiny
    values = (importances / (2 * means.clamp_min(tiny)[:, None])).sum(1)
    return values.std(0, correction=0) / values.mean(0).clamp_min(tiny)


def _importances(sums: TaylorSums, element: str) -> Float64[Tensor, "2 d_ff"]:
    """Returns vector-wise and element-wise importances, summed over slices as in LLM-Pruner."""
    return torch.stack(
        [part.abs().sum(0).double() for part in (sums.vector, getattr(sums, element))]
    )
