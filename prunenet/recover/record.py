"""Recovers a pruned checkpoint on disk: loads it, trains it, writes it with its provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.identity import identify
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.options import AUTO, LoadOptions
from prunenet.checkpoints.provenance import Provenance, RecoveryStep
from prunenet.checkpoints.records import (
    check_not_padded,
    find_masks,
    find_provenance,
    load_provenance,
)
from prunenet.checkpoints.regimes import most
from prunenet.checkpoints.save import bytes_to_write, save_pruned
from prunenet.checkpoints.sources import source_name
from prunenet.models.layers import count_parameters, ffn_widths
from prunenet.recover.estimate import Estimate, writing
from prunenet.recover.lora import load_peft
from prunenet.recover.options import RecoverText, Tuning
from prunenet.recover.state import STATE, remove_state
from prunenet.recover.text import (
    blocks_wanted,
    external_text,
    held_back,
    learning_text,
    window_of,
)
from prunenet.recover.training import Recovered, estimated, tuned
from prunenet.runtime import parallel
from prunenet.runtime.files import CheckpointError, check_absent, check_home, check_room, expanded
from prunenet.runtime.own_files import ContentError, unpacked
from prunenet.runtime.tracking import Tracker, check_trackers
from prunenet.text.calibration import CalibrationSet, token_blocks

Progress = Callable[[str, int, int], None]
_LOSSES = {"kl": "KL(dense || pruned)", "top256": "KL(dense || pruned), top 256 and rest"}
_PADDED = (
    "which training would not keep; recover the checkpoint that it was exported from, and export"
    " that"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who is told of a recovery.

    Attributes:
        estimate: called with what the run is going to take, before text is written; a micro-batch
            is timed for it.
        progress: called with (stage, done, in all).
        report_to: trackers that are told what the log is told, settings and results too; see
            `prunenet.runtime.tracking`.
    """

    estimate: Callable[[Estimate], None] | None = None
    progress: Progress | None = None
    report_to: Sequence[Tracker] = ()


def recover(
    pruned: str | Path,
    out: str | Path,
    tuning: Tuning | None = None,
    *,
    teacher: str | Path | None = None,
    text: RecoverText | None = None,
    resume: bool = False,
    loading: LoadOptions | None = None,
    watch: Watch | None = None,
) -> Recovered:
    """Trains a pruned checkpoint to predict what the dense model predicts.

    Args:
        pruned: folder or hub id of the pruned checkpoint.
        out: folder to create; `OUT.recovery` beside it holds the run's state and its log.
        tuning: how it is trained.
        teacher: folder or hub id of the dense model, which samples the text and teaches; optional
            with external text.
        text: what it learns from.
        resume: continue the unfinished run beside `out`.
        loading: device and dtype; one device.
        watch: who is told of it.

    Returns:
        The recovered model and its losses; the checkpoint in `out` holds its weights.

    Raises:
        ValueError: options that contradict each other, a teacher that is not the base model, or a
            checkpoint that training would spoil.
        CheckpointError: a folder cannot be read or written.
        ImportError: peft, or a tracker, is not installed.
    """
    watch, loading = watch or Watch(), loading or LoadOptions()
    check_trackers(watch.report_to)
    tuning, text, progress = tuning or Tuning(), text or RecoverText(), watch.progress
    source, out = source_name(pruned), expanded(out)
    teacher = None if teacher is None else source_name(teacher)
    _check_asked(tuning, teacher, text, loading)
    run = _places(out, resume)
    provenance = find_provenance(source) if teacher is not None else _recorded(source)
    check_not_padded(source, _PADDED)
    masks, groups = find_masks(source)
    if teacher is not None:
        _check_base(source, str(teacher), provenance)
    load = partial(load_model, device=loading.device, dtype=loading.dtype)
    model, dense = load(source), None if teacher is None else load(teacher)
    tuning = _chosen(tuning, model)
    check_room(out, bytes_to_write(model))
    provenance = _of_base(provenance, str(teacher), dense, model)
    writer, tokens_of = (model, pruned) if dense is None else (dense, teacher)
    tokenizer = load_tokenizer(str(tokens_of))
    told = None if progress is None else partial(progress, "text")
    write = partial(learning_text, writer, tokenizer, text, tuning, told)
    drawn = write() if text.moments == "data" else None  # costs nothing, and can be too short
    if watch.estimate is not None:
        watch.estimate(expected(model, dense, tokenizer, text, tuning, drawn))
    blocks = write() if drawn is None else drawn

    def advance(done: int, total: int, loss: float) -> None:
        if progress is not None:
            progress(f"recovering, loss {loss:.4f}", done, total)

    learn = partial(tuned, teacher=dense, folder=run, resume=resume, report_to=watch.report_to)
    found = learn(model, blocks, tuning, progress=advance)
    taught = dense is not None
    provenance = recorded(provenance, found, tuning, blocks, taught=taught, dtype=loading.dtype)
    if parallel.is_first():
        save_pruned(found.model, out, masks, provenance, groups=groups)
        remove_state(run)
    return found


