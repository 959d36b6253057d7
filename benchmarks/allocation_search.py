"""Where to cut, searched for: accuracy predictor and evolution against uniform and the best of as
many random architectures.

    python benchmarks/allocation_search.py MODEL --data ../shared/data --ratios 0.2 0.3 --seeds 0 1
    2 \
        --out benchmarks/results/allocation_search.jsonl
    python benchmarks/allocation_search.py --figure benchmarks/results/importance.png \
        --out benchmarks/results/allocation_search.jsonl

Searches are judged by KL(dense || pruned) on `--tokens` tokens that the model wrote itself, with
refitted layers (`--no-refit`: without), and scored on WikiText-2 test. One JSON line per (search,
ratio, seed); finished lines are skipped, and a killed search goes on from the pairs in <out>.pairs.
The figure shows the predictor's importance of each layer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunenet import __version__
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.evaluation.perplexity import perplexity
from prunenet.policies.methods import (
    Budget,
    Evidence,
    Searched,
    Space,
    WidthDivergence,
    best_of_random,
    evolution_search,
    predictor_search,
)
from prunenet.policies.methods.papers import wanda_sp
from prunenet.refit.cut import Refits, cut_layers
from prunenet.refit.folds import held_back
from prunenet.text.calibration import self_blocks
from prunenet.text.corpora import TestText, load_text

SEARCHES = ("uniform", "random_18", "random", "evolution", "predictor")


def searched(
    name: str, budget: Budget, judge: WidthDivergence, step: int | None, seed: int, path: Path
) -> dict[str, Any]:
    """The row's facts; all searches measure 60 architectures, the predictor's authors' control
    18.
    """
    space = Space.around(budget, step=step)
    if name == "predictor":
        return predictor_search(budget, judge, space=space, seed=seed, path=path).as_dict()
    searches: dict[str, Callable[[], Searched]] = {
        "uniform": lambda: best_of_random(budget, judge, 1, path=path),
        "random_18": lambda: best_of_random(budget, judge, 18, space=space, seed=seed, path=path),
        "random": lambda: best_of_random(budget, judge, 60, space=space, seed=seed, path=path),
        "evolution": lambda: evolution_search(budget, judge, step=step, seed=seed, path=path),
    }
    best = searches[name]()
    return {"widths": best.widths, "loss": best.loss, "evaluations": len(best.pairs)}


def measure(args: argparse.Namespace) -> None:
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    blocks = self_blocks(model, tokenizer).ids
    test = load_text(str(args.data / "wikitext2/wiki.test.raw"), TestText)
    fit, held = held_back(blocks)
    held = held[: max(1, args.tokens // held.shape[1])]
    scores = wanda_sp.scores(Evidence(model, self_blocks(model, tokenizer)))
    refits = Refits(model, fit, scores=scores) if args.refit else None
    judge = WidthDivergence(model, held, None if args.refit else scores, refits=refits)
    for ratio in args.ratios:
        budget = Budget.of(model, ratio, floor=refits.step if refits is not None else 1)
        for name in SEARCHES:
            for seed in args.seeds[:1] if name == "uniform" else args.seeds:
                cell = {
                    "search": name,
                    "ratio": ratio,
                    "seed": seed,
                    "refit": args.refit,
                    "tokens": held.numel(),
                }
                if any(
                    all(row.get(key) == value for key, value in cell.items())
                    for row in rows_of(args.out)
                ):
                    continue
                start = time.perf_counter()
                step = None if refits is None else refits.step
                facts = searched(name, budget, judge, step, seed, args.out.with_suffix(".pairs"))
                seconds = time.perf_counter() - start
                (cut,) = cut_layers(
                    model, blocks, [facts["widths"]], scores=scores, refit=args.refit
                )
                scored = perplexity(
                    cut.model(model), tokenizer, test, window=1024, max_windows=args.max_windows
                )
                row = (
                    cell
                    | facts
                    | {
                        "perplexity": scored.value,
                        "seconds": seconds,
                        "version": __version__,
                    }
                )
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"{ratio} {name} seed {seed}: KL {row['loss']:.4f}, perplexity"
                    f" {row['perplexity']:.2f}, {seconds:.0f} s"
                )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the predictor's importance of each layer, mean over seeds, one panel a ratio."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["search"] == "predictor"]
    if not rows:
        raise SystemExit("there is no row of the predictor to draw yet; measure first")
    ratios = sorted({row["ratio"] for row in rows})
    figure = Figure(figsize=(9, 2.5 * len(ratios)), layout="constrained")
    for panel, ratio in zip(figure.subplots(len(ratios), squeeze=False)[:, 0], ratios, strict=True):
        some = [row for row in rows if row["ratio"] == ratio]
        mean = [
            sum(values) / len(some)
            for values in zip(*(row["importance"] for row in some), strict=True)
        ]
        correlation = sum(row["rank_correlation"] for row in some) / len(some)
        panel.bar(range(len(mean)), mean, color="#0072B2")
        panel.set(
            xlabel="layer",
            ylabel="importance",
            title=f"ratio {ratio}, rank correlation {correlation:.2f}",
        )
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--tokens",
        type=int,
        default=1024,
        help="judged on, at most the fifth that the refit does not see",
    )
    parser.add_argument("--no-refit", dest="refit", action="store_false")
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.figure is not None:
        draw(rows_of(args.out), args.figure)
    elif args.model is None or args.data is None:
        parser.error("give MODEL and --data, or --figure")
    else:
        measure(args)


if __name__ == "__main__":
    main()
