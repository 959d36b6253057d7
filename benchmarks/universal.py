"""One policy for families that have none of their own: trains it, and judges it where it was not
trained.

Trained on several models at once: the one given, and small ones of three families and sizes that
are trained from scratch here (`trained_kinds.DENSE`). The scorer starts as the shipped llama
policy's; in each of `ROUNDS` a copy learns on every model, and the copies are averaged. Where to
cut is then learned over the interaction matrices of all models. Rewards, matrices and judgements
are of text that each model writes; what is judged on is in no matrix. `stories15M` is never trained
on.

  python benchmarks/universal.py MODEL --data ../shared/data --out results.jsonl --policy OUT

Steps, none of them repeated: the rounds, in --policy; `what`, channels at uniform widths by several
scores; `where`, for each model widths that were learned on the other ones alone; `final`, widths
learned on all, written to --policy and judged on stories15M.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from _common import Line, append_line, is_measured, opened, parser, read_lines, setting
from stories import stories_model
from torch import Tensor
from trained_kinds import DENSE, trained
from transformers import PreTrainedModel

from prunenet.evaluation.divergence import mask_distances
from prunenet.evaluation.interaction import Ablation, interaction_folder, measure_interaction
from prunenet.evaluation.shares import allocated, damages, masks
from prunenet.evaluation.slots import PLACE, Game
from prunenet.features.from_weights import CONTEXT, layer_context
from prunenet.models.layers import ffn_widths, iter_ffns
from prunenet.models.masks import top_channels
from prunenet.policies.artifact import Policy, zoo
from prunenet.policies.methods.widths.joint import search_shares
from prunenet.policies.scorer import SlotAllocator
from prunenet.policies.training.recipe import recipe_for
from prunenet.policies.training.slots import AllocatorRecipe, train_allocator
from prunenet.policies.training.train import train, unfinished
from prunenet.refit.folds import folds_of
from prunenet.text.calibration import CalibrationSet, self_blocks

BINS, ROWS, HELD, SEEDS = 6, 2, 3, 3
ROUNDS, UPDATES = 4, 10
RATIOS = (0.2, 0.3, 0.5)
SMALL_TEXT = 40  # sequences that a small model writes
RECIPE = AllocatorRecipe(updates=150, learning_rate=1e-2)


@dataclass(frozen=True)
class Opened:
    """A model and text that it writes."""

    name: str
    model: PreTrainedModel
    text: CalibrationSet

    @classmethod
    def of(cls, name: str, source: Path | str, sequences: int = SMALL_TEXT) -> Opened:
        """Opens a checkpoint; its text is cached."""
        model, tokenizer = opened(source)
        return cls(name, model, self_blocks(model, tokenizer, sequences=sequences))


def scored_by_all(models: list[Opened], begin: Policy, folder: Path) -> Policy:
    """A policy whose scorer is the mean of those trained on each model, round after round."""
    recipe = recipe_for("default", {"updates": UPDATES})
    for turn in range(ROUNDS):
        found = []
        for one in models:
            out = folder / f"{turn}-{one.name}"
            if not (out / "config.json").exists():
                asked = replace(recipe, seed=turn)
                resume = unfinished(out)
                train(one.model, asked, out=out, resume=resume, blocks=one.text, start=begin)
            found.append(Policy.from_pretrained(out))
        states = [policy.scorer.state_dict() for policy in found]
        mean = {key: torch.stack([s[key] for s in states]).mean(0) for key in states[0]}
        begin = Policy.from_pretrained(folder / f"{turn}-{models[-1].name}")
        begin.scorer.load_state_dict(mean)
    return begin


@dataclass(frozen=True)
class Case:
    """A model, its game, and text that the game has not seen."""

    name: str
    model: PreTrainedModel
    scores: list[Tensor]
    game: Game
    held: Tensor
    front: int

    @classmethod
    def of(cls, opened_model: Opened, policy: Policy) -> Case:
        """Measures a model's matrix, channels in the order of a policy's scores."""
        model, text = opened_model.model, opened_model.text
        front, scores = int(text.bos is not None), policy.scores(model)
        kinds = folds_of(text.ids, text.kinds)
        parts = measure_interaction(
            model,
            torch.cat([kind[:ROWS] for kind in kinds]),
            scores,
            Ablation(bins=BINS, structures=("channels",), unscored=front, batch=ROWS),
            cache=interaction_folder(),
        )
        game = Game.of(parts, layer_context(model).cpu(), structures=("channels",))
        held = torch.cat([kind[-HELD:] for kind in kinds])
        return cls(opened_model.name, model, scores, game, held, front)

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


def start(policy: Policy | None, seed: int) -> SlotAllocator:
    """An allocator whose channels are a policy's, or untrained."""
    names = [name.removeprefix("is_") for name in PLACE]
    made = SlotAllocator(CONTEXT, names, generator=torch.Generator().manual_seed(seed))
    if policy is not None:
        made.heads["channels"].load_state_dict(policy.scorer.widths.state_dict())
    return made


