"""What the steps of `joint_budget.py` share: the model, its text, its matrices, and what cuts are
worth on text that nothing was fitted to.
"""

from __future__ import annotations

import hashlib
import resource
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from _common import Line, append_line, is_measured, opened, read_lines, setting
from torch import Tensor

from prunenet.evaluation.divergence import Distances, mask_distances
from prunenet.evaluation.interaction import (
    Ablation,
    Interaction,
    interaction_folder,
    measure_interaction,
)
from prunenet.evaluation.shares import allocated, masks
from prunenet.evaluation.slots import PLACE, Game
from prunenet.evaluation.units import Cut, Structure
from prunenet.features.from_weights import CONTEXT, layer_context
from prunenet.models.layers import iter_ffns
from prunenet.policies.artifact import Policy, zoo
from prunenet.policies.scorer import SlotAllocator
from prunenet.text.calibration import self_blocks

SEQUENCES, BINS, HELD = 24, 6, 8
STRUCTURES: tuple[Structure, ...] = ("channels", "heads")
RATIOS = (0.2, 0.3, 0.5)
TEXTS = ("self", "wikitext2", "ptb")
HEADS_START = 1.0  # as `prunenet.policies.refine`
_TOGETHER = 8  # cuts between two writes, for which the dense model runs once


class Bench:
    """The model, its text and its matrices."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = opened(args.model)
        self.policy = Policy.from_pretrained(zoo()["llama"])
        self.scores = self.policy.scores(self.model)
        self.text = self_blocks(
            self.model, self.tokenizer, sequences=SEQUENCES, tokens=args.text_tokens
        )
        left = len(self.text.ids) - HELD - args.rows * args.blocks
        assert left >= 0, f"--rows times --blocks is {-left} blocks more than there are"
        self.front = int(self.text.bos is not None)
        self.context = layer_context(self.model)
        self.ffn = sum(ffn.channel_parameters * ffn.d_ff for ffn in iter_ffns(self.model))
        self.size = {"rows": args.rows, "blocks": args.blocks, "text_tokens": args.text_tokens}
        self.parts: list[Interaction] = []

    def matrices(self) -> None:
        """Measures the matrices around the dense model, one for each row of blocks."""
        self.parts = [self.matrix(row) for row in range(self.args.rows)]

    def matrix(self, row: int, behind: Cut | None = None, ratio: float = 0.0) -> Interaction:
        """One matrix: around the dense model, or behind a cut of a ratio."""
        start, cpu, ablated = time.perf_counter(), time.process_time(), []
        blocks = self.args.blocks
        (part,) = measure_interaction(
            self.model,
            self.text.ids[row * blocks : (row + 1) * blocks],
            self.scores,
            Ablation(
                bins=BINS,
                structures=STRUCTURES,
                unscored=self.front,
                batch=blocks,
                behind=behind,
            ),
            cache=interaction_folder(),
            progress=lambda done, _: ablated.append(done),
        )
        if ablated:  # else it was read from disk, and nothing was timed
            self.write(
                {"step": "matrix", "row": row, "behind": ratio, **self.size},
                {
                    "tokens": part.tokens,
                    "units": len(part.units),
                    "seconds": time.perf_counter() - start,
                    "cpu_seconds": time.process_time() - cpu,
                    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                    "load": float(Path("/proc/loadavg").read_text().split()[0]),
                },
            )
        return part

    def write(self, place: Line, found: Line) -> None:
        """Adds a line, unless there is one of this place."""
        if not is_measured(read_lines(self.args.out), place):
            append_line(self.args.out, {**place, **found, **setting()})

    def game(self, rows: slice) -> Game:
        """The game of some matrices, one domain each."""
        return Game.of(self.parts[rows], self.context, structures=STRUCTURES)

    @property
    def first(self) -> range:
        """Rows whose matrices may be fitted: all but the last, or the only one."""
        return range(max(self.args.rows - 1, 1))

    def fitted(self) -> Game:
        """The game that searches fit: the mean of the first matrices."""
        return self.mean([self.parts[row] for row in self.first])

    def mean(self, parts: Sequence[Interaction]) -> Game:
        """One game of one domain."""
        return Game.of([Interaction.mean(parts)], self.context, structures=STRUCTURES)

    def behind(self, game: Game, ratio: float) -> list[Interaction]:
        """The first matrices, measured behind the cut of a ratio from which refining starts."""
        share = self.share(game, ratio)
        first = allocated(game, self.shipped(game, HEADS_START), share)[0]
        cut = masks(game, first, self.scores)
        return [self.matrix(row, cut, ratio) for row in self.first]

    def share(self, game: Game, ratio: float) -> float:
        """As many parameters as this share of the FFN channels has, of the game's."""
        return ratio * self.ffn / game.total

    def shipped(self, game: Game, heads: float = 100.0) -> Tensor:
        """The shipped policy's log-odds; heads stay whole."""
        offsets = self.policy.offsets(self.model)
        return torch.tensor(
            [offsets[s.layer] if s.structure == "channels" else heads for s in game.slots]
        ).double()

    def allocator(self, seed: int) -> SlotAllocator:
        """An allocator whose channels are the shipped policy's."""
        names = [name.removeprefix("is_") for name in PLACE]
        made = SlotAllocator(CONTEXT, names, generator=torch.Generator().manual_seed(seed))
        made.heads["channels"].load_state_dict(self.policy.scorer.widths.state_dict())
        with torch.no_grad():
            made.levels[names.index("heads")] = HEADS_START
        return made

    def texts(self, tokens: int, names: Sequence[str] = TEXTS) -> dict[str, Tensor]:
        """Text that nothing was fitted to: the model's own, and validation splits at hand."""
        width = self.args.text_tokens
        found = {"self": self.text.ids[-HELD:].flatten()[:tokens].view(-1, width)}
        for name, file in (
            ("wikitext2", "wikitext2/wiki.valid.tokens"),
            ("ptb", "ptb/ptb.valid.txt"),
        ):
            path = self.args.data / file
            if path.exists():
                text = path.read_text(encoding="utf-8")[: tokens * 20]
                ids = self.tokenizer(text, return_tensors="pt").input_ids[0]
                found[name] = ids[:tokens].view(-1, min(2 * width, 256, tokens))
        return {name: ids for name, ids in found.items() if name in names}

    def measured(self, cuts: Sequence[Cut], text: str, ids: Tensor) -> list[Line]:
        """The distances of cuts from the dense model, each distinct one once and for all."""
        front = self.front if text in ("self", "fitted") else 0
        where = {"step": "cut", "text": text, "tokens": ids.numel(), "of": digest([ids])}
        keys = [digest([*keep, *(groups or ())]) for keep, groups in cuts]
        known = {
            line["cut"]: line for line in read_lines(self.args.out) if where.items() <= line.items()
        }
        left = [*dict.fromkeys(key for key in keys if key not in known)]
        for first in range(0, len(left), _TOGETHER):
            some = left[first : first + _TOGETHER]
            found = mask_distances(
                self.model, [cuts[keys.index(key)] for key in some], ids, unscored=front
            )
            for number, key in enumerate(some):
                line = {
                    name: float(row[number])
                    for name, row in zip(Distances._fields, found, strict=True)
                }
                known[key] = {**where, "cut": key, **line}
                self.write({**where, "cut": key}, line)
        return [known[key] for key in keys]


def digest(tensors: Sequence[Tensor]) -> str:
    """Names tensors by what they hold."""
    made = hashlib.sha256()
    for tensor in tensors:
        made.update(tensor.cpu().contiguous().numpy().tobytes())
    return made.hexdigest()[:12]
