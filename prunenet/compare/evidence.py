"""What methods look at, every measurement of it priced: `Evidence` with a ledger, and with what refit and elimination need."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from prunenet.compare.ledger import Ledger
from prunenet.compensate import held_back
from prunenet.eliminate import eliminate, score_order
from prunenet.layers import iter_ffns
from prunenet.moments import Moments, ffn_moments
from prunenet.policies.methods import Evidence


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
    def fitted(self) -> list[Moments]:
        """Of each layer, on the blocks that refits are fitted on."""
        return list(ffn_moments(self.model, held_back(self.ids)[0]))

    @cached_property
    def checked(self) -> list[Moments]:
        """Of each layer, on the blocks held back."""
        return list(ffn_moments(self.model, held_back(self.ids)[1]))

    @cached_property
    def elimination(self) -> list[Float[Tensor, " _"]]:
        """Scores of each layer's channels in the order of greedy elimination, all the way; see `prunenet.eliminate`."""
        pairs = zip(iter_ffns(self.model), self.fitted, strict=True)
        return [score_order(eliminate(ffn.down, moments.second), ffn.d_ff) for ffn, moments in pairs]

    def __getattribute__(self, name: str) -> Any:
        if name not in _SHARED:
            return super().__getattribute__(name)
        key = (self.label, self.seed, name)
        return self.ledger.measured(key, lambda: super(SharedEvidence, self).__getattribute__(name))


_SHARED = {
    name
    for kind in (Evidence, SharedEvidence)
    for name, value in vars(kind).items()
    if isinstance(value, cached_property) and name not in ("ffns", "attentions")  # views
}
