"""Draws which rows a step of a training reads, from a seed and the number of the step alone: a run
that is killed and resumed draws the same ones.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def batch_of(step: int, size: int, count: int, seed: int) -> Int[Tensor, " size"]:
    """Draws the rows of a step: all `count` in a drawn order, then in another one, and so on.

    Batches go on over the seams.
    """
    turns = [divmod(step * size + number, count) for number in range(size)]
    orders = {turn: drawn_order(count, seed, turn) for turn in {turn for turn, _ in turns}}
    return torch.stack([orders[turn][place] for turn, place in turns])


def drawn_order(count: int, *numbers: int) -> Int[Tensor, " count"]:
    """A random order of `count` rows, by a seed of several numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
