"""`efficient-pruners` 0.1.0, by PruneNet's authors, beside the policy that we ship: one JSON line
per cut; resumable.

    python benchmarks/peers/efficient_pruners_row.py MODEL --data ../shared/data --out
    benchmarks/results/peers.jsonl

The peer runs in an environment of its own (made in the cache folder from `requirements.txt`), on
the same model at the same ratios, as it comes (`--episodes 2`: no episode changes its policy on a
CPU, which is checked) and trained in float32 with svdvals for its 20 episodes; each `compress()`
draws a new mask, so there are several. Its masks are handed over and cut by our surgery, because
its own checkpoints do not load. Perplexity: WikiText-2 test, first windows of 1024, and the
built-in test text, windows of 512.
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
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from prunenet import __version__
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.evaluation.perplexity import perplexity
from prunenet.models.layers import count_parameters, ffn_widths
from prunenet.models.surgery import narrowed
from prunenet.policies.apply import prune
from prunenet.policies.artifact import policy_for
from prunenet.runtime.files import cache_folder
from prunenet.text.corpora import TestText, load_text

HERE = Path(__file__).parent
PEER = "efficient-pruners 0.1.0"
WAYS: dict[str, list[str]] = {
    f"{PEER}, as it comes": ["--episodes", "2"],
    f"{PEER}, 20 episodes in float32": ["--episodes", "20", "--float32", "--svdvals"],
}


def environment() -> Path:
    """The peer's python, its environment made the first time."""
    folder = cache_folder() / "peers-venv"
    python = folder / "bin/python"
    if not (folder / ".ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
        wanted = [line for line in lines if line and not line.startswith("#")]
        for part in (wanted[:1], wanted):
            subprocess.run([python, "-m", "pip", "install", "-q", *part], check=True)
        (folder / ".ready").touch()
    return python


def peer_cuts(
    source: Path, way: list[str], ratios: list[float], draws: int
) -> tuple[dict[str, Any], dict[tuple[float, int], dict[str, Tensor]]]:
    """How training went, and for each ratio and draw the rows kept in each layer."""
    with tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        # The package tells an architecture by the path: no 'opt' or 'phi' may be in it.
        named = Path(scratch) / "llama"
        named.symlink_to(source.resolve())
        out = Path(scratch) / "out"
        out.mkdir()
        asked = ["--ratios", *map(str, ratios), "--draws", str(draws), "--out", str(out)]
        subprocess.run(
            [environment(), HERE / "efficient_pruners_cut.py", named, *way, *asked], check=True
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


def lines(
    arguments: argparse.Namespace, model: PreTrainedModel, done: set[str]
) -> Iterator[tuple[dict[str, Any], PreTrainedModel]]:
    """What is known of each cut, and its model."""
    yield {"method": "dense", "ratio": 0.0, "draw": 0}, model
    policy, name = policy_for(None, model.config.model_type)
    for ratio in arguments.ratios:
        start = time.perf_counter()
        pruned = prune(model, policy, ratio=ratio, widths="per-layer", policy_name=name)
        seconds = time.perf_counter() - start
        yield (
            {"method": "prunenet-weights", "ratio": ratio, "draw": 0, "seconds_compress": seconds},
            pruned.model,
        )
    for method, way in WAYS.items():
        if method in done:
            continue
        facts, cuts = peer_cuts(arguments.model, way, arguments.ratios, arguments.draws)
        compress = iter(facts.pop("seconds_compress"))
        for (ratio, draw), rows in cuts.items():
            line = {
                "method": method,
                "ratio": ratio,
                "draw": draw,
                "seconds_compress": next(compress),
            } | facts
            yield line, narrowed(model, masks(model, rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    texts = {
        "wikitext2": (load_text(str(arguments.data / "wikitext2/wiki.test.raw"), TestText), 1024),
        "builtin": (load_text("builtin", TestText), 512),
    }
    written = [json.loads(line) for line in arguments.out.open()] if arguments.out.exists() else []
    places = {(line["method"], line["ratio"], line["draw"]) for line in written}
    wanted = len(arguments.ratios) * arguments.draws
    whole = {method for method in WAYS if sum(place[0] == method for place in places) >= wanted}
    for line, narrow in lines(arguments, model, whole):
        if (line["method"], line["ratio"], line["draw"]) in places:
            continue
        for name, (text, window) in texts.items():
            most = min(arguments.windows, 6) if name == "builtin" else arguments.windows
            scored = perplexity(narrow, tokenizer, text, window=window, max_windows=most)
            line |= {f"perplexity_{name}": scored.value}
        line |= {
            "parameters": count_parameters(narrow)[0],
            "model": arguments.model.name,
            "prunenet": __version__,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print({key: value for key, value in line.items() if key != "episode_rewards"}, flush=True)


if __name__ == "__main__":
    main()
