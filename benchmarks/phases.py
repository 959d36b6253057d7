"""Time and peak memory of each phase of `prunenet prune MODEL --ratio 0.3`, the calibration-free
default.

    python benchmarks/phases.py MODEL --out benchmarks/results/phases.jsonl [--device cuda]

The text is written anew, whatever the cache holds. Peak memory is the most that the process held in
the phase, what was there before it included: resident memory on a CPU (reset through
/proc/self/clear_refs, so Linux only), allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from prunenet import __version__
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.policies.apply import prune
from prunenet.policies.artifact import policy_for
from prunenet.text.calibration import self_blocks


class Clock:
    """Seconds, seconds of all threads together, and peak megabytes of each phase."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.phases: dict[str, dict[str, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._reset()
        start, used = time.perf_counter(), time.process_time()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        passed = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
        self.phases[name] = passed | {"peak_megabytes": self._peak()}
        print(name, {key: round(value, 1) for key, value in self.phases[name].items()}, flush=True)

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    clock = Clock(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        with clock.phase("load"):
            model, tokenizer = (
                load_model(arguments.model, device=arguments.device),
                load_tokenizer(arguments.model),
            )
        with clock.phase("write text (once for a model; cached)"):
            blocks = self_blocks(model, tokenizer, cache=Path(scratch))
        policy, name = policy_for(None, model.config.model_type)
        assert policy is not None, f"no policy ships for {model.config.model_type}"
        with clock.phase("score channels from weights"):
            scores = policy.scores(model)
        with clock.phase("measure, refit, choose widths"):
            pruned = prune(
                model, policy, ratio=arguments.ratio, blocks=blocks, scores=scores, policy_name=name
            )
        with clock.phase("save, reload and compare"):
            pruned.save_pretrained(Path(scratch) / "smaller", tokenizer=tokenizer)
    line: dict[str, Any] = {
        "model": Path(arguments.model).name,
        "ratio": arguments.ratio,
        "tokens": blocks.ids.numel(),
    }
    line |= {
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "phases": clock.phases,
        "prunenet": __version__,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
