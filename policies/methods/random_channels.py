"""Uniformly random channels (METHODS.md section 6): the baseline of every method. Report several seeds with their spread."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prunenet.policies.methods.evidence import Evidence


def scores(evidence: Evidence) -> list[Float[Tensor, " _"]]:
    """Uniform draws in [0, 1) for each layer; masks of one seed nest as the ratio rises."""
    generator = evidence.generator()
    return [torch.rand(ffn.d_ff, generator=generator).to(ffn.up.device) for ffn in evidence.ffns]
