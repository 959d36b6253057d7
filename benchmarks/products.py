r"""Measures what `prunenet.runtime.products` saves on a CPU without bfloat16.

    python benchmarks/products.py MODEL --out benchmarks/results/products.jsonl

Three copies of a model take turns: float32, bfloat16 as torch computes it, and bfloat16 inside
`fast_products`. Each reads two blocks of 256 tokens, and writes 80 sequences of 16 tokens, as many
at once as `prune` does. A line is a part; times are medians of five turns, in seconds, and ratios
those of the same turn.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from statistics import median

import torch
from _common import append_line, is_measured, opened, parser, read_lines, setting
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.recover.estimate import timed
from prunenet.runtime.products import fast_products, lacks
from prunenet.text.generate import SamplingOptions, document_start, generate_blocks

TURNS = 5
WRITTEN = SamplingOptions(sequences=80, tokens=16, keep=1.0, batch=80)


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, start: int) -> None:
    """Reads token blocks."""
    model(input_ids=ids, use_cache=False)


def write(model: PreTrainedModel, ids: Tensor, start: int) -> None:
    """Samples sequences."""
    generate_blocks(model, start, WRITTEN)


def main() -> None:
    """Measures both parts."""
    asked = parser(__doc__)
    asked.add_argument("model")
    args = asked.parse_args()
    if not lacks(torch.bfloat16):
        raise SystemExit("this CPU has arithmetic of bfloat16, so there is nothing to measure")
    (wide, tokenizer), (low, _) = (opened(args.model, dtype=d) for d in ("float32", "bfloat16"))
    start = document_start(tokenizer)
    ids = torch.randint(3, 1000, (2, 256), generator=torch.Generator().manual_seed(0))
    for part in (read, write):
        if is_measured(read_lines(args.out), {"part": part.__name__}):
            continue
        turns: dict[str, list[float]] = {"float32": [], "stock": [], "fast": []}
        for _ in range(TURNS):
            for name, model in (("float32", wide), ("stock", low), ("fast", low)):
                fast = fast_products(model, unchanged=part is write)
                with fast if name == "fast" else nullcontext():
                    call = partial(part, model, ids, start)
                    turns[name].append(timed(call, torch.device("cpu")))
        saved = [a / b for a, b in zip(turns["stock"], turns["fast"], strict=True)]
        line = {f"seconds_{name}": median(times) for name, times in turns.items()}
        line |= {"ratio": median(saved), "ratio_low": min(saved), "ratio_high": max(saved)}
        append_line(args.out, {"part": part.__name__, **line, **setting()})


if __name__ == "__main__":
    main()
