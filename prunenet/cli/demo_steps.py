"""The steps of `prunenet demo`: from nothing to a real language model, pruned to several sizes and
compared with the dense one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from prunenet.checkpoints.demo_model import fetch_demo_model
from prunenet.checkpoints.identity import identify, weights_sha256
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.save import load_provenance
from prunenet.cli import tables
from prunenet.cli.report import reward_curves
from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.page import Extras, write_page
from prunenet.evaluation.report import draw_report
from prunenet.evaluation.side_by_side import evaluate
from prunenet.evaluation.speed import generate_sentence
from prunenet.policies.apply import decide, pruned_by
from prunenet.policies.artifact import Policy, PolicyError
from prunenet.policies.options import PruneOptions
from prunenet.policies.training.recipe import PRESETS, Recipe
from prunenet.policies.training.train import recorded, train, unfinished
from prunenet.runtime.choices import check_ratio
from prunenet.runtime.files import CheckpointError, check_home, write_atomic
from prunenet.text.calibration import CalibrationSet, self_blocks
from prunenet.text.corpora import TestText, load_text

PROMPT = "The Nile is the longest river in"
SEQUENCES = 64
"""Sequences that the model writes: fewer than for `prunenet prune`, which measures more and takes
longer for it.
"""
HOW = PruneOptions(ratio=0.0, widths="uniform", channels="policy", refit="layerwise")
"""How the demo prunes: its own policy chooses channels, and no allocation is learned."""


def run_demo(
    out: Path,
    ratios: Sequence[float],
    console: Console,
    *,
    windows: int = 6,
    recipe: Recipe | None = None,
) -> list[dict[str, Any]]:
    """Fetches SmolLM2-135M, trains a policy, prunes at each ratio, compares. What is in `out`
    already is used again.

    Nothing from outside is looked at: masks are judged and the down matrices refitted on text that
    the model writes. Widths are uniform; `prunenet train` also learns where to cut.

    Args:
        out: folder for the policy, the checkpoints, `results.json`, `report.png` and
            `report.html`.
        ratios: shares of FFN channels to remove, in [0, 1).
        console: for progress.
        windows: windows of 512 tokens of the built-in test text to score.
        recipe: of the training, which has one stage; default `PRESETS["default"]`.

    Returns:
        One row per model, the dense one first; see `prunenet.evaluation.side_by_side.evaluate`.

    Raises:
        ValueError: a ratio out of range. Errors of fetching, training and saving pass through.
    """
    for ratio in ratios:
        check_ratio(ratio)
    check_home(out)
    console.print("1/4 the model: SmolLM2-135M-Instruct")
    source = str(fetch_demo_model(progress=lambda message: console.print(f"    {message}")))
    dense = load_model(source)
    console.print(
        "2/4 the policy: learns to tell channels to keep by their weights, judged on text that the"
        " model writes"
    )
    policy = _policy(dense, out / "policy", recipe or PRESETS["default"], console)
    sizes = ", ".join(f"{ratio:g}" for ratio in ratios)
    console.print(
        f"3/4 pruning at {sizes}: the policy's channels, refitted on the same text; saved and"
        " verified by reloading"
    )
    folders = _pruned(dense, policy, ratios, out, console)
    del dense
    console.print("4/4 comparing with the dense model")
    text = load_text("builtin", TestText)
    with tables.progress(console, "scoring") as advance:
        options = EvaluationOptions(window=512, max_windows=windows)
        found = evaluate([source, *map(str, folders)], text, options, progress=advance)
    rows = [row.as_dict() for row in found]
    rows[0]["name"] = "dense"
    for row in rows:
        row["sentence"] = generate_sentence(
            load_model(str(row["folder"])), load_tokenizer(source), PROMPT, new_tokens=16
        )
        console.print(f"    {row['name']}: {row['sentence']!r}", style="dim", markup=False)
    write_atomic(out / "results.json", (json.dumps({"models": rows}, indent=2) + "\n").encode())
    draw_report(rows, out / "report.png")
    write_page(rows, out / "report.html", Extras(curves=tuple(reward_curves(out / "policy"))))
    return rows


def _policy(dense: PreTrainedModel, folder: Path, recipe: Recipe, console: Console) -> Policy:
    try:
        policy = Policy.from_pretrained(folder)
    except PolicyError:
        pass
    else:
        asked = (recorded(recipe), weights_sha256(dense))
        if (policy.config.recipe, policy.config.trained_on.get("weights")) != asked:
            raise ValueError(
                f"{folder} holds a policy of another recipe or model; remove it, or give another"
                " --out"
            )
        console.print(f"    trained already: {folder}", markup=False)
        return policy
    blocks = _own_text(dense, console)
    with tables.progress(console, "training", "reward") as advance:
        return train(
            dense, recipe, out=folder, resume=unfinished(folder), blocks=blocks, progress=advance
        ).policy


def _own_text(dense: PreTrainedModel, console: Console) -> CalibrationSet:
    """Written once, then read from the cache."""
    with tables.progress(console, "writing") as advance:
        return self_blocks(
            dense, load_tokenizer(dense.config._name_or_path), sequences=SEQUENCES, progress=advance
        )


def _pruned(
    dense: PreTrainedModel, policy: Policy, ratios: Sequence[float], out: Path, console: Console
) -> list[Path]:
    """The checkpoint of each ratio: what is in `out` already if it is this policy's, else made now,
    all in one measurement.
    """
    source = dense.config._name_or_path
    folders = {ratio: out / f"ratio-{ratio:g}" for ratio in ratios}
    missing = [
        ratio
        for ratio, folder in folders.items()
        if not _made(folder, policy, ratio, identify(source)[1])
    ]
    if missing:
        blocks, tokenizer = _own_text(dense, console), load_tokenizer(source)
        sizes = [replace(HOW, ratio=ratio) for ratio in missing]
        with tables.stages(console) as advance:
            decisions = decide(dense, policy, sizes, blocks=blocks, progress=advance)
        for ratio, decision in zip(missing, decisions, strict=True):
            pruned = pruned_by(dense, decision, policy, "demo")
            pruned.save_pretrained(folders[ratio], tokenizer=tokenizer)
    return list(folders.values())


def _made(folder: Path, policy: Policy, ratio: float, revision: str) -> bool:
    """Whether the folder holds the checkpoint. Raises ValueError where it holds another one."""
    try:
        found = load_provenance(folder)
    except CheckpointError:
        return False
    same = (found.policy_sha256, found.ratio, found.revision) == (policy.sha256, ratio, revision)
    if not same or any(
        found.how.get(name) != getattr(HOW, name) for name in ("widths", "channels", "refit")
    ):
        raise ValueError(f"{folder} holds another pruned model; remove it, or give another --out")
    return True
