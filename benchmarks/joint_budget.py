"""One budget over channels and heads: what an interaction matrix predicts, what is learned on many.

Steps, each kept in --out and on disk, and not repeated:
  matrix     measures one matrix for each row of self-written text (tokens, seconds, memory)
  learn      trains one allocation policy on all matrices but the last, from the shipped policy's
             channels; controls search the first matrix alone; all are priced on the last one
  correlate  rank correlation of predicted and measured damage over allocations of all kinds
  validate   KL, total variation, flips and perplexity on other text
  curve      measured KL on other text against the evaluations that a search may make on the mean
             matrix (random, evolution, predictor, smooth; 5 seeds), levels that take none, and the
             policy trained on these matrices near the ratio (--updates, --seeds, --cap)
  refreshed  how well the form behind the policy's cut and the dense form rank and match drawn cuts

Cost on SmolLM2-135M, in CPU seconds of one core: a matrix takes half a forward pass for each of 270
units, 112 s for 128 tokens (docs/log.md, 2026-11-28); a measured cut 3.6 s for 512 tokens (3.2 and
an eighth of the dense pass). `curve` measures some 90 distinct cuts a ratio, form, start and text:
6 minutes for 512 tokens. `refreshed` measures 2 * --draws cuts a ratio on each text and on that of
the matrices, and one matrix more a ratio and fitted row.

  python benchmarks/joint_budget.py MODEL --data ../shared/data --rows 4 --out results.jsonl
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from _common import Line, is_measured, parser, read_lines
from _joint import RATIOS, TEXTS, Bench
from _joint_curve import curve, figure, refreshed
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.evaluation.divergence import Distances, mask_distances
from prunenet.evaluation.shares import allocated, capped, damages, masks
from prunenet.evaluation.slots import Episodes, Game
from prunenet.models.layers import ffn_widths
from prunenet.models.surgery import masking
from prunenet.policies.methods.widths.joint import search_shares
from prunenet.policies.training.slots import AllocatorRecipe, train_allocator

STEPS = ("speed", "learn", "correlate", "validate", "curve", "refreshed")


def allocations(bench: Bench, seeds: int) -> Iterator[tuple[str, float, Tensor]]:
    """(name, ratio of the FFN, shares) of every policy and control."""
    one, many = bench.game(slice(0, 1)), rows(bench)
    tries = [(0, [one]), (bench.args.updates, [one])]
    if len(many) > 1:
        tries.append((bench.args.updates, many))
    for updates, games in tries:
        for seed in range(seeds if updates else 1):
            name = "learned on one" if games[0] is one and updates else f"learned on {len(games)}"
            policy = bench.allocator(seed)
            if updates:
                recipe = AllocatorRecipe(
                    updates=updates, seed=seed, learning_rate=5e-3, cap=bench.args.cap
                )
                policy = train_allocator(games, policy, recipe).allocator
            for ratio in RATIOS:
                share = bench.share(one, ratio)
                limited = capped(one, share, bench.args.cap)
                shares = allocated(limited, policy(one.features).detach(), share)[0]
                yield (name if updates else "start with heads"), ratio, shares
    for ratio in RATIOS:
        share = bench.share(one, ratio)
        yield "shipped", ratio, allocated(one, bench.shipped(one), share)[0]
        for search in ("uniform", "random", "greedy", "dynamic", "evolution"):
            yield f"{search} on one", ratio, search_shares(one, share, search, evaluations=300)


def rows(bench: Bench) -> list[Game]:
    """One game a matrix, all but the last."""
    return [bench.game(slice(n, n + 1)) for n in bench.first]


def learn(bench: Bench) -> dict[tuple[str, float], Tensor]:
    """Prices every allocation on the first matrix and, where there are several, on the last, which
    nothing was fitted to.
    """
    one, last = bench.game(slice(0, 1)), bench.game(slice(-1, None))
    last = Game(one.slots, last.matrices, last.features, last.length)  # the same order of heads
    found: dict[tuple[str, float], list[Tensor]] = {}
    for name, ratio, shares in allocations(bench, bench.args.seeds):
        found.setdefault((name, ratio), []).append(shares)
    for (name, ratio), each in found.items():
        stacked = torch.stack(each)
        bench.write(
            {"step": "learn", "name": name, "ratio": ratio, "cap": bench.args.cap, **bench.size},
            {
                "on_first": damages(one, stacked).tolist(),
                "on_last": damages(last, stacked).tolist(),
                "heads_left": [
                    sum(
                        float(s) * 3
                        for s, slot in zip(x, one.slots, strict=True)
                        if slot.structure == "heads"
                    )
                    for x in each
                ],
            },
        )
    return {key: each[0] for key, each in found.items()}


def correlate(bench: Bench, found: dict[tuple[str, float], Tensor]) -> None:
    """Measures allocations on the first matrix's text and on text of no matrix."""
    game = bench.game(slice(0, 1))
    generator = torch.Generator().manual_seed(0)
    for ratio in RATIOS:
        share = bench.share(game, ratio)
        offsets = bench.shipped(game, 1.0) * torch.rand(bench.args.draws, 1, generator=generator)
        offsets = offsets + 0.7 * torch.randn(offsets.shape, generator=generator)
        drawn = allocated(game, offsets, share)
        named = [shares for (_, at), shares in found.items() if at == ratio]
        every = torch.stack([*drawn, *named])
        place = {"step": "correlate", "ratio": ratio, "draws": bench.args.draws, **bench.size}
        if is_measured(read_lines(bench.args.out), place):
            continue
        cuts = [masks(game, shares, bench.scores) for shares in every]
        line: Line = {"allocations": len(cuts)}
        predicted = damages(game, every)
        for text, ids in (
            ("fitted", bench.text.ids[: bench.args.blocks]),
            ("other", bench.text.ids[-1:]),
        ):
            true = mask_distances(bench.model, cuts, ids, unscored=bench.front)
            for name, values in zip(Distances._fields, true, strict=True):
                line[f"{name}_{text}"] = float(spearmanr(predicted, values).statistic)
            line[f"measured_{text}"] = true.kl.tolist()
        line["predicted"] = predicted.tolist()
        bench.write(place, line)


