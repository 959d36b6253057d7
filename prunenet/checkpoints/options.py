"""How a model is loaded: options in Python and in the CLI."""

from __future__ import annotations

from dataclasses import dataclass

AUTO = "auto"
"""The device that stands for all devices of the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Arguments of `prunenet.load_model`.

    Attributes:
        device: a torch device; or "auto": all GPUs, then the CPU, then the disk.
        max_memory: with "auto", how much of the weights each device holds, as in
            "cuda:0=20GiB,cpu=60GiB"; None: what is free.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
    """

    device: str = "cpu"
    max_memory: str | None = None
    dtype: str = "auto"
