"""What a comparison varies and how its models are scored: options in Python and in the CLI."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prunenet.evaluation.options import EVALUATION, EvaluationOptions
from prunenet.recover.options import TOKENS, RecoverText, Tuning
from prunenet.runtime.choices import ROUND_TO, RoundTo, check_fields

ShareOf = Literal["channels", "parameters", "active"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What is varied besides the method.

    Attributes:
        ratios: shares removed, in [0, 1).
        share_of: what ratios are shares of: FFN "channels", all "parameters", or the "active" ones,
            which one token uses.
        seeds: of text, windows and draws, in [0, 2^32).
        round_to: widths are multiples of this; "auto": see `prunenet.policies.PruneOptions`.
        policy: a policy that ships, the folder of a trained one, or "none"; None: the family's,
            else the universal one where FFNs are gated and dense.
        recover_tokens, recover_window: of the self-written text that methods `+recovered` learn
            from, and of a block of it; see `prunenet.recover.RecoverText`.
        tuning: how they are trained; the seed is the cell's.
    """

    ratios: Sequence[float] = (0.2, 0.3)
    share_of: ShareOf = "channels"
    seeds: Sequence[int] = (0,)
    round_to: RoundTo = ROUND_TO
    policy: str | None = None
    recover_tokens: int = TOKENS
    recover_window: int | None = None
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def recover_text(self) -> RecoverText:
        """What methods `+recovered` learn from. Raises ValueError for blocks that are too short."""
        from prunenet.text.calibration import check_window

        check_window(self.recover_window, "recover_window")
        return RecoverText(tokens=self.recover_tokens, window=self.recover_window)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What every model is scored on.

    Attributes:
        texts: for perplexity: "builtin", files, or datasets as id[:config[:split]].
        column: of texts in rows, see `prunenet.text.corpora.load_text`.
        options: how texts are scored; its `bos` holds for calibration text and tasks too.
        tasks: zero-shot tasks; ("all",) for every one in the folder.
        task_data: folder of their `<task>.jsonl` files.
        limit: questions of each task; None: all.
    """

    texts: Sequence[str | Path] = ("builtin",)
    column: str | None = None
    options: EvaluationOptions = EVALUATION
    tasks: Sequence[str] = ()
    task_data: Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTexts:
    """The calibration text that methods read.

    Attributes:
        named: short names for texts, as in {"ptb": "ptb.valid.txt"}.
        tokens: of each calibration set.
        window: tokens of a block; None: 256, or what the model reads.
    """

    named: Mapping[str, str | Path] = field(default_factory=dict)
    tokens: int = 16384
    window: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Callbacks of a comparison.

    Attributes:
        line: called with each new line.
        progress: called with (cell, cells done, cells in all), and while text is sampled.
    """

    line: Callable[[dict[str, Any]], None] | None = None
    progress: Callable[[str, int, int], None] | None = None
