"""Searches an allocation by smooth changes of its log-odds: a few cosines of the layer's place for
each structure (docs/methods.md, sections 12 and 13).

What is searched freely, slot by slot, fits the text that it is judged on and loses on other text
(docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from prunenet.evaluation.slots import Game

_WAVES, _STEP, _SHRINK = 5, 0.4, 0.7


def waves(game: Game) -> Float[Tensor, "waves slots"]:
    """Smooth functions of a slot's place, for channels and for heads: cosines of up to `_WAVES`
    half turns, and the constant, which weighs structures against one another.
    """
    last = max(slot.layer for slot in game.slots)
    place = torch.tensor([slot.layer / max(last, 1) for slot in game.slots]).double()
    rows = []
    for structure in sorted({slot.structure for slot in game.slots} - {"layers"}):
        of = torch.tensor([slot.structure == structure for slot in game.slots])
        rows += [torch.cos(math.pi * n * place) * of for n in range(_WAVES + 1)]
    return torch.stack(rows) if rows else torch.zeros(0, len(game.slots)).double()


def smooth_search(
    game: Game,
    start: Float[Tensor, " slots"],
    evaluate: Callable[[Tensor], Tensor],
    budget: tuple[int, int],
    *,
    known: float | None = None,
    seed: int = 0,
) -> tuple[Float[Tensor, " slots"], float]:
    """Steps to the best of a few mirrored candidates while one is better; else shrinks the step.

    Args:
        game: of the slots.
        start: log-odds.
        evaluate: rows of log-odds to their damages.
        budget: rounds, and candidates of each, an even number.
        known: damage of the start; None has it evaluated.
        seed: of the draws.

    Returns:
        Log-odds, never worse than the start on their own measure, and that measure.
    """
    generator, basis = torch.Generator().manual_seed(seed), waves(game)
    best, (rounds, candidates) = start, budget
    least = float(evaluate(start[None])) if known is None else known
    step = _STEP
    for _ in range(rounds if len(basis) else 0):
        draws = torch.randn(candidates // 2, len(basis), generator=generator, dtype=torch.float64)
        moves = step / len(basis) ** 0.5 * (draws @ basis)
        rows = torch.cat((best + moves, best - moves))
        found = evaluate(rows)
        if float(found.min()) < least:
            best, least = rows[int(found.argmin())], float(found.min())
        else:
            step *= _SHRINK
    return best, least
