r"""Measures which self-written text stands in best for real text.

    python benchmarks/self_text.py MODEL --data ../shared/data \
        --out benchmarks/results/self_text.jsonl

A setting writes a small text (16 sequences of 127 counted tokens, unless it says otherwise) and
measures its second moments H_self of FFN activations. Its score compares them with the moments H of
real texts: WikiText-2 validation, PTB validation, the built-in calibration text; never a test text.
Each real text has two halves of as many tokens (16 windows of 128, drawn without overlap): A
competes, B judges. First positions do not count (an attention sink there outweighs all else),
unless the setting says so.

Scores, all on H of half B, per layer, at ratio 0.3. K(H): the channels with the largest diag(H)_j
|W_j|^2, W the down matrix.

* regret = lost(K(H_self)) / lost(K(H_A)) - 1, with lost = |W_R h_R|^2 / |W h|^2, the output energy
  that the cut loses without refit. 0: the self-written text chooses as well as real text of the
  same domain and size does.
* refit_regret = the same with the kept columns refitted (`prunenet.refit.ridge`, damping 0.3) to
  H_self, and to H_A.

Both are means over every third layer and the last (0, 3, .., 27, 29 of SmolLM2), then over the
texts. `lost` and `refit_lost` are the shares themselves. Rows "real: X" put half A of text X in the
place of the self-written text, and show what calibration on another domain costs (the text itself,
at 0, is in their mean). `repeats` is the share of 8-grams that the text had already.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _common import append_line, opened, parser, read_lines
from torch import Tensor

from prunenet.envs.rewards import energy_lost
from prunenet.models.layers import down_linears
from prunenet.models.masks import top_channels, width_at
from prunenet.refit.moments import LayerWalk
from prunenet.refit.ridge import lost, ridge
from prunenet.text.corpora import CalibrationText, load_text
from prunenet.text.generate import SamplingOptions, document_start, generate_blocks
from prunenet.text.random_tokens import random_blocks
from prunenet.text.windows import calibration_blocks

RATIO, DAMPING, WINDOW, HALF = 0.3, 0.3, 128, 16  # HALF: windows in half a real text
TEXTS = {
    "wikitext2": "wikitext2/wiki.valid.tokens",
    "ptb": "ptb/ptb.valid.txt",
    "builtin": "builtin",
}

# What each setting changes; "sequences" are those that are left after the filter.
BASE = {
    "sequences": 16,
    "keep": 0.8,
    "hot": 2.5,
    "temperature": 0.9,
    "top_p": 0.95,
    "start": "document",
    "skip": 1,
}
FLAT = {"hot": 1.0, "temperature": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "base: document start, 2.5 -> 0.9, top-p 0.95, keep 0.8, 2k tokens": {},
    "random token ids, nothing written": {"start": "none"},
    "base, other seed (1)": {"seed": 1},
    "temperature 1.0": FLAT,
    "keep 1.0": {"keep": 1.0},
    "top-p 1.0": {"top_p": 1.0},
    "hot 4 -> 1.0": {"hot": 4.0, "temperature": 1.0},
    "temperature 0.7": {"hot": 0.7, "temperature": 0.7},
    "chat template": {"start": "chat"},
    "random token behind the start": {"start": "random"},
    "base, first positions counted": {"skip": 0},
    "temperature 1.0, top-p 1.0, keep 1.0": FLAT | {"top_p": 1.0, "keep": 1.0},
    "repetition penalty 1.1": {"penalty": 1.1},
    "8k tokens": {"sequences": 64},
    "base, other seed (2)": {"seed": 2},
}


class Bench:
    """The model, and half A and half B of the real texts."""

    def __init__(self, source: str, data: Path) -> None:
        self.model, self.tokenizer = opened(source)
        self.start = document_start(self.tokenizer)
        self.downs = [linear.weight.detach() for linear in down_linears(self.model)]
        count = len(self.downs)
        self.layers = sorted({*range(0, count, 3), count - 1})
        self.halves = {name: self._real(data, name) for name in TEXTS}

    def moments(self, ids: Tensor, skip: int) -> list[Tensor]:
        """H of the layers that are looked at."""
        walk = LayerWalk(self.model, ids, skip=skip)
        return [walk.moments(index).second for index in walk if index in self.layers]

    def _real(
        self, data: Path, name: str
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[dict[str, float]]]:
        """(ids of half A, its moments, those of half B, what half A loses on B in each layer)."""
        file = TEXTS[name]
        text = load_text(file if file == "builtin" else str(data / file), CalibrationText)
        generator = torch.Generator().manual_seed(0)
        blocks = calibration_blocks(
            self.tokenizer, text, count=2 * HALF, window=WINDOW, generator=generator
        )
        first, second = blocks.chunk(2)
        own, judge = self.moments(first, 1), self.moments(second, 1)
        return first, own, judge, self.losses(own, [judge])[0]

    def losses(
        self, measured: list[Tensor], judges: list[list[Tensor]]
    ) -> list[list[dict[str, float]]]:
        """For each judge and layer: the energy lost by the channels that the measured moments
        choose, and after their refit.
        """
        rows: list[list[dict[str, float]]] = [[] for _ in judges]
        for place, index in enumerate(self.layers):
            weight, second = self.downs[index], measured[place]
            keep = top_channels(
                second.diagonal() * weight.square().sum(0), width_at(weight.shape[1], RATIO)
            )
            refitted = ridge(weight, second, keep, damping=DAMPING)
            for row, judge in zip(rows, judges, strict=True):
                h = judge[place]
                cut = energy_lost((weight.T @ weight) * h, keep[None])
                row.append({"lost": float(cut), "refit_lost": lost(weight, h, keep, refitted)})
        return rows

    def score(self, measured: list[Tensor]) -> dict[str, Any]:
        """Regrets against each real text, and their means."""
        names = list(self.halves)
        rows = self.losses(measured, [self.halves[name][2] for name in names])
        texts = {}
        for name, row in zip(names, rows, strict=True):
            real, texts[name] = self.halves[name][3], {}
            for key, regret in (("lost", "regret"), ("refit_lost", "refit_regret")):
                texts[name][key] = statistics.mean(layer[key] for layer in row)
                texts[name][regret] = statistics.mean(
                    a[key] / b[key] - 1 for a, b in zip(row, real, strict=True)
                )
        keys = ("regret", "refit_regret", "lost", "refit_lost")
        return {
            **{key: statistics.mean(text[key] for text in texts.values()) for key in keys},
            "texts": texts,
        }

    @cache  # noqa: B019 - one bench per process
    def written(
        self, start: str, sequences: int, keep: float, seed: int, **sampling: float
    ) -> tuple[Tensor, int]:
        """(text, how many tokens at the start of each sequence were not sampled)."""
        generator = torch.Generator().manual_seed(seed)
        if start == "none":
            return random_blocks(self.model, sequences, WINDOW, generator), 1
        count, prefixes = round(sequences / keep), None
        if start == "random":
            prefixes = random_blocks(self.model, count, 1, generator)
        elif start == "chat":
            # The user's turn is the model's too: the template up to where the user's words stand.
            chat = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": "@@"}], tokenize=False
            )
            prefixes = torch.tensor([self.tokenizer(chat.split("@@")[0])["input_ids"]])
        prompt = 1 if prefixes is None else 1 + prefixes.shape[1]
        tokens = WINDOW - 1 + prompt
        options = SamplingOptions(
            sequences=count,
            tokens=tokens,
            keep=keep,
            batch=count,
            seed=seed,
            **sampling,  # type: ignore[arg-type]
        )
        return generate_blocks(self.model, self.start, options, prefixes=prefixes), prompt

    def run(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Writes a text and scores it."""
        options = {"seed": 0, **BASE, **changes}
        skip = options.pop("skip")
        begin = time.process_time()
        ids, prompt = self.written(**options)
        wrote = time.process_time() - begin
        # What the template says is in every sequence, and no text of the model's.
        measured = self.moments(ids, prompt if skip else 0)
        return {
            **self.score(measured),
            "tokens": len(ids) * (ids.shape[1] - (prompt if skip else 0)),
            "repeats": repeats(ids[:, prompt:]),
            "sample": self.tokenizer.decode(ids[0, prompt : prompt + 40]),
            "cpu_seconds": {"writing": wrote, "all": time.process_time() - begin},
            "options": {**options, "skip": skip},
        }


