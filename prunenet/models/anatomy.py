"""The anatomy of a language model: its decoder layers and the channel groups that can be cut.

`Anatomy.of` resolves a model's row of `prunenet.models.architectures` once: names become modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from prunenet.models.architectures import (
    Architecture,
    UnsupportedArchitecture,
    architecture_for,
    check_heads,
)
from prunenet.models.groups import FFN, Group, Pattern, Slice, starred
from prunenet.models.knobs import field_of, step_of, top_k, uniform_widths
from prunenet.models.masks import width_at
from prunenet.runtime.choices import ROUND_TO, RoundTo
from prunenet.runtime.placement import present

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_EACH = (
    "norm_scale",
    "down_bias",
)  # read with every expert, where attention is read with the first


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLayer:
    """One decoder layer, and the paths of its architecture in it.

    Attributes:
        index: layer number, from 0.
        module: the layer.
        architecture: where its parts are.
    """

    index: int
    module: nn.Module
    architecture: Architecture

    @property
    def path(self) -> str:
        """Of the layer, from the causal LM."""
        return f"{self.architecture.layers}.{self.index}"

    def linear(self, path: str) -> nn.Linear:
        """The linear at a path of this layer. Raises as `plain_linear`."""
        return plain_linear(self.module, path)

    def heads(self, count: int) -> list[Slice]:
        """Where the `count` groups of heads lie: query, key, value and output linears. Without any
        they have no size.
        """
        row, made = self.architecture, []
        for path in row.attention_in:
            linear = self.linear(path)
            for name, tensor in linear.named_parameters(recurse=False):
                full = f"{self.path}.{path}.{name}"
                made.append(Slice(full, linear, "head", 0, size=len(tensor) // max(count, 1)))
        out, name = self.linear(row.attention_out), f"{self.path}.{row.attention_out}.weight"
        return [*made, Slice(name, out, "head", 1, size=out.in_features // max(count, 1))]


@dataclass(frozen=True, slots=True, eq=False)
class Anatomy:
    """A model's decoder layers and channel groups, resolved once. Holds no weights of its own.

    Attributes:
        model: the causal LM, or its skeleton on the meta device.
        architecture: its row.
        layers: first to last.
        groups: of all layers, first to last; a layer has none, one or several.
    """

    model: PreTrainedModel
    architecture: Architecture
    layers: tuple[DecoderLayer, ...]
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, architecture: Architecture | None = None) -> Anatomy:
        """Resolves a model.

        Args:
            model: a causal LM.
            architecture: its row; default the one that is known.

        Raises:
            UnsupportedArchitecture: the model type is not supported, the model is not the family's
                causal LM, or a matrix of an FFN is quantised.
        """
        row = architecture or architecture_for(model.config, type(model))
        layers = tuple(
            DecoderLayer(index, layer, row)
            for index, layer in enumerate(decoder_layers(model, row))
        )
        return cls(model, row, layers, tuple(_groups(model, row)))

    @property
    def widths(self) -> list[int]:
        """Channels of each group."""
        return [group.width for group in self.groups]

    def uniform_widths(self, ratio: float, round_to: RoundTo = ROUND_TO) -> list[int]:
        """The width of each group when every one loses the same share of its channels.

        Args:
            ratio: share of channels removed, in [0, 1).
            round_to: widths are multiples of this; "auto": see `prunenet.models.knobs.rounding`.

        Raises:
            ValueError: a group cannot be rounded to a multiple of `round_to`.
        """
        return uniform_widths(self.groups, ratio, round_to, free=self.free)

    @property
    def listed(self) -> bool:
        """Whether the family's own configuration holds a width for each layer, as a list."""
        return all(group.listed for group in self.groups)

    @property
    def free(self) -> bool:
        """Whether each group may have a width of its own."""
        return not self.tied_by

    @property
    def tied_by(self) -> str:
        """Why groups cannot have widths of their own; empty where they can."""
        if not self.architecture.found or self.listed:
            return ""
        if any(group.expert is not None for group in self.groups):
            return "all its experts have one width"
        if [group.layer for group in self.groups] != list(range(len(self.layers))):
            return "not every layer has one FFN"
        if not self.architecture.per_layer:
            return f"{self.architecture.width} does not state the width of one layer alone"
        return ""

    def even_widths(self, ratio: float, round_to: RoundTo = ROUND_TO) -> list[int]:
        """As `uniform_widths`, but groups that are free and differ keep their differences.

        Raises:
            ValueError: see `prunenet.models.masks.width_at`.
        """
        if not self.free:
            return self.uniform_widths(ratio, round_to)
        step = step_of(self.groups, ratio, round_to)
        return [width_at(width, ratio, step) for width in self.widths]

    def down_places(self) -> dict[tuple[nn.Module, str], list[Group]]:
        """The groups of each output matrix, by its module and name: of a bank, all experts."""
        places: dict[tuple[nn.Module, str], list[Group]] = {}
        for group in self.groups:
            places.setdefault((group.down.module, group.down.attribute), []).append(group)
        return places

    @property
    def downs(self) -> list[nn.Linear]:
        """The linear d_ff -> d_model of each group, whose input is the activations h.

        Raises:
            UnsupportedArchitecture: an output matrix is no linear layer, as in experts.
        """
        found = []
        for group in self.groups:
            module = group.down.module
            if not isinstance(module, nn.Linear) or group.expert is not None:
                raise UnsupportedArchitecture(
                    f"gradients are read of linear layers, and biases are added to them, and"
                    f" {group.path} of a {type(self.model).__name__} is none; take another method,"
                    " or no bias"
                )
            found.append(module)
        return found

    @property
    def outs(self) -> list[nn.Linear]:
        """Attention's output linear of each layer.

        Raises:
            UnsupportedArchitecture: heads of this family cannot be cut.
        """
        check_heads(self.architecture)
        return [layer.linear(self.architecture.attention_out) for layer in self.layers]

    def check_whole(self) -> None:
        """Raises UnsupportedArchitecture where the residual stream is sliced."""
        check_whole(self.model)

    def ffn(self, index: int) -> FFN:
        """The FFN of one group. Raises as `check_whole`."""
        self.check_whole()
        group = self.groups[index]
        with present(group.module):
            return group.read()

    def ffns(self) -> Iterator[FFN]:
        """The FFN of each group, first to last. Raises as `check_whole`."""
        return (self.ffn(index) for index in range(len(self.groups)))


