"""How models are scored and timed: options in Python and in the CLI."""

from __future__ import annotations

from dataclasses import dataclass

from prunenet.runtime.choices import check_fields
from prunenet.text.choices import Bos, check_window


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """How a text is scored.

    Attributes:
        window: tokens of the text that the model sees at once, at least 2.
        stride: tokens between two windows, in [1, window]; None: `window`, no overlap.
        max_windows: score only the first windows, at least 1; None: all.
        bos: whether every window begins with the BOS token: "auto" (as the model's tokenizer begins
            a text), "yes" or "no". It is not counted in `window`, and the same tokens are scored.
        batch_size: windows in one forward pass, at least 1.

    Raises:
        ValueError: one is out of range.
    """

    window: int = 1024
    stride: int | None = None
    max_windows: int | None = None
    bos: Bos = "auto"
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        check_window(self.window, self.stride)
        for name in ("max_windows", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}")

    @property
    def step(self) -> int:
        """Tokens between two windows."""
        return self.stride or self.window


EVALUATION = EvaluationOptions()
"""How a text is scored by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedOptions:
    """How speed is measured.

    Attributes:
        prompt: tokens of each prompt. Which tokens they are does not matter.
        new_tokens: decoding steps.
        batch: sequences at once.
        repeats: measurements of each model, besides one warm-up.
        most: go on, up to so many measurements, until the middle half of every model's lies within
            10 % of the median; None: `repeats`, however they differ.
        compiled: run what `torch.compile` makes of each model, with a KV cache of fixed size; the
            warm-up compiles.

    Raises:
        ValueError: a number is below 1.
    """

    prompt: int = 128
    new_tokens: int = 32
    batch: int = 1
    repeats: int = 3
    most: int | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("prompt", "new_tokens", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}")
        if self.most is not None and self.most < self.repeats:
            raise ValueError(f"`most` must be {self.repeats} or more, got {self.most}")


SPEED = SpeedOptions()
"""How speed is measured by default."""
