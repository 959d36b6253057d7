"""Writes a comparison for papers and spreadsheets: LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from prunenet.compare.results import Line
from prunenet.compare.summary import Row, Value, caption, cells_of, headings

_SPECIAL = re.compile(r"[&%$#_{}~^\\]")
_SPELT = {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}


def latex(rows: Sequence[Row], lines: Sequence[Line]) -> str:
    """Returns a `table` of LaTeX, for a preamble with the package booktabs.

    Args:
        rows: of `summary.summarise`.
        lines: that they are of.
    """
    titles = headings(rows)
    left = sum(title in ("regime", "method") for title in titles)
    body = "".join(_line(cells) for cells in cells_of(rows))
    return (
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{_spelt(caption(lines))}}}\n"
        f"\\begin{{tabular}}{{r{'l' * left}{'r' * (len(titles) - left - 1)}}}\n\\toprule\n"
        f"{_line(titles)}\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def comma_separated(rows: Sequence[Row]) -> str:
    """Returns CSV, one line a method and ratio, numbers as measured.

    A value has four columns: mean, standard deviation over n seeds, and the 95 % interval over
    windows or questions; what is not known is empty.

    Args:
        rows: of `summary.summarise`.
    """
    texts = list(dict.fromkeys(text for row in rows for text in row.perplexity))
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    titles = ["method", "ratio", "regime", "applied_regime", "n", "failed"]
    titles += ["parameters", "active"]
    for name in [*(f"perplexity {text}" for text in texts), "accuracy", *tasks, "seconds"]:
        titles += [name, *(f"{name} {part}" for part in ("sd", "low", "high"))]
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(titles)
    for row in rows:
        values = [
            *(row.perplexity.get(text) for text in texts),
            row.accuracy,
            *(row.tasks.get(task) for task in tasks),
            row.seconds,
        ]
        facts = [row.method, row.ratio, row.regime, row.applied_regime, row.seeds, len(row.failed)]
        sizes = [row.parameters, row.active]
        writer.writerow([*facts, *sizes, *(n for value in values for n in _numbers(value))])
    return made.getvalue()


def _numbers(value: Value | None) -> tuple[float | None, ...]:
    if value is None:
        return None, None, None, None
    return value.mean, value.deviation, value.low, value.high


def _line(cells: Sequence[str]) -> str:
    return " & ".join(map(_spelt, cells)) + " \\\\\n"


def _spelt(text: str) -> str:
    spelt = _SPECIAL.sub(lambda found: _SPELT.get(found[0], f"\\{found[0]}"), text)
    return spelt.replace("±", r"$\pm$")
