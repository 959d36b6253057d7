"""One policy for families that have none of their own: widths learned over several models at once,
judged on models that the training did not see.

Which channels go is the shipped llama policy's choice: step `what` says on which models that is
better than chance. Where to cut is learned over the interaction matrices of the model given and of
small ones that are trained from scratch here (`trained_kinds.DENSE`, those with a gate). Matrices
and judgements are of text that each model writes; what is judged on is in no matrix.
`stories15M` is never trained on.

  python benchmarks/universal.py MODEL --data ../shared/data --out results.jsonl --policy OUT

Steps, none of them repeated: `what`, channels at uniform widths by several scores; `where`, for
each model left out widths that were learned on the other ones alone; `judged`, on MODEL and on
stories15M a policy whose widths were learned on the small ones alone, which is written to --policy:
KL on self-written text, perplexity on validation texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from _common import Line, append_line, is_measured, opened, parser, read_lines, setting
from stories import stories_model
from torch import Tensor
from trained_kinds import DENSE, trained
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.evaluation.divergence import mask_distances
from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.perplexity import perplexity
from prunenet.evaluation.shares import allocated, damages, masks
from prunenet.evaluation.slots import Game
from prunenet.models.layers import ffn_widths, iter_ffns
from prunenet.models.masks import top_channels
from prunenet.models.surgery import masking
from prunenet.policies.artifact import Policy, zoo
from prunenet.policies.methods.widths.joint import search_shares
from prunenet.policies.training.matrices import Measured, allocator, train_widths
from prunenet.policies.training.slots import AllocatorRecipe, train_allocator
from prunenet.refit.folds import folds_of
from prunenet.text.calibration import CalibrationSet, self_blocks
from prunenet.text.corpora import TestText, load_text

HELD, SEEDS, WINDOWS = 3, 3, 12
RATIOS, READ_AT = (0.2, 0.3, 0.5), 0.3
GATED = ("llama", "qwen3", "gemma3", "olmo2", "phi3")
SMALL_TEXT = 40  # sequences that a small model writes
RECIPE = AllocatorRecipe(updates=150, learning_rate=1e-2)


@dataclass(frozen=True)
class Opened:
    """A model and text that it writes."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: CalibrationSet

    @classmethod
    def of(cls, name: str, source: Path | str, sequences: int = SMALL_TEXT) -> Opened:
        """Opens a checkpoint; its text is cached."""
        model, tokenizer = opened(source)
        return cls(name, model, tokenizer, self_blocks(model, tokenizer, sequences=sequences))


@dataclass(frozen=True)
class Case:
    """A model, its game, and text that the game has not seen."""

    name: str
    model: PreTrainedModel
    scores: list[Tensor]
    known: Measured
    held: Tensor
    front: int

    @classmethod
    def of(cls, one: Opened, policy: Policy) -> Case:
        """Measures a model's matrix, channels in the order of a policy's scores."""
        held = torch.cat([kind[-HELD:] for kind in folds_of(one.text.ids, one.text.kinds)])
        known, front = Measured.of(one.model, one.text, policy), int(one.text.bos is not None)
        return cls(one.name, one.model, policy.scores(one.model), known, held, front)

    @property
    def game(self) -> Game:
        """Its rules."""
        return self.known.game

    def measured(self, rows: dict[str, Tensor]) -> Line:
        """Predicted damage of allocations, and measured distances on held text."""
        stacked = torch.stack([row.double() for row in rows.values()])
        cuts = [masks(self.game, row, self.scores, round_to=1) for row in stacked]
        true = mask_distances(self.model, cuts, self.held, unscored=self.front)
        predicted = damages(self.game, stacked)
        return {
            name: {"predicted": float(predicted[n]), "kl": float(true.kl[n])}
            | {"tv": float(true.tv[n]), "flips": float(true.flips[n])}
            for n, name in enumerate(rows)
        }


def what(one: Opened, llama: Policy) -> Line:
    """KL at uniform widths of the channels that several scores keep."""
    model, front = one.model, int(one.text.bos is not None)
    held = torch.cat([kind[-HELD:] for kind in folds_of(one.text.ids, one.text.kinds)])
    generator = torch.Generator().manual_seed(0)
    norms = [
        f.up.norm(dim=1) * f.down.norm(dim=0) * (1 if f.gate is None else f.gate.norm(dim=1))
        for f in iter_ffns(model)
    ]
    ways = {"llama": llama.scores(model), "norms": norms} | {
        f"random {n}": [torch.rand(w, generator=generator) for w in ffn_widths(model)]
        for n in range(3)
    }
    found: Line = {}
    for ratio in RATIOS:
        cuts = [
            ([top_channels(s, round(len(s) * (1 - ratio))) for s in scores], None)
            for scores in ways.values()
        ]
        kl = mask_distances(model, cuts, held, unscored=front).kl
        found[f"{ratio:g}"] = dict(zip(ways, kl.tolist(), strict=True))
    return {"kl": found}


