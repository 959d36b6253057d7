"""Chooses experts of a mixture by REAP, AIMER, or at random, and says what fewer of them cost
(docs/methods.md, section 19).

The same number of experts stays in every layer. What differs from the papers: where
experts fall into routing groups, each group keeps as many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.experts import Experts, concentration
from prunenet.models.layers import active_parameters, count_parameters
from prunenet.policies.options import ExpertsBy, PruneOptions
from prunenet.refit.expert_use import check_readable, expert_use

CANDIDATES = 8
"""Numbers of experts that are tried at most, spread over those that a budget allows."""


def keep_experts(
    model: PreTrainedModel,
    left: int,
    by: ExpertsBy = "aimer",
    *,
    blocks: Tensor | None = None,
    seed: int = 0,
) -> dict[int, Tensor]:
    """Masks of the experts that stay, by layer.

    Args:
        model: a causal LM with experts; not changed.
        left: experts that stay in each layer.
        by: "aimer" reads weights alone, "reap" measures on text.
        blocks: (n, tokens) token ids for "reap".
        seed: of "random".

    Raises:
        ValueError: a number that a layer cannot be left with, or no blocks where they are needed.
        UnsupportedArchitecture: as `Experts.of`.
    """
    check_experts(model, by, left, measured=blocks is not None)
    experts, scores = Experts.of(model), expert_scores(model, by, blocks, seed)
    return {layer: experts.best(values, left) for layer, values in scores.items()}


def expert_scores(
    model: PreTrainedModel, by: ExpertsBy, blocks: Tensor | None, seed: int = 0
) -> dict[int, Tensor]:
    """Scores of the experts of each layer; the highest stay. Arguments as for `keep_experts`."""
    if by == "reap":
        assert blocks is not None, "check_experts"
        return expert_use(model, blocks)
    return scores_without_text(model, Experts.of(model), by, seed)


def check_experts(
    model: PreTrainedModel, by: ExpertsBy, left: int | None = None, *, measured: bool = True
) -> None:
    """Checks that experts of a model can be removed, before anything is measured.

    Args:
        model: only shapes and configuration are read.
        by: see `keep_experts`.
        left: experts that stay in each layer, where that is known.
        measured: whether there is text to measure on.

    Raises:
        ValueError, UnsupportedArchitecture: as `keep_experts`.
    """
    experts = Experts.of(model)
    if left is not None:
        experts.check(left)
    if by != "reap":
        return
    check_readable(model)
    if not measured:
        raise ValueError("reap measures experts on text: give `blocks`, or choose them by aimer")


def scores_without_text(
    model: PreTrainedModel, experts: Experts, by: ExpertsBy, seed: int
) -> dict[int, Tensor]:
    """Scores of the experts of each layer from the weights, or drawn; the highest stay.

    Args:
        model: with experts.
        experts: of the model.
        by: "aimer" or "random".
        seed: of "random".
    """
    if by == "aimer":
        return concentration(model)
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.rand(experts.count, generator=generator) for layer in experts.layers}


@dataclass(frozen=True, slots=True)
class MixtureCost:
    """What a mixture counts with fewer experts, in parameters: all, or the active ones.

    Attributes:
        total: of all experts.
        count: experts of each layer.
        each: what goes with one expert of each layer, rows of routers included.
    """

    total: float
    count: int
    each: float
    _shared: float
    _bank: float
    _used: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, active: bool) -> MixtureCost:
        """Counts a model's; shapes alone are read.

        Args:
            model: a mixture.
            active: whether active parameters count.
        """
        anatomy, experts = Anatomy.of(model), Experts.of(model)
        tensors = dict(model.named_parameters(remove_duplicate=False))
        numbered = [tensors[name] for name in experts.axes if name in tensors]
        each = sum(tensor.numel() for tensor in numbered) // experts.count
        sizes = [(group.expert, group.channel_parameters * group.width) for group in anatomy.groups]
        bank = sum(size for expert, size in sizes if expert is not None) // experts.count
        return cls(
            total=active_parameters(anatomy) if active else count_parameters(model)[0],
            count=experts.count,
            # a token passes through as many experts when some are gone
            each=each - bank if active else each,
            _shared=sum(size for expert, size in sizes if expert is None),
            _bank=bank,
            _used=experts.least if active else None,
        )

    def whole(self, left: int) -> float:
        """What counts with so many experts of whole width."""
        return self.total - (self.count - left) * self.each

    def channels(self, left: int) -> float:
        """The part of it that is in channels."""
        return self._shared + (left if self._used is None else self._used) * self._bank


def line_of_cost(model: PreTrainedModel, options: PruneOptions, ratio: float) -> dict[int, float]:
    """Numbers of experts, and with each the share of the channels that must go: all cost the same.

    Of numbers whose widths are rounded to the same the most experts are taken. The fewest experts
    may cost less than the budget: then no channels go. They are all that there is where experts go
    alone, and the budget is met from below.

    Args:
        model: a mixture; shapes alone are read.
        options: shares a budget with experts.
        ratio: as much of the budget goes as that share of the FFN channels counts, in [0, 1).

    Returns:
        At most `CANDIDATES`, the most experts first.

    Raises:
        ValueError: experts alone cannot give as much.
        UnsupportedArchitecture: as `Experts.of`.
    """
    experts, price = Experts.of(model), MixtureCost.of(model, options.counts_active)
    wanted = price.total - ratio * price.channels(price.count)
    found: dict[int, float] = {}
    for left in reversed(experts.possible):
        over = (price.whole(left) - wanted) / price.channels(left)
        if options.parts and 1e-9 < over < 1:
            found[left] = over
        if over <= 1e-9:
            found[left] = 0.0
            break
    if not found:
        most = 1 - price.whole(experts.fewest) / price.total
        raise ValueError(
            f"whole experts hold at most {most:.1%} of the parameters, for {experts.fewest} of"
            f" {experts.count} stay in each layer; ask for less, or say"
            " structures='channels,experts'"
        )
    anatomy, best = Anatomy.of(model), dict[tuple[int, ...], int]()
    for left, over in found.items():
        best.setdefault(tuple(anatomy.uniform_widths(over, options.round_to)), left)
    numbers, last = list(best.values()), len(best) - 1
    steps = min(CANDIDATES, len(best)) - 1
    places = [round(step * last / steps) for step in range(steps + 1)] if steps else [0]
    return {numbers[place]: found[numbers[place]] for place in places}
