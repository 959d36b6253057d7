"""The demo: from nothing to a real language model, pruned to several sizes and compared with the dense one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from prunenet import tables
from prunenet.calibration import self_blocks, weights_sha256
from prunenet.checkpoint import CheckpointError, identify, load_model, load_provenance, load_tokenizer
from prunenet.demo_model import fetch_demo_model
from prunenet.folders import write_atomic
from prunenet.latency import generate_sentence
from prunenet.masks import check_ratio
from prunenet.measure import measure
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy, PolicyError
from prunenet.policies.recipe import PRESETS, Recipe, as_json
from prunenet.policies.train import train, unfinished
from prunenet.report import draw_report
from prunenet.text import TestText, load_text

PROMPT = "The Nile is the longest river in"


def run_demo(
    out: Path, ratios: Sequence[float], console: Console, *, windows: int = 6, recipe: Recipe | None = None
) -> list[dict[str, Any]]:
    """Fetches SmolLM2-135M, trains a policy, prunes at each ratio, compares. What is in `out` already is used again.

    Args:
        out: folder for the policy, the checkpoints, `results.json` and `report.png`.
        ratios: shares of FFN channels to remove, in [0, 1).
        console: for progress.
        windows: windows of 512 tokens of the built-in test text to score.
        recipe: of the training; default `PRESETS["default"]`.

    Returns:
        One row per model, the dense one first; see `prunenet.measure.measure`.

    Raises:
        ValueError: a ratio out of range. Errors of fetching, training and saving pass through.
    """
    for ratio in ratios:
        check_ratio(ratio)
    console.print("1/4 the model: SmolLM2-135M-Instruct")
    source = str(fetch_demo_model(progress=lambda message: console.print(f"    {message}")))
    dense = load_model(source)
    console.print("2/4 the policy: learns from the weights which FFN channels to keep")
    policy = _policy(dense, out / "policy", recipe or PRESETS["default"], console)
    console.print(f"3/4 pruning at {', '.join(f'{ratio:g}' for ratio in ratios)}, each saved and verified by reloading")
    folders = [_pruned(dense, policy, ratio, source, out / f"ratio-{ratio:g}") for ratio in ratios]
    del dense
    console.print("4/4 comparing with the dense model")
    text = load_text("builtin", TestText)
    with tables.progress(console, "scoring") as advance:
        rows = measure([source, *map(str, folders)], text, window=512, max_windows=windows, progress=advance)
    rows[0]["name"] = "dense"
    for row in rows:
        row["sentence"] = generate_sentence(load_model(row["folder"]), load_tokenizer(source), PROMPT, new_tokens=16)
        console.print(f"    {row['name']}: {row['sentence']!r}", style="dim", markup=False)
    write_atomic(out / "results.json", (json.dumps({"models": rows}, indent=2) + "\n").encode())
    draw_report(rows, out / "report.png")
    return rows


def _policy(dense: PreTrainedModel, folder: Path, recipe: Recipe, console: Console) -> Policy:
    try:
        policy = Policy.from_pretrained(folder)
    except PolicyError:
        pass
    else:
        same = (policy.config.recipe, policy.config.trained_on.get("weights")) == (as_json(recipe), weights_sha256(dense))
        if not same:
            raise ValueError(f"{folder} holds a policy of another recipe or model; remove it, or give another --out")
        console.print(f"    trained already: {folder}", markup=False)
        return policy
    console.print("    the model writes the text on which masks are judged: no data from outside")
    with tables.progress(console, "writing") as advance:
        blocks = self_blocks(dense, load_tokenizer(dense.config._name_or_path), progress=advance)
    with tables.progress(console, "training", "reward") as advance:
        return train(dense, recipe, out=folder, resume=unfinished(folder), blocks=blocks, progress=advance).policy


def _pruned(dense: PreTrainedModel, policy: Policy, ratio: float, source: str, out: Path) -> Path:
    """The checkpoint at `out` if it is this policy's at this ratio; else made now."""
    try:
        found = load_provenance(out)
    except CheckpointError:
        pruned = prune(dense, policy, ratio=ratio, policy_name="demo")
        return pruned.save_pretrained(out, tokenizer=load_tokenizer(source))
    if (found.policy_sha256, found.ratio, found.revision) != (policy.sha256, ratio, identify(source)[1]):
        raise ValueError(f"{out} holds another pruned model; remove it, or give another --out")
    return out
