"""Trains a policy on one model: first the channels' scores, then the allocation of widths.

Source: Sengupta et al. (PruneNet), ICLR 2025, arXiv 2501.15296, section 3. What differs, and why,
is in docs/methods.md, section 1.2: masks are applied deterministically; the policy gradient uses
the exact log-probability of the sampled mask; rewards are bounded and compared with a baseline;
returns are reward-to-go; many masks of a layer are judged per step; the scorer fits any width; the
result is never worse than its start on its own reward.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import weights_sha256
from prunenet.checkpoints.records import check_channels
from prunenet.checkpoints.regimes import Regime, most
from prunenet.checkpoints.sources import check_loaded, local_folder
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.envs.divergence import DivergenceReward
from prunenet.envs.rewards import ReconstructionReward, Reward, SpectralReward
from prunenet.envs.split import judged_by_all
from prunenet.envs.sweep import View, groups_played
from prunenet.features.from_activations import MOMENT_STATISTICS
from prunenet.models.anatomy import Anatomy
from prunenet.models.layers import structure
from prunenet.policies.artifact import Policy, PolicyConfig, PolicyError
from prunenet.policies.training.pathwise import PathwiseRun
from prunenet.policies.training.recipe import MOMENT_PRIOR, Recipe, as_json
from prunenet.policies.training.reports import Reports, Tracked
from prunenet.policies.training.run import Run, Saving, Stage
from prunenet.runtime import parallel
from prunenet.runtime.choices import check_choice
from prunenet.runtime.files import check_home, expanded, lock
from prunenet.runtime.products import with_fast_products
from prunenet.runtime.tracking import Track, check_trackers, tracking
from prunenet.text.calibration import CalibrationSet

_History = list[tuple[int, float]]  # (updates, reward) at each evaluation


@dataclass(frozen=True, slots=True)
class Training:
    """Holds a trained policy and its rewards.

    Attributes:
        policy: the best seen.
        history: (updates, reward of the deterministic masks) at each evaluation of the first stage,
            the first before any update.
        widths_history: the same for the second stage, which learns the allocation; empty without
            one.
    """

    policy: Policy
    history: list[tuple[int, float]]
    widths_history: list[tuple[int, float]]


@with_fast_products
def train(
    model: PreTrainedModel | StreamedCheckpoint,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    blocks: CalibrationSet | None = None,
    reward: Reward | None = None,
    regime: Regime | None = None,
    start: Policy | None = None,
    reports: Reports | None = None,
) -> Training:
    """Trains a policy.

    With several processes (`prunenet.runtime.parallel`) the first one samples masks, learns and
    writes; all of them judge masks and describe layers (`prunenet.envs.split`). With the same
    number of threads each, the policy is the same bit for bit.

    Args:
        model: stays on its device; read, never changed. A streamed model is trained on from its
            weights alone: with the spectral reward, whose every step reads a layer from disk.
        recipe: of the channels' scores, and, in `recipe.allocation`, of the stage that learns the
            layers' widths; default `PRESETS["default"]`.
        out: folder for the policy; `out/training` holds the run's state and its TensorBoard log.
            None keeps all in memory.
        resume: whether to continue the run in `out`.
        blocks: token blocks on which rewards are measured; see `prunenet.text.calibration`. With
            `recipe.features` "moments" the scorer reads statistics of the first half, and rewards
            are measured on the second half: what is true of one text alone does not pay.
        reward: replaces the recipe's reward.
        regime: "weights", "self" or "data": what `reward` looks at; needed with it unless `blocks`
            say so.
        start: a policy to go on from, which stays as it is; it reads what the recipe's reads, and
            has its hidden widths. None: an untrained one.
        reports: who is told meanwhile.

    Raises:
        PolicyError: nothing to resume, the run in `out` had other settings, or `out` is in use and
            `resume` is not set.
        CheckpointError: another process is training in `out`, or it cannot be written.
        ValueError: the recipe's reward or its features need blocks, and none (or too few) are
            given; `reward` comes without its regime; `start` reads something else; weights or
            activations are not finite.
        ImportError: a tracker is not installed.
        UnsupportedArchitecture: see `prunenet.models.architectures`.
    """
    recipe, reports = recipe or Recipe(), reports or Reports()
    check_trackers(reports.report_to)
    read = recipe.features == "moments"
    if not read and reward is None and _spectral_alone(recipe):
        blocks = None  # only weights are read, and the record must say so
    _check_asked(model, recipe, reward, blocks, regime, reports)
    measured, paid = _halves(blocks) if read else (None, blocks)
    config = _continued(_config(model, recipe, reward, blocks, regime), start)
    folder = None if out is None else check_run(expanded(out), resume)
    view = View.of(model, measured)
    identity = {"recipe": config.recipe, "trained_on": config.trained_on, "text": config.text}
    histories: dict[str, _History] = {}
    called = config.trained_on["model"] if folder is None else folder.name
    with (
        _writing(folder, resume),
        _random_state_kept(),
        tracking(reports.report_to, called, identity) as track,
    ):
        policy = _begun(config, recipe.seed, start)
        for name, asked, judge in _stages(model, recipe, reward, paid):
            own = track.stage(name, _steps(view, recipe) if histories else 0)

            def play(
                judge: Reward, name: str = name, asked: Recipe = asked, own: Track = own
            ) -> _History:
                saving = Saving(folder and _state(folder, name), identity)
                stage = Stage(view, policy.scorer, judge, asked, saving, reports.progress)
                on = resume and unfinished(folder, name)
                return _run(stage, reports, own, paid).learn(model, on)

            histories[name] = judged_by_all(judge, play) or []
        histories = _broadcast(policy.scorer.cpu(), histories)
        policy = Policy(policy.scorer, replace(config, gain=_gain(recipe, histories, start)))
        if folder is not None and parallel.is_first():
            policy.save_pretrained(folder)
        best = {f"{name}/best_reward": max(r for _, r in h) for name, h in histories.items() if h}
        track.results(best | {"predicted_gain": policy.config.gain})
    return Training(policy, histories["channels"], histories.get("widths", []))


def _config(
    model: PreTrainedModel | StreamedCheckpoint,
    recipe: Recipe,
    reward: Reward | None,
    blocks: CalibrationSet | None,
    regime: str | None,
) -> PolicyConfig:
    """What the policy will say of itself."""
    read = recipe.features == "moments"
    return PolicyConfig(
        moments=MOMENT_STATISTICS if read else (),
        hidden=recipe.hidden,
        prior=dict(recipe.prior or (MOMENT_PRIOR if read else {})),
        regime=_regime(regime, recipe, blocks, read),
        text=None if blocks is None else dict(blocks.source),
        trained_on=identity_of(model),
        recipe=recorded(recipe)
        | {"reward": recipe.reward if reward is None else type(reward).__name__},
    )


def _begun(config: PolicyConfig, seed: int, start: Policy | None) -> Policy:
    """The policy to train, untrained or a copy of the start."""
    policy = Policy.untrained(config, seed=seed)
    if start is not None:
        policy.scorer.load_state_dict(start.scorer.state_dict())
    return policy


def _continued(config: PolicyConfig, start: Policy | None) -> PolicyConfig:
    """A configuration that names the policy it goes on from, if there is one.

    Raises:
        ValueError: that policy reads something else, or has other hidden widths.
    """
    if start is None:
        return config
    for name in ("statistics", "context", "moments", "hidden", "prior"):
        given, wanted = getattr(start.config, name), getattr(config, name)
        if given != wanted:
            raise ValueError(
                f"`start` has other {name} than the policy that this recipe trains: {given} in"
                f" place of {wanted}; start from another, or from none"
            )
    trained_on = {**config.trained_on, "start": start.sha256}
    regime = most([config.regime, start.config.regime])
    return replace(config, trained_on=trained_on, regime=regime)


def _steps(view: View, recipe: Recipe) -> int:
    """Environment steps of a stage; updates of one by the pathwise gradient."""
    each = 1 if recipe.gradient == "pathwise" else view.layers * recipe.masks
    return recipe.updates * each


def _spectral_alone(recipe: Recipe) -> bool:
    """Returns whether every stage takes the spectral reward."""
    second = recipe.allocation
    return recipe.reward == "spectral" and (second is None or second.reward == "spectral")


@contextmanager
def _writing(folder: Path | None, resume: bool) -> Iterator[None]:
    """Locks the folder for the first process, and checks again what is in it by then."""
    if folder is None or not parallel.is_first():
        yield
        return
    with lock(folder):
        check_run(folder, resume)
        yield


def check_trainable(model: PreTrainedModel | StreamedCheckpoint) -> None:
    """Checks that a policy can be trained on a model; reads no weight.

    Raises:
        ValueError: its layers have different widths, or are filled up with zeros.
    """
    check_channels(model, "train on the checkpoint that it was exported from")
    groups_played(model)


def learns_widths(model: PreTrainedModel | StreamedCheckpoint) -> bool:
    """Whether layers can have widths of their own, so that an allocation can be learned."""
    return Anatomy.of(structure(model)).free


def _check_asked(
    model: PreTrainedModel | StreamedCheckpoint,
    recipe: Recipe,
    reward: Reward | None,
    blocks: CalibrationSet | None,
    regime: str | None,
    reports: Reports,
) -> None:
    """Raises ValueError where the model, the regime or the blocks are none to be trained on."""
    check_loaded(model=model)
    check_trainable(model)
    _check_pathwise(recipe, reward, reports)
    if recipe.allocation is not None and not learns_widths(model):
        raise ValueError(
            f"the layers of a {type(structure(model)).__name__} share one width, for"
            f" {Anatomy.of(structure(model)).tied_by}; leave `allocation` out (uniform `widths`)"
        )
    if regime is not None:
        check_choice("regime", regime, Regime)
    if blocks is not None and not isinstance(model, PreTrainedModel):
        raise ValueError(
            "activations need the model in memory, and this one is read layer by layer: leave the"
            " blocks out, or load it"
        )
    if regime is None and reward is not None and blocks is None:
        raise ValueError(
            "say which regime a reward of your own belongs to: regime='weights', 'self' or 'data'"
        )
    for wanted in (recipe if reward is None else None, recipe.allocation):
        if wanted is not None and wanted.reward != "spectral" and blocks is None:
            raise ValueError(
                f"the {wanted.reward} reward is measured on text: give token blocks (see"
                " prunenet.text.calibration)"
            )


def _check_pathwise(recipe: Recipe, reward: Reward | None, reports: Reports) -> None:
    """Raises ValueError for what a stage by the pathwise gradient cannot do."""
    if recipe.gradient == "pathwise" and reward is not None:
        raise ValueError(
            f"the pathwise gradient is that of the divergence, got {type(reward).__name__} as"
            " `reward`; leave it out, or take gradient 'reinforce'"
        )
    stages = [recipe, *([] if recipe.allocation is None else [recipe.allocation])]
    if reports.callbacks and all(stage.gradient == "pathwise" for stage in stages):
        raise ValueError(
            "callbacks of stable-baselines3 listen to gradient 'reinforce', and no stage has it;"
            " leave `callbacks` out"
        )


def _run(
    stage: Stage, reports: Reports, track: Track, blocks: CalibrationSet | None
) -> Run | PathwiseRun:
    """The run of a stage by its gradient."""
    if stage.recipe.gradient == "reinforce":
        return Run(stage, [*reports.callbacks, Tracked(track)])
    assert blocks is not None, "checked before"
    return PathwiseRun(stage, track, blocks)


def _halves(blocks: CalibrationSet | None) -> tuple[Int[Tensor, "n tokens"], CalibrationSet]:
    """Splits a calibration set: token ids for the scorer's moments, and blocks for the rewards."""
    if blocks is None or len(blocks.ids) < 2:
        given = "none" if blocks is None else str(len(blocks.ids))
        raise ValueError(
            "a policy that reads moments measures them on text, and its rewards on other text:"
            f" give 2 token blocks or more (see prunenet.text.calibration), got {given}"
        )
    half = len(blocks.ids) // 2
    return blocks.ids[:half], blocks.rows(slice(half, None))


