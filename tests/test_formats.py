"""Formats of text: what is understood gives the same text in every format, and what is not is
refused in one sentence, never read as prose.
"""

import gzip
import json
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prunenet.evaluation.task_files import TaskError, read_task, task_files
from prunenet.text import formats
from prunenet.text.corpora import (
    CalibrationText,
    TestText,
    TextError,
    content_sha256,
    load_text,
)
from prunenet.text.windows import tokenise

ROWS = ['one, "quoted"', "", "two\nlines; é 😀"]
JOINED = "\n\n".join(ROWS)


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)


def lines(column: str = "text", rows: list[str] = ROWS) -> str:
    return "".join(json.dumps({"n": i, column: row}) + "\n" for i, row in enumerate(rows))


def array(indent: int | None = None) -> str:
    return json.dumps([{"n": i, "text": row} for i, row in enumerate(ROWS)], indent=indent)


def delimited(mark: str) -> str:
    quoted = [row.replace('"', '""') for row in ROWS]
    return f"n{mark}text\n" + "".join(f'{i}{mark}"{row}"\n' for i, row in enumerate(quoted))


def stored() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"n": [0, 1, 2], "text": ROWS})


def read(path: Path | str, column: str | None = None) -> str:
    return load_text(path, TestText, column).content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", lines()),
        ("rows.JSONL", lines()),
        ("rows.ndjson", lines()),
        ("rows.json", lines()),
        ("rows.json", array()),
        ("rows.JSON", array(indent=2)),
        ("rows.jsonl", array()),
        ("rows.txt", lines()),
        ("rows", lines()),
        ("rows.txt", array(indent=1)),
        ("rows.csv", delimited(",")),
        ("rows.CSV", delimited(";")),
        ("rows.csv", delimited("\t")),
        ("rows.tsv", delimited("\t")),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_rows_are_the_same_text_in_every_format_and_encoding(
    tmp_path: Path, name: str, content: str, encoding: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode(encoding))
    assert read(path) == JOINED
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(content.encode(encoding), mtime=0))
    assert read(packed) == JOINED


@pytest.mark.parametrize("name", ["rows.parquet", "rows[1] *.parquet", "rows.PARQUET", "rows"])
def test_parquet_is_known_by_its_suffix_or_its_first_bytes(tmp_path: Path, name: str) -> None:
    stored().to_parquet(tmp_path / "whole.parquet")
    (tmp_path / name).write_bytes((tmp_path / "whole.parquet").read_bytes())
    assert read(tmp_path / name) == JOINED


def test_null_is_an_empty_row_of_a_table_and_an_error_in_json_lines(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": [None, "a", None, "b"]})
    table.to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == "\n\na\n\n\n\nb"
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(TextError, match=r'line 2 of .* has no "text" column with a string in it'):
        read(tmp_path / "rows.jsonl")


def test_what_save_to_disk_wrote_is_read_by_split(tmp_path: Path) -> None:
    train = datasets.Dataset.from_dict({"text": ["seen"]})
    datasets.DatasetDict(train=train, test=stored()).save_to_disk(tmp_path / "both")
    stored().save_to_disk(tmp_path / "one")
    assert read(tmp_path / "both") == read(tmp_path / "one") == JOINED
    assert load_text(tmp_path / "both", CalibrationText).content == "seen"
    assert load_text(f"{tmp_path / 'both'}::train", TestText).content == "seen"
    with pytest.raises(TextError, match="has no split 'valid'; it has test, train"):
        load_text(f"{tmp_path / 'both'}::valid", TestText)
    with pytest.raises(TextError, match="is one split, without a name, and not 'valid'"):
        load_text(f"{tmp_path / 'one'}::valid", TestText)
    with pytest.raises(TextError, match="calibration must not see test text"):
        load_text(f"{tmp_path / 'both'}::test", CalibrationText)


def test_a_test_split_saved_alone_does_not_calibrate(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(lines())
    split = datasets.load_dataset(
        "json", data_files={"test": str(tmp_path / "test.jsonl")}, cache_dir=str(tmp_path)
    )["test"]
    split.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == JOINED
    with pytest.raises(TextError, match="calibration must not see test text"):
        load_text(tmp_path / "saved", CalibrationText)


def test_a_saved_dataset_that_names_files_outside_its_folder_is_refused(tmp_path: Path) -> None:
    stored().save_to_disk(tmp_path / "secret")
    stored().save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    outside = f"../secret/{state['_data_files'][0]['filename']}"
    for entry in (outside, str(tmp_path / "secret" / "data-00000-of-00001.arrow"), 5):
        state["_data_files"][0]["filename"] = entry
        (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
        with pytest.raises(TextError, match=r"is damaged: its state\.json does not name"):
            read(tmp_path / "saved")


def test_the_column_is_text_then_content_or_the_one_that_is_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"content": "c", "body": "b", "n": 1}) + "\n")
    assert read(rows) == "c"
    assert read(rows, "body") == "b"
    with pytest.raises(TextError, match=r'line 1 of .* has no "story" column .* content, body, n'):
        read(rows, "story")
    with pytest.raises(TextError, match='has no "n" column with a string in it'):
        read(rows, "n")
    both = tmp_path / "both.csv"
    both.write_text("content,text\nc,t\n")
    assert read(both) == "t"
    both.write_text("question,answer\nq,a\n")
    with pytest.raises(TextError, match="2 columns of strings: question, answer; name the one"):
        read(both)
    assert read(both, "answer") == "a"
    plain = tmp_path / "plain.txt"
    plain.write_text("prose")
    with pytest.raises(TextError, match="is plain text, which has no column 'text'"):
        read(plain, "text")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "prose.txt"
    path.write_bytes("First línes\r\nof prose\r".encode(encoding))
    assert read(path) == "First línes\nof prose\n"


