"""How a pruned model is trained: options of `recover`, in Python and in the CLI."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from prunenet.text.choices import Bos


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How a pruned model is trained.

    Attributes:
        steps: of AdamW, at least 1.
        batch: blocks of each step, at least 1.
        micro_batch: blocks that are in memory at once; gradients add up.
        rank: of an update, at least 1.
        learning_rate: at the first step, above 0; it falls linearly to 0.
        seed: of the updates' start and of the order of the blocks.

    Raises:
        ValueError: one is out of range.
    """

    steps: int = 100
    batch: int = 8
    micro_batch: int = 4
    rank: int = 16
    learning_rate: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        from prunenet.text.calibration import check_seed

        for name in ("steps", "batch", "micro_batch", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(
                f"`learning_rate` must be above 0, got {self.learning_rate}; 0.0005 is the default"
            )
        check_seed(self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverText:
    """The text that a pruned model learns from.

    Attributes:
        moments: "self" (the teacher samples it) or "data" (external).
        text: source of external text; None: the built-in one.
        column: of external text in rows, see `prunenet.text.corpora.load_text`.
        bos: whether blocks begin with the BOS token, see `prunenet.text.windows`.
        tokens: tokens in all, in blocks of 256; a fifth is held back to choose by.

    Raises:
        ValueError: a text that would not be read.
    """

    moments: Literal["self", "data"] = "self"
    text: str | None = None
    column: str | None = None
    bos: Bos = "auto"
    tokens: int = 40960

    def __post_init__(self) -> None:
        if self.text and self.moments != "data":
            raise ValueError(
                "`text` is read where `moments` is data only: say so, or leave `text` out"
            )
