"""Questions of zero-shot tasks from local JSON lines, checked: a row is a row of the task's Hugging
Face dataset.

Names and columns are those of lm-eval's tasks. `arc_easy`, `arc_challenge`: allenai/ai2_arc;
`piqa`: baber/piqa; `winogrande`: allenai/winogrande, winogrande_xl; `copa`, `boolq`:
aps/super_glue; `openbookqa`: allenai/openbookqa; `sciq`: allenai/sciq; `hellaswag`:
Rowan/hellaswag; `mmlu`: cais/mmlu, all subjects or some. The split is what lm-eval scores:
validation, and test for ARC, OpenBookQA, SciQ and MMLU.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_EXAM: dict[str, type] = {"question": str, "choices": dict, "answerKey": str}
# Task -> the columns that its prompts read. `choices` is {"text": [...], "label": [...]}.
COLUMNS: dict[str, dict[str, type]] = {
    "arc_easy": _EXAM,
    "arc_challenge": _EXAM,
    "piqa": {"goal": str, "sol1": str, "sol2": str, "label": int},
    "winogrande": {"sentence": str, "option1": str, "option2": str, "answer": str},
    "copa": {"premise": str, "choice1": str, "choice2": str, "question": str, "label": int},
    "boolq": {"passage": str, "question": str, "label": int},
    "openbookqa": {"question_stem": str, "choices": dict, "answerKey": str},
    "sciq": {
        "support": str,
        "question": str,
        "distractor1": str,
        "distractor2": str,
        "distractor3": str,
        "correct_answer": str,
    },
    "hellaswag": {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": str},
    "mmlu": {"question": str, "subject": str, "choices": list, "answer": int},
}


class TaskError(ValueError):
    """A task is unknown, or its file is missing, empty or not what the task reads."""


def task_files(tasks: Mapping[str, str | Path] | str | Path) -> dict[str, Path]:
    """Task -> file. Of a folder, the files `<task>.jsonl` of known tasks in name order; its other
    files are left alone.

    Raises:
        TaskError: unknown task, or a folder that is missing or holds no file of a known task.
    """
    if isinstance(tasks, Mapping):
        for task in tasks:
            _check_known(task)
        return {task: Path(file) for task, file in tasks.items()}
    folder = Path(tasks)
    if not folder.is_dir():
        raise TaskError(
            f"task folder {str(folder)!r} does not exist; give a folder with <task>.jsonl files"
        )
    found = {file.stem: file for file in sorted(folder.glob("*.jsonl")) if file.stem in COLUMNS}
    if not found:
        raise TaskError(
            f"task folder {str(folder)!r} holds no <task>.jsonl file of a known task"
            f" ({', '.join(COLUMNS)})"
        )
    return found


def read_task(task: str, file: str | Path) -> tuple[list[Row], str]:
    """The rows of a task's file, each checked, as the prompts read them; and the file's sha256.

    Args:
        task: one of `COLUMNS`.
        file: one JSON object per line; blank lines are skipped.

    Raises:
        TaskError: unknown task; file missing, empty, or a row that is not readable, lacks a column
            or has no right answer.
    """
    _check_known(task)
    file = Path(file)
    if not file.is_file():
        raise TaskError(
            f"task file {str(file)!r} does not exist; {task} needs the rows of its Hugging Face"
            " dataset as JSON lines"
        )
    content = file.read_bytes()
    rows: list[Row] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # JSON, or not UTF-8
            raise TaskError(
                f"{file.name} row {number} is not JSON ({error}); {task} needs one object per line"
            ) from None
        if fault := _fault(task, row):
            raise TaskError(
                f"{file.name} row {number} {fault}; {task} needs the columns"
                f" {', '.join(COLUMNS[task])}"
            )
        rows.append(
            _hellaswag(row)
            if task == "hellaswag"
            else {column: row[column] for column in COLUMNS[task]}
        )
    if not rows:
        raise TaskError(f"task file {str(file)!r} is empty; {task} needs at least one row")
    return rows, hashlib.sha256(content).hexdigest()


def _check_known(task: str) -> None:
    if task not in COLUMNS:
        raise TaskError(f"unknown task {task!r}; known tasks: {', '.join(COLUMNS)}")


def _hellaswag(row: Row) -> Row:
    """What lm-eval's `process_docs` makes of a HellaSwag row: one context, without the marks of
    WikiHow.
    """

    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": clean(query),
        "choices": [clean(ending) for ending in row["endings"]],
        "label": row["label"],
    }


def _fault(task: str, row: object) -> str | None:
    """What is wrong with a row, as the end of a sentence; None if nothing is."""
    if not isinstance(row, dict):
        return "is not an object"
    for column, kind in COLUMNS[task].items():
        if column not in row:
            return f"has no column {column!r}"
        if not isinstance(row[column], kind):
            return f"has {row[column]!r} in column {column!r}, which is not {kind.__name__}"
    allowed: dict[str, Sequence[object]] = {"label": (0, 1), "answer": ("1", "2")}
    if task == "mmlu":
        if len(row["choices"]) != 4:
            return f"has {len(row['choices'])} choices in column 'choices', not 4"
        allowed["answer"] = range(4)
    elif "choices" in row:
        texts, labels = row["choices"].get("text"), row["choices"].get("label")
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
            return "has no lists 'text' and 'label' of equal length in column 'choices'"
        allowed["answerKey"] = labels
    if task == "hellaswag":
        allowed["label"] = [str(i) for i in range(len(row["endings"]))]
    elif task == "copa":
        allowed["question"] = ("cause", "effect")
    elif task == "winogrande" and "_" not in row["sentence"]:
        return "has no gap '_' in column 'sentence'"
    for column in COLUMNS[task].keys() & allowed.keys():
        value = row[column].strip() if column == "answerKey" else row[column]
        if value not in allowed[column]:
            return (
                f"has {value!r} in column {column!r}, not one of {list(allowed[column])} (test"
                " splits have no answers)"
            )
    return None
