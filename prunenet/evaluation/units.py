"""The parts of a model that can be taken away, and a model without one of them (docs/methods.md,
section 12).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.evaluation.choices import STRUCTURES as STRUCTURES
from prunenet.evaluation.choices import Structure as Structure
from prunenet.evaluation.divergence import Masks
from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.depth import without_layers
from prunenet.models.groups import Group
from prunenet.models.heads import attentions
from prunenet.models.hooks import zeroing
from prunenet.models.layers import decoder_layers, ffn_at
from prunenet.runtime.choices import check_choice, is_whole
from prunenet.runtime.placement import device_of

Cut = tuple[Masks, Masks | None]
"""Keep masks of each layer's channels, and of its groups of heads; None where these stay whole."""


class Unit(NamedTuple):
    """One part that can be ablated.

    Attributes:
        structure: see `Structure`.
        layer: number of the decoder layer.
        number: bin (0 holds the channels that go first) or key-value group; 0 for the others.
        parameters: that go away with it.
    """

    structure: Structure
    layer: int
    number: int
    parameters: int


def units_of(
    model: PreTrainedModel, bins: int = 12, structures: Sequence[Structure] = STRUCTURES
) -> tuple[Unit, ...]:
    """Lists a model's units, layer by layer: bins of channels, groups, attention, the layer.

    Families whose heads cannot be cut have bins alone, and layers.

    Args:
        model: a causal LM; shapes alone are read.
        bins: of the channels of a layer, at least 1; the narrowest layer's d_ff at most.
        structures: of which units are listed.

    Raises:
        ValueError: bins out of range, or an unknown structure.
    """
    for structure in structures:
        check_choice("structure", structure, Structure)
    anatomy = Anatomy.of(model)
    if not (is_whole(bins) and 1 <= bins <= min(anatomy.widths)):
        raise ValueError(f"bins must be in [1, {min(anatomy.widths)}], got {bins}")
    try:
        heads: Sequence[Any] = attentions(model)
    except UnsupportedArchitecture:
        heads = []
    units: list[Unit] = []
    for layer in anatomy.layers:
        cost, width = ffn_at(model, layer.index).channel_parameters, anatomy.widths[layer.index]
        edges = [width * part // bins for part in range(bins + 1)]
        sizes = [high - low for low, high in pairwise(edges)]
        units += [Unit("channels", layer.index, part, cost * n) for part, n in enumerate(sizes)]
        if heads:
            groups, each = heads[layer.index].groups, heads[layer.index].group_parameters
            units += [Unit("heads", layer.index, group, each) for group in range(groups)]
            if groups:
                units.append(Unit("attention", layer.index, 0, groups * each))
        whole = sum(parameter.numel() for parameter in layer.module.parameters())
        units.append(Unit("layers", layer.index, 0, whole))
    return tuple(unit for unit in units if unit.structure in structures)


def check_cuttable(model: PreTrainedModel, structures: Sequence[Structure]) -> None:
    """Checks that a model can lose structures, before minutes of measuring.

    Raises:
        ValueError: no structure, an unknown one, or layers of a model that has only one.
        UnsupportedArchitecture: heads, or layers, of this family cannot be cut.
    """
    if not structures or isinstance(structures, str):
        known = ", ".join(STRUCTURES)
        raise ValueError(f"`structures` is a list of any of {known}, got {structures!r}")
    for structure in structures:
        check_choice("structure", structure, Structure)
    if "heads" in structures:
        attentions(model)
    if "layers" in structures:
        layers = torch.arange(len(decoder_layers(model)))
        if len(layers) == 1:
            raise ValueError(
                "the last layer of a model stays, and this one has no other: leave layers out of"
                " `structures`"
            )
        without_layers(model, layers != len(layers) // 2)


class Ablations:
    """Takes one unit at a time from a model, or gives it back to what is gone already.

    Bins of channels and groups of heads are columns of the linear that they enter. Inside the
    `with` block the model computes without what is gone.
    """

    def __init__(
        self, anatomy: Anatomy, units: Sequence[Unit], order: Sequence[Tensor], behind: Cut | None
    ) -> None:
        self._anatomy, self._hooks = anatomy, ExitStack()
        self._columns: dict[Unit, tuple[nn.Module, Tensor]] = {}
        self._gone: dict[nn.Module, Tensor] = {}
        beside = Counter((unit.structure, unit.layer) for unit in units)
        ffns = ffns_of(anatomy) if any(unit.structure == "channels" for unit in units) else {}
        for unit in units:
            if unit.structure == "channels":
                ffn, ranked = ffns[unit.layer], order[unit.layer]
                module, size, device = ffn.down.module, ffn.width, ffn.down.tensor.device
                stays = None if behind is None else behind[0][unit.layer]
            elif unit.structure == "heads":
                linear = self._attention(unit)
                module, size, device = linear, linear.in_features, linear.weight.device
                ranked = torch.arange(size)
                stays = None if behind is None or behind[1] is None else behind[1][unit.layer]
            else:
                continue
            parts = beside[unit.structure, unit.layer]
            edges = size * unit.number // parts, size * (unit.number + 1) // parts
            self._columns[unit] = module, ranked[slice(*edges)].to(device)
            gone = torch.zeros(size, dtype=torch.bool)
            if stays is not None:
                gone = ~stays.cpu().repeat_interleave(size // len(stays))
            self._gone[module] = gone.to(device)

    def __enter__(self) -> Ablations:
        for module, gone in self._gone.items():
            self._hooks.callback(module.register_forward_pre_hook(zeroing(gone)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def share(self, unit: Unit) -> float:
        """Share of a unit that is gone, in [0, 1]."""
        if unit not in self._columns:
            return 0.0
        module, columns = self._columns[unit]
        return float(self._gone[module][columns].float().mean())

    @contextmanager
    def turned(self, unit: Unit) -> Iterator[float]:
        """Inside, what is left of the unit is gone too, or all of it is back where more is gone
        than left. A skipped layer is the caller's.

        Yields:
            The share of the unit that goes, in [0.5, 1]; minus that which comes back.
        """
        if unit.structure == "layers":
            yield 1.0
        elif unit.structure == "attention":
            linear = self._attention(unit)  # its bias stays, as where all heads are cut
            all_inputs = torch.ones(linear.in_features, dtype=torch.bool, device=device_of(linear))
            with linear.register_forward_pre_hook(zeroing(all_inputs)):
                yield 1.0
        else:
            module, columns = self._columns[unit]
            # the hook reads this tensor
            gone, before = self._gone[module], self._gone[module][columns]
            share = self.share(unit)
            gone[columns] = share <= 0.5
            try:
                yield -share if share > 0.5 else 1 - share
            finally:
                gone[columns] = before

    def _attention(self, unit: Unit) -> nn.Linear:
        layer = self._anatomy.layers[unit.layer]
        return layer.linear(self._anatomy.architecture.attention_out)


def ffns_of(anatomy: Anatomy) -> dict[int, Group]:
    """The FFN of each layer, whose channels can be ablated.

    Raises:
        UnsupportedArchitecture: a layer has experts, several FFNs or none.
    """
    found = {group.layer: group for group in anatomy.groups if group.expert is None}
    if len(found) != len(anatomy.groups) or len(found) != len(anatomy.layers):
        raise UnsupportedArchitecture(
            f"channels are ablated where each layer has one FFN, and a"
            f" {type(anatomy.model).__name__} has {len(anatomy.groups)} in"
            f" {len(anatomy.layers)} layers"
        )
    return found
