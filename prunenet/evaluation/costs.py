"""What each unit of a model costs in parameters, operations, bytes of the KV cache or measured time
(docs/methods.md, section 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunenet.evaluation.choices import Cost
from prunenet.evaluation.latency import LatencyTable
from prunenet.evaluation.units import Unit
from prunenet.models.heads import HEAD_DIM, QUERY_HEADS


def unit_costs(
    units: Sequence[Unit],
    config: Any,
    cost: Cost,
    tokens: int = 1024,
    *,
    table: LatencyTable | None = None,
) -> list[float]:
    """Returns what each unit costs.

    Args:
        units: of a dense model.
        config: the model's.
        cost: "params" and "active": parameters. "flops": of one token's forward pass, in the mean
            over a sequence. "kv-bytes": of one token's keys and values in 16 bits. "latency":
            microseconds, where the units of a layer go in the order of their numbers.
        tokens: length of that sequence.
        table: of "latency", see `prunenet.evaluation.latency.latency_table`.

    Raises:
        ValueError: "latency" without a table.
    """
    if cost in ("params", "active"):
        return [float(unit.parameters) for unit in units]
    if cost == "latency":
        if table is None:
            raise ValueError("costs by latency are measured: give the table of the model (`table`)")
        return _times(units, table)
    queries = int(getattr(config, QUERY_HEADS))
    head_dim = int(getattr(config, HEAD_DIM, None) or config.hidden_size // queries)
    groups = {u.layer: 0 for u in units}
    for unit in units:
        groups[unit.layer] += unit.structure == "heads"

    def price(unit: Unit) -> float:
        heads = {"heads": 1, "channels": 0}.get(unit.structure, groups[unit.layer])
        if cost == "kv-bytes":
            return 4.0 * head_dim * heads
        each = queries // max(groups[unit.layer], 1)
        # scores and mixing, each 2 * head_dim a pair, of half of all pairs
        return 2.0 * unit.parameters + 2.0 * tokens * head_dim * each * heads

    return [price(unit) for unit in units]


def _times(units: Sequence[Unit], table: LatencyTable) -> list[float]:
    """Microseconds that go with each unit, behind those of its layer that go before it."""
    sizes: dict[tuple[str, int], list[int]] = {}
    for unit in units:
        sizes.setdefault((unit.structure, unit.layer), []).append(unit.parameters)
    widest = max((sum(n) for (what, _), n in sizes.items() if what == "channels"), default=0)
    groups = table.groups[-1] if table.groups else 0

    def left(unit: Unit, gone: int) -> float:
        """Time of the layer without so many of the unit's structure."""
        own = sizes[unit.structure, unit.layer]
        if unit.structure == "channels":
            return table.at(table.widths[-1] * sum(own[gone:]) / widest)
        stay = len(own) - gone if unit.structure == "heads" else 0 if gone else groups
        return table.at(table.widths[-1], stay)

    return [
        table.whole if unit.structure == "layers" else left(unit, n) - left(unit, n + 1)
        for unit in units
        for n in (unit.number,)
    ]
