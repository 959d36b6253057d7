"""Choices about structures and budgets, for options and commands alike; importing them is quick."""

from __future__ import annotations

from typing import Literal

Structure = Literal["channels", "heads", "attention", "layers"]
STRUCTURES: tuple[Structure, ...] = ("channels", "heads", "attention", "layers")
Cost = Literal["params", "active", "flops", "kv-bytes", "latency"]
"""What a budget counts; in a dense model all parameters are active."""
