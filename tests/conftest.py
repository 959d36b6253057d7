"""What every test shares: one thread, fixed seeds, no hub, and the paths of real data and of the
real model.
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Set before torch is imported, and inherited by the subprocesses of tests: the number of threads
# changes the order of floating-point sums, so bit-equality between two processes needs the same
# number in both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jaxtyping
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

_SHAPE = re.compile(r"\b(Bool|Float|Int)\d*\[")
_jaxtyped = jaxtyping.jaxtyped


def _shapes_only(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Checks calls of what has a shape in its annotations, and leaves the rest to mypy.

    The import hook decorates every function, and its wrapper binds the arguments of every call: a
    quarter of the tests' time went into functions that have no shape to check.
    """

    def decorate(thing: Any) -> Any:
        annotations = " ".join(map(str, getattr(thing, "__annotations__", {}).values()))
        checked = _SHAPE.search(annotations) is not None
        return _jaxtyped(typechecker=typechecker)(thing) if checked else thing

    return decorate


jaxtyping.jaxtyped = _shapes_only  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tiny models take their random weights from the global generators; the package itself never
    does.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As for a caller without a type checker: our own sentence answers a value that its annotation
    forbids.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The project's shared text data (WikiText-2, PTB, tasks); the test is skipped where it is
    not.
    """
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no shared data in {path}")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct: $PRUNENET_DEMO_MODEL, or the one that `make demo` left
    in the cache.
    """
    if chosen := os.environ.get("PRUNENET_DEMO_MODEL"):
        return Path(chosen)
    from prunenet.runtime.files import cache_folder

    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    pytest.skip(
        "no real model; run `make demo` once, or set PRUNENET_DEMO_MODEL to a folder that holds SmolLM2-135M-Instruct"
    )
