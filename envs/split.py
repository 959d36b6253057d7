"""Judging masks with several processes: the first plays, and the others judge with it
(`prunenet.runtime.parallel`).

How a reward can be split it says itself, in an attribute `split`, by the name of its method:
- "masks": each process judges some of the masks of the batch. For rewards that judge masks one by
  one, to the same bits.
- "layers": each process holds, and judges, some of the layers; the batch stays whole, and with it
the rounding of its products. What is not in `split`, as everything of a reward of your own that
does not say so, is the first process's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunenet.envs.rewards import Reward
from prunenet.runtime import parallel

T = TypeVar("T")
_SWEEP, _OVER = -1, -2


def led(reward: Reward, play: Callable[[Reward], T]) -> T | None:
    """What `play` gives, called by the first process with a reward that all judge for; None on the
    others.

    Args:
        reward: of the same model and text on every process.
        play: see `prunenet.policies.training.run.Run`.
    """
    if parallel.size() == 1:
        return play(reward)
    judges = _Judges(reward)
    if not parallel.is_first():
        judges.serve()
        return None
    result = play(judges)
    judges.end()
    return result


class _Judges:
    """A reward whose masks come from the first process."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._split = getattr(reward, "split", {})

    def layer(
        self, index: int, keep: Bool[Tensor, "masks d_ff"]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """As the reward's."""
        return (
            self._asked(index, keep) if "layer" in self._split else self._reward.layer(index, keep)
        )

    def sweep(
        self, keep: Sequence[Bool[Tensor, "masks d_ff"]]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """As the reward's."""
        return (
            self._asked(_SWEEP, torch.stack(list(keep)))
            if "sweep" in self._split
            else self._reward.sweep(keep)
        )

    def serve(self) -> None:
        """Judges what the first process asks, until it has no more."""
        while (order := int(parallel.broadcast(0, _nothing))) != _OVER:
            self._judged(order, parallel.broadcast(0, _nothing))

    def end(self) -> None:
        """Lets the others go on."""
        parallel.broadcast(0, lambda: torch.tensor(_OVER))

    def _asked(self, order: int, keep: Tensor) -> dict[str, Tensor]:
        parallel.broadcast(0, lambda: torch.tensor(order))
        return self._judged(order, parallel.broadcast(0, lambda: keep))

    def _judged(self, order: int, keep: Tensor) -> dict[str, Tensor]:
        """On all processes: the terms of all masks, by name."""
        if order != _SWEEP and self._split["layer"] == "layers":
            owner = order % parallel.size()
            found = self._reward.layer(order, keep) if parallel.is_owner(order) else {}
            names = parallel.broadcast_object(owner, lambda: list(found))
            return {
                name: parallel.broadcast(owner, partial(found.__getitem__, name)) for name in names
            }
        masks = keep.shape[-2]
        own = keep[..., parallel.share(masks), :]
        found = {}
        if own.shape[-2]:
            found = (
                self._reward.sweep(list(own)) if order == _SWEEP else self._reward.layer(order, own)
            )
        names = parallel.broadcast_object(0, lambda: list(found))  # its share is never empty
        return {
            name: parallel.all_gather(found.get(name, torch.zeros(0, device=keep.device)), masks)
            for name in names
        }


def _nothing() -> Tensor:
    raise AssertionError("the first process asks")
