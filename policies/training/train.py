"""Trains a policy on one model: first which channels to keep, then where to cut.

After Sengupta et al. (PruneNet), ICLR 2025, arXiv 2501.15296, section 3. What differs, and why, is
METHODS.md 1.2: deterministic application, the exact log-probability of the mask played, bounded
rewards against a baseline, reward-to-go, many masks of a layer per step, a scorer without widths,
and a result that is never worse than its start on its own reward.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import weights_sha256
from prunenet.checkpoints.regimes import most
from prunenet.checkpoints.sources import local_folder
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.envs.divergence import DivergenceReward
from prunenet.envs.rewards import ReconstructionReward, Reward, SpectralReward
from prunenet.envs.split import led
from prunenet.envs.sweep import View
from prunenet.features.from_activations import MOMENT_STATISTICS
from prunenet.models.layers import structure
from prunenet.policies.artifact import Policy, PolicyConfig, PolicyError
from prunenet.policies.training.recipe import MOMENT_PRIOR, Recipe, as_json
from prunenet.policies.training.run import Run
from prunenet.runtime import parallel
from prunenet.runtime.files import check_home, lock
from prunenet.text.calibration import CalibrationSet


@dataclass(frozen=True, slots=True)
class Training:
    """What training gives.

    Attributes:
        policy: the best seen.
        history: (updates, reward of the deterministic masks) at each evaluation, the first before
            any update.
        widths_history: the same of the second stage; empty without one.
    """

    policy: Policy
    history: list[tuple[int, float]]
    widths_history: list[tuple[int, float]]


def train(
    model: PreTrainedModel | StreamedCheckpoint,
    recipe: Recipe | None = None,
    *,
    where: Recipe | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    blocks: CalibrationSet | None = None,
    reward: Reward | None = None,
    regime: Literal["weights", "self", "data"] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Training:
    """Trains a policy.

    Of several processes (`prunenet.runtime.parallel`) the first plays, learns and writes, and all
    of them judge masks and describe layers for it (`prunenet.envs.split`): the same policy, bit for
    bit, with the same number of threads each.

    Args:
        model: stays on its device; read, never changed. One that is streamed is trained on from its
            weights alone: with the spectral reward, whose every step reads a layer from disk.
        recipe: of the channels' scores; default `PRESETS["default"]`.
        where: of the stage that learns the layers' widths, such as `PRESETS["widths"]`, with the
            scores as they are by then. None leaves widths uniform.
        out: folder for the policy; `out/training` holds the run's state and its TensorBoard log.
            None keeps all in memory.
        resume: go on with the run in `out`.
        blocks: token blocks on which the reconstruction reward measures activations; see
            `prunenet.text.calibration`. With `recipe.features` "moments" the scorer reads
            statistics of the first half of them, and every reward is measured on the second: what
            is true of one text alone does not pay.
        reward: replaces the recipe's reward.
        regime: what a reward of your own looks at; needed with `reward` unless `blocks` say it.
        progress: called with (updates done, updates in all, best reward so far).

    Raises:
        PolicyError: nothing to resume, the run in `out` had other settings, or `out` is in use and
            `resume` is not set.
        CheckpointError: another process is training in `out`, or it cannot be written.
        ValueError: the recipe's reward or its features need blocks, and none (or too few) are
            given; or a reward of your own comes without its regime.
        UnsupportedArchitecture: see `prunenet.models.architectures`.
    """
    recipe = recipe or Recipe()
    read = recipe.features == "moments"
    if (
        not read
        and reward is None
        and {recipe.reward, "spectral" if where is None else where.reward} == {"spectral"}
    ):
        blocks = None  # it reads weights alone, and the record must say so
    _check_asked(model, recipe if reward is None else None, where, blocks, regime)
    measured, paid = _halves(blocks) if read else (None, blocks)
    config = PolicyConfig(
        moments=MOMENT_STATISTICS if read else (),
        hidden=recipe.hidden,
        prior=dict(recipe.prior or (MOMENT_PRIOR if read else {})),
        regime=_regime(regime, where, blocks, read),
        text=None if blocks is None else dict(blocks.source),
        trained_on={
            "model": _name(model),
            "model_type": structure(model).config.model_type,
            "weights": weights_sha256(model),
        },
        recipe=recorded(recipe, where)
        | {"reward": recipe.reward if reward is None else type(reward).__name__},
    )
    folder = None if out is None else check_run(Path(out), resume)
    view = View.of(model, measured)
    identity = {"recipe": config.recipe, "trained_on": config.trained_on, "text": config.text}
    histories: dict[str, list[tuple[int, float]]] = {}
    with _writing(folder, resume), _random_state_kept():
        policy = Policy.untrained(config, seed=recipe.seed)
        for name, of, judge in _stages(model, recipe, where, reward, paid):

            def play(judge: Reward, name: str = name, of: Recipe = of) -> list[tuple[int, float]]:
                run = Run(
                    view,
                    policy.scorer,
                    judge,
                    of,
                    folder and _state(folder, name),
                    progress,
                    identity,
                )
                return run.learn(model, resume and unfinished(folder, name))

            histories[name] = led(judge, play) or []
        histories = _told(policy.scorer.cpu(), histories)
        policy = Policy(policy.scorer, replace(config, gain=_gain(where, histories.get("widths"))))
        if folder is not None and parallel.is_first():
            policy.save_pretrained(folder)
    return Training(policy, histories["channels"], histories.get("widths", []))


@contextmanager
def _writing(folder: Path | None, resume: bool) -> Iterator[None]:
    """Locks the folder for the first process, and checks again what is in it by then."""
    if folder is None or not parallel.is_first():
        yield
        return
    with lock(folder):
        check_run(folder, resume)
        yield


def _check_asked(
    model: PreTrainedModel | StreamedCheckpoint,
    recipe: Recipe | None,
    where: Recipe | None,
    blocks: CalibrationSet | None,
    regime: str | None,
) -> None:
    """Raises ValueError where blocks or the regime are missing, or blocks cannot be read; no
    recipe: a reward of one's own.
    """
    if blocks is not None and not isinstance(model, PreTrainedModel):
        raise ValueError(
            "activations need the model in memory, and this one is read layer by layer: leave the"
            " blocks out, or load it"
        )
    if regime is None and recipe is None and blocks is None:
        raise ValueError(
            "say which regime a reward of your own belongs to: regime='weights', 'self' or 'data'"
        )
    for wanted in (recipe, where):
        if wanted is not None and wanted.reward != "spectral" and blocks is None:
            raise ValueError(
                f"the {wanted.reward} reward is measured on text: give token blocks (see"
                " prunenet.text.calibration)"
            )


def _halves(blocks: CalibrationSet | None) -> tuple[Int[Tensor, "n tokens"], CalibrationSet]:
    """CalibrationSet for the scorer to read moments of, and blocks for the rewards."""
    if blocks is None or len(blocks.ids) < 2:
        given = "none" if blocks is None else str(len(blocks.ids))
        raise ValueError(
            "a policy that reads moments measures them on text, and its rewards on other text:"
            f" give 2 token blocks or more (see prunenet.text.calibration), got {given}"
        )
    half = len(blocks.ids) // 2
    return blocks.ids[:half], blocks.rows(slice(half, None))


def _regime(
    regime: str | None, where: Recipe | None, blocks: CalibrationSet | None, read: bool
) -> str:
    """The most that any stage, or the scorer, looks at."""
    if blocks is None:
        return regime or "weights"
    if regime is None or read or (where is not None and where.reward != "spectral"):
        return most([regime or "weights", blocks.regime])
    return regime


def _stages(
    model: PreTrainedModel | StreamedCheckpoint,
    recipe: Recipe,
    where: Recipe | None,
    reward: Reward | None,
    blocks: CalibrationSet | None,
) -> Iterator[tuple[str, Recipe, Reward]]:
    """Name, recipe and reward of each stage; a later one's reward is measured once the earlier ones
    are done.
    """
    yield "channels", recipe, reward or _reward(model, recipe, blocks)
    if where is not None:
        yield "widths", where, _reward(model, where, blocks)


def _told(
    scorer: nn.Module, histories: dict[str, list[tuple[int, float]]]
) -> dict[str, list[tuple[int, float]]]:
    """The first process's histories; the scorer becomes that process's too."""
    weights = scorer.state_dict()
    scorer.load_state_dict(
        {name: parallel.broadcast(0, partial(weights.__getitem__, name)) for name in weights}
    )
    told = parallel.broadcast_object(0, lambda: histories)
    return {
        name: [(updates, reward) for updates, reward in history] for name, history in told.items()
    }


def _gain(where: Recipe | None, history: list[tuple[int, float]] | None) -> float | None:
    """By which share exp(KL) fell from the start, which is uniform widths, to the best seen."""
    if where is None or history is None:
        return None
    uniform, best = history[0][1], max(reward for _, reward in history)
    return 1 - uniform / best if where.reward == "divergence" and best > 0 else None


def recorded(recipe: Recipe, where: Recipe | None) -> dict[str, Any]:
    """What a saved policy's configuration says of its training."""
    return as_json(recipe) | {"where": None if where is None else as_json(where)}


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """stable-baselines3 seeds the global generators; the caller's are put back."""
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
        chosen = {
            name: getattr(recipe, name) for name in ("distance", "matrices", "form", "spectrum")
        }
        return SpectralReward(model, **chosen)
    assert blocks is not None, "checked before"
    assert isinstance(model, PreTrainedModel), "checked before"
    if recipe.reward == "divergence":
        ids, unscored = blocks.ids[: recipe.blocks, : recipe.tokens], int(blocks.bos is not None)
        return DivergenceReward(model, ids, unscored=unscored)
    return ReconstructionReward(model, blocks.ids)


