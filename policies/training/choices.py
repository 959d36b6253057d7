"""The choices of a training recipe, for options and commands alike; importing them is quick."""

from __future__ import annotations

from typing import Literal

PresetName = Literal["default", "widths", "spectral", "paper"]
"""Name of a recipe in `prunenet.PRESETS`."""
RewardName = Literal["spectral", "reconstruction", "divergence"]
"""Reward: singular values, each layer's output energy, or the model's next-token distribution."""
Algorithm = Literal["a2c", "ppo"]
"""Algorithm of stable-baselines3."""
Baseline = Literal["group", "value", "none"]
"""Baseline that returns are compared with."""
Subset = Literal["fixed", "bernoulli", "widths"]
"""Distribution over keep masks: exact width, expected width, or a drawn width."""
Features = Literal["weights", "moments"]
"""What the scorer reads: statistics of the weights, or of activations as well."""
