"""Allocates widths to layers under one budget of parameters, for any scores (docs/methods.md,
sections 1.2, 5 and 6).

The budget is what a cut of the same ratio in every layer leaves, so that methods are compared at
equal total parameters (docs/methods.md, section 10). Widths are multiples of `round_to`, or whole
layers. Every allocation meets the budget exactly where all channels cost the same and layers are
multiples of `round_to`; otherwise from below, by less than one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.layers import active_parameters, count_parameters, iter_ffns


@dataclass(frozen=True, slots=True)
class Budget:
    """Holds the number of parameters that the FFN channels of a cut model may have.

    Attributes:
        d_ff: channels of each layer of the dense model.
        costs: parameters of one channel of each layer.
        parameters: most parameters of all channels that stay.
        round_to: widths are multiples of this, or d_ff.
        floor: channels that every layer keeps, at least 1; rounded up to a multiple.
        only: the widths of all layers where the model can have no others at this size, since its
            layers or experts share one number; None where each may have its own.
    """

    d_ff: tuple[int, ...]
    costs: tuple[int, ...]
    parameters: int
    round_to: int = 8
    floor: int = 1
    only: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, model: PreTrainedModel, ratio: float, *, round_to: int = 8, floor: int = 1
    ) -> Budget:
        """Makes the budget that is left when `ratio` of the channels of every layer is removed.

        Args:
            model: the dense one.
            ratio: share of FFN channels, in [0, 1).
            round_to, floor: see `Budget`.

        Raises:
            ValueError: a number out of range; see `prunenet.models.masks.width_at`.
        """
        ffns = list(iter_ffns(model))
        d_ff, costs = tuple(ffn.d_ff for ffn in ffns), tuple(ffn.channel_parameters for ffn in ffns)
        anatomy = Anatomy.of(model)
        widths = anatomy.even_widths(ratio, round_to)
        kept = sum(cost * width for cost, width in zip(costs, widths, strict=True))
        return cls(d_ff, costs, kept, round_to, floor, None if anatomy.free else tuple(widths))

    @property
    def share(self) -> float:
        """Share of the channels' parameters that stays, in (0, 1]."""
        return self.parameters / self.cost(self.d_ff)

    def cost(self, widths: Sequence[int]) -> int:
        """Returns the parameters of so many channels of each layer."""
        return sum(cost * width for cost, width in zip(self.costs, widths, strict=True))

    def least(self, layer: int) -> int:
        """Returns the fewest channels that a layer may keep."""
        return min(-(-max(self.floor, 1) // self.round_to) * self.round_to, self.d_ff[layer])


def parameters_left(
    model: PreTrainedModel, ratio: float, round_to: int = 8, *, active: bool = False
) -> int:
    """Returns the parameters left when `ratio` of the FFN channels of every layer is removed.

    Args:
        model: the dense one.
        ratio, round_to: as for `Budget.of`.
        active: counts those that one token uses, see `prunenet.models.layers.active_parameters`.

    Raises:
        ValueError: as `Budget.of`.
    """
    anatomy = Anatomy.of(model)
    widths = anatomy.even_widths(ratio, round_to)
    gone = sum(
        (group.width - width) * group.channel_parameters * (group.share if active else 1)
        for group, width in zip(anatomy.groups, widths, strict=True)
    )
    total = active_parameters(anatomy) if active else count_parameters(model)[0]
    return round(total - gone)


def uniform(budget: Budget) -> list[int]:
    """Keeps the same share of every layer."""
    if budget.only is not None:
        return list(budget.only)
    return fitted(budget, [budget.share * d_ff for d_ff in budget.d_ff])


def global_sort(
    budget: Budget, scores: Sequence[Float[Tensor, " _"]], *, first: int = 0, last: int = 0
) -> list[int]:
    """Ranks the channels of all layers together (FLAP, arXiv 2312.11983, section 4.2).

    Args:
        budget: its floor is kept in every layer first.
        scores: of each layer, comparable between layers; higher stays longer.
        first, last: how many layers at each end are left whole.

    Raises:
        ValueError: not one score a channel, one that is not a number, or whole layers that exceed
            the budget.
    """
    if [len(row) for row in scores] != list(budget.d_ff):
        raise ValueError(
            f"a global sort needs one score a channel, got {[len(row) for row in scores]} of"
            f" {list(budget.d_ff)}"
        )
    ranked = [row.detach().double().cpu().clone() for row in scores]
    if any(bool(row.isnan().any()) for row in ranked):
        raise ValueError("scores contain NaN; the model's weights or activations are damaged")
    inner = _inner(budget, first, last)
    for layer, row in enumerate(ranked):
        row[row.topk(budget.least(layer) if layer in inner else len(row)).indices] = torch.inf
    layers = torch.cat([torch.full((d_ff,), layer) for layer, d_ff in enumerate(budget.d_ff)])
    layers = layers[torch.cat(ranked).argsort(descending=True, stable=True)]
    spent = torch.tensor(budget.costs)[layers].cumsum(0)
    counts = torch.bincount(layers[spent <= budget.parameters], minlength=len(ranked))
    return fitted(budget, counts.double().tolist())


def protected(budget: Budget, first: int, last: int) -> list[int]:
    """Leaves layers at both ends whole and cuts all others by the same share.

    As LLM-Pruner does (arXiv 2305.11627).

    Args:
        budget: of all layers.
        first, last: how many layers at each end are left whole, 0 or more.

    Raises:
        ValueError: nothing is left to cut, or the other layers cannot make up for the whole ones.
    """
    inner = _inner(budget, first, last)
    whole = budget.cost([0 if layer in inner else d_ff for layer, d_ff in enumerate(budget.d_ff)])
    left, room = budget.parameters - whole, budget.cost(budget.d_ff) - whole
    return fitted(
        budget,
        [
            left / room * d_ff if layer in inner else float(d_ff)
            for layer, d_ff in enumerate(budget.d_ff)
        ],
    )


def _inner(budget: Budget, first: int, last: int) -> range:
    """Returns the layers that may be cut.

    Raises:
        ValueError: they cannot make up for those left whole.
    """
    inner = range(first, len(budget.d_ff) - last)
    least = [
        budget.least(layer) if layer in inner else d_ff for layer, d_ff in enumerate(budget.d_ff)
    ]
    if first + last > 0 and budget.cost(least) > budget.parameters:
        raise ValueError(
            f"{len(budget.d_ff)} layers with the first {first} and the last {last} left whole"
            f" cannot be cut to {budget.share:.0%} of their channels; protect fewer layers or"
            " remove less"
        )
    return inner


def owl(budget: Budget, outliers: Sequence[float], *, lam: float = 0.08) -> list[int]:
    """Keeps more channels in layers with more outliers.

    As OWL does (Yin et al., ICML 2024, arXiv 2310.05175, section 4, and the authors' code): the
    shares kept span 2 lam and have the budget's share as their mean. What exceeds a whole layer
    goes to the others.

    Args:
        budget: of all layers.
        outliers: of each layer, see `outlier_share`.
        lam: half the span between the layers' shares.

    Raises:
        ValueError: an outlier share is not finite, or as `fitted`.
    """
    shares = outlier_shares(budget.share, outliers, lam=lam)
    return fitted(
        budget, [share * d_ff for share, d_ff in zip(shares.tolist(), budget.d_ff, strict=True)]
    )


def outlier_shares(
    share: float, outliers: Sequence[float], *, lam: float = 0.08
) -> Float[Tensor, " layers"]:
    """Returns what OWL keeps of each layer, `share` in the mean; arguments and errors as for `owl`.

    A share may lie outside [0, 1].
    """
    found = torch.tensor(outliers, dtype=torch.float64)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"OWL needs finite shares of outliers, got {list(outliers)}")
    spread = found.max() - found.min()
    offset = 2 * lam * (found - found.min()) / spread if spread > 0 else torch.zeros_like(found)
    shares: Tensor = share + offset - offset.mean()
    return shares


def outlier_share(
    weights: Sequence[Float[Tensor, "_ _"]],
    input_norms: Sequence[Float[Tensor, " _"]],
    *,
    m: float = 5.0,
) -> float:
    """Returns the percentage of a layer's Wanda scores |W_ij| |X_j| above m times their mean.

    Counts all its matrices together; in [0, 100].

    Args:
        weights: (d_out, d_in) of each linear of the layer.
        input_norms: (d_in,) of each.
        m: OWL's M.
    """
    scores = [
        weight.float().abs() * norm.float()
        for weight, norm in zip(weights, input_norms, strict=True)
    ]
    total = sum(score.numel() for score in scores)
    threshold = m * sum(float(score.double().sum()) for score in scores) / total
    return 100 * sum(int((score > threshold).sum()) for score in scores) / total


def fitted(budget: Budget, wanted: Sequence[float]) -> list[int]:
    """Rounds wanted widths to multiples that fill the budget.

    Steps go where the shortfall is largest, lower layers first.

    Args:
        budget: met from below, by less than the smallest step that is left.
        wanted: channels of each layer, of any size and sum.

    Raises:
        ValueError: the floors alone exceed the budget.
    """
    step = budget.round_to
    widths = []
    for layer, (target, d_ff) in enumerate(zip(wanted, budget.d_ff, strict=True)):
        # 1e-9: a product that should be a whole number may fall just under it.
        rounded = d_ff if target >= d_ff else int((target + 1e-9) // step) * step
        widths.append(max(min(rounded, d_ff), budget.least(layer)))
    left = budget.parameters - budget.cost(widths)
    while left < 0:
        open_ = [i for i, width in enumerate(widths) if width > budget.least(i)]
        if not open_:
            raise ValueError(
                f"{budget.share:.1%} of the channels are fewer than every layer must keep; remove"
                " less"
            )
        i = max(open_, key=lambda i: widths[i] - wanted[i])
        lower = max((widths[i] - 1) // step * step, budget.least(i))
        left += budget.costs[i] * (widths[i] - lower)
        widths[i] = lower
    while True:
        raised = [
            min((width // step + 1) * step, d_ff)
            for width, d_ff in zip(widths, budget.d_ff, strict=True)
        ]
        prices = [c * (new - old) for c, new, old in zip(budget.costs, raised, widths, strict=True)]
        open_ = [i for i, price in enumerate(prices) if 0 < price <= left]
        if not open_:
            return widths
        i = max(open_, key=lambda i: wanted[i] - widths[i])
        left -= prices[i]
        widths[i] = raised[i]