def what(case: Case, llama: Policy) -> Line:
    """KL at uniform widths of the channels that several scores keep."""
    generator = torch.Generator().manual_seed(0)
    norms = [
        f.up.norm(dim=1) * f.down.norm(dim=0) * (1 if f.gate is None else f.gate.norm(dim=1))
        for f in iter_ffns(case.model)
    ]
    ways = {"universal": case.scores, "llama": llama.scores(case.model), "norms": norms} | {
        f"random {n}": [torch.rand(w, generator=generator) for w in ffn_widths(case.model)]
        for n in range(3)
    }
    found: Line = {}
    for ratio in RATIOS:
        cuts = [
            ([top_channels(s, round(len(s) * (1 - ratio))) for s in scores], None)
            for scores in ways.values()
        ]
        kl = mask_distances(case.model, cuts, case.held, unscored=case.front).kl
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
            learned = train_allocator(games, start(begin, seed), recipe).allocator
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


def final(cases: list[Case], scored: Policy, llama: Policy, args: Namespace) -> Line:
    """Trains on all models, writes the policy, and judges it on stories15M."""
    games = [case.game for case in cases]
    learned = train_allocator(games, start(llama, 0), RECIPE).allocator
    offsets = [learned(game.features).detach() for game in games]
    gains = []
    for case, row in zip(cases, offsets, strict=True):
        ways = {"even": torch.zeros_like(row), "policy": row}
        rows = {name: allocated(case.game, each, 0.3)[0] for name, each in ways.items()}
        found = case.measured(rows)
        gains.append(1 - math.exp(found["policy"]["kl"] - found["even"]["kl"]))
    policy = scored
    policy.scorer.widths.load_state_dict(learned.heads["channels"].state_dict())
    names = {case.name: case.model.config.model_type for case in cases}
    policy.config = replace(
        policy.config,
        gain=sum(gains) / len(gains),
        trained_on={**llama.config.trained_on, "widths": names},
    )
    policy.save_pretrained(args.policy)
    case = Case.of(Opened.of("stories", stories_model()), policy)
    found = {}
    for ratio in RATIOS:
        ways = {
            "universal": torch.tensor(policy.offsets(case.model)),
            "llama": torch.tensor(llama.offsets(case.model)),
            "uniform": torch.zeros(len(case.game.slots)),
        }
        rows = {name: allocated(case.game, row, ratio)[0] for name, row in ways.items()}
        found[f"{ratio:g}"] = case.measured(rows)
    return {"gains": dict(zip(names, gains, strict=True)), "stories": found, **what(case, llama)}


def main() -> None:
    """Runs the steps that the results file lacks."""
    asked = parser(__doc__)
    asked.add_argument("model", type=str)
    asked.add_argument("--data", type=Path, default=Path("../shared/data"))
    asked.add_argument("--policy", type=Path, required=True, help="folder that is written")
    asked.add_argument("--seeds", type=int, default=SEEDS)
    args = asked.parse_args()
    llama = Policy.from_pretrained(zoo()["llama"])
    models = [Opened.of(kind, trained(kind, args.data)) for kind in DENSE]
    models.append(Opened.of("given", args.model, 160))
    scored = scored_by_all(models, llama, args.policy / "rounds")
    cases = [Case.of(one, scored) for one in models]

    def step(place: Line, make: object) -> None:
        if not is_measured(read_lines(args.out), place):
            assert callable(make)
            append_line(args.out, {**place, **make(), **setting()})

    for case in cases:
        others = [other for other in cases if other is not case]
        step({"step": "what", "model": case.name}, lambda case=case: what(case, llama))
        step(
            {"step": "where", "left_out": case.name},
            lambda case=case, others=others: where(case, others, llama, args.seeds),
        )
    step({"step": "final"}, lambda: final(cases, scored, llama, args))


if __name__ == "__main__":
    main()
