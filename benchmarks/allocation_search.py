r"""Searches for the widths of all layers: accuracy predictor and evolution against chance.

    python benchmarks/allocation_search.py MODEL --data ../shared/data --ratios 0.2 0.3 \
        --seeds 0 1 2 --out benchmarks/results/allocation_search.jsonl
    python benchmarks/allocation_search.py --figure benchmarks/results/importance.png \
        --out benchmarks/results/allocation_search.jsonl

KL(dense || pruned) on `--tokens` tokens of the model's own text judges a search, with refitted
layers (`--no-refit`: without); WikiText-2 test scores it. A killed search goes on from the pairs in
<out>.pairs. The figure shows the predictor's importance of each layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from _common import Line, append_line, is_measured, opened, parser, read_lines

from prunenet.evaluation.options import EvaluationOptions
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
) -> Line:
    """What a search finds; each measures 60 architectures, the control of the predictor's authors
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
    model, tokenizer = opened(args.model)
    written = self_blocks(model, tokenizer)
    test = load_text(str(args.data / "wikitext2/wiki.test.raw"), TestText)
    fit, held = held_back(written.ids)
    held = held[: max(1, args.tokens // held.shape[1])]
    scores = wanda_sp.scores(Evidence(model, written))
    refits = Refits(model, fit, scores=scores) if args.refit else None
    judge = WidthDivergence(model, held, None if args.refit else scores, refits=refits)
    step = None if refits is None else refits.step
    pairs = args.out.with_suffix(".pairs")
    for cell in cells(args, held.numel()):
        if is_measured(read_lines(args.out), cell):
            continue
        budget = Budget.of(model, cell["ratio"], floor=step or 1)
        start = time.perf_counter()
        facts = searched(cell["search"], budget, judge, step, cell["seed"], pairs)
        seconds = time.perf_counter() - start
        (cut,) = cut_layers(
            model,
            written.ids,
            [facts["widths"]],
            kinds=written.kinds,
            scores=scores,
            refit=args.refit,
        )
        narrow = cut.model(model)
        options = EvaluationOptions(max_windows=args.max_windows)
        value = perplexity(narrow, tokenizer, test, options).value
        append_line(args.out, cell | facts | {"perplexity": value, "seconds": seconds})
        print(cell, f"KL {facts['loss']:.4f}, perplexity {value:.2f}, {seconds:.0f} s", flush=True)


def cells(args: argparse.Namespace, tokens: int) -> Iterator[Line]:
    """What identifies each measurement; uniform widths have one seed."""
    for ratio in args.ratios:
        for name in SEARCHES:
            for seed in args.seeds[:1] if name == "uniform" else args.seeds:
                yield {
                    "search": name,
                    "ratio": ratio,
                    "seed": seed,
                    "refit": args.refit,
                    "tokens": tokens,
                }


def draw(rows: Sequence[Line], path: Path) -> None:
    """Draws the predictor's importance of each layer, mean over seeds, one panel a ratio."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["search"] == "predictor"]
    if not rows:
        raise SystemExit("no row of the predictor to draw; measure first")
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
    made = parser(__doc__)
    made.add_argument("model", nargs="?")
    made.add_argument("--data", type=Path)
    made.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3])
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument(
        "--tokens",
        type=int,
        default=1024,
        help="judged on, at most the fifth that the refit does not see",
    )
    made.add_argument("--no-refit", dest="refit", action="store_false")
    made.add_argument("--max-windows", type=int, default=None)
    made.add_argument("--figure", type=Path, help="draw what --out holds, measure nothing")
    args = made.parse_args()
    if args.figure is not None:
        draw(read_lines(args.out), args.figure)
    elif args.model is None or args.data is None:
        made.error("give MODEL and --data, or --figure")
    else:
        measure(args)


if __name__ == "__main__":
    main()
