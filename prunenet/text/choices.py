"""The choices of this room, for options and commands alike; importing them is quick."""

from __future__ import annotations

from typing import Literal

Bos = Literal["auto", "yes", "no"]
"""Whether windows begin with the BOS token: as the tokenizer does by itself, always, or never; see
`prunenet.text.windows`.
"""