def validate(bench: Bench, found: dict[tuple[str, float], Tensor]) -> None:
    """Measures policies and controls on text that nothing was fitted to."""
    game = bench.game(slice(0, 1))
    for text, ids in bench.texts(bench.args.tokens).items():
        cuts = {key: masks(game, shares, bench.scores) for key, shares in found.items()}
        whole = [torch.ones_like(mask) for mask in next(iter(cuts.values()))[0]]
        cuts = {("dense", 0.0): (whole, None)} | {
            key: cut for key, cut in cuts.items() if key[1] in bench.args.validate_at
        }
        places = {
            key: {"step": "validate", "name": key[0], "ratio": key[1], "text": text}
            | {"tokens": ids.numel(), "cap": bench.args.cap, **bench.size}
            for key in cuts
        }
        lines = read_lines(bench.args.out)
        left = {key: cuts[key] for key in cuts if not is_measured(lines, places[key])}
        for key, found_here in zip(left, compared(bench.model, left.values(), ids), strict=True):
            bench.write(places[key], found_here)


@torch.no_grad()
def compared(
    model: PreTrainedModel, cuts: Iterable[tuple[list[Tensor], list[Tensor] | None]], ids: Tensor
) -> list[Line]:
    """The three distances of masked models, and their perplexity without overlap."""
    dense = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    found = []
    for cut in cuts:
        with masking(model, *cut):
            logs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        loss = -logs[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        found.append(
            {
                "kl": float((dense.exp() * (dense - logs)).sum(-1).mean()),
                "tv": float((dense.exp() - logs.exp()).abs().sum(-1).mean() / 2),
                "flips": float((dense.argmax(-1) != logs.argmax(-1)).float().mean()),
                "perplexity": float(loss.exp()),
            }
        )
    return found


def speed(bench: Bench) -> None:
    """Episodes a second of the batched rules, random actions."""
    game = bench.game(slice(0, 1))
    for count in (256, 2048):
        begun, cpu = time.perf_counter(), time.process_time()
        episodes = Episodes(game, count, 0.3)
        while not episodes.done:
            episodes.play(torch.randint(game.levels, (count,)))
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        line = {"per_second": count / wall, "per_cpu_second": count / cpu}
        bench.write({"step": "speed", "episodes": count}, {"slots": len(game.slots), **line})


def main() -> None:
    """Runs the steps in turn."""
    asked = parser(__doc__)
    asked.add_argument("model", type=str)
    asked.add_argument("--data", type=Path, default=Path("../shared/data"))
    asked.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    asked.add_argument(
        "--rows", type=int, default=4, help="matrices; of 2 or more the last is held back"
    )
    asked.add_argument("--blocks", type=int, default=1, help="of text in a matrix")
    asked.add_argument("--text-tokens", type=int, default=128, help="of a block")
    asked.add_argument("--cap", type=float, help="of a slot of learned policies; default none")
    asked.add_argument("--updates", type=int, default=150)
    asked.add_argument("--draws", type=int, default=20, help="random allocations a ratio")
    asked.add_argument("--seeds", type=int, default=3, help="of policies")
    asked.add_argument("--tokens", type=int, default=2048, help="of each text that validates")
    asked.add_argument("--validate-at", type=float, nargs="+", default=RATIOS)
    asked.add_argument("--only", nargs="+", help="names of allocations to validate; default all")
    asked.add_argument("--curve-at", type=float, nargs="+", default=(0.3,))
    asked.add_argument("--curve-seeds", type=int, default=5)
    asked.add_argument("--curve-tokens", type=int, default=512, help="of each text it is judged on")
    asked.add_argument("--curve-texts", nargs="+", choices=TEXTS, default=TEXTS[:2])
    asked.add_argument("--starts", nargs="+", choices=("policy", "equal"), default=("policy",))
    asked.add_argument("--forms", nargs="+", choices=("dense", "behind"), default=("dense",))
    asked.add_argument("--figure", type=Path, help="draw the curves of --out, measure nothing")
    args = asked.parse_args()
    if args.figure is not None:
        return figure(read_lines(args.out), args.figure)
    bench = Bench(args)
    assert len(set(ffn_widths(bench.model))) == 1
    bench.matrices()
    if "speed" in args.steps:
        speed(bench)
    found = learn(bench) if {"learn", "correlate", "validate"} & {*args.steps} else {}
    if "correlate" in args.steps:
        correlate(bench, found)
    if "validate" in args.steps:
        wanted = {key: s for key, s in found.items() if not args.only or key[0] in args.only}
        validate(bench, wanted)
    if "refreshed" in args.steps:
        refreshed(bench)
    if "curve" in args.steps:
        curve(bench)


if __name__ == "__main__":
    main()
