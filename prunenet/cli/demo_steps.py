"""The steps of `prunenet demo`: from nothing to a real language model, pruned to several sizes and
compared with the dense one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from prunenet.checkpoints.demo_model import fetch_demo_model
from prunenet.checkpoints.identity import identify, weights_sha256
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.save import load_provenance
from prunenet.cli import tables
from prunenet.cli.report import reward_curves, slider
from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.page import Extras, write_page
from prunenet.evaluation.report import draw_report
from prunenet.evaluation.side_by_side import evaluate
from prunenet.evaluation.speed import generate_sentence
from prunenet.policies.apply import decide, pruned_by
from prunenet.policies.artifact import Policy, PolicyError, policy_for
from prunenet.policies.options import PruneOptions
from prunenet.policies.training.recipe import PRESETS, Recipe
from prunenet.policies.training.reports import Reports
from prunenet.policies.training.train import recorded, train, unfinished
from prunenet.runtime.choices import check_ratio
from prunenet.runtime.files import CheckpointError, check_home, write_atomic
from prunenet.text.calibration import CalibrationSet, self_blocks
from prunenet.text.corpora import TestText, load_text

PROMPT = "The Nile is the longest river in"
SEQUENCES, TOKENS = 16, 128
"""What the model writes for the training, in half a minute."""
SHORT = replace(PRESETS["default"], updates=12, masks=8, evaluate_every=2)
"""A training of about a minute; what ships was trained for longer, and learned widths too."""
HOW = PruneOptions(ratio=0.0, channels="policy", refit="off")
"""How the demo prunes: from the weights alone; a refit on text takes minutes and wins more."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """One policy and the checkpoints that it makes: folder -> ratio."""

    policy: Policy
    name: str
    folders: dict[Path, float]


def run_demo(
    out: Path,
    ratios: Sequence[float],
    console: Console,
    *,
    windows: int = 6,
    recipe: Recipe = SHORT,
) -> list[dict[str, Any]]:
    """Fetches SmolLM2-135M, prunes it by the policy that ships, trains a short one beside it, and
    compares. What is in `out` already is used again.

    Nothing from outside is looked at: in training masks are judged on text that the model writes,
    and pruning reads its weights alone.

    Args:
        out: folder for the policy, the checkpoints, `results.json`, `report.png` and
            `report.html`.
        ratios: shares of FFN channels to remove, in [0, 1); the policy trained here is applied at
            the middle one.
        console: for progress.
        windows: windows of 512 tokens of the built-in test text to score.
        recipe: of the training, which has one stage.

    Returns:
        One row per model: the dense one, those of the policy that ships, that of the one trained
        here; see `prunenet.evaluation.side_by_side.evaluate`.

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
        "2/4 a policy learns, in a minute, to tell channels to keep by their weights, judged on"
        " text that the model writes"
    )
    trained = _policy(dense, out / "policy", recipe, console)
    shipped, name = policy_for(None, dense.config.model_type)
    sizes = ", ".join(f"{ratio:g}" for ratio in ratios)
    console.print(
        f"3/4 pruning at {sizes} by the policy that ships, trained for longer, and once by the new"
        " one; from the weights alone, saved, and verified by reloading"
    )
    middle = sorted(ratios)[len(ratios) // 2]
    plans = [
        _Plan(
            shipped or trained,
            name if shipped else "demo",
            {out / f"ratio-{r:g}": r for r in ratios},
        ),
        _Plan(trained, "demo", {out / f"trained-{middle:g}": middle}),
    ]
    for plan in plans:
        _prune(dense, plan, console)
    del dense
    console.print("4/4 comparing with the dense model")
    rows = _compared([source, *(str(f) for plan in plans for f in plan.folders)], windows, console)
    write_atomic(out / "results.json", (json.dumps({"models": rows}, indent=2) + "\n").encode())
    draw_report(rows[:-1], out / "report.png")
    extras = Extras(
        sizes=tuple(slider(name, rows[0])) if shipped else (),
        curves=tuple(reward_curves(out / "policy")),
        texts=(tuple((row["name"], row["sentence"]) for row in rows),),
    )
    write_page(rows, out / "report.html", extras)
    return rows


def _compared(sources: Sequence[str], windows: int, console: Console) -> list[dict[str, Any]]:
    """The row of each model, and what it writes behind a prompt."""
    text = load_text("builtin", TestText)
    with tables.progress(console, "scoring") as advance:
        options = EvaluationOptions(window=512, max_windows=windows)
        found = evaluate(sources, text, options, progress=advance)
    rows = [row.as_dict() for row in found]
    rows[0]["name"] = "dense"
    for row in rows:
        row["sentence"] = generate_sentence(
            load_model(str(row["folder"])), load_tokenizer(sources[0]), PROMPT, new_tokens=16
        )
        console.print(f"    {row['name']}: {row['sentence']!r}", style="dim", markup=False)
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
            dense,
            recipe,
            out=folder,
            resume=unfinished(folder),
            blocks=blocks,
            reports=Reports(progress=advance),
        ).policy


def _own_text(dense: PreTrainedModel, console: Console) -> CalibrationSet:
    """Written once, then read from the cache."""
    with tables.progress(console, "writing") as advance:
        return self_blocks(
            dense,
            load_tokenizer(dense.config._name_or_path),
            sequences=SEQUENCES,
            tokens=TOKENS,
            progress=advance,
        )


def _prune(dense: PreTrainedModel, plan: _Plan, console: Console) -> None:
    """Makes a plan's checkpoints, all in one measurement; those that are there already stay."""
    source = dense.config._name_or_path
    revision = identify(source)[1]
    missing = {
        folder: ratio
        for folder, ratio in plan.folders.items()
        if not _made(folder, plan.policy, ratio, revision)
    }
    if not missing:
        return
    tokenizer = load_tokenizer(source)
    sizes = [replace(HOW, ratio=ratio) for ratio in missing.values()]
    with tables.stages(console) as advance:
        decisions = decide(dense, plan.policy, sizes, progress=advance)
    for folder, decision in zip(missing, decisions, strict=True):
        pruned = pruned_by(dense, decision, plan.policy, plan.name)
        pruned.save_pretrained(folder, tokenizer=tokenizer)


def _made(folder: Path, policy: Policy, ratio: float, revision: str) -> bool:
    """Whether the folder holds the checkpoint. Raises ValueError where it holds another one."""
    try:
        found = load_provenance(folder)
    except CheckpointError:
        return False
    same = (found.policy_sha256, found.ratio, found.revision) == (policy.sha256, ratio, revision)
    if not same or any(found.how.get(name) != getattr(HOW, name) for name in ("channels", "refit")):
        raise ValueError(f"{folder} holds another pruned model; remove it, or give another --out")
    return True
