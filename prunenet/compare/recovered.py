"""Trains what a method has cut, all methods on the same text for as long (docs/methods.md, section
18).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prunenet.checkpoints.regimes import most
from prunenet.compare.pruner import Made, Pruner
from prunenet.recover.lora import load_peft
from prunenet.recover.options import RecoverText, Tuning
from prunenet.recover.text import blocks_wanted, learning_text, window_of
from prunenet.recover.training import tuned
from prunenet.text.calibration import CalibrationSet
from prunenet.text.generate import document_start


@dataclass(slots=True, eq=False)
class Recovery:
    """The training of every cell that asks for it.

    Attributes:
        pruner: has the dense model, which writes the text and teaches.
        tuning: of every cell, with the cell's seed.
        text: that each learns from, self-written; its `tokens` are given.
        progress: called with (stage, done, in all).
    """

    pruner: Pruner
    tuning: Tuning
    text: RecoverText
    progress: Callable[[str, int, int], None] | None = None
    _texts: dict[int, CalibrationSet] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError or ImportError for what no training could do, before any work."""
        if self.tuning.chosen(self.pruner.model.num_parameters()).updates == "lora":
            load_peft()
        document_start(self.pruner.tokenizer, self.pruner.bos)
        try:
            blocks_wanted(self.text, self.tuning, window_of(self.text, self.pruner.model))
        except ValueError as error:
            raise ValueError(re.sub("^`", "`recover_", str(error))) from None

    def write(self, seeds: Sequence[int]) -> None:
        """Has the dense model write the texts of these seeds, once for all processes."""
        for seed in seeds:
            self._texts[seed] = learning_text(
                self.pruner.model,
                self.pruner.tokenizer,
                replace(self.text, bos=self.pruner.bos),
                replace(self.tuning, seed=seed),
                self._told("writing text to recover by"),
            )

    def recovered(self, made: Made, seed: int) -> tuple[Made, dict[str, Any]]:
        """The model trained, and what a line says of the training.

        Raises:
            ValueError: see `prunenet.recover.training.tuned`.
        """
        blocks, told = self._texts[seed], self._told("recovering")
        found = tuned(
            made.model,
            blocks,
            replace(self.tuning, seed=seed),
            teacher=self.pruner.model,
            progress=None if told is None else lambda done, of, loss: told(done, of),
        )
        seen = (made.regime, made.applied_regime)
        regime, applied = (most([before, blocks.regime]) for before in seen)
        facts = {
            "loss_before": found.before,
            "loss_after": found.after,
            "best_step": found.best_step,
            "text": dict(blocks.source),
        }
        return replace(made, model=found.model, regime=regime, applied_regime=applied), facts

    def _told(self, stage: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, of: progress(stage, done, of)
