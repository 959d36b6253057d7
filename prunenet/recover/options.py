"""How a pruned model is trained: options of `recover`, in Python and in the CLI."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from prunenet.runtime.choices import check_fields
from prunenet.text.choices import Bos

Updates = Literal["auto", "full", "lora"]
Schedule = Literal["linear", "cosine", "stable"]
Loss = Literal["kl", "top256"]
TOKENS = 98304
"""Tokens that are learned from where neither text nor steps say how many."""
STEP = 256
"""Tokens of a step, about, where no `batch` is given."""
WINDOW = 64
"""Tokens of a block of self-written text, where the model reads as many. As much text in shorter
blocks begins more often: up to 2 % less perplexity than 256 gives, and it is written in two thirds
of the time (docs/results.md, "Recovery").
"""
RATES = {"auto": 2e-4, "full": 2e-4, "lora": 5e-4}
"""Learning rate of each kind of update."""
GENTLE = 0.4
"""Nats below which the default rate of all weights falls in proportion to what a cut has lost: with
the full rate light cuts lost more to the training's noise than they gained (docs/log.md).
"""
FULL = 10**9
"""Parameters up to which "auto" trains all weights: about 20 bytes of memory each."""
DECAY = 0.2
"""Share of the steps in which the rate of "stable" falls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How a pruned model is trained.

    Attributes:
        updates: "full" (all weights of the decoder layers, in float32), "lora" (low-rank updates of
            their linears), or "auto": full up to a billion parameters.
        embeddings: whether "full" trains token embeddings and LM head too.
        steps: of AdamW, at least 1; None: one pass over the text.
        batch: blocks of each step, at least 1; None: as many as have about 256 tokens.
        micro_batch: blocks that are in memory at once; gradients add up.
        rank: of an update, at least 1; of "lora".
        learning_rate: highest one, above 0; None: 2e-4 of "full", 5e-4 of "lora".
        gentle_below: KL before the training, in nats per token, below which the rate is smaller in
            proportion; 0: nowhere. None: 0.4 of "full" at its default rate, else 0.
        warmup: share of the steps in which the rate rises to it linearly, in [0, 1).
        schedule: how it falls to 0 then: "linear", "cosine", or "stable" (in the last fifth).
        betas: of AdamW, each in [0, 1).
        loss: against a teacher: "kl" over the vocabulary, or "top256" over the teacher's 256
            likeliest tokens and one bin for the rest.
        hidden: weight of the squared error of the hidden states behind each layer, relative to
            their energy; of training against a teacher; 0 or more.
        average: decay of an exponential moving average of what is learned, in [0, 1), which is
            judged beside the last state; 0: none.
        seed: of the updates' start and of the order of the blocks.

    Raises:
        ValueError: one is out of range.
    """

    updates: Updates = "auto"
    embeddings: bool = False
    steps: int | None = None
    batch: int | None = None
    micro_batch: int = 4
    rank: int = 16
    learning_rate: float | None = None
    gentle_below: float | None = None
    warmup: float = 0.05
    schedule: Schedule = "linear"
    betas: tuple[float, float] = (0.9, 0.99)
    loss: Loss = "kl"
    hidden: float = 0.0
    average: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        from prunenet.text.calibration import check_seed

        check_fields(self)
        for name in ("steps", "batch", "micro_batch", "rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise ValueError(
                f"`learning_rate` must be above 0, got {self.rate}; {RATES[self.updates]:g} is the"
                " default"
            )
        shares = {"warmup": self.warmup, "average": self.average}
        for name, share in (shares | {"betas": min(self.betas)}).items():
            if not 0 <= share < 1 or (name == "betas" and not max(self.betas) < 1):
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")
        for name, value in (("hidden", self.hidden), ("gentle_below", self.gentle_below or 0.0)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be 0 or more, got {value}")
        if self.embeddings and self.updates != "full":
            raise ValueError("`embeddings` are trained with `updates` full only: add that")
        check_seed(self.seed)

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return RATES[self.updates] if self.learning_rate is None else self.learning_rate

    def chosen(self, parameters: int) -> Tuning:
        """The same with updates and rate as they are for a model of so many parameters."""
        fitting: Updates = "full" if parameters <= FULL else "lora"
        found = replace(self, updates=fitting) if self.updates == "auto" else self
        own = self.learning_rate is None and found.updates == "full"
        below = (GENTLE if own else 0.0) if self.gentle_below is None else self.gentle_below
        return replace(found, learning_rate=found.rate, gentle_below=below)

    def blocks_of_step(self, window: int) -> int:
        """How many blocks of so many tokens a step reads."""
        return max(1, round(STEP / window)) if self.batch is None else self.batch

    def settled(self, blocks: int, window: int, parameters: int) -> Tuning:
        """The same with nothing left open, for a text of so many blocks of so many tokens to learn
        from, and a model of so many parameters.
        """
        batch = self.blocks_of_step(window)
        batch = min(batch, blocks) if self.batch is None else batch
        steps = max(1, blocks // batch) if self.steps is None else self.steps
        return replace(self.chosen(parameters), batch=batch, steps=steps)

    def rate_at(self, step: int, steps: int, before: float = math.inf) -> float:
        """The learning rate of a step, counted from 0, of so many; `before` is the KL before them,
        where there is a teacher.
        """
        share = max(before, 0.0) / self.gentle_below if self.gentle_below else 1.0
        return self._scheduled(step, steps) * min(1.0, share)

    def _scheduled(self, step: int, steps: int) -> float:
        rising = round(self.warmup * steps)
        if step < rising:
            return self.rate * (step + 1) / rising
        left = 1 - (step - rising) / (steps - rising)
        if self.schedule == "cosine":
            return self.rate * 0.5 * (1 - math.cos(math.pi * left))
        return self.rate * (min(1.0, left / DECAY) if self.schedule == "stable" else left)


FAST = 32768
"""Tokens that `prunenet prune --recover fast` learns from. The amount is fixed, so that a command
gives the same bytes everywhere; with the cut it is to take a model of 135 million parameters and
two cores about a quarter of an hour, writing included.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverText:
    """The text that a pruned model learns from.

    Attributes:
        moments: "self" (the teacher samples it) or "data" (external).
        text: source of external text; None: the built-in one.
        column: of external text in rows, see `prunenet.text.corpora.load_text`.
        bos: whether blocks begin with the BOS token, see `prunenet.text.windows`.
        tokens: that are learned from: once each, unless `Tuning.steps` says otherwise. A quarter as
            many, at most 4,096, are held back to choose by. None: as many as the steps read; 98,304
            without steps, or what external text has.
        window: tokens of a block. None: 64 of self-written text, 256 of external text, or as many
            as the model has positions for.

    Raises:
        ValueError: a text that would not be read, or blocks that are too short.
    """

    moments: Literal["self", "data"] = "self"
    text: str | None = None
    column: str | None = None
    bos: Bos = "auto"
    tokens: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        from prunenet.text.calibration import check_window

        check_fields(self)
        check_window(self.window)
        for name in ("text", "column"):
            if getattr(self, name) is not None and self.moments != "data":
                raise ValueError(
                    f"`{name}` is read with `moments` data only: add that, or leave `{name}` out"
                )