def _name(model: PreTrainedModel | StreamedCheckpoint) -> str:
    """The hub id, or the last part of a local path: where a folder lies is nobody else's
    business.
    """
    config, fallback = structure(model).config, type(structure(model)).__name__
    source = config._name_or_path or fallback
    folder = local_folder(source)
    return source if folder is None else folder.resolve().name


def unfinished(folder: Path | None, stage: str = "channels") -> bool:
    """Whether the folder holds a run that can be resumed, or has come to a later stage."""
    return folder is not None and _state(folder, stage).exists()


def _state(folder: Path, stage: str) -> Path:
    return folder / "training" / stage / "state.safetensors"


def check_run(folder: Path, resume: bool) -> Path:
    """The folder, if a run can start there, or go on where `resume` asks for that. Creates nothing.
    The first process looks.

    Raises:
        PolicyError: the folder holds a policy or a run and `resume` is not set, or nothing to
            resume.
        CheckpointError: the folder cannot be made or written in.
    """
    if not parallel.is_first():  # whose disk it may not be
        return folder
    if resume and not unfinished(folder):
        raise PolicyError(f"nothing to resume in {folder}; start the run without --resume")
    if not resume and ((folder / "config.json").exists() or unfinished(folder)):
        raise PolicyError(
            f"{folder} holds a policy or an unfinished run; say --resume, or give another folder"
        )
    check_home(folder)
    return folder
