"""Keeps a model's next-token distributions in 257 numbers a token, and compares other logits with
them (docs/methods.md, sections 12 and 14).

A distribution is binned: the likeliest successors one by one, all others as one bin. Merging bins
never raises a divergence, so what is measured here is at most the whole one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Divergence = Literal["kl", "tv"]
"""KL(dense || other) in nats, or total variation in [0, 1]; both a token."""
TOP = 256
"""Successors of a token whose logits are compared one by one; the others are one bin."""
_REST = 1e-6  # least mass of the rest, below which float32 has no digits left


@dataclass(frozen=True, slots=True)
class Successors:
    """Holds the next-token distributions of a dense model.

    Attributes:
        top: the likeliest tokens.
        logs: log-probabilities of those, then of all others together.
    """

    top: Int[Tensor, "n tokens top"]
    logs: Float[Tensor, "n tokens bins"]

    @classmethod
    def of(cls, logits: Float[Tensor, "n tokens vocabulary"]) -> Successors:
        """Bins the distributions that these logits give."""
        top = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
        return cls(top, _binned(logits, top).log_softmax(-1))

    def under(self, logits: Float[Tensor, "n tokens vocabulary"]) -> Successors:
        """Bins the distributions that other logits give, into the same bins."""
        return Successors(self.top, _binned(logits, self.top).log_softmax(-1))

    @property
    def probabilities(self) -> Float[Tensor, "n tokens bins"]:
        """Of the bins; they sum to 1."""
        return self.logs.exp()

    def compared(self, logits: Float[Tensor, "n tokens vocabulary"]) -> tuple[Tensor, Tensor]:
        """Returns the effect of other logits, sqrt(p) (dz - E_p dz), (n, tokens, bins), and the
        mean KL to them.
        """
        logs = _binned(logits, self.top).log_softmax(-1)
        change, p = logs - self.logs, self.probabilities
        centred = change - (p * change).sum(-1, keepdim=True)
        return p.sqrt() * centred, -(p * change).sum(-1).mean()

    def lost(
        self, logits: Float[Tensor, "n tokens vocabulary"], divergence: Divergence
    ) -> Float[Tensor, ""]:
        """Returns the mean divergence of other logits over tokens; differentiable in them."""
        logs = _binned(logits, self.top).log_softmax(-1)
        if divergence == "tv":
            return (self.probabilities - logs.exp()).abs().sum(-1).mean() / 2
        return (self.probabilities * (self.logs - logs)).sum(-1).mean()


def _binned(logits: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities of the top successors, then of the mass of all others."""
    logits = logits.float()
    chosen = logits.gather(-1, top) - logits.logsumexp(-1, keepdim=True)
    rest = (1 - chosen.exp().sum(-1, keepdim=True)).clamp_min(_REST).log()
    return torch.cat((chosen, rest), -1)
