"""The options of the command line, each said once, and option objects as flags.

`grouped` lets a command take a frozen option object: each of its fields becomes a flag. `HELP`
describes the fields of objects that Python users know too; objects of the command line describe
their own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

from prunenet.checkpoints.options import LoadOptions
from prunenet.cli.console import one_sentence, path
from prunenet.text.choices import Bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunenet.cli.inputs import Checkpoint
    from prunenet.runtime.tracking import Tracker
    from prunenet.text.calibration import CalibrationSet


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number; give a share such as 0.3") from None


def _rounding(text: str | int) -> int | str:
    if isinstance(text, int):  # the default
        return text
    if text != "auto" and not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither a number such as 8 nor auto")
    return text if text == "auto" else int(text)


def trackers(text: str | None) -> list[Tracker]:
    """The trackers that `--report-to` names.

    Raises:
        ValueError, ImportError: as `check_trackers`.
    """
    from prunenet.runtime.tracking import check_trackers

    names = [] if text is None else [name.strip() for name in text.split(",")]
    check_trackers(names)
    return cast("list[Tracker]", names)


Model = Annotated[
    str, typer.Argument(help="Folder of a checkpoint, or its id on the Hugging Face hub.")
]
Out = Annotated[Path, typer.Option("--out", "-o", parser=path, help="Folder to create.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the unfinished run.")]
ReportTo = Annotated[
    str | None,
    typer.Option(
        metavar="TRACKER,...",
        help="Also log to wandb, trackio or mlflow (an extra each); TensorBoard's log is always"
        " written.",
    ),
]
PolicyName = Annotated[
    str | None,
    typer.Option(
        help="A policy that ships with prunenet (llama, universal), the folder of a trained one, or"
        " none. Default: the model family's, else the universal one where FFNs are gated and dense."
    ),
]
CalibrationSource = Annotated[
    str | None,
    typer.Option(
        "--text",
        help="Calibration text for --moments data: builtin, a file, or id[:config[:split]].",
    ),
]
_COLUMN = "Of a text in rows, the column to read; default: text, else content."
TextColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=_COLUMN,
    ),
]
_BOS = (
    "Whether windows of text begin with the BOS token: auto (as the model's tokenizer begins a"
    " text), yes or no."
)
BosOption = Annotated[
    Bos,
    typer.Option(
        help=_BOS,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Whether an unfinished training goes on, and who is told of it."""

    resume: Resume = False
    report_to: ReportTo = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(LoadOptions):
    """How weights are loaded, or read layer by layer."""

    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read (and write) weights layer by layer, for models larger than memory; weights"
            " alone.",
        ),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The calibration set of `prune`: whose text, and how much of it."""

    moments: Annotated[
        Literal["none", "self", "data"],
        typer.Option(
            help="none (weights alone), self (text that the model writes) or data (see --text)."
        ),
    ] = "self"
    text: CalibrationSource = None
    text_column: TextColumn = None
    bos: BosOption = "auto"
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of text to measure on, in blocks of 256: more is better and slower."
            " Default: 40960 (data: 8192)."
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(help="Of the text that the model writes, or of the windows drawn.")
    ] = 0

    def blocks(self, model: PreTrainedModel, checkpoint: Checkpoint) -> CalibrationSet | None:
        """The calibration set; None for `--moments none`. Raises as `blocks_for`."""
        from prunenet.cli.inputs import blocks_for
        from prunenet.text.calibration import CalibrationOptions

        if self.moments == "none":
            return None
        options = CalibrationOptions(
            seed=self.seed, tokens=self.tokens, bos=self.bos, column=self.text_column
        )
        return blocks_for(model, checkpoint, self.moments, self.text, options)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneDevice:
    """How weights are loaded where they must be on one device."""

    device: Annotated[str, typer.Option(help="A torch device: cpu, cuda, cuda:1, ...")] = "cpu"
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = (
        "auto"
    )


HELP: dict[str, Any] = {
    # LoadOptions
    "device": typer.Option(
        help="A torch device: cpu, cuda, cuda:1, ...; or auto, for models larger than one:"
        " all GPUs, then the CPU, then the disk (extra 'large')."
    ),
    "max_memory": typer.Option(
        metavar="DEVICE=SIZE,...",
        help="With --device auto: how much of the weights each device holds, as in"
        " cuda:0=20GiB,cpu=60GiB. GPUs left out are not used; what fits nowhere stays on disk."
        " Default: what is free.",
    ),
    "dtype": typer.Option(help="auto (as stored), float32, bfloat16 or float16."),
    # PruneOptions
    "ratio": typer.Option(
        parser=_number, metavar="SHARE", help="Share of FFN channels to remove, in [0, 1)."
    ),
    "params": typer.Option(
        parser=_number, metavar="SHARE", help="Share of all parameters to remove, in [0, 1)."
    ),
    "active": typer.Option(
        parser=_number, metavar="SHARE", help="Share of the active parameters to remove, in [0, 1)."
    ),
    "experts": typer.Option(help="Experts that stay in each layer of a mixture. Default: all."),
    "experts_by": typer.Option(
        help="Which experts stay: aimer (from weights), reap (measured on text) or random. Default:"
        " reap where experts share a budget (--structures), else aimer."
    ),
    "round_to": typer.Option(
        "--round",
        parser=_rounding,
        metavar="NUMBER|auto",
        help="Widths are multiples of this. auto: of 64 where that moves a uniform width by less"
        " than 1 % of its channels, else of 32, for engines quantise in blocks of 32 or 64 and"
        " leave other widths whole; in experts and narrow FFNs of 8 at least.",
    ),
    "widths": typer.Option(
        help="uniform, per-layer (the policy's allocation), auto: per-layer for a predicted gain"
        " over 5 %, or refined: per-layer, changed on calibration text in some minutes."
    ),
    "structures": typer.Option(
        metavar="NAME,...",
        help="What refined widths cut, at as many parameters in all: channels, heads (groups of"
        " them), attention (heads, and of a layer all of them), layers (whole ones); of a mixture"
        " channels,experts or experts.",
    ),
    "budget": typer.Option(
        help="What refined widths save; --ratio is the share of what FFN channels cost in it (of"
        " kv-bytes, of all), --params the share of what all layers cost. latency: microseconds,"
        " measured on this machine at first use."
    ),
    "channels": typer.Option(
        help="Which channels stay: policy (its scores), elimination (greedy, from activations) or"
        " blend (policy and measured energies). Default: blend where there is text."
    ),
    "refit": typer.Option(
        help="Least squares of the down matrices: off, layerwise or sequential; blocks: layerwise,"
        " then each FFN trained in some minutes. Default: layerwise where there is text."
    ),
    # EvaluationOptions
    "window": typer.Option(help="Tokens the model sees at once."),
    "stride": typer.Option(help="Tokens between windows; default: no overlap."),
    "max_windows": typer.Option(help="Score only the first windows of a text."),
    "bos": typer.Option(help=_BOS),
    "batch_size": typer.Option(help="Windows scored at once."),
    # SpeedOptions
    "prompt": typer.Option(help="Tokens of the prompt when measuring speed."),
    "new_tokens": typer.Option(help="Tokens decoded when measuring speed."),
    "SpeedOptions.batch": typer.Option(help="Sequences at once when measuring speed."),
    "repeats": typer.Option(help="Measurements of speed."),
    "most": typer.Option(
        "--most-repeats",
        help="Measure speed again, up to so many times, until the middle half is within 10 %.",
    ),
    "compiled": typer.Option(
        "--compile", help="Measure the speed of what torch.compile makes of the models."
    ),
    # Tuning
    "updates": typer.Option(
        help="full (all weights of the layers), lora (low-rank updates of their linears, merged)"
        " or auto: full up to a billion parameters."
    ),
    "embeddings": typer.Option(help="With full: train embeddings and LM head too."),
    "steps": typer.Option(help="Steps of training. Default: one pass over the text."),
    "batch": typer.Option(help="Blocks of a step. Default: as many as have about 256 tokens."),
    "micro_batch": typer.Option(help="Blocks in memory at once."),
    "rank": typer.Option(help="Rank of the low-rank updates."),
    "learning_rate": typer.Option(
        help="Highest learning rate of AdamW. Default: 2e-4 of full, 5e-4 of lora."
    ),
    "gentle_below": typer.Option(
        help="KL before, in nats, below which the rate is smaller in proportion; 0: nowhere."
        " Default: 0.4 of full at its default rate, else 0."
    ),
    "warmup": typer.Option(help="Share of the steps in which the learning rate rises."),
    "schedule": typer.Option(
        help="How the rate falls to 0: linear, cosine, or stable (in the last fifth)."
    ),
    "betas": typer.Option(help="Of AdamW."),
    "loss": typer.Option(
        help="Against a teacher: kl over the vocabulary, or top256: its likeliest tokens, and the"
        " rest."
    ),
    "hidden": typer.Option(
        help="Weight of the relative squared error of the hidden states behind each layer."
    ),
    "average": typer.Option(
        help="Decay of a moving average of the weights, judged beside the last state; 0: none."
    ),
    "seed": typer.Option(help="Seed of the text and of the training."),
    # RecoverText
    "moments": typer.Option(
        help="Text to learn from: self (the dense model samples it) or data (see --text)."
    ),
    "column": typer.Option("--text-column", help=_COLUMN),
    "text": typer.Option(
        help="External text for --moments data: builtin, a file, or id[:config[:split]]."
    ),
    "tokens": typer.Option(
        help="Tokens to learn from, once each unless --steps says otherwise; a quarter as many, at"
        " most 4096, are held back to choose by. Default: as many as the steps read, 98304 without"
        " them."
    ),
    "RecoverText.window": typer.Option(
        help="Tokens of a block. Default: 64 of self-written text, 256 of external text."
    ),
}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Turns a command that takes option objects into one that Typer can read: a flag a field.

    Objects are made inside `one_sentence`, so that a value out of range is one sentence. An object
    that is described by a function of the command's own module says so by `HELP`.
    """
    hints = get_type_hints(command, include_extras=True)
    flat: list[inspect.Parameter] = []
    groups: dict[str, list[str]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(hints[name]):
            flags = [_flag(hints[name], field) for field in fields(hints[name])]
            groups[name] = [flag.name for flag in flags]
            flat += flags
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            flat.append(parameter.replace(annotation=hints[name], kind=kind))

    @functools.wraps(command)
    def flattened(**given: Any) -> None:
        with one_sentence():
            objects = {
                name: hints[name](**{member: given.pop(member) for member in members})
                for name, members in groups.items()
            }
        command(**given, **objects)

    flattened.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return flattened


def _flag(kind: Any, field: Field[Any]) -> inspect.Parameter:
    """A field as a keyword parameter, with the option that describes it."""
    hint = get_type_hints(kind, include_extras=True)[field.name]
    if get_origin(hint) is not Annotated:
        own = HELP.get(f"{kind.__name__}.{field.name}") or HELP[field.name]
        if own.parser is not None and type(None) not in get_args(hint):
            hint = str  # Typer knows no unions; the parser makes the value
        hint = Annotated[hint, own]
    default = field.default
    if default is MISSING:
        made = field.default_factory
        default = inspect.Parameter.empty if made is MISSING else made()
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
    )
