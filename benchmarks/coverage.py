"""Tries every decoder type of transformers: cut, built anew, saved, reloaded with equal logits, or
the reason why not. `tests/test_every_type.py` (slow) compares what ships with the same discovery.

    python benchmarks/coverage.py --out lines.jsonl            # resumes; some seconds a type
    python benchmarks/coverage.py --out lines.jsonl --again    # tries those that failed once more
    python benchmarks/coverage.py --out lines.jsonl --types gpt2 llama  # these once more
    python benchmarks/coverage.py --out lines.jsonl --ship     # writes what the package ships

The count stands at the end.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import transformers
from _common import append_line, parser, read_lines

from prunenet.models import known
from prunenet.models.discovery import Discovery
from prunenet.runtime.json_files import convert


def main() -> None:
    """Runs what is left, and counts."""
    arguments = parser(__doc__)
    arguments.add_argument("--again", action="store_true", help="try again what failed")
    arguments.add_argument("--types", nargs="+", default=(), help="try these once more, no others")
    arguments.add_argument("--ship", action="store_true", help=f"write {known.SHIPPED.name}")
    given = arguments.parse_args()
    version = {"transformers": transformers.__version__}
    done = _lines(given.out)
    for model_type, name in known.all_entries():
        before = done.get(f"{model_type} {name}")
        again = given.again and before is not None and before["architecture"] is None
        if model_type not in given.types if given.types else before is not None and not again:
            continue
        start = time.perf_counter()
        found = asdict(known.discovered_anew(model_type, name))
        seconds = round(time.perf_counter() - start, 1)
        place = {"type": model_type, "class": name, "seconds": seconds}
        append_line(given.out, place | version | {"found": found})
    _report(_lines(given.out), given.ship)


def _lines(path: Any) -> dict[str, dict[str, Any]]:
    """The last discovery of each type and class."""
    return {f"{line['type']} {line['class']}": line["found"] for line in read_lines(path)}


def _report(found: dict[str, dict[str, Any]], ship: bool) -> None:
    cut = {name.split()[0] for name, known_as in found.items() if known_as["architecture"]}
    types = {name.split()[0] for name in found}
    for name, known_as in sorted(found.items()):
        if name.split()[0] not in cut:
            print(f"{name}: {known_as['reason']}")
    print(f"{len(cut)} of {len(types)} types are cut, saved and reloaded with equal logits")
    if ship:
        _ship(found)


def _ship(found: dict[str, dict[str, Any]]) -> None:
    """Writes one line a type, each checked against the schema."""
    lines = []
    for name, known_as in sorted(found.items()):
        convert(json.loads(json.dumps(known_as)), Discovery)
        lines.append(f"{json.dumps(name)}: {json.dumps(known_as)}")
    head = f'"transformers": "{transformers.__version__}", "rules": {known.RULES}'
    text = f'{{{head}, "types": {{\n' + ",\n".join(lines) + "\n}}\n"
    known.SHIPPED.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
