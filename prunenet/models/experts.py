"""Whole experts: which tensors number them, how many a configuration may state, and cutting them.

The tensors are found on the real model: with another number in the configuration, exactly those
change on the meta device that number experts, along that axis. They are router rows, biases,
scales and the experts themselves.

Rules: the same number in every layer, since engines read one; at least top-k; as many in each
routing group, in the order of the original.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.groups import starred
from prunenet.models.knobs import field_of, set_field, top_k
from prunenet.models.rebuilt import forget_quantisation
from prunenet.models.surgery import built, check_built, restate_modules, shapes_of
from prunenet.runtime.placement import check_together, home, shared_copy

_FIELDS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_routed_experts", "ffn_config.moe_num_experts"),
)
_GROUPS = ("n_group", "num_expert_group", "n_groups")


_ALIGNED = 16
"""Bytes of which the rows of each expert must have a multiple in torch's grouped product."""


def check_grouped(anatomy: Anatomy, widths: Sequence[int]) -> None:
    """Checks that experts of these widths can be multiplied as transformers multiplies them.

    Args:
        anatomy: of a dense model; only configuration and dtype are read.
        widths: of each group.

    Raises:
        ValueError: torch's grouped product refuses a width in the model's dtype.
    """
    if getattr(anatomy.model.config, "_experts_implementation", None) != "grouped_mm":
        return
    dtype = anatomy.model.dtype
    unit = _ALIGNED // dtype.itemsize
    for group, width in zip(anatomy.groups, widths, strict=True):
        if group.expert is not None and width % unit:
            raise ValueError(
                f"experts of {width} channels cannot run in {str(dtype).removeprefix('torch.')},"
                f" whose grouped product takes multiples of {unit}; give `round_to` {unit}"
            )


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a model.

    Attributes:
        field: dotted configuration field of their number.
        count: experts of each layer.
        least: of which a token passes through this many.
        routing_groups: into which they fall, in their order; 1 where there are none.
        layers: numbers of the layers that have experts.
        axes: axis of experts in each tensor that has one.
    """

    field: str
    count: int
    least: int
    routing_groups: int
    layers: tuple[int, ...]
    axes: Mapping[str, int]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Experts:
        """Finds them.

        Raises:
            UnsupportedArchitecture: there are none, or no field states their number alone.
        """
        anatomy = Anatomy.of(model)
        banks = {g.down.name: g for g in anatomy.groups if g.expert is not None}
        if not banks:
            raise UnsupportedArchitecture(
                f"a {type(model).__name__} has no experts to remove; cut channels instead"
            )
        config, counts = model.config, {len(_tensor(g)) for g in banks.values()}
        found = [
            (path, axes)
            for path in _candidates(config)
            if (axes := _axes(model, path, counts)) and banks.keys() <= axes.keys()
        ]
        if len(counts) > 1 or not found:
            raise UnsupportedArchitecture(
                f"no field of the configuration of a {type(model).__name__} states the number of"
                " its experts alone; narrow them by a `ratio` of channels"
            )
        text = config.get_text_config()
        groups = (getattr(text, name, None) for name in _GROUPS)
        return cls(
            field=found[0][0],
            count=counts.pop(),
            least=top_k(config) or 1,
            routing_groups=next((n for n in groups if isinstance(n, int) and n > 1), 1),
            layers=tuple(dict.fromkeys(group.layer for group in banks.values())),
            axes=found[0][1],
        )

    @property
    def fewest(self) -> int:
        """Fewest experts that a layer can be left with."""
        # a routing group is judged by its two best experts
        return max(self.least, 2 * self.routing_groups if self.routing_groups > 1 else 1)

    @property
    def possible(self) -> list[int]:
        """The numbers of experts that a layer can be left with, rising."""
        numbers = range(self.fewest, self.count + 1)
        return [left for left in numbers if left % self.routing_groups == 0]

    def check(self, left: int) -> None:
        """Raises ValueError for a number of experts that a layer cannot be left with."""
        if not self.fewest <= left <= self.count:
            why = f"a token passes through {self.least}"
            if self.fewest > self.least:
                why = f"each of {self.routing_groups} routing groups is judged by its two best"
            raise ValueError(
                f"`experts` must be from {self.fewest} to {self.count} here, got {left}: {why}"
            )
        if left % self.routing_groups:
            raise ValueError(
                f"`experts` must be a multiple of the {self.routing_groups} routing groups, got"
                f" {left}"
            )

    def best(self, scores: Tensor, left: int) -> Bool[Tensor, " experts"]:
        """Keep mask of the experts with the highest scores, as many in each routing group."""
        self.check(left)
        rows = scores.view(self.routing_groups, -1)
        order = torch.sort(rows, dim=-1, descending=True, stable=True).indices
        keep = torch.zeros_like(rows, dtype=torch.bool)
        keep.scatter_(-1, order[:, : left // self.routing_groups], True)
        return keep.flatten()


def without_experts(
    model: PreTrainedModel, keep: Mapping[int, Bool[Tensor, " experts"]]
) -> PreTrainedModel:
    """A model without the experts that masks drop; the given one stays as it was.

    Parameters that are not cut are the same tensors in both models.

    Args:
        model: a causal LM with experts, on one device.
        keep: mask of each layer that has experts, all of one number.

    Raises:
        UnsupportedArchitecture: as `Experts.of`.
        ValueError: a number of experts that a layer cannot be left with.
    """
    experts, count = _checked(model, keep)
    narrow = shared_copy(model)
    for name, axis in experts.axes.items():
        _pick(narrow, name, axis, keep[_layer(name)])
    set_field(narrow.config, experts.field, count)
    narrow.__dict__.pop("_weight_conversions", None)
    forget_quantisation(narrow)
    restate_modules(narrow, check_built(narrow))
    return narrow


def rerouted(
    model: PreTrainedModel, keep: Mapping[int, Bool[Tensor, " experts"]]
) -> PreTrainedModel:
    """A model that computes what `without_experts` gives, with all experts in their places: its
    routers know those alone that stay. It is there to be measured, not saved.

    Routers alone are new; every other parameter, the experts' included, is the same tensor in both
    models. Numbers that routers give become those of the dense model in front of the experts.

    Args:
        model, keep: as for `without_experts`; its experts are called as
            `prunenet.refit.expert_use.check_readable` demands.

    Raises:
        UnsupportedArchitecture, ValueError: as `without_experts`.
    """
    experts, count = _checked(model, keep)
    made = shared_copy(model)
    places = [g.down.name for g in Anatomy.of(made).groups if g.expert is not None]
    banks = {place.rpartition(".")[0]: keep[_layer(place)] for place in places}
    for name, axis in experts.axes.items():
        if not any(name.startswith(f"{bank}.") for bank in banks):
            _pick(made, name, axis, keep[_layer(name)])
    set_field(made.config, experts.field, count)
    own = {name: dict(vars(made.get_submodule(name))) for name in banks}
    restate_modules(made, built(type(made), copy.deepcopy(made.config)))
    for name, mask in banks.items():
        bank = made.get_submodule(name)
        vars(bank).update(own[name])  # it holds all experts still
        stay = mask.nonzero().flatten().to(home(made))
        bank.register_forward_pre_hook(partial(_renumbered, stay, len(mask)), with_kwargs=True)
        if len(takes(bank)) == 1:
            bank.register_forward_hook(partial(_of_those, stay, len(mask)))
    return made


def takes(bank: nn.Module) -> list[str]:
    """Names of what a bank of experts is called with: tokens, indices and weights; or one scaled
    copy of all tokens for each expert.
    """
    return list(inspect.signature(type(bank).forward).parameters)[1:]


def _renumbered(stay: Tensor, count: int, bank: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a bank is called with, where numbers count those that stay, for one of all experts."""
    call, names = inspect.signature(type(bank).forward).bind(bank, *args, **kwargs), takes(bank)
    if len(names) == 1:
        given = call.arguments[names[0]]
        rows = given.reshape(len(stay), -1, given.shape[-1])
        whole = rows.new_zeros(count, *rows.shape[1:]).index_copy(0, stay, rows)
        call.arguments[names[0]] = whole.flatten(0, 1)
    else:
        call.arguments[names[1]] = stay[call.arguments[names[1]]]
    return call.args[1:], call.kwargs