def repeats(ids: Tensor, n: int = 8) -> float:
    grams = [tuple(row[i : i + n]) for row in ids.tolist() for i in range(len(row) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def runs(bench: Bench) -> Iterator[tuple[str, Any]]:
    for name, half in bench.halves.items():
        yield (
            f"real: {name}",
            lambda half=half: {**bench.score(half[1]), "tokens": half[0][:, 1:].numel()},
        )
    for name, changes in SETTINGS.items():
        yield name, lambda changes=changes: bench.run(changes)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("model")
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--only", nargs="*", help="names of settings; default all")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    done = {line["setting"] for line in read_lines(arguments.out)}
    bench = Bench(arguments.model, arguments.data)
    print(f"real texts measured, {time.process_time():.0f} s of CPU", flush=True)
    for name, run in runs(bench):
        if name in done or (arguments.only and name not in arguments.only):
            continue
        line = {"setting": name, **run()}
        append_line(arguments.out, line)
        print(
            name,
            *(round(line[key], 3) for key in ("regret", "refit_regret", "lost", "refit_lost")),
            flush=True,
        )
    for line in sorted(read_lines(arguments.out), key=lambda line: line["refit_regret"]):
        each = ", ".join(
            f"{name} {t['regret']:.2f} / {t['refit_regret']:.2f}"
            for name, t in line["texts"].items()
        )
        print(f"{line['regret']:.3f} / {line['refit_regret']:.3f}  {line['setting']}  ({each})")


if __name__ == "__main__":
    main()
