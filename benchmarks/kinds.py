"""Prunes a trained tiny model of each kind by the commands that users type: `prune` with its
defaults, `train`, `eval` and `compare` with whole experts at equal total and active parameters.
Mixtures also share a budget of parameters between whole experts and channels, in one process.

    python benchmarks/kinds.py --data ../shared/data --out benchmarks/results/kinds.jsonl

Models are trained the first time (`trained_kinds.py`). Perplexity is on the held-out part of
WikiText-2 validation. A killed run goes on; the table stands at the end.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import Line, append_line, is_measured, opened, parser, read_lines
from trained_kinds import KINDS, has_experts, home, texts, trained

from prunenet.evaluation.divergence import model_divergences
from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.perplexity import perplexity
from prunenet.models.anatomy import Anatomy
from prunenet.models.experts import Experts
from prunenet.models.layers import active_parameters, count_parameters
from prunenet.policies.apply import prune
from prunenet.text.calibration import calibration_for
from prunenet.text.corpora import TestText, load_text

_RATIO = "0.3"
_WINDOW = ("--window", "256")
_METHODS = ("prunenet", "random")
# what ratios are shares of -> ratios, and methods that remove or pass by whole experts
_COMPARED = {
    "channels": ("0.3", ("reap", "aimer", "random_experts")),
    "active": ("0.3", ("fewer_per_token",)),
}
_RATIOS_OF = {
    ("wrapper", "channels"): "0.3,0.5,0.7",
    ("hybrid", "active"): "0.19",  # with one expert a token, and its shared one, it is 0.2 smaller
}
_SHARES = (0.2, 0.3, 0.5)
_SHARED: dict[str, dict[str, Any]] = {
    "channels": {},
    "experts": {"widths": "refined", "structures": "experts"},
    "channels,experts": {"widths": "refined", "structures": "channels,experts"},
}
_OTHER = 64  # blocks of 256 tokens of the held-out text on which KL is measured


def main() -> None:
    """Runs what is left, and prints the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="holds wikitext2/")
    arguments.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    arguments.add_argument("--seeds", default="0,1,2", help="of compare")
    given = arguments.parse_args()
    for kind in given.kinds:
        model, held_out = trained(kind, given.data), texts(given.data)[1]
        steps: dict[str, Callable[[], Iterator[Line]]] = {
            "prune": partial(_pruned, model, held_out),
            "train": partial(_trained, model, held_out),
        }
        if has_experts(kind):
            steps["budget"] = partial(_shared, model, held_out)
        for share_of in _COMPARED:
            steps[f"compare {share_of}"] = partial(
                _compared, kind, model, held_out, share_of, given.seeds
            )
        for by, step in steps.items():
            place = {"kind": kind, "type": KINDS[kind][0], "by": by}
            if not is_measured(read_lines(given.out), place):
                for line in list(step()):  # a killed step leaves none
                    append_line(given.out, place | line)
    print("\n".join(_table(read_lines(given.out))))


def _pruned(model: Path, held_out: Path) -> Iterator[Line]:
    """The dense model, and what the defaults leave of it."""
    out = _empty(model.with_name(f"{model.name}-pruned"))
    start = time.perf_counter()
    _prunenet("prune", model, "--out", out, "--ratio", _RATIO)
    seconds = time.perf_counter() - start
    dense, narrow = _scored(held_out, model, out)
    yield {"method": "dense", "ratio": 0.0} | dense
    yield {"method": "prunenet", "ratio": float(_RATIO), "seconds": seconds} | narrow


def _trained(model: Path, held_out: Path) -> Iterator[Line]:
    """What a policy that is trained on the model leaves of it, from weights alone."""
    policy, out = (_empty(model.with_name(f"{model.name}-{name}")) for name in ("policy", "by"))
    start = time.perf_counter()
    _prunenet("train", model, "--out", policy, "--updates", 10, "--masks", 8)
    seconds = time.perf_counter() - start
    weights = ("--policy", policy, "--moments", "none")
    _prunenet("prune", model, "--out", out, "--ratio", _RATIO, *weights)
    (narrow,) = _scored(held_out, out)
    yield {"method": "trained", "ratio": float(_RATIO), "seconds": seconds} | narrow


