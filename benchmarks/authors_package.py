r"""Measures `efficient-pruners` 0.1.0, by PruneNet's authors, beside the policy that ships.

    python benchmarks/authors_package.py MODEL --data ../shared/data \
        --out benchmarks/results/peers.jsonl

Runs the authors' package in an environment of its own (made in the cache folder from
`peers/requirements.txt`), on the same model at the same ratios. It runs as it comes
(`--episodes 2`: no episode changes its policy on a CPU, which is checked) and trained in float32
with svdvals for its 20 episodes. Each `compress()` draws a new mask, so there are several.
prunenet's surgery cuts by its masks, because its own checkpoints do not load.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import Line, append_line, is_measured, opened, parser, read_lines, scored
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.layers import count_parameters, ffn_widths
from prunenet.models.surgery import narrowed
from prunenet.policies.apply import prune
from prunenet.policies.artifact import policy_for
from prunenet.runtime.files import cache_folder

PEERS = Path(__file__).parent / "peers"
PEER = "efficient-pruners 0.1.0"
WAYS: dict[str, list[str]] = {
    f"{PEER}, as it comes": ["--episodes", "2"],
    f"{PEER}, 20 episodes in float32": ["--episodes", "20", "--float32", "--svdvals"],
}


def environment() -> Path:
    """The python of the package's environment, which is made the first time."""
    folder = cache_folder() / "peers-venv"
    python = folder / "bin/python"
    if not (folder / ".ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        lines = (PEERS / "requirements.txt").read_text(encoding="utf-8").splitlines()
        wanted = [line for line in lines if line and not line.startswith("#")]
        for part in (wanted[:1], wanted):
            subprocess.run([python, "-m", "pip", "install", "-q", *part], check=True)
        (folder / ".ready").touch()
    return python


def peer_cuts(
    source: Path, way: list[str], ratios: list[float], draws: int
) -> tuple[dict[str, Any], dict[tuple[float, int], dict[str, Tensor]]]:
    """Trains and compresses in the package's environment.

    Returns:
        How training went, and for each ratio and draw the rows kept in each layer.
    """
    with tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        # The package tells an architecture by the path: no 'opt' or 'phi' may be in it.
        named = Path(scratch) / "llama"
        named.symlink_to(source.resolve())
        out = Path(scratch) / "out"
        out.mkdir()
        asked = ["--ratios", *map(str, ratios), "--draws", str(draws), "--out", str(out)]
        subprocess.run(
            [environment(), PEERS / "efficient_pruners_cut.py", named, *way, *asked], check=True
        )
        facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
        return facts, {
            (r, draw): load_file(out / f"{r:g}-{draw}.safetensors")
            for r in ratios
            for draw in range(draws)
        }


def masks(model: PreTrainedModel, rows: dict[str, Tensor]) -> list[Tensor]:
    keep = [torch.zeros(width, dtype=torch.bool) for width in ffn_widths(model)]
    for index, mask in enumerate(keep):
        mask[rows[f"layers.{index}"].long()] = True
    return keep


def cuts(
    arguments: argparse.Namespace, model: PreTrainedModel, done: set[str]
) -> Iterator[tuple[Line, PreTrainedModel]]:
    """What is known of each cut, and its model."""
    yield {"method": "dense", "ratio": 0.0, "draw": 0}, model
    policy, name = policy_for(None, model.config.model_type)
    for ratio in arguments.ratios:
        start = time.perf_counter()
        pruned = prune(model, policy, ratio=ratio, widths="per-layer", policy_name=name)
        seconds = time.perf_counter() - start
        place = {"method": "prunenet-weights", "ratio": ratio, "draw": 0}
        yield place | {"seconds_compress": seconds}, pruned.model
    for method, way in WAYS.items():
        if method in done:
            continue
        facts, found = peer_cuts(arguments.model, way, arguments.ratios, arguments.draws)
        compress = iter(facts.pop("seconds_compress"))
        for (ratio, draw), rows in found.items():
            place = {"method": method, "ratio": ratio, "draw": draw}
            narrow = narrowed(model, masks(model, rows))
            yield place | {"seconds_compress": next(compress)} | facts, narrow


def main() -> None:
    made = parser(__doc__)
    made.add_argument("model", type=Path)
    made.add_argument("--data", type=Path, default=Path("../shared/data"))
    made.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3])
    made.add_argument("--draws", type=int, default=3)
    made.add_argument("--windows", type=int, default=8, help="of 1024 tokens of WikiText-2 test")
    arguments = made.parse_args()
    model, tokenizer = opened(arguments.model)
    written = read_lines(arguments.out)
    wanted = len(arguments.ratios) * arguments.draws
    whole = {way for way in WAYS if sum(line["method"] == way for line in written) >= wanted}
    for line, narrow in cuts(arguments, model, whole):
        if is_measured(written, {key: line[key] for key in ("method", "ratio", "draw")}):
            continue
        line |= scored(narrow, tokenizer, arguments.data, windows=arguments.windows)
        line |= {"parameters": count_parameters(narrow)[0], "model": arguments.model.name}
        append_line(arguments.out, line)
        print({key: value for key, value in line.items() if key != "episode_rewards"}, flush=True)


if __name__ == "__main__":
    main()