def expected(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    text: RecoverText,
    tuning: Tuning,
    drawn: CalibrationSet | None = None,
) -> Estimate:
    """What a recovery is going to take: on external text that is drawn, or before the teacher has
    written any.
    """
    if drawn is not None:
        return estimated(model, drawn, tuning, teacher=teacher)
    assert teacher is not None, "_check_asked"
    block = window_of(text, model)
    count = sum(blocks_wanted(text, tuning, block))
    stand_in = token_blocks(model, count=count, window=block)
    found = estimated(model, stand_in, tuning, teacher=teacher)
    seconds = writing(teacher, tokenizer, count, block, text.bos)
    return dataclasses.replace(found, text_seconds=seconds)


def recorded(
    provenance: Provenance,
    found: Recovered,
    tuning: Tuning,
    blocks: CalibrationSet,
    *,
    taught: bool,
    dtype: str,
) -> Provenance:
    """The provenance of a recovered model; its regime is the most that any step looked at."""
    window = blocks.window
    learned = len(blocks.ids) - held_back(blocks)
    tuning = tuning.settled(learned, window, found.model.num_parameters())
    assert tuning.steps is not None, "Tuning.settled"
    assert tuning.batch is not None, "Tuning.settled"
    step = dataclasses.asdict(tuning) | {
        "dtype": dtype,
        "betas": list(tuning.betas),
        "tokens": window * tuning.batch * tuning.steps,
        "learned": window * learned,
        "window": window,
        "loss": _LOSSES[tuning.loss] if taught else "next token",
        "loss_before": found.before,
        "loss_after": found.after,
        "best_step": found.best_step,
        "regime": blocks.regime,
        "text": dict(blocks.source),
    }
    regime = most([provenance.regime, blocks.regime])
    return dataclasses.replace(
        provenance, regime=regime, recovered=(*provenance.recovered, cast(RecoveryStep, step))
    )


def _chosen(tuning: Tuning, model: PreTrainedModel) -> Tuning:
    """How this model is trained. Raises ImportError where that needs peft and it is not there."""
    tuning = tuning.chosen(model.num_parameters())
    if tuning.updates == "lora":
        load_peft()
    return tuning


def _check_asked(
    tuning: Tuning, teacher: str | Path | None, text: RecoverText, loading: LoadOptions
) -> None:
    """Raises ValueError for options that contradict each other or text that cannot be read,
    ImportError where they need peft and it is not there.
    """
    if tuning.updates == "lora":
        load_peft()
    if teacher is None and text.moments == "self":
        raise ValueError(
            "a pruned model learns nothing from text of its own: give the dense model, which"
            " samples the text and teaches (`teacher`), or external text (`moments` data,"
            " `text`)"
        )
    if text.moments == "data":
        external_text(text)
    if loading.device == AUTO:
        raise ValueError(
            "recovery trains a model on one device: give that as `device`, such as cuda, in place"
            " of auto"
        )


