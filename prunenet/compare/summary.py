"""Lines of cells -> rows of a table: a method at a ratio, with how sure its values are; as text and
as Markdown. `prunenet.compare.tables` writes the same rows for papers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prunenet.checkpoints.regimes import REGIMES
from prunenet.compare.results import Line

_NORMAL = 1.96
"""Standard errors on either side of a mean that hold 95 %."""


@dataclass(frozen=True, slots=True)
class Value:
    """A measured value, and how sure it is.

    Attributes:
        mean: over seeds.
        deviation: standard deviation over seeds; None for one seed, or where all are equal, as of a
            method that draws nothing.
        low, high: 95 % interval over windows or questions, where there is no deviation; None where
            the lines do not say.
        seeds: averaged.
    """

    mean: float
    deviation: float | None
    low: float | None = None
    high: float | None = None
    seeds: int = 1

    @classmethod
    def of(
        cls,
        values: Sequence[float | None],
        intervals: Sequence[tuple[float, float] | None] = (),
    ) -> Value | None:
        """None where there are no values, or where one is missing (an infinite perplexity)."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        if max(known) > min(known):
            return cls(statistics.fmean(known), statistics.stdev(known), seeds=len(known))
        low, high = (intervals[0] if intervals else None) or (None, None)
        return cls(known[0], None, low, high, len(known))


@dataclass(frozen=True, slots=True)
class Row:
    """A method at a ratio; seeds that failed are counted and not averaged.

    Attributes:
        method: its spec; "dense" for the model itself.
        ratio: share removed, of FFN channels or as was asked (`share_of`).
        regime, applied_regime: what the whole way, and what cutting alone, looked at; None where
            every seed failed.
        parameters: of the model, biases of a compensation included.
        active: parameters that one token uses; None in lines of before.
        perplexity: of each text, in the order of the lines.
        accuracy: mean over the tasks.
        tasks: of each task.
        seconds: of pruning, text that had to be written included.
        seeds: that are averaged.
        failed: error of each seed that failed.
    """

    method: str
    ratio: float
    regime: str | None
    applied_regime: str | None
    parameters: float | None
    perplexity: dict[str, Value | None]
    accuracy: Value | None
    tasks: dict[str, Value | None]
    seconds: Value | None
    seeds: int
    failed: tuple[str, ...]
    active: float | None = None

    @property
    def looks_at(self) -> str:
        """The regime, in words."""
        if self.method == "dense" or self.regime is None:
            return "-"
        return (
            self.regime
            if self.regime == self.applied_regime
            else f"{self.applied_regime} (trained: {self.regime})"
        )


def summarise(lines: Sequence[Line]) -> list[Row]:
    """Dense first, then by ratio, by regime, and by perplexity on the first text; failures last."""
    groups: dict[tuple[str, float], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["method"], line["ratio"]), []).append(line)
    return sorted((_row(*place, group) for place, group in groups.items()), key=_place)


def headings(rows: Sequence[Row], *, each_task: bool = False) -> list[str]:
    """Of the columns of `cells_of`."""
    tasks = list(_tasks(rows))
    accuracy = [*(tasks if each_task else []), f"mean of {len(tasks)} tasks"] if tasks else []
    active = ["active"] if _mixtures(rows) else []
    return ["ratio", "regime", "method", "params", *active, *_texts(rows), *accuracy, "time"]


def cells_of(rows: Sequence[Row], *, each_task: bool = False) -> list[list[str]]:
    """Each row as text, under `headings`."""
    texts, tasks = _texts(rows), _tasks(rows)
    shown = []
    for row in rows:
        accuracy = (
            [*([row.tasks.get(task) for task in tasks] if each_task else []), row.accuracy]
            if tasks
            else []
        )
        shown.append(
            [
                f"{row.ratio:g}",
                row.looks_at,
                row.method,
                _size(row.parameters),
                *([_size(row.active)] if _mixtures(rows) else []),
                *(_shown(row.perplexity.get(text), _perplexity) for text in texts),
                *(_shown(value, lambda share: f"{100 * share:.1f}") for value in accuracy),
                (
                    "-"
                    if row.seconds is None or row.method == "dense"
                    else f"{row.seconds.mean:,.1f} s"
                ),
            ]
        )
    return shown


def markdown(rows: Sequence[Row], lines: Sequence[Line]) -> str:
    """A table with every task, what it was measured on, and what failed."""
    titles = headings(rows, each_task=True)
    body = [titles, ["---"] * len(titles), *cells_of(rows, each_task=True)]
    table = "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body
    )
    failed = [
        f"* {row.method} at {row.ratio:g} failed: {error}"
        for row in rows
        for error in dict.fromkeys(row.failed)
    ]
    return "\n\n".join([caption(lines), table, *(["\n".join(failed)] if failed else [])]) + "\n"


