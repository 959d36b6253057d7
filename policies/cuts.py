"""Scores the channels of a model; cuts it to several allocations in one pass over its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.layers import Weights
from prunenet.models.masks import top_channels
from prunenet.policies.artifact import Policy
from prunenet.policies.options import Channels
from prunenet.refit.cut import Cut, cut_layers
from prunenet.text.calibration import CalibrationSet

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""
MEASURED = 1 / 3
"""Share of the measured energies' ranks in "blend": the best of 1/5, 1/4, 1/3 and 2/5 on validation
texts.
"""


def read_scores(
    model: Weights,
    policy: Policy,
    blocks: CalibrationSet | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Float[Tensor, " _"]], list[float] | None]:
    """Scores of each layer's channels and, where the same pass over the weights gives them, the
    layers' log-odds.
    """
    if not policy.config.moments:
        # A pass over weights in memory takes a moment, one over a file does not.
        return policy.read(model, progress=None if isinstance(model, PreTrainedModel) else progress)
    assert isinstance(model, PreTrainedModel), "PruneOptions.filled"
    return policy.scores(model, blocks, progress=progress), None


def cuts_of(
    model: Weights,
    ways: Sequence[Mapping[str, Sequence[int]]],
    channels: Channels | None,
    refit: bool,
    scores: Sequence[Float[Tensor, " _"]] | None,
    blocks: CalibrationSet | None,
    progress: Progress | None,
) -> list[dict[str, Cut]]:
    """A cut for every allocation of every size, in one pass over the layers."""
    flat = [widths for way in ways for widths in way.values()]
    if blocks is None:
        assert scores is not None
        pairs = (zip(scores, widths, strict=True) for widths in flat)
        made = [Cut([top_channels(*pair) for pair in rows], None) for rows in pairs]
    else:
        assert isinstance(model, PreTrainedModel), "a streamed checkpoint measures nothing"
        made = cut_layers(
            model,
            blocks.ids,
            flat,
            kinds=blocks.kinds,
            scores=scores,
            measured=MEASURED if channels == "blend" else 0.0,
            refit=refit,
            progress=stage_of(progress, "cutting"),
        )
    left = iter(made)
    return [{name: next(left) for name in way} for way in ways]


def stage_of(
    progress: Callable[[str, int, int], None] | None, what: str
) -> Callable[[int, int], None] | None:
    """The callback of one stage."""
    return None if progress is None else lambda done, of: progress(what, done, of)
