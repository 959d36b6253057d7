"""What the commands read: a model in memory or streamed, its tokenizer, the text to measure
activations on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from rich.markup import escape

from prunenet.cli import tables
from prunenet.cli.console import errors
from prunenet.runtime.placement import AUTO

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prunenet.checkpoints.streaming import StreamedCheckpoint
    from prunenet.text.calibration import CalibrationOptions, CalibrationSet


def open_model(
    source: str, stream: bool, *, dtype: str, device: str, max_memory: str | None = None
) -> PreTrainedModel | StreamedCheckpoint:
    """The model, loaded or to be read layer by layer.

    Raises:
        ValueError: streamed and placed at once; or as `checkpoint.load_model`.
    """
    if stream:
        if device == AUTO or max_memory is not None:
            raise ValueError(
                "--stream leaves all weights on disk, so there is nothing to place: leave --device"
                " auto out"
            )
        from prunenet.checkpoints.streaming import StreamedCheckpoint

        return StreamedCheckpoint.open(source, dtype=dtype, device=device)
    from prunenet.checkpoints.load import load_model

    return load_model(source, dtype=dtype, device=device, max_memory=max_memory)


def check_streamable(stream: bool, reads_text: bool, remedy: str) -> None:
    """Raises ValueError where activations would be measured on a model that is not in memory;
    `remedy`: what to say instead.
    """
    if stream and reads_text:
        raise ValueError(
            "--stream holds one layer of the model at a time, so nothing can be measured on text:"
            f" {remedy}"
        )


def blocks_for(
    dense: PreTrainedModel | StreamedCheckpoint,
    source: str,
    moments: Literal["self", "data"],
    text: str,
    options: CalibrationOptions,
) -> CalibrationSet:
    """Makes the calibration set of a command; writing it shows progress.

    Raises:
        ValueError: `--tokens` is less than two blocks; or as `calibration_for`.
    """
    from transformers import PreTrainedModel

    from prunenet.checkpoints.load import load_tokenizer
    from prunenet.text.calibration import block_tokens, calibration_for

    assert isinstance(dense, PreTrainedModel), "check_streamable comes first"
    tokenizer, block = load_tokenizer(source), block_tokens(dense)
    if options.total is not None and options.total < 2 * block:
        raise ValueError(
            f"--tokens must be at least {2 * block}, 2 blocks of {block}, got {options.total}"
        )
    with tables.progress(errors, "text") as advance:
        return calibration_for(dense, tokenizer, moments, text, options, progress=advance)


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
    if reward == "reconstruction" and given:
        raise ValueError(
            f"{given[0]} belongs to the spectral reward: say --preset spectral without --reward, or"
            " leave it out"
        )
    check_text(moments, text)


def check_text(moments: str | None, text: str | None, tokens: int | None = None) -> None:
    """Raises ValueError for a text, or an amount of it, that would not be read."""
    if text and moments != "data":
        raise ValueError("--text is read with --moments data only: add that, or leave --text out")
    if tokens is not None and moments == "none":
        raise ValueError(
            f"--moments none reads no text: leave --tokens {tokens} out, or say --moments self"
        )


def tokenizer_of(source: str) -> PreTrainedTokenizerBase | None:
    """A checkpoint without a tokenizer can be cut all the same."""
    from prunenet.checkpoints.load import load_tokenizer
    from prunenet.runtime.files import CheckpointError

    try:
        return load_tokenizer(source)
    except CheckpointError as error:
        errors.print(f"note: {escape(str(error))}; the pruned checkpoint gets none either")
        return None
