"""Choices about structures and budgets, for options and commands alike; importing them is quick."""

from __future__ import annotations

from typing import Literal

Structure = Literal["channels", "heads", "attention", "layers"]
Cuttable = Literal["channels", "heads", "attention", "layers", "experts"]
"""What one budget may take; of experts one number is decided, and no slot of a layer."""
STRUCTURES: tuple[Structure, ...] = ("channels", "heads", "attention", "layers")
Cost = Literal["params", "active", "flops", "kv-bytes", "latency"]
"""What a budget counts; in a dense model all parameters are active."""
