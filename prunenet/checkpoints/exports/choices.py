"""What an exported file may hold: options in Python and in the CLI."""

from __future__ import annotations

from typing import Literal

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
"""How GGUF stores matrices; norms and biases stay in float32."""
