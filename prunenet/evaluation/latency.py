"""Measures how long a decoder layer takes on this machine at several widths and numbers of heads,
once for a model's shapes, dtype and device (docs/methods.md, section 13).

The table is kept in the cache folder: once it is there, costs by time are the same for every call.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.depth import without_layers
from prunenet.models.heads import HEAD_DIM, QUERY_HEADS, group_counts
from prunenet.models.layers import decoder_layers, text_config
from prunenet.models.surgery import cut
from prunenet.refit.calls import layer_calls
from prunenet.runtime import parallel
from prunenet.runtime.files import cache_folder, write_atomic
from prunenet.runtime.json_files import Count, Positive, Within, parse_json, read_json
from prunenet.runtime.placement import home

TOKENS = 128
"""Of the one sequence that is passed through the layer."""
_POINTS, _ROUNDS, _WARM = 8, 25, 3
_Times = tuple[Annotated[float, Within(0)], ...]


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Microseconds of a decoder layer, medians; rising, for a wider layer is never faster.

    Attributes:
        widths, channels: FFN channels, and the time of the layer at each with all of its heads.
        groups, heads: groups of heads from 0, and the time at each with all channels; none where
            heads of the family cannot be cut.

    Raises:
        ValueError: not one time for each number, or numbers that do not rise.
    """

    widths: tuple[Positive, ...]
    channels: _Times
    groups: tuple[Count, ...]
    heads: _Times

    def __post_init__(self) -> None:
        for places, times in ((self.widths, self.channels), (self.groups, self.heads)):
            if len(places) != len(times) or any(a >= b for a, b in pairwise(places)):
                raise ValueError("a table of latency has a time for each number, and these rise")

    @property
    def whole(self) -> float:
        """Time of the whole layer."""
        return self.channels[-1]

    def at(self, width: float, groups: float | None = None) -> float:
        """Time of a layer of some channels and groups (None: all), in straight lines between the
        measured ones; below the least of them on the line of the first two, from 0.
        """
        saved = self.whole - _line(width, self.widths, self.channels)
        if groups is not None and self.groups:
            saved += self.whole - _line(groups, self.groups, self.heads)
        return max(self.whole - saved, 0.0)


def latency_table(model: PreTrainedModel) -> LatencyTable:
    """The table of a model on its device, measured at first use; all processes get the first's.

    Args:
        model: a causal LM on one device; its widest layer is measured.

    Raises:
        UnsupportedArchitecture: no single layer of the model can be taken out, see
            `prunenet.models.depth.without_layers`.
    """
    found = parallel.broadcast_object(0, lambda: asdict(_kept(model)))
    table: LatencyTable = parse_json(json.dumps(found), LatencyTable)
    return table


def table_path(model: PreTrainedModel) -> Path:
    """Where the table of a model is kept: models of the same shapes, dtype and device share it."""
    config, device = text_config(model), home(model)
    machine = [platform.node(), platform.machine(), str(torch.get_num_threads())]
    if device.type == "cuda":
        machine = [torch.cuda.get_device_name(device)]
    shapes = [tuple(tensor.shape) for tensor in decoder_layers(model)[0].parameters()]
    attention = [getattr(config, name, None) for name in (QUERY_HEADS, HEAD_DIM)]
    kind = [type(model).__name__, model.config._attn_implementation, str(model.dtype)]
    measured = max(Anatomy.of(model).widths), machine, TOKENS, "from 0 groups"
    said = repr((kind, shapes, attention, *measured))
    name = hashlib.sha256(said.encode()).hexdigest()[:24]
    return cache_folder() / "latency" / f"{name}.json"


def _kept(model: PreTrainedModel) -> LatencyTable:
    path = table_path(model)
    with suppress(FileNotFoundError, ValueError):  # a damaged one is measured again
        known: LatencyTable = read_json(path, LatencyTable, remedy="remove it")
        return known
    made = measure_latency(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(asdict(made), indent=2) + "\n").encode())
    return made


@torch.no_grad()
def measure_latency(
    model: PreTrainedModel, rounds: int = _ROUNDS, clock: Callable[[], float] = time.perf_counter
) -> LatencyTable:
    """Measures the table; every round passes text through each variant of the layer in turn, so
    that noise hits them alike.

    Args:
        model: as for `latency_table`.
        rounds: of which the median counts, at least 1.
        clock: seconds.
    """
    widths = Anatomy.of(model).widths
    widest = max(range(len(widths)), key=lambda layer: widths[layer])
    one = without_layers(model, torch.arange(len(widths)) == widest)
    width, count = widths[widest], _group_count(one)
    groups = [0, *_points(count)] if count else []
    sizes = [(n, count) for n in _points(width)] + [(width, n) for n in groups[:-1]]
    variants = [_layer(one, *size, count) for size in sizes]
    times: list[list[float]] = [[] for _ in variants]
    for turn in range(_WARM + rounds):
        for run, found in zip(variants, times, strict=True):
            start = _now(model, clock)
            run()
            if turn >= _WARM:
                found.append(_now(model, clock) - start)
    spent = [median(found) * 1e6 for found in times]
    channels = _rising(spent[: len(_points(width))])
    heads = [min(value, channels[-1]) for value in _rising(spent[len(channels) :])]
    heads += channels[-1:] if count else ()
    return LatencyTable(tuple(_points(width)), channels, tuple(groups), tuple(heads))


def _points(most: int) -> list[int]:
    """Numbers up to the most, evenly spaced."""
    return sorted({most * part // _POINTS for part in range(1, _POINTS + 1)} - {0})


def _group_count(one: PreTrainedModel) -> int:
    """Groups of heads of the one layer; 0 where they cannot be cut."""
    try:
        return group_counts(one)[0]
    except UnsupportedArchitecture:
        return 0


def _layer(one: PreTrainedModel, width: int, groups: int, count: int) -> Callable[[], Any]:
    """What passes text through the layer of a model of one layer, narrowed."""
    keep = [torch.arange(Anatomy.of(one).widths[0]) < width]
    heads = [torch.arange(count) < groups] if groups < count else None
    narrow = cut(Anatomy.of(one), keep, heads)  # no cache counts tokens here: it needs no heads
    narrow.train(False)
    ids = torch.arange(TOKENS, device=home(narrow))[None] % text_config(narrow).vocab_size
    (layer,), (call,) = decoder_layers(narrow), layer_calls(narrow, ids)
    assert isinstance(call.hidden, Tensor), "the first layer is given hidden states"
    return partial(layer, call.hidden, *call.args, **call.kwargs)


def _rising(times: Sequence[float]) -> tuple[float, ...]:
    """The nearest times that rise: neighbours that fall share their mean."""
    pools: list[list[float]] = []
    for value in times:
        pools.append([value])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return tuple(mean(pool) for pool in pools for _ in pool)


def _line(at: float, places: tuple[int, ...], times: tuple[float, ...]) -> float:
    first = times[0]
    if len(places) > 1:
        slope = (times[1] - times[0]) / (places[1] - places[0])
        first = max(times[0] - slope * places[0], 0.0)
    return float(np.interp(at, (0, *places), (first, *times)))


def _now(model: PreTrainedModel, clock: Callable[[], float]) -> float:
    device = home(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()
