"""The scorer: statistics of a channel and of its layer in, one logit out; and one log-odds per
layer. No width in its weights.

Where the published scorer (arXiv 2501.15296, section 3.1) maps a d_ff x d_model matrix with weights
of that shape, this one reads standardised statistics channel by channel: one policy serves every
model of a family. It does not see the ratio, so that its ranking of a layer's channels, and with it
the nesting of masks, is the same at every ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu


class ChannelScorer(nn.Module):
    """A fixed closed-form score plus a learned residual (a perceptron whose last layer starts at
    zero); and where to cut.

    The layers' log-odds (`WidthHead`) start at zero, which is uniform widths.

    Args:
        statistics: names of the channel statistics, in order.
        context: names of the layer context, in order.
        hidden: widths of the perceptron's hidden layers; () makes the residual linear.
        prior: weight of each statistic in the closed-form score; those not named weigh 0. An
            untrained scorer is this score.
        generator: draws the hidden layers' start.

    Raises:
        ValueError: the prior names a statistic that is not in `statistics`.
    """

    def __init__(
        self,
        statistics: Sequence[str],
        context: Sequence[str],
        *,
        hidden: Sequence[int] = (32, 32),
        prior: Mapping[str, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        prior = prior or {}
        unknown = sorted(set(prior) - set(statistics))
        if unknown:
            raise ValueError(
                f"the prior weighs unknown statistics: {', '.join(unknown)}; known:"
                f" {', '.join(statistics)}"
            )
        self.register_buffer(
            "prior", torch.tensor([float(prior.get(name, 0.0)) for name in statistics])
        )
        sizes = [len(statistics) + len(context), *hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], 1, bias=False)
        nn.init.zeros_(self.out.weight)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            nn.init.orthogonal_(layer.weight, gain=2**0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        self.widths = WidthHead(context, generator=generator)

    prior: Tensor

    def forward(
        self,
        statistics: Float[Tensor, "*layers d_ff n_stats"],
        context: Float[Tensor, "*layers n_context"],
    ) -> Float[Tensor, "*layers d_ff"]:
        """Logits, centred within each layer (only their differences matter). Higher stays
        longer.
        """
        wide = context.unsqueeze(-2).expand(*statistics.shape[:-1], -1)
        x = torch.cat((statistics, wide), dim=-1)
        for layer in self.hidden:
            x = torch.nn.functional.silu(layer(x))
        logits: Tensor = statistics @ self.prior + self.out(x).squeeze(-1)
        return logits - logits.mean(-1, keepdim=True)

    def offsets(self, context: Float[Tensor, "layers n_context"]) -> Float[Tensor, " layers"]:
        """Log-odds of each layer's share of channels kept, from the context of all layers; see
        `prunenet.policies.training.swept_widths`.
        """
        offsets: Tensor = self.widths(context)
        return offsets


class WidthHead(nn.Module):
    """Context of a layer -> log-odds of its share of channels kept. Starts at zero: uniform widths.

    Args:
        context: names of the layer context, in order.
        hidden: width of the hidden layer.
        generator: draws the hidden layer's start.
    """

    def __init__(
        self, context: Sequence[str], *, hidden: int = 16, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(len(context), hidden)
        self.out = nn.Linear(hidden, 1, bias=False)
        nn.init.orthogonal_(self.hidden.weight, gain=2**0.5, generator=generator)
        nn.init.uniform_(self.hidden.bias, -1, 1, generator=generator)
        nn.init.zeros_(self.out.weight)

    def forward(self, context: Float[Tensor, "layers n_context"]) -> Float[Tensor, " layers"]:
        """Offsets, centred over the layers (only their differences matter)."""
        offsets: Tensor = self.out(silu(self.hidden(context))).squeeze(-1)
        return offsets - offsets.mean()


class SlotAllocator(nn.Module):
    """Where to cut under one budget: one `WidthHead` a structure, and how much each structure stays
    beside the others.

    Starts at equal log-odds of all slots. No number of layers is in its weights, so that one policy
    serves every model.

    Args:
        context: names of the layer context, in order.
        structures: names of the structures, in the order of their columns behind the context.
        generator: draws the hidden layers' start.
    """

    BOUND = 3.0
    """Log-odds lie within this of each other's middle: no slot is emptied, or kept whole, before
    others are cut.
    """

    def __init__(
        self,
        context: Sequence[str],
        structures: Sequence[str],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({s: WidthHead(context, generator=generator) for s in structures})
        self.levels = nn.Parameter(torch.zeros(len(structures)))

    def forward(self, features: Float[Tensor, "slots n"]) -> Float[Tensor, " slots"]:
        """Log-odds of each slot's share that stays.

        Args:
            features: the layer's context, then one column a structure, 1 where the slot is of it
                (`prunenet.evaluation.slots.Game.features`).
        """
        kinds = features[:, -len(self.levels) :]
        context = features[:, : -len(self.levels)]
        offsets = kinds @ self.levels
        for number, head in enumerate(self.heads.values()):
            rows = kinds[:, number] > 0
            if bool(rows.any()):
                offsets = offsets.masked_scatter(rows, offsets[rows] + head(context[rows]))
        return self.BOUND * torch.tanh(offsets / self.BOUND)