def where(case: Case, others: list[Case], llama: Policy, seeds: int) -> Line:
    """Policies of the other models, llama's and controls, on a model left out."""
    known = any(other.name == "given" for other in others)
    shipped = torch.tensor([llama.offsets(case.model)[s.layer] for s in case.game.slots])
    offsets = {"llama": shipped}
    for seed in range(seeds):
        recipe = replace(RECIPE, seed=seed)
        for name, games, begin in (
            ("others", [other.game for other in others], llama if known else None),
            ("own", [case.game], None),
        ):
            learned = train_allocator(games, allocator(begin, seed), recipe).allocator
            offsets[f"{name} {seed}"] = learned(case.game.features).detach()
    found: Line = {}
    for ratio in RATIOS:
        rows = {name: allocated(case.game, row, ratio)[0] for name, row in offsets.items()}
        for search in ("uniform", "greedy", "dynamic"):
            rows[search] = search_shares(case.game, ratio, search)
        for seed in range(seeds):
            for drawn in ("random", "evolution"):
                rows[f"{drawn} {seed}"] = search_shares(case.game, ratio, drawn, seed=seed)
        found[f"{ratio:g}"] = case.measured(rows)
    return {"found": found, "updates": RECIPE.updates}


def judged(one: Opened, ways: dict[str, tuple[Policy, bool]], data: Path) -> Line:
    """KL on the model's own text, and at 0.3 perplexity on two validation texts, of policies from
    weights alone, at their own widths or at uniform ones.
    """
    model, front = one.model, int(one.text.bos is not None)
    held = torch.cat([kind[-HELD:] for kind in folds_of(one.text.ids, one.text.kinds)])
    longest = int(model.config.max_position_embeddings) - front
    options = EvaluationOptions(window=min(512, longest), max_windows=WINDOWS)
    texts = {
        name: load_text(str(data / file), TestText)
        for name, file in {
            "wikitext2": "wikitext2/wiki.valid.tokens",
            "ptb": "ptb/ptb.valid.txt",
        }.items()
    }
    found: Line = {}
    for ratio in RATIOS:
        for name, (policy, own) in ways.items():
            cut = policy.masks(model, ratio, per_layer=own)
            line = {"kl": float(mask_distances(model, [(cut, None)], held, unscored=front).kl[0])}
            with masking(model, cut):
                for text, given in texts.items() if ratio == READ_AT else ():
                    line[text] = perplexity(model, one.tokenizer, given, options).value
            found[f"{ratio:g} {name}"] = line
    return found


def main() -> None:
    """Runs the steps that the results file lacks."""
    asked = parser(__doc__)
    asked.add_argument("model", type=str)
    asked.add_argument("--data", type=Path, default=Path("../shared/data"))
    asked.add_argument("--policy", type=Path, required=True, help="folder that is written")
    asked.add_argument("--seeds", type=int, default=SEEDS)
    asked.add_argument("--left-out", nargs="+", default=("given",), help="models, each in turn")
    args = asked.parse_args()
    llama = Policy.from_pretrained(zoo()["llama"])
    models = {kind: Opened.of(kind, trained(kind, args.data)) for kind in DENSE}
    models["given"] = Opened.of("given", args.model, 160)
    stories = Opened.of("stories", stories_model())

    def step(place: Line, make: Callable[[], Line]) -> None:
        if not is_measured(read_lines(args.out), place):
            append_line(args.out, {**place, **make(), **setting()})

    for one in (*models.values(), stories):
        step({"step": "what", "model": one.name}, partial(what, one, llama))
    cases = {name: Case.of(models[name], llama) for name in (*GATED, "given")}
    for name in args.left_out:
        others = [case for case in cases.values() if case.name != name]
        place = {"left_out": name, "others": [case.name for case in others]}
        step({"step": "where", **place}, partial(where, cases[name], others, llama, args.seeds))
    small = [cases[name].known for name in GATED]
    universal = train_widths(llama, small, RECIPE, anew=True)
    ways = {"uniform": (llama, False), "llama": (llama, True), "universal": (universal, True)}
    for one in (models["given"], stories):
        place = {"step": "judged", "model": one.name, "models": list(GATED)}
        step(place, partial(judged, one, ways, args.data))
    # small models have idle channels, so that their matrices say nothing of what widths gain
    (line,) = [x for x in read_lines(args.out) if place.items() <= x.items()]
    lower = line[f"{READ_AT:g} universal"]["kl"] - line[f"{READ_AT:g} uniform"]["kl"]
    universal.config = replace(universal.config, gain=1 - math.exp(lower))
    universal.save_pretrained(args.policy)


if __name__ == "__main__":
    main()
