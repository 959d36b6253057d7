"""The command `prunenet train-widths`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from prunenet.cli import tables
from prunenet.cli.console import errors, one_process, show
from prunenet.cli.inputs import Checkpoint, blocks_for
from prunenet.cli.options import BosOption, Json, OneDevice, Out, Seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """What is learned from, and for how long."""

    start: Annotated[
        str,
        typer.Option(
            help="The policy whose channels are cut: one that ships, or the folder of a trained"
            " one. Its widths are where learning starts."
        ),
    ]
    anew: Annotated[
        bool, typer.Option("--anew", help="Learn widths from nothing, not from those of --start.")
    ] = False
    updates: Annotated[
        int, typer.Option(help="Gradient steps, each after a batch of episodes of one model.")
    ] = 150
    episodes: Annotated[int, typer.Option(help="Of a batch.")] = 64
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, falling to 0.")] = 1e-2
    bos: BosOption = "auto"
    seed: Seed = 0


def train_widths(
    models: Annotated[
        list[str],
        typer.Argument(help="Checkpoints, folders or hub ids, over which widths are learned."),
    ],
    out: Out,
    learning: Learning,
    place: OneDevice,
    as_json: Json = False,
) -> None:
    """Learn where to cut over the interaction matrices of several models, for a policy's
    channels.
    """
    with one_process(out):
        from prunenet.checkpoints.load import load_model
        from prunenet.checkpoints.streaming import StreamedCheckpoint
        from prunenet.policies.artifact import Policy
        from prunenet.policies.training.matrices import Measured, check_measurable
        from prunenet.policies.training.matrices import train_widths as learn
        from prunenet.policies.training.slots import AllocatorRecipe
        from prunenet.policies.training.train import check_run
        from prunenet.text.calibration import CalibrationOptions

        recipe = AllocatorRecipe(
            updates=learning.updates,
            episodes=learning.episodes,
            learning_rate=learning.learning_rate,
            seed=learning.seed,
        )
        check_run(out, resume=None)
        start = Policy.from_pretrained(learning.start)
        start.check_measured(False)
        sources = [Checkpoint(source) for source in models]
        for source in sources:  # what cannot be read is said before minutes of measuring
            check_measurable(StreamedCheckpoint.open(source.source))
            _ = source.tokenizer
        measured = []
        for source in sources:
            model = load_model(source.source, dtype=place.dtype, device=place.device)
            blocks = blocks_for(model, source, "self", None, CalibrationOptions(bos=learning.bos))
            with tables.progress(errors, "matrix") as advance:
                measured.append(Measured.of(model, blocks, start, progress=advance))
            del model
        with tables.progress(errors, "training", "log damage") as learned:
            policy = learn(start, measured, recipe, anew=learning.anew, progress=learned)
        policy.save_pretrained(out)
        facts: dict[str, Any] = {"policy": str(out), "regime": policy.config.regime}
        facts |= {"models": len(measured), "episodes": recipe.updates * recipe.episodes}
        facts |= {"predicted_gain_of_widths": policy.config.gain}
        show(facts, as_json, lambda: tables.facts("policy", facts))