def run_folder(out: Path) -> Path:
    """The folder beside a result for what its training leaves: state, log."""
    return out.absolute().with_name(f"{out.absolute().name}.recovery")


def _places(out: Path, resume: bool) -> Path:
    """The folder beside `out` for the run's state and its log.

    Raises:
        CheckpointError: `out` or the folder cannot be made, or `out` exists.
        ValueError: an unfinished run is there and `resume` is not set, or none and it is.
    """
    run = run_folder(out)
    check_home(run)
    if parallel.is_first():
        forget_made(out)
    check_absent(out)
    unfinished = (run / STATE).exists()
    if unfinished and not resume:
        raise ValueError(
            f"{run} holds an unfinished run; say `resume`, remove it, or give another `out`"
        )
    if resume and not unfinished:
        raise ValueError(f"nothing to resume in {run}; start the run without `resume`")
    return run


def forget_made(out: Path) -> None:
    """Removes the state of the run that has made `out`: a kill behind the last step left it."""
    run = run_folder(out)
    if _ended(run / STATE, out):
        remove_state(run)


def _ended(state: Path, out: Path) -> bool:
    """Whether the state is of the run that has made `out`."""
    if not (state.exists() and out.is_dir()):
        return False
    try:
        made, (_, facts) = find_provenance(out), unpacked(state, hashed=True)
        last, run = () if made is None else made.recovered[-1:], facts["run"]
        # the record names the loss in words
        tuning = {name: value for name, value in run["tuning"].items() if name != "loss"}
        return any(run["text"] == step["text"] and tuning.items() <= step.items() for step in last)
    except (CheckpointError, ContentError, OSError, KeyError):
        return False


def _of_base(
    provenance: Provenance | None,
    teacher: str,
    dense: PreTrainedModel | None,
    model: PreTrainedModel,
) -> Provenance:
    """What is known of the cut, by the dense model where nothing is recorded. Raises as
    `_check_shapes`.
    """
    if provenance is None:
        assert dense is not None, "_recorded"
        return Provenance.unrecorded(dense, model, *identify(teacher))
    if dense is not None:
        _check_shapes(teacher, dense, provenance)
    return provenance


def _recorded(source: str) -> Provenance:
    """The provenance of a checkpoint, which only the dense model could stand in for."""
    try:
        return load_provenance(source)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, or give the dense model (`teacher`)") from None


def _check_base(source: str, teacher: str, provenance: Provenance | None) -> None:
    """Raises ValueError where the teacher is known not to be the base model, or to be what is to be
    recovered: before any weight is loaded.
    """
    name, revision = identify(teacher)
    if provenance is None:
        if identify(source)[1] == revision:
            raise ValueError(
                f"{source} is the dense model that is to teach, so there is nothing to recover;"
                " give a pruned checkpoint"
            )
        return
    known = provenance.revision
    comparable = known != "unknown" and known.startswith("sha256:") == revision.startswith(
        "sha256:"
    )
    if comparable and known != revision:
        raise ValueError(
            f"the teacher {name} ({revision[:19]}) is not the model that was pruned,"
            f" {provenance.base_model} ({known[:19]}); give that one"
        )


def _check_shapes(teacher: str, dense: PreTrainedModel, provenance: Provenance) -> None:
    """Raises ValueError where the teacher has other sizes than the base model: a hub's revision
    says nothing of a folder's.
    """
    widths, left = ffn_widths(dense), provenance.layers
    if left is not None and len(widths) == provenance.dense_layers:
        widths = [widths[number] for number in left]
    if "experts" in provenance.how:  # of those that stay alone the record has widths
        widths = list(provenance.dense_widths)
    said: tuple[Any, ...] = (list(provenance.dense_widths), provenance.parameters_before)
    if (widths, count_parameters(dense)[0]) != said:
        raise ValueError(
            f"the teacher {teacher} has other sizes than the model that was pruned,"
            f" {provenance.base_model}: {count_parameters(dense)[0]:,} parameters and not"
            f" {provenance.parameters_before:,}; give that one"
        )