def _shared(model: Path, held_out: Path) -> Iterator[Line]:
    """Channels alone, experts alone by REAP, and both, at equal shares of all parameters."""
    dense, tokenizer = opened(model)
    blocks = calibration_for(dense, tokenizer, "self", "builtin")
    text, asked = load_text(str(held_out), TestText), EvaluationOptions(window=256)
    ids = torch.tensor(tokenizer.encode(held_out.read_text(encoding="utf-8")))
    other = ids[: _OTHER * 256].view(_OTHER, 256)
    for share in _SHARES:
        for method, options in _SHARED.items():
            start = time.perf_counter()
            made = prune(dense, blocks=blocks, params=share, **options)
            seconds = time.perf_counter() - start
            narrow = partial(nullcontext, made.model)
            yield {
                "method": method,
                "ratio": share,
                "parameters": count_parameters(made.model)[0],
                "active_parameters": active_parameters(Anatomy.of(made.model)),
                "experts": Experts.of(made.model).count,
                "widths": sorted(set(made.provenance.widths)),
                "tried": made.provenance.how.get("tried"),
                "kl": float(model_divergences(dense, [narrow], other)[0]),
                "perplexity": perplexity(made.model, tokenizer, text, asked).value,
                "seconds": seconds,
            }


def _compared(kind: str, model: Path, held_out: Path, share_of: str, seeds: str) -> Iterator[Line]:
    """The lines of a comparison."""
    ratios, of_experts = _COMPARED[share_of]
    ratios = _RATIOS_OF.get((kind, share_of), ratios)
    methods = _METHODS + (of_experts if has_experts(kind) else ())
    out = home() / f"{model.name}-{share_of}.jsonl"
    common = ("--text", held_out, *_WINDOW, "--ratios", ratios, "--share-of", share_of)
    _prunenet("compare", model, *methods, *common, "--seeds", seeds, "--out", out)
    for line in read_lines(out):
        yield {
            "method": line["method"],
            "ratio": line["ratio"],
            "seed": line["seed"],
            "parameters": line["parameters"],
            "active_parameters": line["active_parameters"],
            "perplexity": line["perplexity"][0]["value"],
            "seconds": line["seconds_pruning"],
        }


def _scored(held_out: Path, *models: Path) -> list[Line]:
    """Parameters and perplexity of each checkpoint."""
    shown = _prunenet("eval", *models, "--text", held_out, *_WINDOW, "--no-speed")
    fields = ("parameters", "perplexity", "tokens", "window")
    return [{name: row[name] for name in fields} for row in shown["models"]]


def _prunenet(*arguments: object) -> Any:
    """What a command prints as JSON."""
    command = [sys.executable, "-m", "prunenet", *map(str, arguments), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _table(lines: list[Line]) -> Iterator[str]:
    """Means over seeds, as Markdown."""
    yield "| kind | by | ratio | method | parameters | active | perplexity |"
    yield "|---|---|---|---|---|---|---|"
    cells: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        place = (line["kind"], line["by"], f"{line['ratio']:g}", line["method"])
        cells.setdefault(place, []).append(line)
    for place, found in cells.items():
        active = found[0].get("active_parameters")
        values = [line["perplexity"] for line in found]
        spread = f" ({min(values):.1f} to {max(values):.1f})" if len(set(values)) > 1 else ""
        yield (
            f"| {' | '.join(place)} | {found[0]['parameters']:,} |"
            f" {f'{active:,}' if active else '-'} | {sum(values) / len(values):.1f}{spread} |"
        )


if __name__ == "__main__":
    main()
