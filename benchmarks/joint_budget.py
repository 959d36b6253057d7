"""One budget over channels and heads: what an interaction matrix predicts, what is learned on many.

Steps, each kept in --out and on disk, and not repeated:
  matrix     measures one matrix for each row of self-written text (tokens, seconds, memory)
  learn      trains one allocation policy on all matrices but the last, from the shipped policy's
             channels; controls search the first matrix alone; all are priced on the last one
  correlate  rank correlation of predicted and measured damage over allocations of all kinds
  validate   KL, total variation, flips and perplexity on other text

  python benchmarks/joint_budget.py MODEL --data ../shared/data --rows 4 --out results.jsonl
"""

from __future__ import annotations

import resource
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from _common import Line, append_line, is_measured, opened, parser, read_lines, setting
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.evaluation.divergence import Distances, mask_distances
from prunenet.evaluation.interaction import (
    Ablation,
    Interaction,
    interaction_folder,
    measure_interaction,
)
from prunenet.evaluation.shares import allocated, damages, masks
from prunenet.evaluation.slots import PLACE, Episodes, Game
from prunenet.evaluation.units import Structure
from prunenet.features.from_weights import CONTEXT, layer_context
from prunenet.models.layers import ffn_widths, iter_ffns
from prunenet.models.surgery import masking
from prunenet.policies.artifact import Policy, zoo
from prunenet.policies.methods.widths.joint import search_shares
from prunenet.policies.scorer import SlotAllocator
from prunenet.policies.training.slots import AllocatorRecipe, train_allocator
from prunenet.text.calibration import self_blocks

SEQUENCES, TOKENS, BINS, HELD = 24, 128, 6, 8
STRUCTURES: tuple[Structure, ...] = ("channels", "heads")
RATIOS = (0.2, 0.3, 0.5)
HEADS_START = 1.0  # as `prunenet.policies.refine`


class Bench:
    """The model, its text and its matrices."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = opened(args.model)
        self.policy = Policy.from_pretrained(zoo()["llama"])
        self.scores = self.policy.scores(self.model)
        self.text = self_blocks(self.model, self.tokenizer, sequences=SEQUENCES, tokens=TOKENS)
        self.front = int(self.text.bos is not None)
        self.context = layer_context(self.model)
        self.ffn = sum(ffn.channel_parameters * ffn.d_ff for ffn in iter_ffns(self.model))
        self.parts: list[Interaction] = []

    def matrices(self) -> None:
        for row in range(self.args.rows):
            start, cpu, ablated = time.perf_counter(), time.process_time(), []
            (part,) = measure_interaction(
                self.model,
                self.text.ids[row : row + 1],
                self.scores,
                Ablation(bins=BINS, structures=STRUCTURES, unscored=self.front, batch=1),
                cache=interaction_folder(),
                progress=lambda done, _, ablated=ablated: ablated.append(done),
            )
            self.parts.append(part)
            if not ablated:
                continue  # read from disk: nothing was timed
            place = {"step": "matrix", "row": row}
            self.write(
                place,
                {
                    "tokens": part.tokens,
                    "units": len(part.units),
                    "seconds": time.perf_counter() - start,
                    "cpu_seconds": time.process_time() - cpu,
                    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                    "load": float(Path("/proc/loadavg").read_text().split()[0]),
                },
            )

    def write(self, place: Line, found: Line) -> None:
        if not is_measured(read_lines(self.args.out), place):
            append_line(self.args.out, {**place, **found, **setting()})

    def game(self, rows: slice) -> Game:
        return Game.of(self.parts[rows], self.context, structures=STRUCTURES)

    def share(self, game: Game, ratio: float) -> float:
        """As many parameters as this share of the FFN channels has, of the game's."""
        return ratio * self.ffn / game.total

    def shipped(self, game: Game, heads: float = 100.0) -> Tensor:
        """The shipped policy's log-odds; heads stay whole."""
        offsets = self.policy.offsets(self.model)
        return torch.tensor(
            [offsets[s.layer] if s.structure == "channels" else heads for s in game.slots]
        ).double()


def start(bench: Bench, seed: int) -> SlotAllocator:
    """An allocator whose channels are the shipped policy's."""
    names = [name.removeprefix("is_") for name in PLACE]
    made = SlotAllocator(CONTEXT, names, generator=torch.Generator().manual_seed(seed))
    made.heads["channels"].load_state_dict(bench.policy.scorer.widths.state_dict())
    with torch.no_grad():
        made.levels[names.index("heads")] = HEADS_START
    return made


