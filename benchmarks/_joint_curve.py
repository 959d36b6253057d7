"""Two steps of `joint_budget.py`: measured KL against evaluations, and the form behind a cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from _common import Line, is_measured, read_lines
from _joint import HEADS_START, RATIOS, Bench
from scipy.stats import spearmanr
from torch import Tensor

from prunenet.evaluation.divergence import Distances
from prunenet.evaluation.shares import allocated, capped, damages, masks
from prunenet.evaluation.slots import Game
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.widths.joint import JointSearch, search_shares
from prunenet.policies.training.slots import AllocatorRecipe, train_allocator

EVALUATIONS = (1, 4, 16, 64, 256)
CURVES: tuple[JointSearch, ...] = ("random", "evolution", "predictor", "smooth")
CAP, GUARDED = 1.5, 2
_NEAR = 0.05  # of a share, either side, that a policy is trained at
SPREADS = (0.3, 0.7)  # of log-odds drawn around the policy's


class Found(NamedTuple):
    """An allocation, and how it was found; evaluations and seed are 0 where nothing is drawn."""

    search: str
    start: str
    evaluations: int
    seed: int
    shares: Tensor


def levels(bench: Bench, game: Game, share: float) -> Iterator[Found]:
    """Allocations that no number of evaluations changes."""
    rows = slice(0, len(bench.first) * bench.args.blocks)
    evidence = Evidence(bench.model, bench.text.rows(rows))
    layers = {"owl": evidence.outliers, "influence": evidence.influence}
    free = [name for name in get_args(JointSearch) if name not in CURVES]
    for name in free:
        shares = search_shares(game, share, name, layers=layers.get(name))
        yield Found(name, "none", 0, 0, shares)
    guarded = min(GUARDED, game.slots[-1].layer // 8)  # a shallow model cannot spare two
    limited = capped(game, share, CAP, guarded=guarded)
    for name in ("greedy", "dynamic"):
        yield Found(f"{name} capped and guarded", "none", 0, 0, search_shares(limited, share, name))
    yield Found("policy", "none", 0, 0, allocated(game, bench.shipped(game), share)[0])


def searched(bench: Bench, game: Game, share: float) -> Iterator[Found]:
    """Allocations of every search at every number of evaluations, from each start."""
    for start in bench.args.starts:
        first = bench.shipped(game, HEADS_START) if start == "policy" else None
        for search in CURVES:
            for evaluations in EVALUATIONS:
                for seed in range(bench.args.curve_seeds):
                    shares = search_shares(
                        game, share, search, evaluations=evaluations, seed=seed, start=first
                    )
                    yield Found(search, start, evaluations, seed, shares)


def learned(
    bench: Bench, games: list[Game], game: Game, share: float, where: Line
) -> Iterator[Found]:
    """Policies trained near this share on one game a matrix, from the shipped one; those whose
    lines are there are not trained again.
    """
    args = bench.args
    limited = capped(game, share, args.cap)
    name = "learned" if args.cap is None else f"learned under a cap of {args.cap}"
    for seed in range(args.seeds if args.updates else 0):
        recipe = AllocatorRecipe(
            updates=args.updates,
            ratio=(max(share - _NEAR, 0.0), share + _NEAR),
            evaluate_at=(share,),
            learning_rate=5e-3,
            cap=args.cap,
            seed=seed,
        )
        evaluations = recipe.updates * recipe.episodes
        place = {"step": "curve", "search": name, "evaluations": evaluations, "seed": seed}
        places = [{**place, **where, **bench.size, "text": text} for text in args.curve_texts]
        lines = read_lines(args.out)
        if all(is_measured(lines, each) for each in places):
            continue
        policy = train_allocator(games, bench.allocator(seed), recipe).allocator
        shares = allocated(limited, policy(game.features).detach(), share)[0]
        yield Found(name, "policy", evaluations, seed, shares)


def curve(bench: Bench) -> None:
    """Measures what every search finds on the fitted matrices, on other text."""
    dense = bench.fitted()
    for ratio in bench.args.curve_at:
        for form in bench.args.forms:
            parts = bench.parts[: len(bench.first)]
            if form == "behind":
                parts = bench.behind(dense, ratio)
            # groups of heads in the same order in all of them
            game = replace(bench.mean(parts), slots=dense.slots)
            share = bench.share(game, ratio)
            where = {"ratio": ratio, "form": form}
            judge(bench, game, where, [*searched(bench, game, share), *levels(bench, game, share)])
            games = [replace(bench.mean([part]), slots=dense.slots) for part in parts]
            judge(bench, game, where, [*learned(bench, games, game, share, where)])


def judge(bench: Bench, game: Game, where: Line, every: list[Found]) -> None:
    """Writes what allocations are predicted to cost, and what they do on other text."""
    if not every:
        return
    cuts = [masks(game, found.shares, bench.scores) for found in every]
    predicted = damages(game, torch.stack([found.shares for found in every])).tolist()
    for text, ids in bench.texts(bench.args.curve_tokens, bench.args.curve_texts).items():
        true = bench.measured(cuts, text, ids)
        for found, price, line in zip(every, predicted, true, strict=True):
            how = {key: value for key, value in found._asdict().items() if key != "shares"}
            place = {"step": "curve", "text": text, **where, **how, **bench.size}
            measured = {name: line[name] for name in (*Distances._fields, "cut", "tokens")}
            bench.write(place, {"predicted": price, **measured})


def figure(lines: list[Line], path: Path) -> None:
    """Draws measured KL against evaluations, mean and range over seeds; levels that take none as
    dotted lines.
    """
    from matplotlib import pyplot

    lines = [line for line in lines if line["step"] == "curve" and line["form"] == "dense"]
    texts = sorted({line["text"] for line in lines})
    sheet, axes = pyplot.subplots(
        1, len(texts), figsize=(5 * len(texts), 4.2), constrained_layout=True, squeeze=False
    )
    for axis, text in zip(axes[0], texts, strict=True):
        here = [line for line in lines if line["text"] == text]
        for search in CURVES:
            found: dict[int, list[float]] = {}
            for line in here:
                if line["search"] == search:
                    found.setdefault(line["evaluations"], []).append(line["kl"])
            counts, each = sorted(found), [found[count] for count in sorted(found)]
            (drawn,) = axis.plot(counts, [sum(kl) / len(kl) for kl in each], label=search)
            edges = [min(kl) for kl in each], [max(kl) for kl in each]
            axis.fill_between(counts, *edges, color=drawn.get_color(), alpha=0.15)
        for number, line in enumerate(one for one in here if not one["evaluations"]):
            axis.axhline(line["kl"], color=f"C{len(CURVES) + number}", ls=":", label=line["search"])
        learned = [line for line in here if line["search"].startswith("learned")]
        for line in learned:
            label = "learned policy" if line is learned[0] else None
            axis.plot(line["evaluations"], line["kl"], "k*", label=label)
        axis.set(xscale="log", xlabel="allocations priced on the matrix", title=f"on {text} text")
    axes[0][0].set_ylabel("measured KL to the dense model, nats a token")
    axes[0][-1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    sheet.savefig(path, dpi=110)


def refreshed(bench: Bench) -> None:
    """Compares the form behind the policy's cut with the dense one: rank correlation of predicted
    damage with three measured distances, and mean relative error of KL.
    """
    dense = bench.fitted()
    for ratio in RATIOS:
        share, draws = bench.share(dense, ratio), bench.args.draws
        place: Line = {"step": "refreshed", "ratio": ratio, "draws": draws, **bench.size}
        behind = replace(bench.mean(bench.behind(dense, ratio)), slots=dense.slots)
        forms = {"dense": dense, "behind": behind}
        generator, rows = torch.Generator().manual_seed(0), []
        for spread in SPREADS:
            drawn = torch.randn(draws, len(dense.slots), generator=generator).double()
            rows.append(allocated(dense, bench.shipped(dense, HEADS_START) + spread * drawn, share))
        every = torch.cat(rows)
        cuts = [masks(dense, row, bench.scores) for row in every]
        predicted = {name: damages(form, every) for name, form in forms.items()}
        fitted = bench.text.ids[: len(bench.first) * bench.args.blocks]
        for text, ids in {
            "fitted": fitted,
            **bench.texts(bench.args.curve_tokens, bench.args.curve_texts),
        }.items():
            lines = bench.measured(cuts, text, ids)
            for number, spread in enumerate(SPREADS):
                these = slice(number * draws, (number + 1) * draws)
                for form, prices in predicted.items():
                    where = {"text": text, "spread": spread, "form": form}
                    bench.write({**place, **where}, compared(prices[these], lines[these]))


def compared(predicted: Tensor, lines: list[Line]) -> Line:
    """How well predicted damages rank and match measured ones."""
    found: Line = {
        name: float(spearmanr(predicted, [line[name] for line in lines]).statistic)
        for name in Distances._fields
    }
    true = torch.tensor([line["kl"] for line in lines])
    found["relative_error"] = float(((predicted - true).abs() / true).mean())
    return found | {"mean_kl": float(true.mean()), "mean_predicted": float(predicted.mean())}