def _regime(regime: str | None, recipe: Recipe, blocks: CalibrationSet | None, read: bool) -> str:
    """Returns the regime of the whole training: the most that a stage or the scorer looks at."""
    if blocks is None:
        return regime or "weights"
    second = recipe.allocation
    if regime is None or read or (second is not None and second.reward != "spectral"):
        return most([regime or "weights", blocks.regime])
    return regime


def _stages(
    model: PreTrainedModel | StreamedCheckpoint,
    recipe: Recipe,
    reward: Reward | None,
    blocks: CalibrationSet | None,
) -> Iterator[tuple[str, Recipe, Reward]]:
    """Yields name, recipe and reward of each stage; a reward is measured when its stage begins."""
    yield "channels", recipe, reward or _reward(model, recipe, blocks)
    if recipe.allocation is not None:
        yield "widths", recipe.allocation, _reward(model, recipe.allocation, blocks)


def _broadcast(scorer: nn.Module, histories: dict[str, _History]) -> dict[str, _History]:
    """Broadcasts the first process's histories and the weights of its scorer."""
    weights = scorer.state_dict()
    scorer.load_state_dict(
        {name: parallel.broadcast(0, partial(weights.__getitem__, name)) for name in weights}
    )
    received = parallel.broadcast_object(0, lambda: histories)
    return {
        name: [(updates, reward) for updates, reward in history]
        for name, history in received.items()
    }


