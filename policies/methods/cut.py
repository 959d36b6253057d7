"""Applies one method and one allocation at one ratio: the cut, and the narrow model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.heads import out_linears
from prunenet.models.layers import FFN, down_linears, iter_ffns
from prunenet.models.masks import top_channels
from prunenet.models.surgery import narrowed, zeroed
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.evidence.structures import Scores, StructurePool, ranked, shared
from prunenet.policies.methods.papers.flap import group_mean_bias, mean_bias, zscore
from prunenet.policies.methods.searched_widths import searched_widths
from prunenet.policies.methods.table import METHODS, Allocation, Method, MethodRefit
from prunenet.policies.methods.widths.allocation import (
    Budget,
    global_sort,
    owl,
    protected,
    uniform,
)
from prunenet.policies.methods.widths.influence import by_influence
from prunenet.refit.moments import LayerWalk
from prunenet.runtime.choices import check_choice
from prunenet.runtime.placement import check_together, derive, is_placed

WITH_HEADS = ("uniform", "protected", "global")
"""Allocations that are defined for attention heads as well."""
_BY_SCORES = ("global", "predictor", "evolution")


@dataclass(frozen=True, slots=True, eq=False)
class BaselineCut:
    """Holds a method's cut of a model at one size.

    Attributes:
        widths: channels left in each layer.
        keep: (d_ff,) mask of each layer. For a merge, a mask of the right width that chooses no
            channels.
        merged: the FFN of each layer where channels were merged; None where they were chosen.
        biases: (d_model,) of each layer, to be added behind the down linear; None without
            mean-bias compensation.
        groups: (groups,) mask of the attention heads of each layer; None where heads are left
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
        """Makes the narrow model, for evaluation in memory; the dense one stays as it is.

        Parameters are shared as in `prunenet.models.surgery.narrowed`. A bias is added to the down
        linear (and to attention's output linear where heads are cut) in every family. It costs
        d_model parameters a layer, and can be saved and loaded only where the configuration has a
        bias (OPT, Phi, GPT-NeoX; Llama with `mlp_bias`, for heads with `attention_bias`).

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
    refit: MethodRefit | None = None,
    sequential: bool = True,
    round_to: int = 8,
    heads: bool = False,
) -> BaselineCut:
    """Chooses, or merges, the FFN channels of every layer; with `heads`, attention heads as well.

    All cuts at one ratio leave the same number of parameters, without the biases of a mean-bias
    compensation; see `Budget` and `prunenet.policies.methods.evidence.structures`.

    Args:
        evidence: the model and the text.
        method: a name in `METHODS`, or a method of one's own.
        ratio: share of the FFN channels of all layers removed, in [0, 1).
        allocation: how widths are chosen, or the widths themselves (within the budget); default the
            method's own. For "global", scores that are not comparable between layers are
            standardised in each layer first. "owl" and "influence" read text. "predictor" and
            "evolution" judge about 60 architectures on 1024 tokens of it, see `searched_widths`.
        refit: "mean_bias" adds what the removed channels write on average in the dense model, "off"
            nothing; default the method's own.
        sequential: whether to measure each layer behind the cut ones, for methods published so;
            False measures the dense model.
        round_to: widths are multiples of this.
        heads: whether to cut groups of attention heads as well; at least one stays in a layer. The
            budget is the same: the more heads go, the more channels stay. By allocation "uniform"
            or "protected" the layers that are cut lose the same share of both (LLM-Pruner); by
            "global" both are ranked together (FLAP, SAAP); no other is defined.

    Raises:
        UnsupportedArchitecture: with `heads`, where the family's heads cannot be cut.
        ValueError: an unknown method, allocation or refit, text that is missing, a ratio out of
            range, widths that do not fit, scores that are not finite, or `heads` with a method or
            an allocation for channels alone.
    """
    method = _known(method)
    if method.rebuild is not None:
        raise ValueError(
            f"{method.name} cuts no FFN channels and has no masks of them; ask pruned_model for its"
            " model"
        )
    allocation = method.allocation if allocation is None else allocation
    refit = method.refit if refit is None else refit
    if isinstance(allocation, str):
        check_choice("allocation", allocation, Allocation)
    check_choice("refit", refit, MethodRefit)
    budget = Budget.of(evidence.model, ratio, round_to=round_to)
    # Where layers are scored one behind the other, scores of the dense model only serve the widths.
    one_by_one = sequential and method.layer_score is not None
    groups, scores = None, None
    if heads:
        groups, scores, budget = _groups(evidence, method, budget, allocation)
    elif method.score is not None and not (one_by_one and allocation not in _BY_SCORES):
        scores = method.score(evidence, **({"ratio": ratio} if method.searches else {}))
        _check_finite(method, scores)
    widths = _widths(evidence, method, budget, allocation, scores)
    if method.merge is not None:
        keep = [torch.arange(d_ff) < width for d_ff, width in zip(budget.d_ff, widths, strict=True)]
        return BaselineCut(widths, keep, merged=method.merge(evidence, widths))
    if one_by_one:
        keep = _sequential(evidence, method, widths)
    else:
        assert scores is not None
        keep = [top_channels(row, width) for row, width in zip(scores, widths, strict=True)]
    biases, group_biases = None, None
    if refit == "mean_bias":
        biases = list(map(mean_bias, evidence.ffns, evidence.energies, keep))
        if groups is not None:
            group_biases = list(
                map(group_mean_bias, evidence.attentions, evidence.head_outputs, groups)
            )
    return BaselineCut(widths, keep, biases=biases, groups=groups, group_biases=group_biases)


def pruned_model(
    evidence: Evidence,
    method: str | Method,
    ratio: float,
    *,
    allocation: Allocation | Sequence[int] | None = None,
    refit: MethodRefit | None = None,
    sequential: bool = True,
    round_to: int = 8,
    heads: bool = False,
) -> PreTrainedModel:
    """Makes the narrow model of `cut`, for evaluation in memory (`BaselineCut.applied`).

    Arguments are those of `cut`. A method that cuts no FFN channels (slicegpt) makes a model of no
    more parameters; it takes no option but `round_to`.

    Raises:
        UnsupportedArchitecture, ValueError: as `cut`.
    """
    method = _known(method)
    if method.rebuild is not None:
        if allocation not in (None, "uniform") or refit or heads or not sequential:
            raise ValueError(
                f"{method.name} has one allocation, uniform, and no options but round_to; leave the"
                " others out"
            )
        return method.rebuild(evidence, ratio, round_to)
    found = cut(
        evidence,
        method,
        ratio,
        allocation=allocation,
        refit=refit,
        sequential=sequential,
        round_to=round_to,
        heads=heads,
    )
    return found.applied(evidence.model)


def _known(method: str | Method) -> Method:
    """Looks a method up by its name; raises ValueError for an unknown one."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; it is one of {', '.join(METHODS)}")
    return METHODS[method]


