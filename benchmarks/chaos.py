r"""Disturbs prunenet in every way that we know of, and counts what it survives.

    python benchmarks/chaos.py all --count 6000 --out benchmarks/results/chaos.jsonl
    python benchmarks/chaos.py table --out benchmarks/results/chaos.jsonl

The parts are kills, disks, fuzz, folders, twins and ranks; `table` prints what the lines say. A
line is a batch of attempts of one kind: tried, survived (without a fault), what came of them, and
each fault with its number. An attempt is drawn by seed, kind and number, so that `--again NUMBER`
with `--kind` makes it once more. What `--out` holds is not tried again.
"""

from __future__ import annotations

import os

# before torch is imported: threads that wait for each other cost more than they give
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}

import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from _common import Line, append_line, parser, read_lines
from disturb import disks, folders, fuzz, kills, ranks, twins
from disturb.commands import Yard
from disturb.kinds import FAULTS, Kind, batch

PARTS: dict[str, Callable[[Yard], Iterator[Kind]]] = {
    "kills": kills.kinds,
    "disks": disks.kinds,
    "fuzz": fuzz.kinds,
    "folders": folders.kinds,
    "twins": twins.kinds,
    "ranks": ranks.kinds,
}
# Attempts of a part for each 6 000 in all.
SHARES = {"kills": 450, "disks": 200, "fuzz": 5000, "folders": 250, "twins": 60, "ranks": 40}
BATCH = 25


def rest(kind: Kind, count: int, seed: int, lines: Sequence[Line]) -> Iterator[tuple[int, int]]:
    """(first, how many) of each batch that has no line yet."""
    here = {"part": kind.part, "kind": kind.name, "seed": seed}
    done = {
        number
        for line in lines
        if here.items() <= line.items()
        for number in range(line["first"], line["first"] + line["tried"])
    }
    left = [number for number in range(min(count, kind.most or count)) if number not in done]
    for start in range(0, len(left), BATCH):
        part = left[start : start + BATCH]
        cut = next((i for i, n in enumerate(part) if n != part[0] + i), len(part))
        yield part[0], cut
        if cut < len(part):  # after a gap; numbers run on in all but odd cases
            yield from ((number, 1) for number in part[cut:])


def table(lines: Sequence[Line]) -> str:
    """The Markdown table of all lines, by part."""
    titles = ["part", "tried", "survived", "what came of it", "faults"]
    rows = []
    for part in dict.fromkeys(line["part"] for line in lines):
        own = [line for line in lines if line["part"] == part]
        outcomes, faults = Counter[str](), Counter[str]()
        for line in own:
            outcomes.update(line["outcomes"])
            faults.update(line["faults"])
        said = ", ".join(f"{what} {number:,}" for what, number in outcomes.most_common())
        found = ", ".join(f"{name} {faults[name]}" for name in FAULTS if faults[name]) or "0"
        tried, survived = (sum(line[key] for line in own) for key in ("tried", "survived"))
        rows.append([part, f"{tried:,}", f"{survived:,}", said, found])
    return "\n".join("| " + " | ".join(row) + " |" for row in [titles, ["---"] * 5, *rows])


def main() -> None:
    """Runs parts and appends their lines."""
    options = parser(__doc__)
    options.add_argument("part", choices=[*PARTS, "all", "table"])
    options.add_argument("--count", type=int, default=6000, help="attempts of the part, or in all")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kind", help="kinds whose name holds this")
    options.add_argument("--again", type=int, metavar="NUMBER", help="one attempt; no line")
    options.add_argument("--minutes", type=float, help="begin no batch after so long")
    given = options.parse_args()
    torch.set_num_threads(1)
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if given.part == "table":
        print(table(read_lines(given.out)))
        return
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as home:
        yard = Yard(Path(home).resolve(), (given.kind or "").partition(",")[0])
        for part in PARTS if given.part == "all" else [given.part]:
            kinds = [k for k in PARTS[part](yard) if (given.kind or "") in k.name]
            total = given.count * SHARES[part] // 6000 if given.part == "all" else given.count
            for kind in kinds:
                if given.again is not None:
                    print(batch(kind, given.again, 1, given.seed))
                    continue
                for first, count in rest(
                    kind, -(-total // len(kinds)), given.seed, read_lines(given.out)
                ):
                    if given.minutes and time.monotonic() - begun > 60 * given.minutes:
                        return
                    line = batch(kind, first, count, given.seed) | {"commit": commit}
                    append_line(given.out, line)
                    shown = {key: line[key] for key in ("kind", "first", "tried", "faults")}
                    print(
                        shown, *(str(e)[:300] for e in line["examples"][:8]), sep="\n  ", flush=True
                    )


if __name__ == "__main__":
    main()