def _of_those(stay: Tensor, count: int, _bank: nn.Module, _args: Any, output: Tensor) -> Tensor:
    """What the experts that stay write, of what all do."""
    rows = output.reshape(count, -1, output.shape[-1])
    return rows[stay].reshape(-1, *output.shape[1:])


def _checked(model: PreTrainedModel, keep: Mapping[int, Tensor]) -> tuple[Experts, int]:
    """The experts of a model, and how many stay in each layer; raises as `without_experts`."""
    check_together(model, "removing experts")
    experts = Experts.of(model)
    left = {int(mask.sum()) for mask in keep.values()}
    if len(left) != 1 or keep.keys() != set(experts.layers):
        raise ValueError(
            f"every one of the layers {list(experts.layers)} keeps the same number of experts, got"
            f" {sorted(left)} in {sorted(keep)}"
        )
    experts.check(count := left.pop())
    return experts, count


def _pick(model: PreTrainedModel, name: str, axis: int, mask: Tensor) -> None:
    """Cuts one tensor to the experts that stay."""
    module, _, own = name.rpartition(".")
    owner = model.get_submodule(module)
    tensor = getattr(owner, own)
    picked = tensor.detach().index_select(axis, mask.nonzero().flatten().to(tensor.device))
    if own in owner._parameters:
        picked = nn.Parameter(picked, requires_grad=tensor.requires_grad)
    setattr(owner, own, picked)
    if own == "weight" and isinstance(owner, nn.Linear):
        owner.out_features = len(picked)