def caption(lines: Sequence[Line]) -> str:
    """The conditions, in a sentence or two."""
    line = next((line for line in lines if line["perplexity"]), lines[0])
    scored, tokens = (
        line["evaluation"],
        {text["text"]: text["tokens"] for text in line["perplexity"] or []},
    )
    texts = ", ".join(
        text["text"] + (f" ({tokens[text['text']]:,} tokens)" if tokens else "")
        for text in scored["texts"]
    )
    behind = " behind BOS" if scored.get("bos") else ""  # lines of before know no BOS
    tasks = (
        f"; tasks: accuracy in %, {scored['limit'] or 'all'} questions" if scored["tasks"] else ""
    )
    seeds = sorted({line["seed"] for line in lines if line["method"] != "dense"})
    return (
        f"{line['model']}, {line['dtype']}; perplexity on {texts} in windows of {scored['window']}"
        f"{behind}, stride {scored['stride']}{tasks}; seeds"
        f" {', '.join(map(str, seeds)) or '-'} (mean ± standard deviation, n ="
        f" {max(len(seeds), 1)}; [95 % interval over windows or questions] where seeds do not"
        " differ); prunenet"
        f" {line['versions']['prunenet']}."
    )


def _row(method: str, ratio: float, lines: list[Line]) -> Row:
    fine = [line for line in lines if line["error"] is None]
    texts = [text["text"] for text in lines[0]["evaluation"]["texts"]]
    tasks = list(lines[0]["evaluation"]["tasks"])
    at: dict[str, Any] = {
        "parameters": statistics.fmean(line["parameters"] for line in fine) if fine else None,
        "active": _mean([line.get("active_parameters") for line in fine]),
        "perplexity": {
            text: Value.of(
                [line["perplexity"][i]["value"] for line in fine],
                [_over_windows(line["perplexity"][i]) for line in fine],
            )
            for i, text in enumerate(texts)
        },
        "accuracy": Value.of(
            [line["accuracy"] for line in fine],
            [_over_questions(line["accuracy"], line["tasks"] or []) for line in fine],
        ),
        "tasks": {
            task: Value.of(
                [_accuracy(line["tasks"][i]) for line in fine],
                [_over_questions(_accuracy(line["tasks"][i]), [line["tasks"][i]]) for line in fine],
            )
            for i, task in enumerate(tasks)
        },
        "seconds": Value.of(
            [line["seconds_pruning"] + (line["seconds_calibration"] or 0) for line in fine]
        ),
    }
    regime, applied = (fine[0]["regime"], fine[0]["applied_regime"]) if fine else (None, None)
    failed = tuple(line["error"] for line in lines if line["error"] is not None)
    return Row(method, ratio, regime, applied, seeds=len(fine), failed=failed, **at)


def _mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _accuracy(task: dict[str, Any]) -> float:
    return float(task["accuracy"] if task["accuracy_norm"] is None else task["accuracy_norm"])


def _over_windows(scored: dict[str, Any]) -> tuple[float, float] | None:
    """The interval of a perplexity; lines of before have none."""
    low, high = scored.get("low"), scored.get("high")
    return None if low is None or high is None else (low, high)


def _over_questions(
    mean: float | None, tasks: Sequence[dict[str, Any]]
) -> tuple[float, float] | None:
    """The normal interval of a mean accuracy, by the standard errors of its tasks."""
    names = ["standard_error" + ("" if t["accuracy_norm"] is None else "_norm") for t in tasks]
    errors = [task.get(name) for task, name in zip(tasks, names, strict=True)]
    known = [error for error in errors if error is not None]
    if mean is None or not known or len(known) < len(errors):
        return None
    reach = _NORMAL * math.hypot(*known) / len(known)
    return max(0.0, mean - reach), min(1.0, mean + reach)


def _place(row: Row) -> tuple[float, int, float, str]:
    first = next(iter(row.perplexity.values()))
    regime = len(REGIMES) if row.regime is None else list(REGIMES).index(row.regime)
    return (
        row.ratio if row.method != "dense" else -1.0,
        regime,
        float("inf") if first is None else first.mean,
        row.method,
    )


def _mixtures(rows: Sequence[Row]) -> bool:
    """Whether a token uses fewer parameters than there are."""
    return any(row.active not in (None, row.parameters) for row in rows)


def _texts(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(text for row in rows for text in row.perplexity))


def _tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(task for row in rows for task in row.tasks))


def _size(parameters: float | None) -> str:
    if parameters is None:
        return "failed"
    return f"{parameters / 1e6:,.1f} M" if parameters >= 1e6 else f"{parameters:,.0f}"


def _perplexity(value: float) -> str:
    return f"{value:,.1f}" if value < 1e6 else f"{value:.1e}"


def _shown(value: Value | None, form: Callable[[float], str]) -> str:
    if value is None:
        return "-"
    if value.deviation is not None:
        return f"{form(value.mean)} ± {form(value.deviation)}"
    if value.low is None or value.high is None:
        return form(value.mean)
    return f"{form(value.mean)} [{form(value.low)}, {form(value.high)}]"
