"""FLAP: scores channels by the fluctuation of their activations.

Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI
2024, arXiv 2312.11983, sections 4.1 to 4.3; docs/methods.md, section 6. Statistics of the dense
model in one pass, one global sort, mean-bias compensation.

What differs:
- heads are cut only on request (`with_heads`), and as groups where query heads share a key-value
  head;
- every layer keeps at least one rounding step of channels, and widths are rounded (see
  `allocation`);
- text is the caller's; the authors use 1024 sequences of 128 tokens of WikiText-2's training split.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunenet.models.heads import Attention
from prunenet.models.layers import FFN
from prunenet.policies.methods.evidence.measurements import Evidence, HeadOutputs
from prunenet.policies.methods.evidence.structures import Scores
from prunenet.refit.moments import Energies


def fluctuation(ffn: FFN, energies: Energies) -> Float[Tensor, " d_ff"]:
    """Returns Var_t(X_j) |W_:,j|^2 of each channel j.

    The first factor is the variance over tokens of the down matrix' input, the second the squared
    norm of its column.
    """
    variance = (energies.energy - energies.mean.square()).clamp_min(0)
    return variance * ffn.down.float().square().sum(0)


def scores(evidence: Evidence) -> list[Float[Tensor, " _"]]:
    """Returns fluctuations, standardised within each layer, so that one sort ranks all channels."""
    return [
        zscore(fluctuation(ffn, found))
        for ffn, found in zip(evidence.ffns, evidence.energies, strict=True)
    ]


def with_heads(evidence: Evidence) -> Scores:
    """Returns scores of channels, and `group_fluctuation` of heads, on one scale."""
    parts = zip(evidence.attentions, evidence.head_outputs, strict=True)
    return Scores(
        scores(evidence), [group_fluctuation(attention, outputs) for attention, outputs in parts]
    )


def group_fluctuation(attention: Attention, outputs: HeadOutputs) -> Float[Tensor, " groups"]:
    """Returns the mean over a group's coordinates j of z((Var_t(X_j) |W_:,j|^2)^2).

    X is the input of the output linear, and z standardises within the layer. As in the authors'
    code (CASIA-IVA-Lab/FLAP, lib/prune.py, structure AL-AM), which squares the fluctuations of
    attention but not those of channels, and standardises coordinates before averaging over a head.
    A head of many coordinates therefore scores near 0, the mean of all coordinates; standardised
    sums over heads would spread as single channels do.
    """
    fluctuations = outputs.variance * attention.out.float().square().sum(0)
    return zscore(fluctuations.square()).view(attention.groups, -1).mean(1)


def zscore(scores: Float[Tensor, " d_ff"]) -> Float[Tensor, " d_ff"]:
    """Returns (s - mean) / standard deviation (with d_ff - 1); zeros where all are equal."""
    deviation = scores.std() if len(scores) > 1 else scores.new_zeros(())
    centred = scores - scores.mean()
    return torch.where(deviation == 0, 0.0, centred / deviation)


def mean_bias(
    ffn: FFN, energies: Energies, keep: Bool[Tensor, " d_ff"]
) -> Float[Tensor, " d_model"]:
    """Returns W_R mu_R: what the removed channels R write on average."""
    removed = ~keep.to(ffn.down.device)
    return ffn.down.float()[:, removed] @ energies.mean[removed]


def group_mean_bias(
    attention: Attention, outputs: HeadOutputs, groups: Bool[Tensor, " groups"]
) -> Float[Tensor, " d_model"]:
    """Returns what the removed groups of heads write on average."""
    removed = ~groups.to(attention.out.device).repeat_interleave(attention.group_inputs)
    return attention.out.float()[:, removed] @ outputs.mean[removed]
