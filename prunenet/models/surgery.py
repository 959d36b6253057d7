"""Keep masks + model -> narrow model; and the dense model made to compute as if it were narrow.

Cut are channels of the FFNs and, where masks for them are given too, groups of attention heads (see
`prunenet.models.heads`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunenet.models import modeling
from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import Architecture, UnsupportedArchitecture
from prunenet.models.groups import Group, Slice, laid_out
from prunenet.models.heads import GROUPS, counting_layers, group_counts, state_counts
from prunenet.models.hooks import skipping, zeroing
from prunenet.models.knobs import restate, tied
from prunenet.models.layers import text_config
from prunenet.models.masks import check_keep
from prunenet.models.rebuilt import forget_quantisation
from prunenet.runtime.placement import derive, device_of, shared_copy


def narrowed(
    model: PreTrainedModel,
    keep: Sequence[Bool[Tensor, " _"]],
    groups: Sequence[Bool[Tensor, " _"]] | None = None,
) -> PreTrainedModel:
    """A model without the channels that `keep` drops, and without the heads that `groups` drops.
    The given one stays as it was.

    Parameters that are not cut are the *same tensors* in both models (so a cut costs the memory of
    the narrow FFNs only): training one, or moving it with `.to(...)`, changes the other. Device,
    dtype, tied embeddings and the generation configuration are kept. Of a placed model
    (`prunenet.runtime.placement`) nothing is copied: the narrow matrices are picked from the dense
    ones, wherever these are kept, each time that they are needed.

    Where all layers end up equally wide, the result is an ordinary model whose configuration has
    the new width; where they do not, its class is `prunenet.models.modeling.PerLayer<class>` and
    `config.per_layer_config` holds the widths. The same goes for the number of groups; a number
    that the family's configuration refuses (see `heads.state_counts`) travels per layer too.

    Args:
        model: a `*ForCausalLM` model.
        keep: for each layer, first to last, a mask of length d_ff with at least one channel kept.
        groups: for each layer a mask over its groups of heads, with at least one kept in
            `prunenet.models.heads.counting_layers`; None leaves attention whole.

    Raises:
        UnsupportedArchitecture: the model's type has no row in the table, its FFN is quantised, or
            its heads cannot be cut.
        ValueError: not one mask per layer, a mask of the wrong length, or one that keeps nothing.
    """
    dense = Anatomy.of(model)
    check_masks(dense, keep, groups)
    return cut(dense, keep, groups)


def cut(
    dense: Anatomy,
    keep: Sequence[Bool[Tensor, " _"]],
    heads: Sequence[Bool[Tensor, " _"]] | None = None,
) -> PreTrainedModel:
    """`narrowed` of a model that is resolved already, with masks that fit it."""
    narrow = Anatomy.of(shared_copy(dense.model), dense.architecture)
    chosen: list[Choice] = [
        (group.slices, mask.nonzero().flatten(), group.width)
        for group, mask in zip(narrow.groups, keep, strict=True)
    ]
    if heads is not None:
        chosen += [
            (layer.heads(mask.numel()), mask.nonzero().flatten(), mask.numel())
            for layer, mask in zip(narrow.layers, heads, strict=True)
        ]
    pick(chosen)
    counted = heads is not None or hasattr(dense.model.config, modeling.HEADS)
    kept = [int(mask.sum()) for mask in keep]
    set_widths(narrow, dense.groups, kept, group_counts(narrow.model) if counted else None)
    return narrow.model


@contextmanager
def masking(
    model: PreTrainedModel,
    keep: Sequence[Bool[Tensor, " _"]],
    groups: Sequence[Bool[Tensor, " _"]] | None = None,
    layers: Bool[Tensor, " layers"] | None = None,
    *,
    anatomy: Anatomy | None = None,
) -> Iterator[PreTrainedModel]:
    """Inside the `with` block the model computes as if what the masks drop were cut: of channels,
    of groups of heads, of whole layers.

    The weights do not change; the activations h of dropped channels are zeroed in front of the down
    linear, the outputs of dropped heads in front of attention's output linear. The hooks that do so
    are gone after the block, however it ends. Arguments and errors as for `narrowed`; `anatomy`:
    the model's, where the caller has it.
    """
    anatomy = anatomy or Anatomy.of(model)
    check_masks(anatomy, keep, groups)
    with ExitStack() as hooks:
        hooks.enter_context(zeroed(anatomy.groups, keep))
        for linear, mask in () if groups is None else zip(anatomy.outs, groups, strict=True):
            whole = mask.repeat_interleave(linear.in_features // max(len(mask), 1))
            hooks.enter_context(_zeroed_inputs(linear, whole))
        if layers is not None:
            modules = [layer.module for layer in anatomy.layers]
            hooks.enter_context(skipping(modules, layers))
        yield model


@contextmanager
def zeroed(groups: Sequence[Group], keep: Sequence[Bool[Tensor, " _"]]) -> Iterator[None]:
    """Inside, some groups of a model compute as if the channels that `keep` drops were cut."""
    with ExitStack() as hooks:
        for group, mask in zip(groups, keep, strict=True):
            if group.expert is None:
                hooks.enter_context(_zeroed_inputs(group.down.module, mask))
        hooks.enter_context(_zeroed_experts(groups, keep))
        yield


def _zeroed_inputs(module: nn.Module, keep: Bool[Tensor, " _"]) -> Any:
    """A hook, which is a context, that zeroes what enters a module where `keep` is False."""
    return module.register_forward_pre_hook(zeroing(~keep.to(device_of(module))))


@contextmanager
def _zeroed_experts(groups: Sequence[Group], keep: Sequence[Tensor]) -> Iterator[None]:
    """Inside, output matrices of experts are copies in which dropped channels are zero: no module
    of their own takes h.
    """
    own: dict[tuple[nn.Module, str], nn.Parameter] = {}
    try:
        for group, mask in zip(groups, keep, strict=True):
            if group.expert is None:
                continue
            down = group.down
            place = (down.module, down.attribute)
            if place not in own:
                own[place] = getattr(*place)
                setattr(*place, nn.Parameter(own[place].detach().clone(), requires_grad=False))
            dropped = (~mask).nonzero().flatten().to(down.tensor.device)
            down.tensor.index_fill_(down.axis - 1, dropped, 0)
        yield
    finally:
        for place, parameter in own.items():
            setattr(*place, parameter)


def zero_padded(model: PreTrainedModel) -> PreTrainedModel:
    """A model of one width that computes the same: narrower layers are filled with zero channels to
    the widest.

    Where layers differ in their groups of heads, with groups of zeros to a number that stock
    configurations accept. Shares the other parameters with the given model, as `narrowed` does.
    """
    wide = Anatomy.of(shared_copy(model))
    widths, config = wide.widths, wide.model.config
    index = torch.arange(max(widths))
    pick(
        [
            (group.slices, torch.where(index < group.width, index, -1), group.width)
            for group in wide.groups
        ]
    )
    counts = None
    if hasattr(model.config, modeling.HEADS):
        # The stock field then says how many groups a stock model can have.
        config.per_layer_config = None
        index, left = torch.arange(getattr(config, GROUPS)), group_counts(model)
        sizes = [where.size for where in wide.layers[0].heads(left[0])]  # it has a group
        filled = []
        for layer, count in zip(wide.layers, left, strict=True):
            found = zip(layer.heads(count), sizes, strict=True)
            slices = [replace(where, size=size) for where, size in found]
            filled.append((slices, torch.where(index < count, index, -1), count))
        pick(filled)
        counts = group_counts(wide.model)
    set_widths(wide, wide.groups, [max(widths)] * len(widths), counts)
    return wide.model


def set_widths(
    anatomy: Anatomy,
    dense: Sequence[Group],
    widths: Sequence[int],
    counts: Sequence[int] | None = None,
) -> None:
    """Makes the class and configuration of a model state what its layers already have.

    Args:
        anatomy: of a causal LM, changed in place.
        dense: the groups whose widths its configuration states so far.
        widths: channels of each group, at least 1.
        counts: groups of heads of each layer; None where there are as many as the stock fields
            say.

    Raises:
        ValueError: a configuration field cannot hold the number.
    """
    model, architecture = anatomy.model, anatomy.architecture
    varies = anatomy.free and not anatomy.listed and len(set(widths)) > 1
    config = model.config
    own: dict[int, dict[str, Any]] = {}
    if architecture.per_layer:
        text, field = modeling.holder_of(config, architecture.width)
        own = modeling.without(modeling.overrides(text), (field, GROUPS)) or {}
        if any(hasattr(config, name) for name in (modeling.FFN, modeling.HEADS)):
            text.per_layer_config = own or None  # ours goes, a family's own stays
    for name in (modeling.FFN, modeling.HEADS, "auto_map"):
        config.__dict__.pop(name, None)
    # How transformers renamed tensors when it read them for the dense class: per-layer classes are
    # saved and read as they are.
    model.__dict__.pop("_weight_conversions", None)
    if not forget_quantisation(model):
        raise UnsupportedArchitecture(
            f"a {type(model).__name__} with quantised weights is not cut; load it unquantised"
        )
    restate(config, dense, widths)
    _state_parents(model, dense, widths)
    stock = getattr(type(model), "stock_class", type(model))
    varying: dict[str, Sequence[int]] = {}
    if varies:
        varying[field] = widths
        inputs, output = architecture.input_linears, architecture.down
        setattr(config, modeling.FFN, _structure(architecture, architecture.width, inputs, output))
    if counts is not None:
        inputs, output = architecture.attention_in, architecture.attention_out
        heads = _structure(architecture, GROUPS, inputs, output)
        modeling.settle_heads(model, heads, counts)
        if not state_counts(config, counts):
            varying[GROUPS] = counts
            setattr(config, modeling.HEADS, heads)
    if varying:
        text.per_layer_config = {
            index: own.get(index, {}) | {name: numbers[index] for name, numbers in varying.items()}
            for index in range(len(widths))
        }
        stock = getattr(modeling, modeling.PREFIX + stock.__name__)
    model.__class__ = stock
    if architecture.found:
        restate_modules(model, check_built(model))


def _state_parents(model: PreTrainedModel, groups: Sequence[Group], widths: Sequence[int]) -> None:
    """Makes the module around each FFN state its width, where it does."""
    for group, width in zip(groups, widths, strict=True):
        ffn: Any = model.get_submodule(group.path.rpartition(".")[0])
        if hasattr(ffn, "intermediate_size"):
            ffn.intermediate_size = width


def check_stock(anatomy: Anatomy, widths: Sequence[int]) -> None:
    """Checks on the real model what was discovered on a tiny one: that its configuration can state
    these widths, and that its class then has tensors of exactly these shapes.

    Args:
        anatomy: of a dense model; only shapes and configuration are read.
        widths: of each group.

    Raises:
        ValueError, UnsupportedArchitecture: what does not fit.
    """
    config = copy.deepcopy(anatomy.model.config)
    restate(config, anatomy.groups, widths)
    expected = {n: list(t.shape) for n, t in anatomy.model.state_dict(keep_vars=True).items()}
    for group, width in zip(anatomy.groups, widths, strict=True):
        for where in group.slices:
            halves = 1 if where.layout == "plain" else 2
            expected[where.name][where.axis] = width * halves
    _compare(built(type(anatomy.model), config), expected)


def check_built(model: PreTrainedModel) -> PreTrainedModel:
    """A model newly built on the meta device from the configuration of another, with tensors of the
    same shapes.

    Raises:
        UnsupportedArchitecture: a tensor has another shape.
    """
    made = built(type(model), copy.deepcopy(model.config))
    _compare(made, {n: list(t.shape) for n, t in model.state_dict(keep_vars=True).items()})
    return made


def built(kind: Any, config: Any) -> PreTrainedModel:
    """A model newly built on the meta device."""
    with torch.device("meta"):
        made = kind(config)
    assert isinstance(made, PreTrainedModel)
    return made


def shapes_of(kind: Any, config: Any) -> dict[str, list[int]]:
    """Shapes of the stored tensors of a model newly built on the meta device, by name."""
    made = built(kind, config)
    return {n: list(t.shape) for n, t in made.state_dict(keep_vars=True).items()}


def _compare(made: PreTrainedModel, expected: dict[str, list[int]]) -> None:
    found = {n: list(t.shape) for n, t in made.state_dict(keep_vars=True).items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise UnsupportedArchitecture(
                f"a {type(made).__name__} of this configuration cannot be cut: {name} would be"
                f" {expected.get(name)}, and its class makes it {found.get(name)}"
            )


def restate_modules(model: PreTrainedModel, made: PreTrainedModel) -> None:
    """Gives modules the numbers that a model newly built from the configuration has."""
    new = dict(made.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        for field, value in vars(new.get(name, module)).items():
            if type(value) is int and vars(module).get(field) != value:
                setattr(module, field, value)


def _structure(
    architecture: Architecture, field: str, inputs: Sequence[str], output: str
) -> dict[str, Any]:
    """What `prunenet.models.modeling` must know to narrow a structure."""
    return {"width": field, "layers": architecture.layers, "inputs": list(inputs), "output": output}


def check_masks(anatomy: Anatomy, keep: Sequence[Tensor], groups: Sequence[Tensor] | None) -> None:
    """Raises as `narrowed` does where masks do not fit a model."""
    anatomy.check_whole()
    widths = anatomy.widths
    if groups is not None:
        _check_groups(anatomy.model, groups)
    what = "layer" if anatomy.free else "group"
    if len(keep) != len(widths):
        raise ValueError(
            f"the model has {len(widths)} {what}s and needs one keep mask for each, got {len(keep)}"
            " masks"
        )
    for index, (mask, d_ff) in enumerate(zip(keep, widths, strict=True)):
        try:
            if mask.dim() != 1:
                raise ValueError(f"a keep mask has one dimension, got {mask.dim()}")
            check_keep(mask, d_ff)
        except ValueError as error:
            raise ValueError(f"{what} {index}: {error}") from None
    if not anatomy.free:
        _check_tied(anatomy, [int(mask.sum()) for mask in keep])


def _check_tied(anatomy: Anatomy, kept: Sequence[int]) -> None:
    """Raises ValueError where groups that share a number keep other shares of their channels."""
    for groups in tied(anatomy.groups):
        first = groups[0]
        for group in groups:
            if kept[group.number] * first.width != kept[first.number] * group.width:
                raise ValueError(
                    f"{first.pattern.knob} is one number, and masks keep {kept[first.number]} of"
                    f" {first.width} channels in {first.path} and {kept[group.number]} of"
                    f" {group.width} in {group.path}; give uniform `widths`"
                )


def _check_groups(model: PreTrainedModel, groups: Sequence[Tensor]) -> None:
    counts, counting = group_counts(model), counting_layers(text_config(model))
    if len(groups) != len(counts):
        raise ValueError(
            f"the model has {len(counts)} layers and needs one mask of heads for each, got"
            f" {len(groups)} masks"
        )
    for index, (mask, count) in enumerate(zip(groups, counts, strict=True)):
        if mask.dtype != torch.bool or mask.shape != (count,):
            raise ValueError(
                f"layer {index}: a mask of heads has {count} booleans here, one a group; got"
                f" {tuple(mask.shape)}, {mask.dtype}"
            )
        if index in counting and not bool(mask.any()):
            raise ValueError(
                f"layer {index}: a mask of heads must keep at least one group in the first layer of"
                " each kind of attention, where caches count tokens; got one that keeps none"
            )


def set_downs(anatomy: Anatomy, downs: Sequence[Float[Tensor, "d_model _"]]) -> None:
    """Replaces the output matrices of all groups of a model by others of the same shapes.

    Biases stay. Of a placed model the given tensors are kept; see `derive`.
    """
    for place, groups in anatomy.down_places().items():
        matrices = [downs[group.number] for group in groups]
        derive(*place, laid_out([group.down for group in groups], matrices))


Choice = tuple[Sequence[Slice], Int[Tensor, " _"], int]
"""Slices, the units that stay of them, and how many there are; unit -1 is one of zeros."""


def pick(chosen: Sequence[Choice]) -> None:
    """Rebuilds a model's tensors from some of the units that lie in them, in the order given."""
    tensors: dict[tuple[nn.Module, str], list[tuple[Slice, Tensor]]] = {}
    for slices, units, count in chosen:
        for where in slices:
            place = (where.module, where.attribute)
            tensors.setdefault(place, []).append((where, where.entries(units, count)))
    for (module, name), found in tensors.items():
        where, index = found[0]
        if where.expert is not None:
            index = torch.stack([entries for _, entries in found])
        derive(module, name, partial(_selected, dim=where.axis, index=index))
    for module, name in tensors:
        if name == "weight":
            _resize(module)


def _resize(module: nn.Module) -> None:
    """Makes a linear layer state what its matrix has."""
    shape = module.get_parameter("weight").shape
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = shape


def _selected(tensor: Tensor, dim: int, index: Int[Tensor, "*experts n"]) -> Tensor:
    if tensor.shape[dim] == 0:  # whatever is picked is zeros
        return tensor.new_zeros((*tensor.shape[:dim], len(index), *tensor.shape[dim + 1 :]))
    if index.dim() == 2:
        pairs = zip(tensor, index, strict=True)
        return torch.stack([_selected(part, dim - 1, own) for part, own in pairs])
    # before the move: on the meta device nothing can be counted
    blank = (index < 0).nonzero().flatten().to(tensor.device)
    return tensor.index_select(dim, index.clamp_min(0).to(tensor.device)).index_fill_(dim, blank, 0)
