"""The command `prunenet train`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunenet.cli import tables
from prunenet.cli.console import errors, one_job, show
from prunenet.cli.inputs import (
    Checkpoint,
    blocks_for,
    check_reward_inputs,
    check_streamable,
    check_text,
    open_model,
)
from prunenet.cli.options import (
    BosOption,
    CalibrationSource,
    Json,
    Model,
    Out,
    Reading,
    Running,
    Seed,
    TextColumn,
    trackers,
)
from prunenet.policies.training.choices import Algorithm, Features, GradientName, LayerReward
from prunenet.spectra.choices import Distance, Spectrum

if TYPE_CHECKING:
    from prunenet.policies.training.recipe import Recipe

_CHANGES = (
    *("updates", "masks", "ratio", "gradient", "algorithm", "reward", "features"),
    *("distance", "spectrum"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A preset, what is changed of it, and the text that its rewards read."""

    preset: Annotated[
        str,
        typer.Option(
            help="default, widths (where to cut alone, for the channels of --start), spectral"
            " (weights only), or paper (the published recipe)."
        ),
    ] = "default"
    updates: Annotated[
        int | None, typer.Option(help="Sweeps over the layers, each followed by one update.")
    ] = None
    masks: Annotated[int | None, typer.Option(help="Masks of each layer played side by side.")] = (
        None
    )
    ratio: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Range of ratios to train at: low and high, in [0, 1)."),
    ] = None
    gradient: Annotated[
        GradientName | None,
        typer.Option(
            help="Of the first stage. reinforce: from rewards of drawn masks (the default)."
            " pathwise: of the divergence through relaxed masks; 160 forward and backward passes"
            " of 512 tokens."
        ),
    ] = None
    algorithm: Annotated[Algorithm | None, typer.Option(help="stable-baselines3's algorithm.")] = (
        None
    )
    reward: Annotated[
        LayerReward | None,
        typer.Option(
            help="spectral: from weights alone. reconstruction: from activations on text, see"
            " --moments."
        ),
    ] = None
    features: Annotated[
        Features | None,
        typer.Option(
            help="What the policy reads: weights (the default), or also moments of activations; it"
            " then needs text to prune."
        ),
    ] = None
    moments: Annotated[
        Literal["self", "data"] | None,
        typer.Option(
            help="Text of reward and moments: self (the model writes it, the default) or data (see"
            " --text)."
        ),
    ] = None
    text: CalibrationSource = None
    text_column: TextColumn = None
    bos: BosOption = "auto"
    distance: Annotated[
        Distance | None,
        typer.Option(help="Distance behind the spectral reward."),
    ] = None
    spectrum: Annotated[
        Spectrum | None,
        typer.Option(
            help="Singular values behind the spectral reward: decomposed, estimated, or auto: by"
            " the model's size."
        ),
    ] = None
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW, in the first stage.")] = (
        None
    )
    widths: Annotated[
        Literal["uniform", "per-layer"] | None,
        typer.Option(
            help="per-layer (the default preset's, where the family's layers may differ): a second"
            " stage learns an allocation. uniform: no such stage."
        ),
    ] = None
    start: Annotated[
        str | None,
        typer.Option(
            help="A policy to go on from: one that ships, or the folder of a trained one."
        ),
    ] = None
    seed: Seed = 0

    def recipes(self) -> tuple[Recipe, Recipe | None]:
        """Of the channels' scores, and of the allocation where one is learned.

        Raises:
            ValueError: an unknown preset, a value out of range, or an option that is not read.
        """
        if self.gradient == "pathwise" and self.algorithm is not None:
            raise ValueError(
                f"--algorithm {self.algorithm} belongs to --gradient reinforce: leave it out"
            )
        if self.preset == "widths" and self.widths is not None:
            raise ValueError(
                f"--preset widths learns per-layer widths and nothing else: leave --widths"
                f" {self.widths} out"
            )
        from prunenet.policies.training.recipe import recipe_for, widths_recipe

        given = {name: getattr(self, name) for name in (*_CHANGES, "learning_rate", "seed")}
        pathwise = self.gradient == "pathwise" and self.preset == "default"
        recipe = recipe_for(
            "pathwise" if pathwise else self.preset,
            {name: value for name, value in given.items() if value is not None},
        )
        uniform = self.widths == "uniform" or (self.widths is None and self.preset != "default")
        spectral = {"--distance": self.distance, "--spectrum": self.spectrum}
        check_reward_inputs(recipe.reward, recipe.features, self.moments, self.text, spectral)
        check_text(self.moments, self.text, self.text_column)
        return recipe, None if uniform else widths_recipe(self.seed)


def train(
    model: Model,
    out: Out,
    training: Training,
    reading: Reading,
    running: Running,
    as_json: Json = False,
) -> None:
    """Train a policy on a model, to be applied at any ratio, by default from weights alone."""
    with one_job(reading.device, out) as place:
        from prunenet.policies.artifact import Policy
        from prunenet.policies.training.reports import Reports
        from prunenet.policies.training.train import check_run, check_trainable, learns_widths
        from prunenet.policies.training.train import train as learn
        from prunenet.text.calibration import CalibrationOptions

        recipe, allocation = training.recipes()
        reported = trackers(running.report_to)
        rewards = {recipe.reward, "spectral" if allocation is None else allocation.reward}
        reads = rewards != {"spectral"} or recipe.features == "moments"
        remedy = "say --preset spectral, without --features moments or --widths per-layer"
        check_streamable(reading, reads, remedy)
        check_run(out, running.resume)
        start = None if training.start is None else Policy.from_pretrained(training.start)
        dense = open_model(model, reading, place)
        check_trainable(dense)
        if training.widths is None and not learns_widths(dense):
            allocation = None
        blocks = None
        if reads:
            whose = training.moments or "self"
            options = CalibrationOptions(bos=training.bos, column=training.text_column)
            blocks = blocks_for(dense, Checkpoint(model), whose, training.text, options)
        with tables.progress(errors, "training", "reward") as advance:
            trained = learn(
                dense,
                replace(recipe, allocation=allocation),
                out=out,
                resume=running.resume,
                blocks=blocks,
                start=start,
                reports=Reports(progress=advance, report_to=reported),
            )
        (_, first), best = trained.history[0], max(reward for _, reward in trained.history)
        config = trained.policy.config
        facts: dict[str, Any] = {"policy": str(out), "regime": config.regime}
        facts |= {"updates": recipe.updates, "reward_untrained": first, "reward": best}
        if allocation is not None:
            facts |= {"width_updates": allocation.updates, "predicted_gain_of_widths": config.gain}
        show(facts, as_json, lambda: tables.facts("policy", facts))
