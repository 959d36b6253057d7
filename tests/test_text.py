"""Where text comes from, how it is cut into windows, and that test text never calibrates."""

import json
import os
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prunenet.text import corpora as text_module
from prunenet.text.corpora import CalibrationText, TestText, TextError, builtin_content, load_text
from prunenet.text.windows import calibration_blocks, token_windows, tokenise


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Words "0" to "63" are the ids 0 to 63."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def words(count: int) -> str:
    return " ".join(str(i % 64) for i in range(count))


@pytest.mark.parametrize(
    ("tokens", "window", "stride"),
    [(100, 10, 10), (103, 10, 4), (50, 7, 1), (12, 12, 3), (40, 2, 2)],
)
def test_each_token_is_scored_at_most_once_and_has_context(
    tokens: int, window: int, stride: int
) -> None:
    scored: Counter[int] = Counter()
    for part, count in token_windows(torch.arange(tokens), window, stride):
        assert len(part) == window
        assert 1 <= count < window
        assert torch.equal(part.diff(), torch.ones(window - 1, dtype=torch.long))
        scored.update(part[-count:].tolist())
    assert set(scored.values()) == {1}
    if stride < window:
        last = (tokens - window) // stride * stride + window
        assert set(scored) == set(range(1, last))


def test_windows_do_not_overlap_by_default() -> None:
    windows = [part for part, _ in token_windows(torch.arange(35), 10)]
    assert torch.equal(torch.cat(windows), torch.arange(30))


def test_a_text_shorter_than_one_window_is_an_error_with_a_remedy() -> None:
    with pytest.raises(
        TextError,
        match=r"has 9 tokens, fewer than one window of 10; give more text or a smaller `window`",
    ):
        token_windows(torch.arange(9), 10)


@pytest.mark.parametrize(("window", "stride"), [(1, None), (10, 0), (10, 11)])
def test_impossible_windows_and_strides_are_errors(window: int, stride: int | None) -> None:
    with pytest.raises(ValueError, match="got"):
        token_windows(torch.arange(20), window, stride)


def test_the_halves_of_the_builtin_text_share_no_paragraph() -> None:
    halves = [builtin_content(test=test) for test in (True, False)]
    test, calibration = ({" ".join(p.split()) for p in half.split("\n\n")} for half in halves)
    assert not (test & calibration) - {""}
    assert min(len(half) for half in halves) > 100_000


def test_the_halves_of_the_builtin_text_share_hardly_any_phrase() -> None:
    test, calibration = (builtin_content(test=test).split() for test in (True, False))
    known = {tuple(calibration[i : i + 13]) for i in range(len(calibration) - 12)}
    phrases = [tuple(test[i : i + 13]) for i in range(len(test) - 12)]
    assert sum(phrase in known for phrase in phrases) < 0.005 * len(phrases)


def test_the_builtin_text_follows_the_kind_and_is_the_same_each_time() -> None:
    test, calibration = load_text("builtin", TestText), load_text("builtin", CalibrationText)
    assert test.content != calibration.content
    assert test == load_text("builtin", TestText)
    even, odd = sorted(topics)[:2]
    assert test.content.startswith(topics[even].splitlines()[0])
    assert calibration.content.startswith(topics[odd].splitlines()[0])
    assert "test half (Python" in test.name
    assert "calibration half (Python" in calibration.name


def test_a_plain_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "some.raw"
    path.write_text(" = Title = \n A row é \n", encoding="utf-8")
    assert load_text(path, TestText) == TestText(str(path), " = Title = \n A row é \n")


def test_rows_of_a_jsonl_file_are_joined_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(["one", "", "two"])
        )
    )
    assert load_text(str(path), CalibrationText).content == "one\n\n\n\ntwo"


def test_a_row_of_a_jsonl_file_ends_where_its_line_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = "one\u2028two\x85three"  # line ends to Python, not to JSON
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_text(path, CalibrationText).content == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "is empty"),
        ("binary.txt", b"abc\xff\xfe", "not UTF-8 text \\(byte 3\\)"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 of .* is not JSON"),
        ("column.jsonl", b'{"txt": "a"}\n', 'line 1 of .* has no "text" column'),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_sentence(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        load_text(path, TestText)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere.txt", "./nowhere", "/no/such/file", "no:such.jsonl"])
def test_a_missing_file_is_an_error_and_not_a_dataset(source: str) -> None:
    with pytest.raises(TextError, match="does not exist"):
        load_text(source, TestText)


@pytest.fixture
def dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = {"train": ["a b\n", "", "c"], "test": ["z"], "validation": ["v"]}
    for split, texts in rows.items():
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps({"n": 1, "text": row}) + "\n" for row in texts)
        )
    return folder


