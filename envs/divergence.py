"""Rewards how much of the dense model's next-token distribution the pruned model keeps
(docs/methods.md, section 2).

The reward is paid once, at the end of a sweep, on text that the model wrote itself (no external
data) or on given text. Unlike the layer-by-layer rewards it measures how the cuts of different
layers add up, and so which allocation of widths is best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.evaluation.divergence import Downs, divergences
from prunenet.models.layers import check_tokens

Refit = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, keep (d_ff,), dense down matrix) -> the cut down matrix, with zeros in the columns
of removed channels.
"""


class DivergenceReward:
    """Pays exp(-KL(dense || pruned)), KL averaged over tokens: in [0, 1], 1 for the dense model.

    Every sweep is judged on the same blocks, so that rewards of different masks are comparable.

    Args:
        model: a causal LM; read, never changed.
        blocks: (n, tokens) token ids.
        refit: makes a cut layer's down matrix; default the dense one without the dropped columns.
        unscored: positions at the start of each block that are not judged, see
            `prunenet.evaluation.divergence.divergences`.

    Raises:
        ValueError: blocks that the model cannot read, or (when judging) logits that are not finite.
    """

    split: ClassVar[Mapping[str, str]] = {"sweep": "masks"}  # see `prunenet.envs.split`

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Int[Tensor, "n tokens"],
        *,
        refit: Refit | None = None,
        unscored: int = 0,
    ) -> None:
        check_tokens(model, blocks)
        self._model = model
        self._blocks, self._unscored = blocks, unscored
        self._refit = refit or _without

    def layer(
        self, index: int, keep: Bool[Tensor, "masks d_ff"]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns no term: the reward is paid at the end of the sweep."""
        return {}

    def sweep(
        self, keep: Sequence[Bool[Tensor, "masks d_ff"]]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns the term `divergence`, (masks,), in [0, 1]."""
        ways = [self._way([masks[number] for masks in keep]) for number in range(len(keep[0]))]
        lost = divergences(self._model, ways, self._blocks, unscored=self._unscored)
        return {"divergence": torch.exp(-lost).clamp(max=1)}

    def _way(self, keep: list[Tensor]) -> Downs:
        return lambda layer, dense: self._refit(layer, keep[layer], dense)


def _without(
    _layer: int, keep: Bool[Tensor, " d_ff"], dense: Float[Tensor, "d_model d_ff"]
) -> Float[Tensor, "d_model d_ff"]:
    return dense * keep.to(dense)