def allocations(bench: Bench, seeds: int) -> Iterator[tuple[str, float, Tensor]]:
    """(name, ratio of the FFN, shares) of every policy and control."""
    one, many = bench.game(slice(0, 1)), rows(bench)
    tries = [(0, [one]), (bench.args.updates, [one])]
    if len(many) > 1:
        tries.append((bench.args.updates, many))
    for updates, games in tries:
        for seed in range(seeds if updates else 1):
            name = "learned on one" if games[0] is one and updates else f"learned on {len(games)}"
            policy = start(bench, seed)
            if updates:
                recipe = AllocatorRecipe(updates=updates, seed=seed, learning_rate=5e-3)
                policy = train_allocator(games, policy, recipe).allocator
            for ratio in RATIOS:
                share = bench.share(one, ratio)
                shares = allocated(one, policy(one.features).detach(), share)[0]
                yield (name if updates else "start with heads"), ratio, shares
    for ratio in RATIOS:
        share = bench.share(one, ratio)
        yield "shipped", ratio, allocated(one, bench.shipped(one), share)[0]
        for search in ("uniform", "random", "greedy", "dynamic", "evolution"):
            yield f"{search} on one", ratio, search_shares(one, share, search, evaluations=300)


def rows(bench: Bench) -> list[Game]:
    """One game a matrix, all but the last."""
    return [bench.game(slice(n, n + 1)) for n in range(max(len(bench.parts) - 1, 1))]


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
            {"step": "learn", "name": name, "ratio": ratio, "rows": bench.args.rows},
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
        place = {"step": "correlate", "ratio": ratio, "draws": bench.args.draws}
        if is_measured(read_lines(bench.args.out), place):
            continue
        cuts = [masks(game, shares, bench.scores) for shares in every]
        line: Line = {"allocations": len(cuts)}
        predicted = damages(game, every)
        for text, ids in (("fitted", bench.text.ids[:1]), ("other", bench.text.ids[-1:])):
            true = mask_distances(bench.model, cuts, ids, unscored=bench.front)
            for name, values in zip(Distances._fields, true, strict=True):
                line[f"{name}_{text}"] = float(spearmanr(predicted, values).statistic)
            line[f"measured_{text}"] = true.kl.tolist()
        line["predicted"] = predicted.tolist()
        bench.write(place, line)


def validate(bench: Bench, found: dict[tuple[str, float], Tensor]) -> None:
    """Measures policies and controls on text that nothing was fitted to."""
    game, tokens = bench.game(slice(0, 1)), bench.args.tokens
    texts = {"self": bench.text.ids[-HELD:].flatten()[:tokens].view(-1, TOKENS)}
    for name, file in (("wikitext2", "wikitext2/wiki.valid.tokens"), ("ptb", "ptb/ptb.valid.txt")):
        path = bench.args.data / file
        if path.exists():
            text = path.read_text(encoding="utf-8")[: tokens * 20]
            ids = bench.tokenizer(text, return_tensors="pt").input_ids[0]
            texts[name] = ids[:tokens].view(-1, 2 * TOKENS)
    for text, ids in texts.items():
        cuts = {key: masks(game, shares, bench.scores) for key, shares in found.items()}
        whole = [torch.ones_like(mask) for mask in next(iter(cuts.values()))[0]]
        cuts = {("dense", 0.0): (whole, None)} | {
            key: cut for key, cut in cuts.items() if key[1] in bench.args.validate_at
        }
        places = {
            key: {"step": "validate", "name": key[0], "ratio": key[1], "text": text}
            | {"rows": bench.args.rows, "tokens": ids.numel()}
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
    asked.add_argument(
        "--rows", type=int, default=4, help="matrices; of 2 or more the last is held back"
    )
    asked.add_argument("--updates", type=int, default=150)
    asked.add_argument("--draws", type=int, default=20, help="random allocations a ratio")
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--tokens", type=int, default=2048, help="of each text that validates")
    asked.add_argument("--validate-at", type=float, nargs="+", default=RATIOS)
    asked.add_argument("--only", nargs="+", help="names of allocations to validate; default all")
    args = asked.parse_args()
    bench = Bench(args)
    assert len(set(ffn_widths(bench.model))) == 1
    bench.matrices()
    speed(bench)
    found = learn(bench)
    correlate(bench, found)
    wanted = {key: s for key, s in found.items() if not args.only or key[0] in args.only}
    validate(bench, wanted)


if __name__ == "__main__":
    main()
