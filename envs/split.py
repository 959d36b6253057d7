"""Splits the judging of masks between processes (`prunenet.runtime.parallel`).

The first process plays; all processes judge. A reward says how it can be split in an attribute
`split`, which maps the name of its method to one of these:
- "masks": each process judges some of the masks of the batch. For rewards whose result for a mask
  does not depend on the other masks, bit for bit.
- "layers": each process holds, and judges, some of the layers. The batch stays whole, and with it
  the rounding of its products.

The first process alone judges what is not in `split`, such as a reward of your own without it.
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


def judged_by_all(reward: Reward, play: Callable[[Reward], T]) -> T | None:
    """Calls `play` on the first process with a reward that all processes compute.

    Args:
        reward: of the same model and text on every process.
        play: trains with the reward it is given; see `prunenet.policies.training.run.Run`.

    Returns:
        The result of `play`; None on the other processes.
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
    """A reward that all processes compute, for masks that the first process sends."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._split = getattr(reward, "split", {})

    def layer(
        self, index: int, keep: Bool[Tensor, "masks d_ff"]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns the reward's layer terms."""
        return (
            self._asked(index, keep) if "layer" in self._split else self._reward.layer(index, keep)
        )

    def sweep(
        self, keep: Sequence[Bool[Tensor, "masks d_ff"]]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns the reward's sweep terms."""
        return (
            self._asked(_SWEEP, torch.stack(list(keep)))
            if "sweep" in self._split
            else self._reward.sweep(keep)
        )

    def serve(self) -> None:
        """Judges the masks that the first process sends, until it ends."""
        while (order := int(parallel.broadcast(0, _nothing))) != _OVER:
            self._judged(order, parallel.broadcast(0, _nothing))

    def end(self) -> None:
        """Tells the other processes to return from `serve`."""
        parallel.broadcast(0, lambda: torch.tensor(_OVER))

    def _asked(self, order: int, keep: Tensor) -> dict[str, Tensor]:
        parallel.broadcast(0, lambda: torch.tensor(order))
        return self._judged(order, parallel.broadcast(0, lambda: keep))

    def _judged(self, order: int, keep: Tensor) -> dict[str, Tensor]:
        """Computes the terms of all masks, by name; called on all processes at once."""
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
