"""The choices of a training recipe, for options and commands alike; importing them is quick."""

from __future__ import annotations

from typing import Literal

LayerReward = Literal["spectral", "reconstruction"]
"""Reward paid layer by layer: singular values, or the layer's output energy."""
RewardName = Literal[LayerReward, "divergence"]
"""Any reward; "divergence" is that of the whole model's next-token distribution."""
Algorithm = Literal["a2c", "ppo"]
"""Algorithm of stable-baselines3."""
Baseline = Literal["group", "value", "none"]
"""Baseline that returns are compared with."""
GradientName = Literal["reinforce", "pathwise"]
"""Gradient of a policy: from rewards of drawn masks, or of the divergence through relaxed ones."""
Subset = Literal["fixed", "bernoulli", "widths"]
"""Distribution over keep masks: exact width, expected width, or a drawn width."""
Features = Literal["weights", "moments"]
"""What the scorer reads: statistics of the weights, or of activations as well."""
