"""Implements the rules of a sweep over the layers, for a batch of masks, for both environments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.envs.rewards import Reward
from prunenet.features.from_activations import channel_features
from prunenet.features.from_weights import layer_context, observe
from prunenet.models.anatomy import Anatomy
from prunenet.models.layers import Weights, ffn_widths, structure
from prunenet.models.masks import check_keep
from prunenet.runtime.choices import as_python, check_ratio, is_whole

PROGRESS = ("ratio", "target", "budget_left")
"""Position in the sweep, appended to the layer's context in an observation; each in [0, 1].

ratio: of the sweep. target: share of this layer's channels that spends the budget evenly over the
layers left. budget_left: share of the whole budget not yet spent.
"""


def groups_played(model: Weights) -> tuple[int, ...]:
    """Returns the numbers of the groups that a sweep plays: those of one width, since an action
    must have one length.

    That is all of them in most models. Where several fields hold widths (of experts, and of dense
    layers or shared experts beside them), it is the width that holds most channels; a policy
    scores channels of any width.

    Raises:
        ValueError: the layers were cut to different widths.
    """
    anatomy = Anatomy.of(structure(model))
    widths = set(anatomy.widths)
    if len(widths) != 1 and anatomy.free:
        raise ValueError(
            f"the layers of this model have {len(widths)} different widths ({min(widths)} to"
            f" {max(widths)}); train on the dense model that it was cut from"
        )
    channels: Counter[int] = Counter()
    for width in anatomy.widths:
        channels[width] += width
    played = channels.most_common(1)[0][0]
    return tuple(group.number for group in anatomy.groups if group.width == played)


@dataclass(frozen=True, slots=True)
class View:
    """Holds the statistics that observations show, computed once for a model.

    Attributes:
        statistics: (d_ff, n_stats) for each layer, in [-4, 4]. A layer is here a group of channels:
            an FFN, or an expert of one.
        context: (layers, n_context), in [-4, 4].
        groups: number of each in the model; see `groups_played`.
        widths: of all groups of the model.
    """

    statistics: tuple[Float[Tensor, "d_ff n_stats"], ...]
    context: Float[Tensor, "layers n_context"]
    groups: tuple[int, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, model: Weights, blocks: Int[Tensor, "n tokens"] | None = None) -> View:
        """Computes the statistics of a model's layers.

        Args:
            model: in memory or streamed.
            blocks: token blocks; given, statistics of activations on them are computed as well.

        Raises:
            ValueError: as `groups_played` or `channel_features`.
            UnsupportedArchitecture: see `prunenet.models.architectures`.
        """
        groups, widths = groups_played(model), tuple(ffn_widths(model))
        if isinstance(model, PreTrainedModel) and blocks is not None:
            features, context = channel_features(model, blocks), layer_context(model)
            played = _together([features[number] for number in groups])
            return cls(played, context[list(groups)], groups, widths)
        if blocks is not None:
            raise ValueError(
                "activations are measured on a model in memory, and this one is read layer by layer"
                " from its files: load it, or leave the blocks out"
            )
        every = list(observe(model))
        statistics, rows = zip(*(every[number] for number in groups), strict=True)
        return cls(_together(statistics), torch.stack(_together(rows)), groups, widths)

    def layer_terms(
        self, reward: Reward, layer: int, keep: Bool[Tensor, "masks d_ff"]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns what a reward pays for masks of a layer."""
        return reward.layer(self.groups[layer], keep)

    def sweep_terms(
        self, reward: Reward, keep: Sequence[Bool[Tensor, "masks d_ff"]]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns what a reward pays for masks of all layers; what is not played stays whole."""
        masks = dict(zip(self.groups, keep, strict=True))
        count, device = len(keep[0]), keep[0].device
        return reward.sweep(
            [
                masks[number]
                if number in masks
                else torch.ones(count, width, dtype=torch.bool, device=device)
                for number, width in enumerate(self.widths)
            ]
        )

    @property
    def layers(self) -> int:
        return len(self.statistics)

    @property
    def d_ff(self) -> int:
        return self.statistics[0].shape[0]


def _together(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Moves all tensors to the device of the first; layers may be on several devices."""
    return tuple(row.to(rows[0].device) for row in rows)


class Sweep:
    """Plays a batch of sweeps in step: all at the same layer, each with its own masks and budget.

    The budget is (1 - ratio) * layers * d_ff channels. A mask may keep more or fewer channels than
    the target as long as each later layer can still keep `min_width`. The whole sweep may overdraw
    its budget by at most `slack` * d_ff.

    Args:
        view: statistics of the model.
        reward: see `prunenet.envs.rewards`.
        masks: sweeps in the batch, at least 1.
        min_width: fewest channels that a layer may keep, at least 1.
        slack: share of one layer's d_ff, in [0, 1].
    """

    def __init__(
        self, view: View, reward: Reward, masks: int = 1, *, min_width: int = 1, slack: float = 0.25
    ) -> None:
        if not (is_whole(min_width) and 1 <= min_width <= view.d_ff):
            raise ValueError(f"min_width must be in [1, {view.d_ff}], got {min_width}")
        if not 0 <= slack <= 1:
            raise ValueError(f"slack must be in [0, 1], got {slack}")
        self.view = view
        self.reward = reward
        self.masks = masks
        self.min_width = int(min_width)
        self.overdraft = int(slack * view.d_ff)
        self.device = view.statistics[0].device
        self.start(0.0)

    def start(self, ratio: float) -> None:
        """Begins a sweep at the first layer. Raises ValueError as `budget_at`."""
        self.ratio, self.budget, self.layer = float(ratio), self.budget_at(ratio), 0
        self.left = torch.full((self.masks,), self.budget, dtype=torch.int64, device=self.device)
        self.kept: list[Bool[Tensor, "masks d_ff"]] = []

    def budget_at(self, ratio: float) -> int:
        """Channels that stay at a ratio.

        Raises:
            ValueError: ratio not in [0, 1), or so high that layers cannot keep `min_width`.
        """
        total = self.view.layers * self.view.d_ff
        budget = max(round((1 - check_ratio(ratio)) * total), self.view.layers)
        if budget < self.view.layers * self.min_width:
            raise ValueError(
                f"at ratio {ratio} the {self.view.layers} layers cannot keep {self.min_width}"
                " channels each"
            )
        return budget

    @property
    def done(self) -> bool:
        return self.layer == self.view.layers

    def target(self) -> Int[Tensor, " masks"]:
        """Returns the width that spends the budget evenly over the layers left.

        It lies in [min_width, d_ff].
        """
        left = max(self.view.layers - self.layer, 1)
        return (self.left / left).round().long().clamp(self.min_width, self.view.d_ff)

    def context(self) -> Float[Tensor, "masks n"]:
        """Returns the layer's context, then PROGRESS, for each mask."""
        row = self.view.context[min(self.layer, self.view.layers - 1)]
        progress = torch.stack(
            (
                torch.full_like(self.left, 1, dtype=torch.float32) * self.ratio,
                self.target() / self.view.d_ff,
                (self.left / self.budget).clamp(0, 1),
            ),
            dim=1,
        )
        return torch.cat((row.expand(self.masks, -1), progress), dim=1)

    def most(self) -> Int[Tensor, " masks"]:
        """Returns the most channels that each mask may keep now; d_ff or more: any number."""
        later = self.view.layers - self.layer - 1
        return self.left + self.overdraft - later * self.min_width

    def legal(self, keep: Bool[Tensor, "masks d_ff"]) -> Bool[Tensor, "masks d_ff"]:
        """Returns the masks, those that break the budget's bounds changed as little as it takes:
        the first dropped channels stay, or the last kept ones go.
        """
        width = keep.sum(1, keepdim=True)
        least = torch.full_like(width, self.min_width)
        missing, over = least - width, width - self.most().clamp(min=self.min_width)[:, None]
        added = (~keep) & ((~keep).cumsum(1) <= missing)
        kept_behind = width - keep.cumsum(1)
        dropped = keep & (kept_behind < over)
        return (keep | added) & ~dropped

    def play(
        self, keep: Bool[Tensor, "masks d_ff"]
    ) -> tuple[Float[Tensor, " masks"], dict[str, Float[Tensor, " masks"]]]:
        """Plays one mask in each sweep and moves to the next layer.

        Returns:
            The reward (masks,) and each of its terms.

        Raises:
            ValueError: a mask keeps nothing, has the wrong length, or breaks the budget's bounds.
        """
        check_keep(keep, self.view.d_ff)
        width = keep.sum(1)
        self._check_bounds(width, self.most())
        terms = self.view.layer_terms(self.reward, self.layer, keep)
        self.left -= width
        self.kept.append(keep)
        self.layer += 1
        if self.done:
            terms |= self.view.sweep_terms(self.reward, self.kept)
            terms["overdraft"] = -(-self.left).clamp(min=0) / self.view.d_ff
        total = (
            torch.stack(list(terms.values())).sum(0)
            if terms
            else torch.zeros(self.masks, device=self.device)
        )
        return total, terms

    def _check_bounds(self, width: Int[Tensor, " masks"], most: Int[Tensor, " masks"]) -> None:
        if bool((width < self.min_width).any()):
            raise ValueError(
                f"layer {self.layer} must keep at least {self.min_width} channels, got"
                f" {int(width.min())}"
            )
        over = width > most
        if bool(over.any()):
            worst = int(over.nonzero()[0])
            raise ValueError(
                f"a mask that keeps {int(width[worst])} channels of layer {self.layer} breaks the"
                f" budget: at most {int(most[worst])} can be kept here at ratio {self.ratio}"
            )


def draw_ratio(ratio: float | Sequence[float], uniform: float) -> float:
    """Returns the sweep's ratio.

    Args:
        ratio: the ratio itself, or a range (low, high).
        uniform: position in the range, in [0, 1].

    Raises:
        ValueError: neither of these, a bound is not in [0, 1), or low is above high.
    """
    low, high = check_ratios(ratio)
    return low + (high - low) * uniform


def check_ratios(ratio: float | Sequence[float]) -> tuple[float, float]:
    """Returns the bounds of a ratio or a range. Raises as `draw_ratio`."""
    given = as_python(ratio)
    bounds = [*given] if isinstance(given, Sequence) else [given, given]
    if len(bounds) != 2 or not all(isinstance(bound, Real) for bound in bounds):
        raise ValueError(
            f"`ratio` is a share in [0, 1), or a range (low, high) of them, got {ratio!r}"
        )
    low, high = (check_ratio(bound) for bound in bounds)
    if low > high:
        raise ValueError(f"the range of ratios must rise, got {low} to {high}")
    return low, high
