"""What methods look at, every measurement of it priced: `Evidence` with a ledger, and with what
refit and elimination need.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from prunenet.compare.ledger import Ledger
from prunenet.models.layers import iter_ffns
from prunenet.policies.methods import Evidence
from prunenet.refit.eliminate import eliminate, score_order
from prunenet.refit.folds import folds_of, pooled
from prunenet.refit.moments import Moments, ffn_moments


@dataclass(frozen=True, eq=False)
class SharedEvidence(Evidence):
    """Evidence whose every measurement goes through a ledger, with those of refit and elimination.

    Attributes:
        ledger: of the measurements.
        label: of the text.
    """

    ledger: Ledger = field(default_factory=Ledger)
    label: str = ""

    @cached_property
    def folds(self) -> list[tuple[Moments, Moments]]:
        """Of each layer, on both folds of the blocks that a refit looks at."""
        return list(zip(*(ffn_moments(self.model, fold) for fold in self._split), strict=True))

    @property
    def _split(self) -> tuple[Int[Tensor, "n tokens"], ...]:
        return folds_of(self.ids, self.kinds)

    @property
    def kinds(self) -> Int[Tensor, " n"] | None:
        """Of the blocks, see `prunenet.text.calibration.CalibrationSet`."""
        return None if self.blocks is None else self.blocks.kinds

    @cached_property
    def elimination(self) -> list[Float[Tensor, " _"]]:
        """Scores of each layer's channels in the order of greedy elimination, all the way; see
        `prunenet.refit.eliminate`.
        """
        pairs = zip(iter_ffns(self.model), self.folds, strict=True)
        return [score_order(eliminate(ffn.down, pooled(folds)), ffn.d_ff) for ffn, folds in pairs]


def _timed(measurement: cached_property[Any]) -> property:
    """The same measurement, made once, its seconds in the ledger."""

    def measured(self: SharedEvidence) -> Any:
        key = (self.label, self.seed, str(measurement.attrname))
        return self.ledger.measured(key, lambda: measurement.__get__(self))

    return property(measured, doc=measurement.__doc__)


_VIEWS = ("ffns", "attentions")  # on weights: nothing is measured
for _kind in (Evidence, SharedEvidence):
    for _name, _value in list(vars(_kind).items()):
        if isinstance(_value, cached_property) and _name not in _VIEWS:
            setattr(SharedEvidence, _name, _timed(_value))