def _gain(recipe: Recipe, histories: dict[str, _History], start: Policy | None) -> float | None:
    """Returns the share by which exp(KL) fell from uniform widths to the best seen."""
    history = histories.get("widths")
    if recipe.allocation is None or history is None:
        return None if start is None else start.config.gain
    first, best = history[0][1], max(reward for _, reward in history)
    if recipe.allocation.reward != "divergence" or best <= 0:
        return None
    before = start.config.gain if start is not None else None  # what the start had gained
    return 1 - (1 - (before or 0.0)) * first / best


def recorded(recipe: Recipe) -> dict[str, Any]:
    """Converts a recipe to JSON values for a saved policy; the second stage is called "where"."""
    second = recipe.allocation
    return as_json(recipe) | {"where": None if second is None else as_json(second)}


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restores the caller's global generators, which stable-baselines3 seeds."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def _reward(
    model: PreTrainedModel | StreamedCheckpoint, recipe: Recipe, blocks: CalibrationSet | None
) -> Reward:
    if recipe.reward == "spectral":
        return SpectralReward(
            model,
            distance=recipe.distance,
            matrices=recipe.matrices,
            form=recipe.form,
            spectrum=recipe.spectrum,
        )
    assert blocks is not None, "checked before"
    assert isinstance(model, PreTrainedModel), "checked before"
    if recipe.reward == "divergence":
        ids, unscored = blocks.ids[: recipe.blocks, : recipe.tokens], int(blocks.bos is not None)
        return DivergenceReward(model, ids, unscored=unscored)
    return ReconstructionReward(model, blocks.ids)


