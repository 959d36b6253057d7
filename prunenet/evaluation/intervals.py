"""Says how far a measured value would move on another sample of the same text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SAMPLES, COVERED = 2000, 0.95
"""Bootstrap samples; share of them that an interval covers."""
_BLOCK = 4_000_000  # drawn numbers held at once


def bootstrap(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float] | None:
    """Returns the percentile bootstrap interval of a mean, 95 %, over resampled parts.

    The parts (windows of a text) are drawn with replacement, always the same draws, so that two
    models that are scored on the same windows meet the same samples.

    Args:
        sums: of the values of each part.
        counts: values of each part, at least 1.

    Returns:
        (low, high); None for fewer than two parts.

    Source: Efron, Ann. Statist. 7 (1979), 1-26; the percentile method.
    """
    parts = len(sums)
    if parts < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([list(map(float, sums)), list(map(float, counts))], dtype=torch.float64)
    step, means = max(1, _BLOCK // parts), list[torch.Tensor]()
    for done in range(0, SAMPLES, step):
        shape = (min(step, SAMPLES - done), parts)
        drawn = values[:, torch.randint(parts, shape, generator=generator)].sum(-1)
        means.append(drawn[0] / drawn[1])
    edges = torch.tensor([(1 - COVERED) / 2, (1 + COVERED) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(edges).tolist()
    return low, high
