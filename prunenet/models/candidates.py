"""Proposes channel groups of a model by the shapes of its matrices, and tests them by number.

A matrix with w inputs may be the output matrix of a feed-forward network (FFN) if one or two
matrices near it have w outputs, or one has 2 w. Three tests in float64 decide (tolerance 1e-9):

1. Dropping channels from the output matrix changes the logits.
2. Dropping the same channels from the input matrices changes them to the same numbers.
3. Permuting the channels in all matrices changes nothing. Attention's value and output matrices
   pass the first two and fail here.

The tests also find how two halves lie in one matrix, and the order of the axes of experts. Banks
of experts with a matrix for each of gate, up and down pass in any order: which one takes the
channels as its input is seen in a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations, product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunenet.models.groups import Layout, Part, Pattern, Role, Slice, starred
from prunenet.models.observed import observing
from prunenet.models.twin import D_MODEL, computed, in_float64, logits_of

_SAME, _EFFECT = 1e-9, 1e-7
_SAME_32, _EFFECT_32 = 1e-5, 1e-3  # classes whose code does not run in float64
_BIASES = ("_bias", ".bias")


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A matrix that text passes through.

    Attributes:
        name: of the tensor.
        star, numbers: see `prunenet.models.groups.starred`.
        module: that owns it.
        shape: of one expert's part where there are three dimensions.
        count: experts; 0 where it is one matrix.
        order: of its module among the calls.
    """

    name: str
    star: str
    numbers: tuple[int, ...]
    module: nn.Module
    shape: tuple[int, int]
    count: int
    order: int

    @property
    def experts(self) -> bool:
        """Whether there are three dimensions."""
        return self.count > 0

    @property
    def axes(self) -> tuple[tuple[int, int], ...]:
        """(axis of outputs, axis of inputs): one order in layers, both in experts."""
        if self.experts:
            return ((1, 2), (2, 1))
        return ((1, 0),) if isinstance(self.module, Conv1D) else ((0, 1),)

    def size(self, axis: int) -> int:
        """Length of an axis of the whole tensor."""
        return self.shape[axis - self.experts]

    @property
    def owner(self) -> str:
        """Path of the module; of a bank of experts the tensor's own path."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Found:
    """A pattern that passed, and the layers in which it did and did not.

    Attributes:
        pattern: without a knob.
        width: channels.
        passed, failed: numbers of each FFN.
    """

    pattern: Pattern
    width: int
    passed: tuple[tuple[int, ...], ...]
    failed: tuple[tuple[int, ...], ...]


class Tester:
    """Computes what a model's logits become when tensors change for a moment.

    Args:
        model: a twin.
        ids: its text.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.logits = logits_of(model, ids)
        self.scale = float(self.logits.abs().max())
        wide = self.logits.dtype == torch.float64
        self._same, self._effect = (_SAME, _EFFECT) if wide else (_SAME_32, _EFFECT_32)

    def passes(self, slices: Sequence[Slice], width: int) -> bool:
        """Whether slices hold the channels of one FFN, or of one bank of experts."""
        if any(_entries(where) != width * _halves(where) for where in slices):
            return False
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(width, generator=generator)
        dropped = order[: width // 2]
        ends = [where for where in slices if where.role == "down"]
        starts = [where for where in slices if where.role != "down"]
        with _changed([(s, _dropping(s, dropped, width)) for s in ends]):
            without = logits_of(self.model, self.ids)
        if self._distance(without, self.logits) < self._effect:
            return False
        with _changed([(s, _ordering(s, order, width)) for s in slices]):
            if self._distance(logits_of(self.model, self.ids), self.logits) > self._same:
                return False
        with _changed([(s, _dropping(s, dropped, width)) for s in starts]):
            # xIELU of 0 is not quite 0
            allowed = max(self._same, 1e-4 * self._distance(without, self.logits))
            return self._distance(logits_of(self.model, self.ids), without) < allowed

    def _distance(self, a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max()) / self.scale


def matrices(model: PreTrainedModel, ids: Tensor) -> list[Matrix]:
    """The matrices that text passes through, in the order in which they are called."""
    order: dict[nn.Module, int] = {}

    def see(module: nn.Module, _: object) -> None:
        order.setdefault(module, len(order))

    hooks = [module.register_forward_pre_hook(see) for module in model.modules()]
    try:
        with torch.enable_grad(), in_float64(model.dtype):
            computed(model, ids).square().sum().backward()  # type: ignore[no-untyped-call]
        graded = True
    # code that changes tensors in place, or asks for training mode: what is called is used
    except (RuntimeError, AssertionError):
        graded = False
    for hook in hooks:
        hook.remove()
    found = []
    for path, module in model.named_modules():
        for own, tensor in module.named_parameters(recurse=False):
            linear = isinstance(module, nn.Linear | Conv1D) and own == "weight"
            experts = tensor.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            used = _graded(tensor) if graded else module in order
            if (linear or experts) and used:
                star, numbers = starred(name := f"{path}.{own}")
                shape = (int(tensor.shape[-2]), int(tensor.shape[-1]))
                place = order.get(module, len(order))
                many = len(tensor) if experts else 0
                found.append(Matrix(name, star, numbers, module, shape, many, place))
    model.zero_grad(set_to_none=True)
    return sorted(found, key=lambda matrix: matrix.order)


def _graded(tensor: Tensor) -> bool:
    return tensor.grad is not None and bool(tensor.grad.any())


def find(model: PreTrainedModel, ids: Tensor) -> list[Found]:
    """All patterns of FFNs, in the order of their output matrices."""
    tester, all_of = Tester(model, ids), matrices(model, ids)
    firsts: dict[str, Matrix] = {}
    for matrix in all_of:
        firsts.setdefault(matrix.star, matrix)
    made: dict[frozenset[tuple[str, int]], Found] = {}
    for down in firsts.values():
        found = _first_that_passes(tester, down, all_of)
        if found is not None:
            key = frozenset((part.tensor, part.axis) for part in found.pattern.parts)
            made.setdefault(key, found)
    return list(made.values())


def _first_that_passes(tester: Tester, down: Matrix, all_of: Sequence[Matrix]) -> Found | None:
    instances = {matrix.numbers: matrix for matrix in all_of if matrix.star == down.star}
    names = dict(tester.model.named_parameters(remove_duplicate=False))
    for out_axis, in_axis in down.axes:
        width = down.size(in_axis)
        if width in (D_MODEL, 1) or down.size(out_axis) == 1:
            continue
        for pattern in _proposals(down, in_axis, width, all_of):
            tried = [
                (numbers, _resolved(tester.model, pattern, numbers))
                for numbers in instances
                if all(_numbered(part.tensor, numbers) in names for part in pattern.parts)
            ]
            widths = {numbers: instances[numbers].size(in_axis) for numbers, _ in tried}
            results = {n: tester.passes(s, widths[n]) for n, s in tried[:1]}
            # the first layer may be the odd one
            if not any(results.values()) and len(tried) > 1:
                results |= {n: tester.passes(s, widths[n]) for n, s in tried[-1:]}
            if not any(results.values()):
                continue
            results |= {n: tester.passes(s, widths[n]) for n, s in tried if n not in results}
            passed = tuple(sorted(n for n, good in results.items() if good))
            failed = tuple(sorted(n for n, good in results.items() if not good))
            return Found(_directed(tester, pattern, passed[0]), width, passed, failed)
    return None


def _directed(tester: Tester, pattern: Pattern, numbers: Sequence[int]) -> Pattern:
    """A bank's pattern whose `down` is the matrix that takes the channels as its input."""
    if not pattern.experts or any(part.layout != "plain" for part in pattern.parts):
        return pattern
    slices, read = _resolved(tester.model, pattern, numbers), set[str]()
    with observing(slices, lambda place, *_: read.add(starred(slices[place].name)[0])):
        logits_of(tester.model, tester.ids)
    if pattern.down.tensor in read or len(read) != 1:
        return pattern
    roles: list[Role] = ["up"] if len(pattern.matrices) == 2 else ["gate", "up"]
    starts = [part for part in pattern.parts if part.tensor not in read]
    ends = [replace(part, role="down") for part in pattern.parts if part.tensor in read]
    starts.sort(key=lambda part: "gate" not in part.tensor.rpartition(".")[2])
    made = [replace(part, role=role) for part, role in zip(starts, roles, strict=True)]
    return replace(pattern, parts=(*made, *ends))


def _proposals(
    down: Matrix, in_axis: int, width: int, all_of: Sequence[Matrix]
) -> Iterator[Pattern]:
    """Input matrices that an output matrix may have, the likeliest first."""
    near = [m for m in all_of if m.numbers == down.numbers and m.name != down.name]
    end = _parts(down, "down", in_axis)[:1]  # its bias is not cut
    tried: set[str] = set()
    place, layer = down.owner, _layer_of(down)
    while place:
        inside = [
            (matrix, axis)
            for matrix in near
            if _within(matrix.name, place) and matrix.name not in tried
            for axis, _ in matrix.axes
            if matrix.count == down.count and matrix.size(axis) in (width, 2 * width)
        ]
        tried |= {matrix.name for matrix, _ in inside}
        for starts in _starts(inside, width):
            yield Pattern((*starts, *end), "", experts=down.experts)
        if place == layer:
            break
        place = place.rpartition(".")[0]


def _layer_of(matrix: Matrix) -> str:
    """Path of the innermost numbered module around a matrix."""
    stars = matrix.star.split(".")
    last = max((i for i, part in enumerate(stars) if part == "*"), default=-1)
    return ".".join(matrix.name.split(".")[: last + 1])


def _starts(inside: Sequence[tuple[Matrix, int]], width: int) -> Iterator[tuple[Part, ...]]:
    singles = [found for found in inside if found[0].size(found[1]) == width]
    for (a, i), (b, j) in combinations(singles, 2):
        if a.name != b.name:
            first, second = (
                ((b, j), (a, i)) if _is_gate(b) and not _is_gate(a) else ((a, i), (b, j))
            )
            yield (*_parts(first[0], "gate", first[1]), *_parts(second[0], "up", second[1]))
    layouts: tuple[Layout, ...] = ("concat", "interleaved")
    for (matrix, axis), layout in product(inside, layouts):
        if matrix.size(axis) == 2 * width:
            yield tuple(_parts(matrix, "gate_up", axis, layout))
    for matrix, axis in singles:
        yield tuple(_parts(matrix, "up", axis))


def _is_gate(matrix: Matrix) -> bool:
    own = matrix.name.removesuffix(".weight").rpartition(".")[2]
    return "gate" in own or own in ("w1", "wi_0", "w_0")


def _parts(matrix: Matrix, role: Role, axis: int, layout: Layout = "plain") -> list[Part]:
    """A matrix and its bias."""
    made = [Part(matrix.star, role, axis, layout)]
    bias = matrix.star.removesuffix(".weight")
    for ending in _BIASES:
        name = f"{bias}{ending}"
        own = name.rpartition(".")[2]
        tensor = matrix.module._parameters.get(own)
        if tensor is not None and tensor.dim() == 1 + matrix.experts:
            made.append(Part(name, role, 1 if matrix.experts else 0, layout))
    return made


def _resolved(model: PreTrainedModel, pattern: Pattern, numbers: Sequence[int]) -> list[Slice]:
    """The slices of one FFN; of a bank, those of all its experts."""
    made = []
    for part in pattern.parts:
        name = _numbered(part.tensor, numbers)
        module = model.get_submodule(name.rpartition(".")[0])
        where = Slice(name, module, part.role, part.axis, part.layout)
        if not pattern.experts:
            made.append(where)
            continue
        count = len(getattr(module, where.attribute))
        made += [replace(where, expert=expert) for expert in range(count)]
    return made


def _numbered(star: str, numbers: Sequence[int]) -> str:
    """A name with numbers in place of `*`."""
    left = iter(numbers)
    return "".join(str(next(left)) if c == "*" else c for c in star)


def _within(name: str, place: str) -> bool:
    return name.startswith(f"{place}.")


@contextmanager
def _changed(changes: Sequence[tuple[Slice, Tensor]]) -> Iterator[None]:
    """Inside, slices hold other numbers."""
    kept = [(where.tensor, where.tensor.clone()) for where, _ in changes]
    try:
        for (tensor, _), (_, new) in zip(kept, changes, strict=True):
            tensor.copy_(new)
        yield
    finally:
        for tensor, old in kept:
            tensor.copy_(old)


def _entries(where: Slice) -> int:
    return where.tensor.shape[where.axis - (where.expert is not None)]


def _halves(where: Slice) -> int:
    return 1 if where.layout == "plain" else 2


def _dropping(where: Slice, dropped: Tensor, width: int) -> Tensor:
    axis = where.axis - (where.expert is not None)
    return where.tensor.index_fill(axis, where.entries(dropped, width), 0)


def _ordering(where: Slice, order: Tensor, width: int) -> Tensor:
    axis = where.axis - (where.expert is not None)
    return where.tensor.index_select(axis, where.entries(order, width))