def decoder_layers(
    model: PreTrainedModel, architecture: Architecture | None = None
) -> nn.ModuleList:
    """The decoder layers of a causal LM.

    Raises:
        UnsupportedArchitecture: the model type has no row, or the model is not the family's causal
            LM.
    """
    architecture = architecture or architecture_for(model.config, type(model))
    try:
        layers = model.get_submodule(architecture.layers)
    except AttributeError:
        raise UnsupportedArchitecture(
            f"a {type(model).__name__} has no {architecture.layers!r}; load it with"
            " AutoModelForCausalLM"
        ) from None
    assert isinstance(layers, nn.ModuleList)
    return layers


def check_whole(model: PreTrainedModel) -> None:
    """Raises UnsupportedArchitecture where the residual stream is sliced: the FFNs of such a model
    read and write different directions.
    """
    if hasattr(model.config, "residual_widths"):
        raise UnsupportedArchitecture(
            f"a {type(model).__name__} has a sliced residual stream and is not cut any further;"
            " give the dense model"
        )


def plain_linear(layer: nn.Module, path: str) -> nn.Linear:
    """The linear at a path of a layer.

    Raises:
        UnsupportedArchitecture: it is of another kind, as in a quantised model.
    """
    module = layer.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise _not_plain(path, module)
    _check_plain(path, module, "weight")
    return module


def _check_plain(path: str, module: nn.Module, name: str) -> None:
    """Raises UnsupportedArchitecture for a tensor that is packed or quantised: the classes of
    bitsandbytes inherit from Linear and from Parameter.
    """
    tensor = getattr(module, name, None)
    if type(tensor) is not nn.Parameter or tensor.dtype not in _FLOATS:
        raise _not_plain(path, module)


def _not_plain(path: str, module: nn.Module) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"{path} is a {type(module).__name__}, not a plain linear layer; load the model unquantised"
    )


