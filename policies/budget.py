"""How much of a model an amount to cut is: as a share of its FFN channels, in bytes, and in widths
of its layers.
"""

from __future__ import annotations

from prunenet.checkpoints.records import check_channels
from prunenet.models.anatomy import Anatomy
from prunenet.models.experts import check_grouped
from prunenet.models.knobs import step_of
from prunenet.models.layers import Weights, active_parameters, count_parameters, structure
from prunenet.models.masks import ratio_for_parameters, widths_for_budget
from prunenet.models.modeling import is_per_layer
from prunenet.models.surgery import check_stock
from prunenet.policies.artifact import Policy
from prunenet.policies.experts import check_experts, line_of_cost
from prunenet.policies.options import PruneOptions
from prunenet.refit.blocks import check_blocks
from prunenet.runtime.choices import RoundTo


def ratio_of(model: Weights, options: PruneOptions) -> float:
    """The share of the model's FFN channels to remove; with another budget than parameters, the
    share of what it counts.

    Raises:
        ValueError: a layer cannot be rounded to a multiple of `options.round_to`, or has too few
            channels for uniform widths; or as `check_channels`.
    """
    check_channels(model, "prune the checkpoint that it was exported from, and export that")
    anatomy, ratio = Anatomy.of(structure(model)), options.ratio
    if options.experts is not None:
        check_experts(anatomy.model, options.experts_by or "aimer", options.experts)
    if options.shares_experts:  # by whatever they are chosen, routers must be known
        check_experts(anatomy.model, "reap")
    if options.refit == "blocks":
        check_blocks(anatomy.model)
    if ratio is None and options.budget not in ("params", "active"):
        ratio = options.params
    if ratio is None:
        total, _ = count_parameters(anatomy.model)
        costs: list[float] = [group.channel_parameters for group in anatomy.groups]
        share = options.params
        if share is None:
            share = options.active
            total = active_parameters(anatomy)
            costs = [cost * g.share for cost, g in zip(costs, anatomy.groups, strict=True)]
        assert share is not None
        ratio = ratio_for_parameters(share, total, costs, anatomy.widths)
    if options.shares_experts:
        line_of_cost(anatomy.model, options, ratio)
    elif anatomy.tied_by and options.widths in ("per-layer", "refined"):
        raise ValueError(
            f"the layers of a {type(anatomy.model).__name__} share one width, for"
            f" {anatomy.tied_by}; give uniform `widths`"
        )
    uniform = options.widths == "uniform"
    even = anatomy.uniform_widths if uniform else anatomy.even_widths
    widths = even(ratio, options.round_to)
    if not options.shares_experts:
        check_grouped(anatomy, widths)
    elif options.parts:  # beside whole experts any multiple is tried
        step = step_of(anatomy.groups, ratio, options.round_to)
        check_grouped(anatomy, [step] * len(widths))
    if anatomy.architecture.found and not is_per_layer(anatomy.model):
        check_stock(anatomy, widths)
    return ratio


def bytes_left(model: Weights, ratio: float, round_to: RoundTo) -> int:
    """Bytes of a model's parameters, in its dtype, once `ratio` of its channels are removed."""
    anatomy = Anatomy.of(structure(model))
    widths = anatomy.even_widths(ratio, round_to)
    gone = sum(
        (group.width - width) * group.channel_parameters
        for group, width in zip(anatomy.groups, widths, strict=True)
    )
    whole = sum(parameter.numel() for parameter in anatomy.model.parameters())
    return (whole - gone) * anatomy.model.dtype.itemsize


def allocations(
    model: Weights,
    policy: Policy | None,
    ratio: float,
    options: PruneOptions,
    offsets: list[float] | None = None,
) -> dict[str, list[int]]:
    """The widths to consider, by name.

    Args:
        model: the dense model.
        policy: allocates per-layer widths.
        ratio: share of FFN channels removed.
        options: widths and rounding.
        offsets: the policy's log-odds of this model's layers, where they are known already.
    """
    anatomy, round_to = Anatomy.of(structure(model)), options.round_to
    if policy is None or options.widths == "uniform" or not anatomy.free:
        return {"uniform": anatomy.uniform_widths(ratio, round_to)}
    if offsets is None:
        offsets = policy.offsets(model)
    step = step_of(anatomy.groups, ratio, round_to)
    learned = widths_for_budget(anatomy.widths, offsets, ratio, step)
    if options.widths == "per-layer":
        return {"per-layer": learned}
    try:
        uniform = anatomy.uniform_widths(ratio, round_to)
    except ValueError:  # a layer has too few channels
        return {"per-layer": learned}
    both = {"uniform": uniform, "per-layer": learned}
    return {"uniform": uniform} if learned == uniform else both