def _check_finite(method: Method, scores: Sequence[Float[Tensor, " _"]], first: int = 0) -> None:
    """Raises ValueError where a score is NaN or infinite; scores are of layers from `first` on."""
    for layer, row in enumerate(scores, first):
        if not bool(torch.isfinite(row).all()):
            raise ValueError(
                f"scores of {method.name} in layer {layer} are not finite: weights or gradients are"
                " damaged, or their products overflow"
            )


def _groups(
    evidence: Evidence, method: Method, budget: Budget, allocation: Allocation | Sequence[int]
) -> tuple[list[Bool[Tensor, " _"]], list[Float[Tensor, " _"]], Budget]:
    """Chooses heads; returns their masks, scores of the channels, and the channels' budget."""
    if method.with_heads is None:
        able = ", ".join(name for name, row in METHODS.items() if row.with_heads is not None)
        raise ValueError(f"{method.name} scores no attention heads; the methods that do: {able}")
    if not isinstance(allocation, str) or allocation not in WITH_HEADS:
        raise ValueError(
            f"attention heads are cut by allocation {', '.join(WITH_HEADS)}, got {allocation!r}"
        )
    pool = StructurePool.of(evidence.model, budget)
    scores = method.with_heads(evidence)
    _check_finite(method, scores.channels)
    _check_finite(method, scores.groups)
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
    if budget.only is not None and allocation != "uniform":
        raise ValueError(
            f"the layers of a {type(evidence.model).__name__} share one width, for"
            f" {Anatomy.of(evidence.model).tied_by}; give allocation uniform, got {allocation!r}"
        )
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
        return owl(budget, evidence.outliers)
    if allocation == "influence":
        return by_influence(budget, evidence.influence)
    if scores is None:
        raise ValueError(
            f"{method.name} has no scores to sort; use another allocation than {allocation!r}"
        )
    if allocation == "global":
        rows = scores if method.comparable else _zscores(scores)
        first, last = method.protects if method.allocation == "global" else (0, 0)
        return global_sort(budget, rows, first=first, last=last)
    return searched_widths(evidence, budget, scores, allocation)


def _sequential(
    evidence: Evidence, method: Method, widths: Sequence[int]
) -> list[Bool[Tensor, " _"]]:
    """Scores each layer behind the cut layers in front of it, and chooses its channels."""
    assert method.layer_score is not None
    groups = Anatomy.of(evidence.model).groups
    keep: list[Bool[Tensor, " _"]] = []
    with ExitStack() as hooks:
        walk = LayerWalk(evidence.model, evidence.ids, changing=True)
        for index in walk:
            scores = method.layer_score(evidence.ffns[index], walk.energies(index))
            _check_finite(method, [scores], index)
            keep.append(top_channels(scores, widths[index]))
            layer = [group for group in groups if group.layer == groups[index].layer]
            if layer[-1].number == index:  # all experts of a layer read what enters it
                masks = [keep[group.number] for group in layer]
                hooks.enter_context(zeroed(layer, masks))
    return keep


def _plus(bias: Tensor, tensor: Tensor) -> Tensor:
    return tensor + bias.to(tensor)