def _groups(model: PreTrainedModel, row: Architecture) -> Iterator[Group]:
    """The groups of all patterns, in the order of the model's layers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    order = {name: place for place, name in enumerate(modules)}
    names: dict[str, dict[tuple[int, ...], str]] = {}
    for name, module in modules.items():
        for own, tensor in module._parameters.items():
            if tensor is not None:
                star, numbers = starred(f"{name}.{own}")
                names.setdefault(star, {})[numbers] = name
    _check_unpacked(modules, row)
    places = []
    for place, pattern in enumerate(row.patterns):
        stack = pattern.down.tensor.partition(".*.")[0]
        for numbers in names.get(pattern.down.tensor, ()):
            there = all(numbers in names.get(part.tensor, ()) for part in pattern.matrices)
            left = pattern.unless and field_of(model.config, pattern.unless)[numbers[0]]
            if there and not left:
                places.append((order.get(stack, 0), numbers, place, pattern))
    last, number = None, 0
    for stack_place, numbers, _, pattern in sorted(places, key=lambda found: found[:3]):
        here = (stack_place, numbers[:1])
        slices = _slices(modules, names, pattern, numbers)
        around = _around(modules, row, pattern, numbers, slices, here != last)
        made = _of_pattern(model, modules, pattern, numbers, slices, around, number)
        yield from made
        last, number = here, number + len(made)


def _check_unpacked(modules: dict[str, nn.Module], row: Architecture) -> None:
    """Raises UnsupportedArchitecture for a module in whose place a matrix is expected and that has
    other tensors, such as the packed ones of GPTQ and AWQ.
    """
    for pattern in row.patterns:
        for part in pattern.matrices:
            owner, _, own = part.tensor.rpartition(".")
            end = owner.rpartition("*")[2]
            for name, module in modules.items():
                if not name.endswith(end) or own in module._parameters:
                    continue
                filled = module._parameters or module._buffers
                if filled and starred(f"{name}.{own}")[0] == part.tensor:
                    raise _not_plain(name, module)


def _slices(
    modules: dict[str, nn.Module],
    names: dict[str, dict[tuple[int, ...], str]],
    pattern: Pattern,
    numbers: tuple[int, ...],
) -> list[Slice]:
    """The tensors of one FFN; biases only where the model has them."""
    found = []
    for part in pattern.parts:
        if (owner := names.get(part.tensor, {}).get(numbers)) is None:
            continue
        module, own = modules[owner], part.tensor.rpartition(".")[2]
        _check_plain(owner, module, own)
        found.append(Slice(f"{owner}.{own}", module, part.role, part.axis, part.layout))
    return found


def _around(
    modules: dict[str, nn.Module],
    row: Architecture,
    pattern: Pattern,
    numbers: tuple[int, ...],
    slices: Sequence[Slice],
    first: bool,
) -> dict[str, tuple[Slice, float]]:
    """What statistics read beside the channels themselves; see `Group.around`."""
    down = next(where for where in slices if where.role == "down")
    layer = f"{pattern.down.tensor.partition('.*.')[0]}.{numbers[0] if numbers else ''}"
    wanted = [("down_bias", down.name.removesuffix(".weight"), "bias", 0.0)]
    norms = (f"{layer}.{path}" for path in row.norms)
    norm = next((name for name in norms if modules.get(name) is not None), None)
    wanted.append(("norm_scale", norm or "", "weight", row.norm_offset))
    out = modules.get(name := f"{layer}.{row.attention_out}")
    # one that writes to another width (muse_spark) is not the stream's
    if first and isinstance(out, nn.Linear) and out.out_features in down.tensor.shape:
        wanted.append(("attention_out", name, "weight", 0.0))
    return {
        field: (Slice(f"{name}.{own}", modules[name], "head", 0), offset)
        for field, name, own, offset in wanted
        if name in modules and isinstance(getattr(modules[name], own, None), torch.Tensor)
    }


def _of_pattern(
    model: PreTrainedModel,
    modules: dict[str, nn.Module],
    pattern: Pattern,
    numbers: tuple[int, ...],
    slices: Sequence[Slice],
    around: dict[str, tuple[Slice, float]],
    number: int,
) -> list[Group]:
    """The group of an FFN; of a bank of experts, one for each."""
    down = next(where for where in slices if where.role == "down")
    shape = getattr(down.module, down.attribute).shape
    experts = range(shape[0]) if pattern.experts else (None,)
    layer = f"{pattern.down.tensor.partition('.*.')[0]}.{numbers[0] if numbers else ''}"
    path = down.name.removesuffix(".weight")
    share = min(1.0, (top_k(model.config) or 1) / shape[0]) if pattern.experts else 1.0
    value = field_of(model.config, pattern.knob)
    listed = isinstance(value, list | tuple)
    whole = isinstance(value, int) and value > 0 and not pattern.companions
    step = shape[down.axis] // math.gcd(shape[down.axis], value) if whole else 1
    return [
        Group(
            number=number + place,
            layer=numbers[0] if numbers else 0,
            path=path,
            expert=expert,
            width=shape[down.axis],
            slices=tuple(slices if expert is None else (replace(s, expert=expert) for s in slices)),
            pattern=pattern,
            module=modules.get(layer, model),
            around=around if not place else {k: v for k, v in around.items() if k in _EACH},
            share=share,
            listed=listed,
            step=step,
        )
        for place, expert in enumerate(experts)
    ]
