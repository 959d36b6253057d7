"""One method, one allocation, one ratio -> a cut, and the narrow model that it makes in memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.heads import out_linears
from prunenet.models.hooks import zeroing
from prunenet.models.layers import FFN, down_linears, iter_ffns
from prunenet.models.masks import top_channels
from prunenet.models.surgery import narrowed
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.evidence.structures import Scores, StructurePool, ranked, shared
from prunenet.policies.methods.papers.flap import group_mean_bias, mean_bias, zscore
from prunenet.policies.methods.searched_widths import searched_widths
from prunenet.policies.methods.table import METHODS, Allocation, Compensation, Method
from prunenet.policies.methods.widths.allocation import (
    Budget,
    global_sort,
    outlier_share,
    owl,
    protected,
    uniform,
)
from prunenet.policies.methods.widths.influence import by_influence
from prunenet.refit.moments import LayerWalk
from prunenet.runtime.placement import check_together, derive, is_placed, present

WITH_HEADS = ("uniform", "protected", "global")
"""Allocations that are defined for attention heads too."""
_BY_SCORES = ("global", "predictor", "evolution")


@dataclass(frozen=True, slots=True, eq=False)
class BaselineCut:
    """What a method makes of a model at one size.

    Attributes:
        widths: channels left in each layer.
        keep: (d_ff,) mask of each layer. For a merge, a template of the right width and no choice
            of channels.
        merged: the FFN of each layer where channels were merged; None where they were chosen.
        biases: (d_model,) of each layer, to be added behind the down linear; None without
            compensation.
        groups: (groups,) mask of the attention heads of each layer; None where heads were left
            whole.
        group_biases: (d_model,) of each layer, to be added behind attention's output linear.
    """

    widths: list[int]
    keep: list[Bool[Tensor, " _"]]
    merged: list[FFN] | None = None
    biases: list[Float[Tensor, " _"]] | None = None
    groups: list[Bool[Tensor, " _"]] | None = None
    group_biases: list[Float[Tensor, " _"]] | None = None

    @torch.no_grad()
    def applied(self, model: PreTrainedModel) -> PreTrainedModel:
        """The narrow model, for evaluation in memory; the dense one stays as it is (see
        `prunenet.models.surgery.narrowed`).

        A bias is added to the down linear (and to attention's output linear where heads are cut),
        whether or not the family's configuration knows of one. It costs d_model parameters a layer,
        and can be saved and loaded only where the configuration has it (OPT, Phi, GPT-NeoX; Llama
        with `mlp_bias`, for heads with `attention_bias`).

        Args:
            model: the model that the cut was made for.
        """
        narrow = narrowed(model, self.keep, self.groups)
        if self.merged is not None:
            check_together(model, "merging channels")
            for target, source in zip(iter_ffns(narrow), self.merged, strict=True):
                for name in ("gate", "up", "down", "gate_bias", "up_bias"):
                    if (view := getattr(target, name)) is not None:
                        view.copy_(getattr(source, name))
        for biases, linears in ((self.biases, down_linears), (self.group_biases, out_linears)):
            if biases is None:
                continue
            for linear, bias in zip(linears(narrow), biases, strict=True):
                if is_placed(model):
                    derive(linear, "bias", bias if linear.bias is None else partial(_plus, bias))
                    continue
                added = bias.to(linear.weight)
                # A new parameter: the old one, where there is one, is shared with the dense model.
                linear.bias = nn.Parameter(
                    added if linear.bias is None else linear.bias + added, requires_grad=False
                )
        return narrow


def cut(
    evidence: Evidence,
    method: str | Method,
    ratio: float,
    *,
    allocation: Allocation | Sequence[int] | None = None,
    compensate: Compensation | None = None,
    sequential: bool = True,
    round_to: int = 8,
    floor: int = 1,
    heads: bool = False,
) -> BaselineCut:
    """Chooses, or merges, the FFN channels of every layer; with `heads`, chooses attention heads
    too.

    All cuts at one ratio leave equal total parameters, biases of a compensation not counted: see
        `allocation`, `structures`.

    Args:
        evidence: the model and the text.
        method: a name in `METHODS`, or a method of one's own.
        ratio: share of the FFN channels of all layers removed, in [0, 1).
        allocation: how widths are chosen, or the widths themselves (within the budget); default the
            method's own. For "global", scores that are not comparable between layers are
            zscore in each layer first. "owl" and "influence" read text. "predictor" and
            "evolution" judge about 60 architectures on 1024 tokens of it, see `searched_widths`.
        compensate: "mean_bias" adds what the removed channels write on average in the dense model;
            default the method's own.
        sequential: measure each layer behind the cut ones, where the method is published so; False
            measures the dense model.
        round_to: widths are multiples of this.
        floor: channels that each layer keeps at least.
        heads: cut groups of attention heads as well, at least one stays in a layer. The budget does
            not change: the more of them go, the more channels stay. By allocation "uniform" or
            "protected" the layers that are cut lose the same share of both (LLM-Pruner); by
            "global" both are ranked together (FLAP, SAAP); no other is defined.

    Raises:
        UnsupportedArchitecture: `heads`, and those of the model's family cannot be cut.
        ValueError: an unknown method or allocation, text that is missing, a ratio out of range,
            widths that do not fit, or `heads` with a method or an allocation that knows of channels
            alone.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; it is one of {', '.join(METHODS)}")
        method = METHODS[method]
    if method.rebuild is not None:
        raise ValueError(
            f"{method.name} cuts no FFN channels and has no masks of them; ask pruned_model for its"
            " model"
        )
    budget = Budget.of(evidence.model, ratio, round_to=round_to, floor=floor)
    allocation = method.allocation if allocation is None else allocation
    # scores of the dense model then only serve the widths
    on_the_way = sequential and method.layer_score is not None
    groups, scores = None, None
    if heads:
        groups, scores, budget = _groups(evidence, method, budget, allocation)
    elif method.score is not None and not (on_the_way and allocation not in _BY_SCORES):
        scores = method.score(evidence)
    widths = _widths(evidence, method, budget, allocation, scores)
    if method.merge is not None:
        keep = [torch.arange(d_ff) < width for d_ff, width in zip(budget.d_ff, widths, strict=True)]
        return BaselineCut(widths, keep, merged=method.merge(evidence, widths))
    if on_the_way:
        keep = _sequential(evidence, method, widths)
    else:
        assert scores is not None
        keep = [top_channels(row, width) for row, width in zip(scores, widths, strict=True)]
    biases, group_biases = None, None
    if (method.compensate if compensate is None else compensate) == "mean_bias":
        biases = list(map(mean_bias, evidence.ffns, evidence.energies, keep))
        if groups is not None:
            group_biases = list(
                map(group_mean_bias, evidence.attentions, evidence.head_outputs, groups)
            )
    return BaselineCut(widths, keep, biases=biases, groups=groups, group_biases=group_biases)


def pruned_model(
    evidence: Evidence, method: str | Method, ratio: float, **options: Any
) -> PreTrainedModel:
    """The narrow model of `cut` with the same arguments, for evaluation in memory; see
    `BaselineCut.applied`.

    A method that cuts no FFN channels (slicegpt) makes a model of no more parameters; of the
    options it takes `round_to`.

    Raises:
        ValueError: as `cut`.
    """
    row = METHODS.get(method) if isinstance(method, str) else method
    if row is not None and row.rebuild is not None:
        round_to = options.pop("round_to", 8)
        if options.pop("allocation", "uniform") != "uniform" or options:
            raise ValueError(
                f"{row.name} has one allocation, uniform, and no options but round_to; leave the"
                " others out"
            )
        return row.rebuild(evidence, ratio, round_to)
    return cut(evidence, method, ratio, **options).applied(evidence.model)


def _groups(
    evidence: Evidence, method: Method, budget: Budget, allocation: Allocation | Sequence[int]
) -> tuple[list[Bool[Tensor, " _"]], list[Float[Tensor, " _"]], Budget]:
    """The heads that stay, and for the channels: their scores, and what the budget leaves them."""
    if method.with_heads is None:
        able = ", ".join(name for name, row in METHODS.items() if row.with_heads is not None)
        raise ValueError(f"{method.name} scores no attention heads; the methods that do: {able}")
    if not isinstance(allocation, str) or allocation not in WITH_HEADS:
        raise ValueError(
            f"attention heads are cut by allocation {', '.join(WITH_HEADS)}, got {allocation!r}"
        )
    pool = StructurePool.of(evidence.model, budget)
    scores = method.with_heads(evidence)
    if allocation == "global":
        both = (
            scores
            if method.comparable
            else Scores(*map(_zscores, (scores.channels, scores.groups)))
        )
        first, last = method.protects if method.allocation == "global" else (0, 0)
        counts = ranked(pool, both, first=first, last=last)
    else:
        first, last = method.protects if allocation == "protected" else (0, 0)
        counts = shared(pool, first=first, last=last)
    groups = [top_channels(row, count) for row, count in zip(scores.groups, counts, strict=True)]
    return groups, scores.channels, pool.rest(counts)


def _zscores(rows: list[Float[Tensor, " _"]]) -> list[Float[Tensor, " _"]]:
    return [zscore(row.float()) for row in rows]


def _widths(
    evidence: Evidence,
    method: Method,
    budget: Budget,
    allocation: Allocation | Sequence[int],
    scores: list[Float[Tensor, " _"]] | None,
) -> list[int]:
    if not isinstance(allocation, str):
        widths = list(allocation)
        if len(widths) != len(budget.d_ff) or budget.cost(widths) > budget.parameters:
            raise ValueError(
                f"widths {widths} do not fit {len(budget.d_ff)} layers and {budget.parameters} FFN"
                " parameters"
            )
        return widths
    if allocation == "uniform":
        return uniform(budget)
    if allocation == "protected":
        return protected(budget, *method.protects)
    if allocation == "owl":
        layers = (
            [(_weight(linear), norm) for linear, norm in layer] for layer in evidence.input_norms
        )
        return owl(budget, [outlier_share(*zip(*layer, strict=True)) for layer in layers])
    if allocation == "influence":
        return by_influence(budget, evidence.influence)
    if allocation not in _BY_SCORES:
        known = ", ".join(get_args(Allocation))
        raise ValueError(
            f"an allocation is one of {known}, or a list of widths, got {allocation!r}"
        )
    if scores is None:
        raise ValueError(
            f"{method.name} has no scores to sort; use another allocation than {allocation!r}"
        )
    if allocation != "global":
        return searched_widths(evidence, budget, scores, allocation)
    rows = scores if method.comparable else _zscores(scores)
    first, last = method.protects if method.allocation == "global" else (0, 0)
    return global_sort(budget, rows, first=first, last=last)


def _weight(linear: nn.Linear) -> Tensor:
    with present(linear):
        return linear.weight.detach()


def _sequential(
    evidence: Evidence, method: Method, widths: Sequence[int]
) -> list[Bool[Tensor, " _"]]:
    """Each layer is scored behind the layers in front of it as they are after their cut."""
    assert method.layer_score is not None
    downs, keep = down_linears(evidence.model), []
    with ExitStack() as hooks:
        walk = LayerWalk(evidence.model, evidence.ids, changing=True)
        for index in walk:
            scores = method.layer_score(evidence.ffns[index], walk.energies(index))
            keep.append(top_channels(scores, widths[index]))
            hooks.enter_context(downs[index].register_forward_pre_hook(zeroing(~keep[-1])))
    return keep


def _plus(bias: Tensor, tensor: Tensor) -> Tensor:
    return tensor + bias.to(tensor)
