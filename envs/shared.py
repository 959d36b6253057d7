"""What all environments do alike: models by name, checks of arguments, masks of information."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prunenet.checkpoints.load import load_model
from prunenet.envs.rewards import Reward
from prunenet.models.layers import Weights
from prunenet.runtime.choices import is_whole

Named = Weights | str | Path | None
"""A model; or its folder or hub id; or None, the tiny one."""
_TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,  # large enough for every part to matter
}


def opened(model: Named) -> Weights:
    """The model to play on: the one given, loaded where it is named; None: a tiny random Llama of 4
    layers with 96 channels.

    Raises:
        CheckpointError, OSError: as `prunenet.load_model`.
        TypeError: something else.
    """
    if isinstance(model, str | Path):
        return load_model(str(model))
    if not isinstance(model, Weights | None):
        raise TypeError(
            f"`model` is a causal LM, its folder or hub id, or None, got {type(model).__name__}"
        )
    return tiny_model() if model is None else model


def tiny_model() -> PreTrainedModel:
    """A random Llama of 4 layers, d_model 64, d_ff 96, 2 groups of 2 heads; always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **_TINY)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        model.train(False)
    return model


def check_reward(reward: Any) -> Reward:
    """Returns the reward. Raises TypeError where it lacks a method of
    `prunenet.envs.rewards.Reward`.
    """
    missing = [name for name in ("layer", "sweep") if not callable(getattr(reward, name, None))]
    if missing:
        raise TypeError(
            f"a reward is an object with the methods layer(index, keep) and sweep(keep), see"
            f" prunenet.envs.rewards.Reward; this {type(reward).__name__} has no {missing[0]}"
        )
    found: Reward = reward
    return found


def check_render_mode(mode: str | None, known: list[str]) -> str | None:
    """Returns the mode. Raises ValueError where the environment does not draw so."""
    if mode is not None and mode not in known:
        raise ValueError(f"`render_mode` must be one of {', '.join(known)}, got {mode!r}")
    return mode


def whole_number(value: Any) -> int:
    """Returns a whole number of any library. Raises ValueError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"this is a whole number, got {value!r}") from None


def counted_envs(count: Any) -> int:
    """Returns a number of environments. Raises ValueError unless it is whole and at least 1."""
    if not (is_whole(count) and count >= 1):
        raise ValueError(f"num_envs must be at least 1, a whole number, got {count!r}")
    return int(count)


def check_reset_options(options: Mapping[str, Any] | None, *known: str) -> Mapping[str, Any]:
    """Returns the options of a reset. Raises ValueError where one is unknown."""
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise ValueError(f"unknown reset option {unknown[0]!r}; options: {', '.join(known)}")
    return options or {}


def with_masks(infos: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Adds to each piece of information `_key`, (count,) booleans: which environments it is of.

    All of them, here; nested information gets its own.
    """
    found: dict[str, Any] = {}
    for key, value in infos.items():
        nested = isinstance(value, Mapping) and key != "final_obs"
        found[key] = with_masks(value, count) if nested else value
        found[f"_{key}"] = np.ones(count, dtype=np.bool_)
    return found
