"""Clusters calibration windows and draws from a mixture of clusters: the data subspace of
AdaPruner's search (docs/methods.md, section 7).

Source: AdaPruner (AAAI 2025, arXiv 2503.06184), which filters out short or uninformative texts and
searches a calibration-data subspace. [rec], our reconstruction: `adapruner` lists what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from prunenet.policies.methods.papers import folding
from prunenet.runtime.placement import home

_BATCH = 4


@dataclass(frozen=True, slots=True)
class CalibrationPool:
    """Holds calibration windows and their clusters.

    Attributes:
        windows: token ids.
        labels: cluster of each, in [0, clusters); no cluster is empty.
        clusters: how many.
    """

    windows: Int[Tensor, "n tokens"]
    labels: Int[Tensor, " n"]
    clusters: int

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        ids: Int[Tensor, "n tokens"],
        generator: torch.Generator,
        *,
        tokens: int = 64,
        clusters: int = 8,
        most: int = 256,
        bos: int | None = None,
    ) -> CalibrationPool:
        """Cuts blocks into windows, drops the least informative fifth and clusters the others.

        Windows are clustered by their mean hidden states.

        Args:
            model: in eval mode; read once on every window.
            ids: token blocks.
            generator: draws the windows, where there are too many, and the start of k-means.
            tokens: length of a window, 2 or more and at most that of a block (docs/methods.md,
                section 7: 64 to 128).
            clusters: at most one a window (docs/methods.md, section 7: 8 to 16).
            most: windows that are clustered, at least 1.
            bos: id of the BOS token that blocks begin with; windows then begin with it too, besides
                their `tokens`.

        Raises:
            ValueError: a number out of range, or hidden states that are not finite.
        """
        if tokens < 2 or clusters < 1 or most < 1:
            raise ValueError(
                f"a pool needs tokens >= 2, clusters >= 1 and most >= 1, got {tokens}, {clusters}"
                f" and {most}"
            )
        ids = ids if bos is None else ids[:, 1:]
        tokens = min(tokens, ids.shape[1])
        windows = ids[:, : ids.shape[1] // tokens * tokens].reshape(-1, tokens)
        windows = windows[torch.randperm(len(windows), generator=generator)[:most]]
        distinct = torch.tensor([len(window.unique()) for window in windows])
        windows = windows[
            distinct.argsort(descending=True, stable=True)[: len(windows) - len(windows) // 5]
        ]
        windows = windows if bos is None else F.pad(windows, (1, 0), value=bos)
        clusters = min(clusters, len(windows))
        points = mean_hidden_states(model, windows)
        return cls(windows, folding.kmeans(points, clusters, generator).cpu(), clusters)

    @property
    def sizes(self) -> Int[Tensor, " clusters"]:
        """Number of windows of each cluster."""
        return torch.bincount(self.labels, minlength=self.clusters)

    def drawn(
        self, weights: Sequence[float], count: int, generator: torch.Generator
    ) -> Int[Tensor, "drawn tokens"]:
        """Draws different windows, one by one.

        Each draw takes a cluster in proportion to its weight and then evenly one of its windows.

        Args:
            weights: of each cluster, 0 or more. A cluster of weight 0 is drawn from only once all
                others are empty.
            count: windows; at most as many as the pool has.
            generator: on the CPU.
        """
        share = torch.tensor(weights, dtype=torch.float64) / self.sizes
        probabilities = share[self.labels] + 1e-9
        chosen = torch.multinomial(
            probabilities, min(count, len(self.windows)), generator=generator
        )
        return self.windows[chosen]


@torch.no_grad()
def mean_hidden_states(
    model: PreTrainedModel, windows: Int[Tensor, "n tokens"]
) -> Float[Tensor, "n d_model"]:
    """Averages the last hidden states (behind the final norm) of each window over its tokens."""
    parts = torch.split(windows.to(home(model)), _BATCH)
    return torch.cat(
        [
            model.base_model(input_ids=p, use_cache=False).last_hidden_state.float().mean(1)
            for p in parts
        ]
    )
