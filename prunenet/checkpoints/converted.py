"""Tensors that transformers computes from several in the files when it loads them, and splits when
it saves them: experts, which are one tensor in the model and one each on the disk.

Memory holds the last two such tensors, since reading and writing alternate between those of a
layer.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from prunenet.checkpoints.shards import StoredTensor
from prunenet.runtime.files import CheckpointError

_HELD: OrderedDict[object, Any] = OrderedDict()
_MOST = 2


@dataclass(frozen=True, slots=True, eq=False)
class ConvertedTensor:
    """A tensor of the model that is computed from others in the files; read as a
    `prunenet.checkpoints.shards.StoredTensor`.

    Attributes:
        name: in the model.
        sources: name in the file, pattern of the converter, and tensor of each.
        converter: of transformers.
        model: that it belongs to, on the meta device.
        shape, dtype: in the model.
        stored: dtype in the files.
        device: where it is put.
    """

    name: str
    sources: tuple[tuple[str, str, StoredTensor], ...]
    converter: WeightConverter
    model: PreTrainedModel
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.whole()[rows]

    def whole(self) -> Tensor:
        """All of it."""
        key = (self.sources[0][2].path, self.name, self.dtype, self.device)
        found: Tensor = _held(key, self._converted)
        return found

    def slabs(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows): all of it."""
        yield 0, self.whole()

    def _converted(self) -> Tensor:
        mapping = copy.deepcopy(self.converter)
        for name, pattern, tensor in self.sources:
            read = replace(tensor, dtype=self.dtype, device=torch.device("cpu")).whole()
            mapping.add_tensor(self.name, name, pattern, read)  # type: ignore[arg-type]
        made = mapping.convert(self.name, model=self.model, config=self.model.config)[self.name]
        whole: Tensor = made[0] if isinstance(made, list) else made
        return whole.to(self.device)


def origins(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the name in the model from which each tensor is split that is stored in parts.

    Args:
        model: says how its tensors are stored.
        state: tensors by their names in the model, as on the meta device.

    Raises:
        CheckpointError: transformers stores several tensors of the model together.
    """
    whole = {id(tensor) for tensor in revert_weight_conversion(model, dict(state)).values()}
    split = {name: tensor for name, tensor in state.items() if id(tensor) not in whole}
    try:
        return {
            part: name
            for name, tensor in split.items()
            for part in revert_weight_conversion(model, {name: tensor})
        }
    except ValueError:
        raise CheckpointError(
            f"a {type(model).__name__} cannot be written layer by layer, for transformers stores"
            " several of its tensors together; cut it in memory"
        ) from None


def part_of(
    model: PreTrainedModel, name: str, part: str, rows: Callable[[str], Iterable[Tensor]]
) -> Tensor:
    """Returns a stored part of a tensor of the model.

    Args:
        model: says how its tensors are stored.
        name: of the tensor in the model.
        part: name in the file.
        rows: given a name in the model, its rows in pieces.
    """

    def split() -> dict[str, Tensor]:
        parts: dict[str, Tensor] = revert_weight_conversion(
            model, {name: torch.cat(list(rows(name)))}
        )
        return parts

    found: Tensor = _held((id(model), name), split)[part]
    return found


def _held(key: object, make: Callable[[], Any]) -> Any:
    """What was made for a key, one of the last few."""
    if key not in _HELD:
        while len(_HELD) >= _MOST:
            _HELD.popitem(last=False)
        _HELD[key] = make()
    _HELD.move_to_end(key)
    return _HELD[key]


def let_go() -> None:
    """Frees what is held."""
    _HELD.clear()