def concentration(model: PreTrainedModel) -> dict[int, Tensor]:
    """AIMER's measure of each expert, negated so that the highest stay, by layer.

    l1 / (sqrt(N) l2) over the gate, up and down weights of an expert (arXiv 2603.18492; see
    docs/methods.md, section 19). Experts with a *higher* measure go first. Reads weights alone.
    """
    found: dict[int, list[Tensor]] = {}
    for group in Anatomy.of(model).groups:
        if group.expert is not None:
            parts = [w.tensor.flatten().float() for w in group.slices if w.tensor.dim() == 2]
            flat = torch.cat(parts)
            measure = flat.abs().sum() / (flat.numel() ** 0.5 * flat.norm())
            found.setdefault(group.layer, []).append(-measure)
    return {layer: torch.stack(values) for layer, values in found.items()}


def _tensor(group: Any) -> Tensor:
    found: Tensor = getattr(group.down.module, group.down.attribute)
    return found


def _layer(name: str) -> int:
    return starred(name)[1][0]


def _candidates(config: Any) -> list[str]:
    """Fields that may state the number of experts."""
    found = []
    for prefix in ("", "text_config."):
        for name in _FIELDS:
            try:
                value = field_of(config, f"{prefix}{name}")
            except (AttributeError, KeyError):
                continue
            if isinstance(value, int) and value > 1:
                found.append(f"{prefix}{name}")
    return found


def _axes(model: PreTrainedModel, path: str, counts: Sequence[int] | set[int]) -> dict[str, int]:
    """Axis of each tensor that alone changes with a field, from its number to another; none where
    another tensor changes or the class refuses the number.
    """
    config = copy.deepcopy(model.config)
    count = field_of(config, path)
    if set(counts) != {count}:
        return {}
    fewer = count // 2 if count % 2 == 0 and count // 2 >= (top_k(config) or 1) else count + count
    set_field(config, path, fewer)
    try:
        after = shapes_of(type(model), config)
    except Exception:  # each class has its own checks
        return {}
    axes: dict[str, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        old, new = list(tensor.shape), after.get(name)
        if new is None:
            return {}
        changed = [place for place, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        if changed and (len(changed) > 1 or (old[changed[0]], new[changed[0]]) != (count, fewer)):
            return {}
        if changed:
            axes[name] = changed[0]
    return axes
