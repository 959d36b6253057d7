"""Reads and checks questions of zero-shot tasks from local files: a row is a row of the task's
Hugging Face dataset. Files are JSON lines, or any other format of rows that
`prunenet.text.formats` reads.

Names and columns are those of lm-eval's tasks. `arc_easy`, `arc_challenge`: allenai/ai2_arc;
`piqa`: baber/piqa; `winogrande`: allenai/winogrande, winogrande_xl; `copa`, `boolq`:
aps/super_glue; `openbookqa`: allenai/openbookqa; `sciq`: allenai/sciq; `hellaswag`:
Rowan/hellaswag; `mmlu`: cais/mmlu, all subjects or some. The split is what lm-eval scores:
validation, and test for ARC, OpenBookQA, SciQ and MMLU.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunenet.runtime.paths import expanded
from prunenet.text.formats import Row, TextError, read_file, without_surrogates

__all__ = ["COLUMNS", "Row", "TaskError", "read_task", "task_files"]

# Of a task's files in one folder, the first of these is read.
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".tsv")

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


def task_files(
    tasks: Mapping[str, str | Path] | str | Path, names: Sequence[str] = ()
) -> dict[str, Path]:
    """Finds the file of each task.

    Args:
        tasks: task -> file; or a folder with files `<task>.jsonl` (or `.json`, `.ndjson`,
            `.parquet`, `.csv`, `.tsv`, `.jsonl.gz`) of known tasks. Its other files are left alone.
        names: of a folder, only these tasks, in this order; by default all, in name order. A task
            without a file gets the name that its file would have.

    Raises:
        TaskError: unknown task, or a folder that is missing or holds no file of a known task.
    """
    for task in (*names, *(tasks if isinstance(tasks, Mapping) else ())):
        _check_known(task)
    if isinstance(tasks, Mapping):
        return {task: expanded(file) for task, file in tasks.items()}
    folder = expanded(tasks)
    if not folder.is_dir():
        raise TaskError(
            f"task folder {str(folder)!r} does not exist; give a folder with <task>.jsonl files"
        )
    found = dict(_in_folder(folder))
    if names:
        return {task: found.get(task, folder / f"{task}.jsonl") for task in names}
    if not found:
        raise TaskError(
            f"task folder {str(folder)!r} holds no <task>.jsonl file of a known task"
            f" ({', '.join(COLUMNS)})"
        )
    return found


def _in_folder(folder: Path) -> Iterator[tuple[str, Path]]:
    names = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_file()}
    for task in sorted(COLUMNS):
        file = next((names[task + s] for s in _SUFFIXES if task + s in names), None)
        if file is not None:
            yield task, file


def read_task(task: str, file: str | Path) -> tuple[list[Row], str]:
    """Reads the rows of a task's file, each checked, as the prompts read them; and the file's
    sha256.

    Args:
        task: one of `COLUMNS`.
        file: rows with the columns that the task needs; blank lines are skipped.

    Raises:
        TaskError: unknown task; file missing, empty, or a row that is not readable, lacks a column
            or has no right answer.
    """
    _check_known(task)
    file = expanded(file)
    if not file.is_file():
        raise TaskError(
            f"task file {str(file)!r} does not exist; {task} needs the rows of its Hugging Face"
            " dataset as JSON lines"
        )
    try:
        rows = list(_rows(task, file))
    except TextError as error:
        raise TaskError(f"{error}; {task} needs one object per line") from None
    if not rows:
        raise TaskError(f"task file {str(file)!r} is empty; {task} needs at least one row")
    with file.open("rb") as content:
        return rows, hashlib.file_digest(content, "sha256").hexdigest()


def _rows(task: str, file: Path) -> Iterator[Row]:
    table = read_file(file)
    if isinstance(table, str):
        if not table.strip():
            return
        raise TextError(f"{str(file)!r} holds no rows")
    for number, row in table.rows:
        if fault := _fault(task, row):
            raise TaskError(
                f"{file.name} row {number} {fault}; {task} needs the columns"
                f" {', '.join(COLUMNS[task])}"
            )
        row = {column: _clean(row[column]) for column in COLUMNS[task]}
        yield _hellaswag(row) if task == "hellaswag" else row


def _clean(value: Any) -> Any:
    """The value without lone surrogates, which no tokenizer takes."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return {k: _clean(v) for k, v in value.items()} if isinstance(value, dict) else value


def _check_known(task: str) -> None:
    if task not in COLUMNS:
        raise TaskError(f"unknown task {task!r}; known tasks: {', '.join(COLUMNS)}")


def _hellaswag(row: Row) -> Row:
    """Does what lm-eval's `process_docs` does to a HellaSwag row: one context, without the marks of
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
    """Says what is wrong with a row, as the end of a sentence; None if nothing is."""
    if not isinstance(row, dict):
        return "is not an object"
    for column, kind in COLUMNS[task].items():
        if column not in row:
            return f"has no column {column!r}"
        # To Python, true is a number.
        if not isinstance(row[column], kind) or isinstance(row[column], bool):
            found = reprlib.repr(row[column])
            return f"has {found} in column {column!r}, which is not {kind.__name__}"
    allowed: dict[str, Sequence[object]] = {"label": (0, 1), "answer": ("1", "2")}
    if "choices" in COLUMNS[task]:
        if fault := _choices_fault(row["choices"], exam=task != "mmlu"):
            return fault
        if task == "mmlu":
            allowed["answer"] = range(4)
        else:
            allowed["answerKey"] = row["choices"]["label"]
    if task == "hellaswag":
        if not _strings(row["endings"]):
            return "has no list of strings in column 'endings'"
        allowed["label"] = [str(i) for i in range(len(row["endings"]))]
    elif task == "copa":
        allowed["question"] = ("cause", "effect")
    elif task == "winogrande" and "_" not in row["sentence"]:
        return "has no gap '_' in column 'sentence'"
    for column in COLUMNS[task].keys() & allowed.keys():
        value = row[column].strip() if column == "answerKey" else row[column]
        if value not in allowed[column]:
            return (
                f"has {reprlib.repr(value)} in column {column!r}, not one of"
                f" {reprlib.repr(list(allowed[column]))} (test splits have no answers)"
            )
    return None


def _choices_fault(choices: Any, *, exam: bool) -> str | None:
    """Says what is wrong with the column `choices`: {"text": [...], "label": [...]} of an exam, a
    list of four elsewhere.
    """
    if not exam:
        if len(choices) != 4:
            return f"has {len(choices)} choices in column 'choices', not 4"
        return None if _strings(choices) else "has no list of strings in column 'choices'"
    texts, labels = choices.get("text"), choices.get("label")
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        return "has no lists 'text' and 'label' of equal length in column 'choices'"
    if not _strings((*texts, *labels)):
        return "has lists 'text' and 'label' in column 'choices' that hold more than strings"
    return None


def _strings(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)
