"""What the commands read: a model in memory or streamed, its tokenizer, the text to measure
activations on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from rich.markup import escape

from prunenet.checkpoints.options import AUTO
from prunenet.cli import tables
from prunenet.cli.console import errors
from prunenet.cli.options import Reading
from prunenet.runtime.json_files import Count, Positive, Within
from prunenet.text.choices import Bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prunenet.checkpoints.streaming import StreamedCheckpoint
    from prunenet.models.architectures import Architecture
    from prunenet.policies.artifact import Policy
    from prunenet.text.calibration import CalibrationOptions, CalibrationSet


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as a command knows it: opened once, its tokenizer loaded once.

    Attributes:
        source: folder or hub id.
    """

    source: str

    @cached_property
    def architecture(self) -> Architecture:
        """Of the model. Raises as `load_model`, before any weight is read."""
        from prunenet.checkpoints.sources import open_checkpoint

        return open_checkpoint(self.source).architecture

    def policy(self, choice: str | None) -> tuple[Policy | None, str]:
        """As `prunenet.policies.artifact.policy_for`. Raises as that, and as `architecture`."""
        from prunenet.policies.artifact import policy_for

        found = self.architecture
        return policy_for(choice, found.model_type, gated=found.gated)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises CheckpointError where there is none."""
        from prunenet.checkpoints.load import load_tokenizer

        return load_tokenizer(self.source)

    def note_tokenizer(self) -> None:
        """Prints a note where no tokenizer travels with the pruned checkpoint."""
        from prunenet.checkpoints.companions import carried_tokenizer
        from prunenet.checkpoints.contents import CONFIG, TOKENIZER
        from prunenet.checkpoints.sources import find_folder

        if not carried_tokenizer(find_folder(self.source, CONFIG, *TOKENIZER)):
            note = f"{escape(self.source)} has no tokenizer; the pruned checkpoint gets none either"
            errors.print(f"note: {note}")


def open_model(source: str, reading: Reading, device: str) -> PreTrainedModel | StreamedCheckpoint:
    """The model, loaded, or to be read layer by layer.

    Args:
        source: folder or hub id.
        reading: how.
        device: of this process.

    Raises:
        ValueError: as `load_model`.
    """
    from prunenet.checkpoints.sources import stored_as

    if (form := stored_as(source)) is not None:
        note = (
            f"{escape(source)} is stored as {form}; it is dequantised, and the result is bfloat16"
        )
        errors.print(f"note: {note}, or what --dtype says")
    if reading.stream:
        from prunenet.checkpoints.streaming import StreamedCheckpoint

        return StreamedCheckpoint.open(source, dtype=reading.dtype, device=device)
    from prunenet.checkpoints.load import load_model

    return load_model(source, dtype=reading.dtype, device=device, max_memory=reading.max_memory)


def check_streamable(reading: Reading, reads_text: bool, remedy: str) -> None:
    """Raises ValueError where activations would be measured on a model that is not in memory, or
    where such a model would be placed; `remedy`: what to say instead.
    """
    if not reading.stream:
        return
    if reading.device == AUTO or reading.max_memory is not None:
        raise ValueError(
            "--stream leaves all weights on disk, so there is nothing to place: leave --device auto"
            " out"
        )
    if reads_text:
        raise ValueError(
            "--stream holds one layer of the model at a time, so nothing can be measured on text:"
            f" {remedy}"
        )


def note_overflow(source: StreamedCheckpoint) -> None:
    """Prints a note where logits, which a streamed model does not have, may be what is damaged."""
    if str(source.skeleton.dtype) == "torch.float16":
        errors.print(
            "note: --stream computes no logits, and in float16 they can overflow: check them with"
            " prunenet eval"
        )


def blocks_for(
    model: PreTrainedModel | StreamedCheckpoint,
    checkpoint: Checkpoint,
    moments: Literal["self", "data"],
    text: str | None,
    options: CalibrationOptions,
) -> CalibrationSet:
    """The calibration set that a command reads; sampling it shows progress.

    Args:
        model: samples the text; in memory.
        checkpoint: of its tokenizer.
        moments: whose text.
        text: source of external text; default the built-in one.
        options: amount, seed, BOS, column.

    Raises:
        CheckpointError, TextError, ValueError: as `calibration_for`.
    """
    from transformers import PreTrainedModel

    from prunenet.text.calibration import calibration_for

    assert isinstance(model, PreTrainedModel), "check_streamable comes first"
    with tables.progress(errors, "text") as advance:
        return calibration_for(
            model,
            checkpoint.tokenizer,
            moments,
            "builtin" if text is None else text,
            options,
            progress=advance,
        )


_Perplexity = Annotated[float, Within(1)] | None


class _Row(TypedDict, total=False):
    """What cards and reports read of a row."""

    name: str
    folder: str
    text: str
    ratio: Annotated[float, Within(0, 1)] | None
    perplexity: _Perplexity
    perplexity_low: _Perplexity
    perplexity_high: _Perplexity
    parameters: Positive
    bytes: Positive
    tokens: Count | None
    window: Positive | None


class _Printed(TypedDict):
    models: list[_Row]


def printed_rows(results: Path) -> list[dict[str, Any]]:
    """The models of a file that `prunenet eval --json` has printed.

    Raises:
        JsonError: it holds something else.
    """
    from prunenet.runtime.json_files import read_json

    remedy = "it is not what 'prunenet eval --json' prints, so make it anew"
    printed: _Printed = read_json(results, _Printed, remedy=remedy)
    return [dict(row) for row in printed["models"]]


def check_reward_inputs(
    reward: str,
    features: str,
    moments: str | None,
    text: str | None,
    spectral: Mapping[str, str | None],
) -> None:
    """Raises ValueError for an option that this training would not read; `spectral`: those of the
    spectral reward.
    """
    if reward == "spectral" and features == "weights" and (moments or text):
        raise ValueError(
            "the spectral reward reads weights alone: leave --moments and --text out, or say"
            " --reward reconstruction"
        )
    given = [option for option, value in spectral.items() if value]
    if reward != "spectral" and given:
        raise ValueError(
            f"{given[0]} belongs to the spectral reward: say --preset spectral without --reward, or"
            " leave it out"
        )


def check_text(
    moments: str | None,
    text: str | None,
    column: str | None = None,
    tokens: int | None = None,
    bos: Bos = "auto",
) -> None:
    """Raises ValueError for a text, its column, an amount or a beginning of it, that would not be
    read.
    """
    for flag, value in (("--text", text), ("--text-column", column)):
        if value is not None and moments != "data":
            raise ValueError(
                f"{flag} is read with --moments data only: add that, or leave {flag} out"
            )
        if value == "":
            raise ValueError(f"{flag} is empty (an unset variable?): give a name, or leave it out")
    if moments != "none":
        return
    for flag, asked, usual in (("--tokens", tokens, None), ("--bos", bos, "auto")):
        if asked != usual:
            raise ValueError(
                f"--moments none reads no text: leave {flag} {asked} out, or say --moments self"
            )
