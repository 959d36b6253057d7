"""One allocation policy for models that its training did not see.

Trains small Llamas of several shapes on built-in English bytes, measures their interaction matrices
on several rows of text, trains one allocation policy on all models but one, and judges it on that
one: predicted damage on rows of no control, and measured KL. Controls search the left-out model's
own first matrix.

  python benchmarks/joint_transfer.py --out benchmarks/results/joint_transfer.jsonl
"""

from __future__ import annotations

import time
from argparse import Namespace

import torch
from _common import append_line, is_measured, parser, read_lines, setting
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prunenet.envs.budget import game_of
from prunenet.evaluation.divergence import mask_distances
from prunenet.evaluation.shares import allocated, damages, masks
from prunenet.evaluation.slots import PLACE, Game
from prunenet.features.from_weights import CONTEXT
from prunenet.models.layers import iter_ffns
from prunenet.policies.artifact import Policy, zoo
from prunenet.policies.methods.widths.joint import search_shares
from prunenet.policies.scorer import SlotAllocator
from prunenet.policies.training.slots import AllocatorRecipe, train_allocator
from prunenet.text.corpora import CalibrationText, load_text

SHAPES = {"6x64": (6, 64), "8x48": (8, 48), "5x96": (5, 96)}
"""Layers and d_model; d_ff is 3 times that, heads are 16 wide, two query heads a group."""
ROWS, TOKENS, MATRICES = 8, 64, 3
RATIOS = (0.2, 0.3, 0.5)


def text() -> Tensor:
    """Bytes of the built-in calibration text."""
    content = load_text("builtin", CalibrationText).content.encode("utf-8", "replace")
    return torch.tensor(list(content))


def trained(shape: str, ids: Tensor, steps: int) -> tuple[PreTrainedModel, float]:
    """A small model, and its loss at the end in nats a byte."""
    layers, d_model = SHAPES[shape]
    torch.manual_seed(layers * d_model)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama",
            vocab_size=256,
            hidden_size=d_model,
            intermediate_size=3 * d_model,
            num_hidden_layers=layers,
            num_attention_heads=max(d_model // 16, 2),
            num_key_value_heads=max(d_model // 32, 1),
            head_dim=16,
            max_position_embeddings=TOKENS,
        )
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    loss = torch.zeros(())
    for step in range(steps):
        starts = torch.randint(len(ids) - TOKENS, (16,))
        batch = ids[starts[:, None] + torch.arange(TOKENS)]
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        optimiser.step()
    return model.eval(), loss.item()


def blocks(ids: Tensor, number: int) -> Tensor:
    """Rows of the text for matrix `number`, far from those of others."""
    at = len(ids) * (number + 1) // (MATRICES + 3)
    return ids[at : at + ROWS * TOKENS].view(ROWS, TOKENS)


def scores(model: PreTrainedModel) -> list[Tensor]:
    """The order in which `game_of` bins channels."""
    return [
        f.up.norm(dim=1) * f.down.norm(dim=0) * f.gate.norm(dim=1)
        for f in iter_ffns(model)
        if f.gate is not None
    ]


def judged(
    model: PreTrainedModel, games: list[Game], found: dict[str, Tensor], ids: Tensor
) -> dict[str, dict[str, float]]:
    """Predicted damage on the first and on the last matrix, and measured KL on other text."""
    first, last = games[0], games[-1]
    last = Game(first.slots, last.matrices, last.features, last.length)  # one order of heads
    names = list(found)
    stacked = torch.stack([found[name] for name in names])
    cuts = [masks(first, row, scores(model), round_to=1) for row in stacked]
    true = mask_distances(model, cuts, blocks(ids, MATRICES + 1))
    return {
        name: {
            "on_first": float(damages(first, stacked)[n]),
            "on_last": float(damages(last, stacked)[n]),
            "kl_other": float(true.kl[n]),
            "tv_other": float(true.tv[n]),
        }
        for n, name in enumerate(names)
    }


def main() -> None:
    """Trains the models, then one policy for each model that is left out."""
    asked = parser(__doc__)
    asked.add_argument("--steps", type=int, default=200)
    asked.add_argument("--updates", type=int, default=60)
    asked.add_argument("--seeds", type=int, default=3)
    args: Namespace = asked.parse_args()
    ids, begun = text(), time.process_time()
    models = {shape: trained(shape, ids, args.steps) for shape in SHAPES}
    games = {
        shape: [game_of(model, blocks(ids, n)) for n in range(MATRICES)]
        for shape, (model, _) in models.items()
    }
    print(f"models and matrices: {time.process_time() - begun:.0f} CPU s", flush=True)
    names = [name.removeprefix("is_") for name in PLACE]
    llama = Policy.from_pretrained(zoo()["llama"])
    for left_out, (model, loss) in models.items():
        own = games[left_out][0]
        train = [game for shape, each in games.items() if shape != left_out for game in each]
        for seed in range(args.seeds):
            place = {"left_out": left_out, "seed": seed}
            if is_measured(read_lines(args.out), place):
                continue
            start = SlotAllocator(CONTEXT, names, generator=torch.Generator().manual_seed(seed))
            recipe = AllocatorRecipe(updates=args.updates, learning_rate=2e-2, seed=seed)
            many = train_allocator(train, start, recipe).allocator
            one = train_allocator([own], start, recipe).allocator
            offsets = llama.offsets(model)
            shipped = torch.tensor(
                [offsets[s.layer] if s.structure == "channels" else 1.0 for s in own.slots]
            )
            for ratio in RATIOS:
                found = {
                    "learned on other models": allocated(own, many(own.features), ratio)[0],
                    "learned on its own first": allocated(own, one(own.features), ratio)[0],
                    "llama's policy": allocated(own, shipped, ratio)[0],
                } | {
                    search: search_shares(own, ratio, search, seed=seed)
                    for search in ("uniform", "random", "greedy", "dynamic", "evolution")
                }
                line = {**place, "ratio": ratio, "loss": loss, "updates": args.updates}
                append_line(
                    args.out,
                    {**line, "found": judged(model, games[left_out], found, ids), **setting()},
                )


if __name__ == "__main__":
    main()
