"""Runs `efficient-pruners` 0.1.0, the package of PruneNet's authors, in its own environment.

Writes, for `authors_package.py`, which rows of each gate matrix each `compress()` kept, and how
training went; imports nothing of prunenet. As installed, its losses are scaled in half precision
and overflow on a CPU. `--float32` takes autocast away, `--svdvals` the singular vectors that it
does not use. Both patch torch for this process; the package's files stay as they came.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import time
from pathlib import Path

import torch
from efficient_pruners import PruneNet, PruningConfig
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        help=(
            "folder; its path must hold 'llama', and neither 'opt' nor 'phi': the package goes"
            " by it"
        ),
    )
    parser.add_argument("--episodes", type=int, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", required=True)
    parser.add_argument("--draws", type=int, required=True)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--svdvals", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.float32:
        torch.autocast = lambda **_: contextlib.nullcontext()
    if arguments.svdvals:
        torch.svd = lambda matrix: (None, torch.linalg.svdvals(matrix), None)
    start, cpu = time.perf_counter(), _cpu_seconds()
    pruner = PruneNet(
        PruningConfig(
            num_episodes=arguments.episodes, device="cpu", save_dir=str(arguments.out / "policies")
        )
    )
    first, setup = {}, {}
    pruner._compute_reference_svds = _then_recording(
        pruner._compute_reference_svds, setup, start, cpu
    )
    with _first_state(first):
        history = pruner.fit(arguments.model, compression_ratio=0.3)
    changed = any(
        not torch.equal(value, first[name])
        for name, value in pruner.policy_model.state_dict().items()
    )
    facts = {
        "episodes": arguments.episodes,
        "float32": arguments.float32,
        "svdvals": arguments.svdvals,
        "policy_changed": changed,
        "episode_rewards": history["episode_rewards"],
        "seconds_training": time.perf_counter() - start,
        "cpu_seconds_training": _cpu_seconds() - cpu,
        **setup,
        "seconds_compress": [],
    }
    dense = [layer.mlp.gate_proj.weight.detach() for layer in pruner.model.model.layers]
    for ratio in arguments.ratios:
        for draw in range(arguments.draws):
            start = time.perf_counter()
            narrow = pruner.compress(compression_ratio=ratio)
            facts["seconds_compress"].append(time.perf_counter() - start)
            rows = {
                f"layers.{index}": _kept(layer.mlp.gate_proj.weight.detach(), dense[index])
                for index, layer in enumerate(narrow.model.layers)
            }
            save_file(rows, arguments.out / f"{ratio:g}-{draw}.safetensors")
    (arguments.out / "facts.json").write_text(json.dumps(facts))


def _then_recording(reference_svds, into: dict[str, float], start: float, cpu: float):
    """Wraps what `fit` calls before its first episode, and records the seconds so far."""

    def recording():
        result = reference_svds()
        into.update(
            {
                "seconds_setup": time.perf_counter() - start,
                "cpu_seconds_setup": _cpu_seconds() - cpu,
            }
        )
        return result

    return recording


@contextlib.contextmanager
def _first_state(into: dict[str, torch.Tensor]):
    """Records the policy's weights before training: `fit` makes the policy and trains it in one
    go.
    """
    import efficient_pruners.core as core

    made = core.create_sparsity_predictor

    def recording(*arguments, **options):
        policy = made(*arguments, **options)
        if not into:
            into.update({name: value.clone() for name, value in policy.state_dict().items()})
        return policy

    core.create_sparsity_predictor = recording
    try:
        yield
    finally:
        core.create_sparsity_predictor = made


def _kept(rows: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Indices of the rows in the dense matrix."""
    places = {row.numpy().tobytes(): index for index, row in enumerate(dense)}
    return torch.tensor([places[row.numpy().tobytes()] for row in rows], dtype=torch.int32)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