def test_the_split_of_a_dataset_follows_the_kind(dataset_folder: Path) -> None:
    assert load_text(dataset_folder, CalibrationText).content == "a b\n\n\n\n\nc"
    assert load_text(dataset_folder, TestText).content == "z"
    assert load_text(f"{dataset_folder}::validation", CalibrationText).content == "v"


def test_a_huge_dataset_is_read_only_as_far_as_needed(
    dataset_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "MAX_CHARACTERS", 3)
    assert load_text(dataset_folder, CalibrationText).content == "a b\n"


def test_the_text_column_is_found_or_asked_for(dataset_folder: Path) -> None:
    (dataset_folder / "train.jsonl").write_text('{"n": 1, "story": "once"}\n')
    assert load_text(dataset_folder, CalibrationText).content == "once"
    (dataset_folder / "train.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    with pytest.raises(
        TextError, match="no 'text' column and 2 columns of strings: question, answer"
    ):
        load_text(dataset_folder, CalibrationText)


def test_a_split_that_does_not_exist_is_one_clear_sentence(dataset_folder: Path) -> None:
    with pytest.raises(TextError, match="split 'nope'") as caught:
        load_text(f"{dataset_folder}::nope", TestText)
    assert "\n" not in str(caught.value)


def test_a_folder_of_far_too_many_files_is_not_searched(
    dataset_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunenet.text.hub._MOST_FILES", 2)
    with pytest.raises(TextError, match="corpus' holds more than 2 files; give the folder"):
        load_text(dataset_folder, TestText)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TextError, match="is a pipe or a device, which is read once"):
        load_text(tmp_path / "pipe", TestText)


def test_a_dataset_out_of_reach_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    # the client itself stays offline
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    with pytest.raises(TextError, match="not reachable; give a local file or 'builtin'"):
        load_text("wikitext:wikitext-2-raw-v1", TestText)
    with pytest.raises(TextError, match="check the spelling"):
        load_text("not/a/dataset", TestText)


def test_a_test_split_is_refused_as_calibration_text() -> None:
    with pytest.raises(TextError, match="calibration must not see test text"):
        load_text("wikitext:wikitext-2-raw-v1:test", CalibrationText)


def test_test_text_is_refused_where_calibration_text_is_needed(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    draw = {"count": 1, "window": 4, "generator": torch.Generator()}
    with pytest.raises(TypeError):  # under pytest, by the annotation
        calibration_blocks(tokenizer, TestText("t", words(20)), **draw)  # type: ignore[arg-type]
    unchecked = (
        calibration_blocks.__wrapped__
        if hasattr(calibration_blocks, "__wrapped__")
        else calibration_blocks
    )
    # in the field, by the function
    with pytest.raises(TypeError, match="test text is only ever scored"):
        unchecked(tokenizer, TestText("t", words(20)), **draw)  # type: ignore[arg-type]


def test_calibration_blocks_are_distinct_windows_and_follow_the_generator(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = CalibrationText("t", words(64))
    draws = [
        calibration_blocks(
            tokenizer, text, count=5, window=8, generator=torch.Generator().manual_seed(s)
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    starts = draws[0][:, 0]
    assert len(set(starts.tolist())) == 5
    assert torch.equal(draws[0], starts[:, None] + torch.arange(8))
    assert (starts % 8 == 0).all()


def test_too_few_calibration_windows_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        TextError, match="'t' has 0 windows of 21 tokens, fewer than the 1 asked for"
    ):
        calibration_blocks(
            tokenizer,
            CalibrationText("t", words(20)),
            count=1,
            window=21,
            generator=torch.Generator(),
        )
    with pytest.raises(TextError, match="has 2 windows of 8 tokens, fewer than the 3 asked for"):
        calibration_blocks(
            tokenizer,
            CalibrationText("t", words(20)),
            count=3,
            window=8,
            generator=torch.Generator(),
        )


def test_a_text_is_tokenised_whole_and_once(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenise(tokenizer, TestText("t", words(130))).tolist() == [i % 64 for i in range(130)]


def test_wikitext_on_disk_has_its_known_size(data_dir: Path) -> None:
    text = load_text(data_dir / "wikitext2" / "wiki.test.raw", TestText)
    assert text.content.startswith(" = Robert Boulter = \n")
    assert len(text.content.splitlines()) == 2_891