def identity_of(model: PreTrainedModel | StreamedCheckpoint) -> dict[str, str]:
    """What a policy records of the model that it was trained on."""
    return {
        "model": _name(model),
        "model_type": structure(model).config.model_type,
        "weights": weights_sha256(model),
    }


def _name(model: PreTrainedModel | StreamedCheckpoint) -> str:
    """Returns the hub id, or only the last part of a local path, which may be private."""
    config, fallback = structure(model).config, type(structure(model)).__name__
    source = config._name_or_path or fallback
    folder = local_folder(source)
    return source if folder is None else folder.resolve().name


def unfinished(folder: Path | None, stage: str = "channels") -> bool:
    """Returns whether the folder holds the saved state of a stage."""
    return folder is not None and _state(folder, stage).exists()


def _state(folder: Path, stage: str) -> Path:
    return folder / "training" / stage / "state.safetensors"


def check_run(folder: Path, resume: bool | None) -> Path:
    """Checks that a run can start in a folder, or continue there with `resume` (None: never).

    Creates nothing. Only the first process looks: the others may not share its disk.

    Returns:
        The folder.

    Raises:
        PolicyError: the folder holds a policy or a run and `resume` is not set, or nothing to
            resume.
        CheckpointError: the folder cannot be made or written in.
    """
    if not parallel.is_first():
        return folder
    if resume and not unfinished(folder):
        raise PolicyError(f"nothing to resume in {folder}: it holds no run; start a new one")
    if not resume and ((folder / "config.json").exists() or unfinished(folder)):
        instead = "" if resume is None else "say `resume`, or "
        raise PolicyError(
            f"{folder} holds a policy or an unfinished run; {instead}give another folder"
        )
    check_home(folder)
    return folder
