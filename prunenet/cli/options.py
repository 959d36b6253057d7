"""The options of the command line, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from prunenet.text.choices import Bos as BosChoice

Model = Annotated[
    str, typer.Argument(help="Folder of a checkpoint, or its id on the Hugging Face hub.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Device = Annotated[
    str,
    typer.Option(
        help=(
            "A torch device: cpu, cuda, cuda:1, ...; or auto, for models larger than one: "
            "all GPUs, then the CPU, then the disk (extra 'large')."
        )
    ),
]
OneDevice = Annotated[str, typer.Option("--device", help="A torch device: cpu, cuda, cuda:1, ...")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE=SIZE,...",
        help=(
            "With --device auto: how much of the weights each device holds, as in"
            " cuda:0=20GiB,cpu=60GiB. GPUs left out are not used; what fits nowhere stays on disk."
            " Default: what is free."
        ),
    ),
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number; give a share such as 0.3") from None


Ratio = Annotated[
    float | None,
    typer.Option(
        parser=_number, metavar="SHARE", help="Share of FFN channels to remove, in [0, 1)."
    ),
]
Params = Annotated[
    float | None,
    typer.Option(
        parser=_number, metavar="SHARE", help="Share of all parameters to remove, in [0, 1)."
    ),
]
Text = Annotated[
    str, typer.Option(help="Text to score: builtin, a file, or a dataset as id[:config[:split]].")
]
Window = Annotated[int, typer.Option(help="Tokens the model sees at once.")]
TextColumn = Annotated[
    str | None,
    typer.Option(
        "--text-column",
        metavar="NAME",
        help="Of a text in rows, the column to read; default: text, else content.",
    ),
]
Bos = Annotated[
    BosChoice,
    typer.Option(
        "--bos",
        help=(
            "Whether windows of text begin with the BOS token: auto (as the model's tokenizer"
            " begins a text), yes or no."
        ),
    ),
]
Preset = Annotated[
    str, typer.Option(help="default, spectral (weights only), or paper (the published recipe).")
]
Updates = Annotated[
    int | None, typer.Option(help="Sweeps over the layers, each followed by one update.")
]
Masks = Annotated[int | None, typer.Option(help="Masks of each layer played side by side.")]
Ratios = Annotated[
    tuple[float, float] | None,
    typer.Option(help="Range of ratios to train at: low and high, in [0, 1)."),
]
Algorithm = Annotated[
    Literal["a2c", "ppo"] | None, typer.Option(help="stable-baselines3's algorithm.")
]
RewardName = Annotated[
    Literal["spectral", "reconstruction"] | None,
    typer.Option(
        help=(
            "spectral: from weights alone. reconstruction: from activations on text, see --moments."
        )
    ),
]
Features = Annotated[
    Literal["weights", "moments"] | None,
    typer.Option(
        help=(
            "What the policy reads: weights (the default), or also moments of activations; it then"
            " needs text to prune."
        )
    ),
]
Moments = Annotated[
    Literal["self", "data"] | None,
    typer.Option(
        help=(
            "Text of reward and moments: self (the model writes it, the default) or data (see"
            " --text)."
        )
    ),
]
CalibrationSource = Annotated[
    str | None,
    typer.Option(
        "--text",
        help="Calibration text for --moments data: builtin, a file, or id[:config[:split]].",
    ),
]
SpectralDistance = Annotated[
    Literal["ks", "wasserstein", "energy"] | None,
    typer.Option(help="Distance behind the spectral reward."),
]
Spectrum = Annotated[
    Literal["auto", "exact", "stochastic"] | None,
    typer.Option(
        help=(
            "Singular values behind the spectral reward: decomposed, estimated, or auto: by the"
            " model's size."
        )
    ),
]
PolicyName = Annotated[
    str | None,
    typer.Option(
        help=(
            "A policy that ships with prunenet (llama), the folder of a trained one, or none."
            " Default: the model family's."
        )
    ),
]
Widths = Annotated[
    str,
    typer.Option(
        help=(
            "uniform, per-layer (as the policy learned), or auto: per-layer for a predicted gain"
            " over 5 %."
        )
    ),
]
Channels = Annotated[
    str | None,
    typer.Option(
        help=(
            "Who chooses them: policy, elimination (from activations), or blend (the default with"
            " moments): both."
        )
    ),
]
Refit = Annotated[
    str | None,
    typer.Option(help="off, layerwise (the default with moments) or sequential: least squares."),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help=(
            "Read (and write) weights layer by layer, for models larger than memory; weights alone."
        ),
    ),
]
PruneMoments = Annotated[
    Literal["none", "self", "data"],
    typer.Option(
        "--moments",
        help="none (weights alone), self (text that the model writes) or data (see --text).",
    ),
]
TrainWidths = Annotated[
    Literal["uniform", "per-layer"] | None,
    typer.Option(
        help=(
            "per-layer (the default preset's): a second stage learns where to cut. uniform: no such"
            " stage."
        )
    ),
]
PruneTokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        help=(
            "Of text to measure on, in blocks of 256: more is better and slower. Default: 40960"
            " (data: 8192)."
        ),
    ),
]
