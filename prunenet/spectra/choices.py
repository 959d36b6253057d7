"""The choices of the spectral reward, for options and commands alike; importing them is quick."""

from __future__ import annotations

from typing import Literal, get_args

Distance = Literal["ks", "wasserstein", "energy"]
"""Distance between singular values: Kolmogorov-Smirnov, 1-Wasserstein relative to the mean, or the
share of squared norm lost. All lie in [0, 1].
"""
DISTANCES: tuple[Distance, ...] = get_args(Distance)
Spectrum = Literal["auto", "exact", "stochastic"]
"""How singular values are found: decomposed, estimated, or by the model's size."""
Matrix = Literal["gate", "up", "down"]
"""A matrix of the FFN."""
Form = Literal["bounded", "inverse"]
"""What a distance pays: 1 - distance, or 1 / distance as PruneNet was published."""
