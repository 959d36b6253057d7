"""Evaluates an architecture by KL(dense || pruned) on given text, for fixed channel rankings
(docs/methods.md, sections 2 and 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import weights_sha256
from prunenet.evaluation.divergence import Downs, divergences
from prunenet.models.layers import check_tokens, down_linears
from prunenet.models.masks import top_channels
from prunenet.refit.cut import Refits
from prunenet.runtime.placement import present


class WidthDivergence:
    """Computes KL(dense || pruned) of widths, in nats per token; an `Evaluator`.

    Channels are ranked once, so that an architecture is only a choice of masks. The model is read,
    never changed.

    Args:
        model: a causal LM in eval mode.
        blocks: token ids to judge on; every architecture is judged on the same ones.
        scores: (d_ff,) of each layer, higher stays longer. Not with `refits`.
        unscored: positions at the start of each block that are not judged, see
            `prunenet.evaluation.divergence.divergences`.
        refits: every layer's down matrix refitted at a grid of levels, with their ranking. A width
            between two levels is judged as the level below it, so search with `step=refits.step`.

    Raises:
        ValueError: neither or both of scores and refits, scores that are not one a channel, or
            blocks that the model cannot read; when judging, widths that do not fit, or are below
            the narrowest level of the refits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Int[Tensor, "n tokens"],
        scores: Sequence[Float[Tensor, " _"]] | None = None,
        *,
        refits: Refits | None = None,
        unscored: int = 0,
    ) -> None:
        check_tokens(model, blocks)
        if (scores is None) == (refits is None):
            raise ValueError(
                f"give either scores or refits, got {'neither' if scores is None else 'both'}"
            )
        self._model, self._blocks, self._refits = model, blocks, refits
        self._unscored = unscored
        self._d_ff = [linear.in_features for linear in down_linears(model)]
        self._scores = list(refits.scores) if refits is not None else list(scores or [])
        if [len(row) for row in self._scores] != self._d_ff:
            got = [len(row) for row in self._scores]
            raise ValueError(
                f"a search over widths needs one score a channel, got {got} of {self._d_ff}"
            )

    @cached_property
    def key(self) -> str:
        """Hash of the weights, the text, the ranking and the refits."""
        digest = hashlib.sha256(weights_sha256(self._model).encode())
        digest.update(b"unscored %d" % self._unscored if self._unscored else b"")
        for tensor in (self._blocks, *self._scores):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        if self._refits is not None:
            # One refitted matrix differs between refits on other text, or with other damping.
            linear = down_linears(self._model)[0]
            with present(linear):
                dense = linear.weight.detach()
            refitted = self._way([self._refits.step] * len(self._d_ff))(0, dense)
            digest.update(refitted.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def __call__(self, widths: Sequence[int]) -> float:
        """Returns the divergence of one architecture."""
        return self.many([widths])[0]

    def many(self, architectures: Sequence[Sequence[int]]) -> list[float]:
        """Returns the divergence of several architectures, for which the dense model runs once."""
        found: list[float] = divergences(
            self._model,
            [self._way(widths) for widths in architectures],
            self._blocks,
            unscored=self._unscored,
        ).tolist()
        return found

    def _way(self, widths: Sequence[int]) -> Downs:
        if len(widths) != len(self._d_ff) or not all(
            0 < w <= d_ff for w, d_ff in zip(widths, self._d_ff, strict=True)
        ):
            raise ValueError(f"widths {list(widths)} do not fit layers of {self._d_ff} channels")
        if self._refits is None:
            return lambda layer, dense: dense * self._keep(layer, widths[layer]).to(dense)
        refits, step = self._refits, self._refits.step
        if min(widths) < step:
            raise ValueError(
                f"a width of {min(widths)} is below the narrowest refitted level; give a budget"
                f" with floor={step}"
            )

        def refitted(layer: int, dense: Tensor) -> Tensor:
            level = widths[layer] // step * step
            return refits.down(layer, self._keep(layer, level), dense)

        return refitted

    def _keep(self, layer: int, width: int) -> Tensor:
        return top_channels(self._scores[layer], width)
