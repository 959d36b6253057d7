"""Random: scores channels by uniform draws (docs/methods.md, section 6).

Source: the control of every method. Report several seeds with their spread.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.evidence.structures import Scores


def scores(evidence: Evidence) -> list[Float[Tensor, " _"]]:
    """Draws uniformly in [0, 1) for each layer; masks of one seed nest as the ratio rises."""
    return _draws(evidence, evidence.generator())


def with_heads(evidence: Evidence) -> Scores:
    """Draws as `scores` for channels, then for the groups of heads of each layer."""
    generator = evidence.generator()
    channels = _draws(evidence, generator)
    groups = [
        torch.rand(a.groups, generator=generator).to(a.out.device) for a in evidence.attentions
    ]
    return Scores(channels, groups)


def _draws(evidence: Evidence, generator: torch.Generator) -> list[Float[Tensor, " _"]]:
    return [torch.rand(ffn.d_ff, generator=generator).to(ffn.up.device) for ffn in evidence.ffns]