def test_a_lone_surrogate_becomes_the_replacement_character_and_the_text_can_be_hashed(
    tmp_path: Path,
) -> None:
    words = Tokenizer(models.WordLevel({"fine": 0, "\ufffd": 1, "😀": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine \\ud83d \\ud83d\\ude00"}\n')
    for kind in (TestText, CalibrationText):
        text = load_text(path, kind)
        assert text.content == "fine \ufffd 😀"
        assert len(content_sha256(text)) == 64
        assert tokenise(tokenizer, text).tolist() == [0, 1, 2]
    by_hand = TestText("by hand", "fine \udc00")
    assert by_hand == TestText("by hand", "fine \ufffd")
    assert content_sha256(by_hand) == content_sha256(TestText("", "fine \ufffd"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"no JSON at all", "line 1 of .* is not JSON"),
        ("a.json", b'[{"text": "a"}, {"te', "is not JSON: its array is damaged"),
        ("a.json", b"[1, 2]", "row 1 of .* is not an object"),
        ("a.json", b'{"data": [{"text": "a"}]}', 'has no "text" column'),
        ("a.jsonl", b"[" * 100_000, "is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n3\n', "line 2 of .* is not an object"),
        ("a.csv", b'text,n\n"open', "is not CSV: unexpected end of data"),
        ("a.csv", b"text,n\na,1,2\n", "line 2 of .* has 3 fields and its header 2: text, n"),
        ("a.parquet", b"PAR1 and nothing", "cannot be read as parquet"),
        ("a.parquet", b"plain words", "cannot be read as parquet"),
        ("a.html", b"<p>words</p>", "is a .html file, which is not read as text"),
        ("a.txt", b"<!DOCTYPE html><p>words</p>", "is HTML or XML"),
        ("a.xml", b"<a/>", "is a .xml file"),
        ("a.txt", b"%PDF-1.4 words", "is a PDF"),
        ("a.txt", b"PK\x03\x04words", "is a zip archive"),
        ("a.zst", b"words", "is a .zst file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "is compressed by zstandard"),
        ("a.jsonl.gz", b"\x1f\x8b cut", "is damaged: its gzip data"),
        ("a.tar.gz", gzip.compress(b"words", mtime=0), "is a .tar file"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "is parquet or Arrow inside .gz"),
        ("a.txt", "words".encode("utf-16-le"), "UTF-16 without its byte order mark"),
        ("a.txt", b"\xff\xfew", "is not UTF-16 text"),
        ("a.txt", b"wo\x00rds", "holds NUL bytes"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text \\(byte 3\\)"),
        ("a.csv", b"", "is empty"),
        ("a.jsonl", b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_short_sentence(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "content", ["[1] A footnote.\nAnd prose.", "{curly} prose", "[[wiki]] link\n", "a,b\nc,d"]
)
def test_prose_that_begins_like_rows_is_prose(tmp_path: Path, content: str) -> None:
    for name in ("prose.txt", "prose.md", "prose"):
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name) == content


def test_a_gzip_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_UNPACKED", 1000)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a" * 1001, mtime=0))
    with pytest.raises(TextError, match="unpacks to more than 2 GiB"):
        read(tmp_path / "bomb.txt.gz")
    (tmp_path / "fine.txt.gz").write_bytes(gzip.compress(b"a" * 1000, mtime=0))
    assert read(tmp_path / "fine.txt.gz") == "a" * 1000
    (tmp_path / "long.txt").write_text("a" * 1001)
    with pytest.raises(TextError, match=r"has 1,001 bytes; give a part, at most 1,000"):
        read(tmp_path / "long.txt")
    (tmp_path / "long.txt").write_text("a" * 1000)
    assert read(tmp_path / "long.txt") == "a" * 1000


@pytest.mark.parametrize("name", ["none.JSONL", "none.ndjson", "none.parquet", "none.txt.gz"])
def test_a_missing_file_of_any_known_suffix_is_no_dataset(name: str) -> None:
    with pytest.raises(TextError, match="does not exist"):
        read(name)


# --- task data ---

QUESTIONS = [
    {"goal": "to \ud83d", "sol1": "a", "sol2": "é", "label": 1},
    {"goal": "to sit", "sol1": "chair", "sol2": "b", "label": 0},
]
CLEAN = [{**QUESTIONS[0], "goal": "to \ufffd"}, QUESTIONS[1]]


@pytest.mark.parametrize("name", ["piqa.jsonl", "piqa.NDJSON", "piqa.json", "piqa.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_questions_are_read_from_the_same_formats(tmp_path: Path, name: str, encoding: str) -> None:
    text = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    if name.endswith(".json"):
        text = json.dumps(QUESTIONS, indent=1)
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    files = task_files(tmp_path)
    assert files == {"piqa": tmp_path / name}
    assert read_task("piqa", files["piqa"])[0] == CLEAN


def test_questions_are_read_from_parquet_with_their_lists(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "arc_easy.parquet")
    assert read_task("arc_easy", task_files(tmp_path)["arc_easy"])[0] == rows


def test_named_tasks_of_a_folder_are_found_or_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "piqa.json").write_text("[]")
    (tmp_path / "copa.jsonl").write_text("")
    assert task_files(tmp_path, ["piqa"]) == {"piqa": tmp_path / "piqa.json"}
    assert task_files(tmp_path, ["boolq"]) == {"boolq": tmp_path / "boolq.jsonl"}
    with pytest.raises(TaskError, match="'trivia'; known tasks"):
        task_files(tmp_path, ["trivia"])


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("piqa", {"label": True}, "has True in column 'label', which is not int"),
        ("piqa", {"goal": "x" * 10_000, "label": "y" * 9_000}, "which is not int"),
        ("hellaswag", {"endings": ["a", 5]}, "no list of strings in column 'endings'"),
        ("mmlu", {"choices": ["a", "b", None, "d"]}, "no list of strings in column 'choices'"),
        (
            "arc_easy",
            {"choices": {"text": ["a", []], "label": ["A", "B"]}},
            "that hold more than strings",
        ),
        ("arc_easy", {"choices": {"text": "ab", "label": "AB"}}, "no lists 'text' and 'label'"),
    ],
)
def test_what_a_question_s_lists_hold_is_checked(
    tmp_path: Path, task: str, row: dict, message: str
) -> None:
    whole = {
        "piqa": QUESTIONS[1],
        "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "label": "0"},
        "mmlu": {"question": "q", "subject": "s", "answer": 0},
        "arc_easy": {"question": "q", "answerKey": "A"},
    }[task]
    (tmp_path / "rows.jsonl").write_text(json.dumps(whole | row) + "\n")
    with pytest.raises(TaskError, match=message) as caught:
        read_task(task, tmp_path / "rows.jsonl")
    assert len(str(caught.value)) < 400


def test_questions_nested_too_deeply_or_in_prose_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text('{"goal": ' + "[" * 100_000)
    with pytest.raises(TaskError, match=r"line 1 of .* is not JSON"):
        read_task("piqa", tmp_path / "piqa.jsonl")
    (tmp_path / "piqa.txt").write_text("Some prose.")
    with pytest.raises(TaskError, match="holds no rows; piqa needs one object per line"):
        read_task("piqa", tmp_path / "piqa.txt")
