"""Recovery by several amounts of text, each measured: what more training buys.

Every rung is a training of its own, whose learning rate ends at 0; texts of later rungs begin with
those of earlier ones, and all are judged on the same blocks where 16,384 tokens or more are learned
from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunenet.checkpoints.load import load_tokenizer
from prunenet.checkpoints.records import load_provenance
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.recover.options import RecoverText, Tuning
from prunenet.recover.record import forget_made, recover, run_folder
from prunenet.recover.state import STATE
from prunenet.recover.text import learning_text
from prunenet.runtime import parallel
from prunenet.runtime.choices import as_python
from prunenet.runtime.files import check_absent, expanded


@dataclass(frozen=True, slots=True)
class Rung:
    """One amount of text.

    Attributes:
        folder: of the checkpoint.
        tokens: that were learned from.
        loss_before, loss_after: on text held back, nats per token.
        best_step: 0 where the pruned model was not improved.
    """

    folder: Path
    tokens: int
    loss_before: float
    loss_after: float
    best_step: int


def recover_rungs(
    pruned: str | Path,
    out: str | Path,
    rungs: Sequence[int],
    tuning: Tuning | None = None,
    *,
    text: RecoverText | None = None,
    resume: bool = False,
    **how: Any,
) -> list[Rung]:
    """Recovers a pruned checkpoint by each amount of text, the smallest first.

    Args:
        pruned: as for `prunenet.recover`.
        out: each rung is written to a folder of this name with its thousands of tokens behind it,
            as in `OUT-100k`.
        rungs: tokens to learn from, different by a thousand at least.
        tuning: without steps.
        text: without tokens.
        resume: go on: rungs that are there are not done again.
        how: the rest of `prunenet.recover`'s arguments.

    Raises:
        ValueError: rungs that have the same name, or steps or tokens beside them; or as
            `prunenet.recover`.
    """
    tuning, text, rungs = tuning or Tuning(), text or RecoverText(), as_python(rungs)
    if tuning.steps is not None or text.tokens is not None:
        raise ValueError("`rungs` say how much is learned: leave `steps` and `tokens` out")
    places = {_place(expanded(out), tokens): tokens for tokens in sorted(set(rungs))}
    if not rungs or len(places) < len(set(rungs)) or min(rungs) < 1000:
        raise ValueError(
            f"`rungs` are numbers of tokens, a thousand apart or more, got {list(rungs)}"
        )
    if not resume:
        for place in places:
            check_absent(place)
    if text.moments == "data":
        _check_enough(str(how.get("teacher") or pruned), replace(text, tokens=max(rungs)), tuning)
    found = []
    for place, tokens in places.items():
        if parallel.is_first():
            forget_made(place)
        started = parallel.broadcast_object(0, (run_folder(place) / STATE).exists)
        if not parallel.broadcast_object(0, place.exists):
            asked = replace(text, tokens=tokens)
            recover(pruned, place, tuning, text=asked, resume=resume and started, **how)
        if parallel.is_first():
            found.append(_rung(place, tokens))
    return found


def _check_enough(writer: str, text: RecoverText, tuning: Tuning) -> None:
    """Raises ValueError where external text is shorter than the largest rung, before any is run."""
    learning_text(StreamedCheckpoint.open(writer).skeleton, load_tokenizer(writer), text, tuning)


def _place(out: Path, tokens: int) -> Path:
    return out.with_name(f"{out.name}-{tokens // 1000}k")


def _rung(folder: Path, tokens: int) -> Rung:
    """What the record of a finished rung says. Raises ValueError where it is another one's."""
    steps = load_provenance(folder).recovered
    # a rung is rounded down to whole blocks
    left = tokens - steps[-1].get("learned", 0) if steps else -1
    if not 0 <= left < steps[-1].get("window", 0):
        raise ValueError(f"{folder} is not the rung of {tokens:,} tokens; give another `out`")
    last = steps[-1]
    return Rung(folder, tokens, last["loss_before"], last["loss_after"], last["best_step"])
