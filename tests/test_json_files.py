"""One reader for every JSON file: what it lets through is what the schema says, and the rest is one
sentence.
"""

import math
import os
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

import pytest

from prunenet.runtime.json_files import (
    DEPTH,
    SIZE,
    JsonError,
    Positive,
    Within,
    parse_json,
    read_json,
)


class Some(TypedDict, total=False):
    layers: Positive
    name: str | None
    shares: list[float]
    how: dict[str, Any]
    kind: Literal["a", "b"]


@dataclass(frozen=True)
class Record:
    ratio: Annotated[float, Within(0, 1)]
    widths: tuple[int, ...]
    pairs: tuple[tuple[int, float], ...] = ()
    about: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if 13 in self.widths:
            raise ValueError("13 is no width")


def test_what_fits_the_schema_comes_through_as_it_was_written() -> None:
    text = '{"layers": 3, "name": null, "shares": [1, 0.5], "kind": "a", "else": [true, {}]}'
    assert parse_json(text, Some) == {
        "layers": 3,
        "name": None,
        "shares": [1, 0.5],
        "kind": "a",
        "else": [True, {}],
    }


def test_a_dataclass_is_built_and_its_lists_are_tuples() -> None:
    text = b'\xef\xbb\xbf{"ratio": 1, "widths": [8, 16], "pairs": [[1, 0.5]], "about": {"a": "b"}}'
    assert parse_json(text, Record) == Record(1, (8, 16), ((1, 0.5),), {"a": "b"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers": 0}', "layers is 0, not 1 or more"),
        ('{"layers": true}', "layers is True, not a whole number"),
        ('{"layers": 3.0}', "layers is 3.0, not a whole number"),
        ('{"name": 3}', "name is 3, not a text"),
        ('{"shares": [1, true]}', r"shares\[1\] is True, not a number"),
        ('{"shares": {}}', "shares is {}, not a list"),
        ('{"kind": "c"}', 'kind is \'c\', not one of "a", "b"'),
        ('{"how": []}', r"how is \[\], not an object"),
        ("[]", "it does not hold a JSON object"),
        ('{"a": 1, "a": 2}', "it has 'a' twice"),
        ('{"a": {"b": NaN}}', "it has NaN, which is no finite number"),
        ('{"a": -Infinity}', "it has -Infinity, which is no finite number"),
        ('{"a": 1e999}', "which is no finite number"),
        ('{"a": 1' + "0" * 400 + "}", "a number of 401 digits"),
        ('{"a": 1' + "0" * 5000 + "}", "a number of 5001 digits"),
        ("[" * 100_000 + "]" * 100_000, "nested more than"),
        ("[" * 500 + "]" * 500, "nested more than"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested more than"),
        ('{"a": "\\ud83d"}', "half of a surrogate pair"),
        ('{"\\uDE00": 1}', "half of a surrogate pair"),
        ("{", "not JSON, .* at line 1"),
        ("", "not JSON"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    ],
)
def test_everything_else_is_one_short_sentence_that_names_field_and_value(text, message) -> None:
    with pytest.raises(JsonError, match=message) as error:
        parse_json(text, Some)
    assert len(str(error.value)) < 200
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"ratio": 2, "widths": []}', "ratio is 2, not from 0 to 1"),
        ('{"ratio": 0.5}', "it lacks widths"),
        ('{"ratio": 0.5, "widths": [8], "more": 1}', "it has more, which is not known here"),
        ('{"ratio": 0.5, "widths": ["8"]}', r"widths\[0\] is '8', not a whole number"),
        ('{"ratio": 0.5, "widths": [], "pairs": [[1]]}', r"pairs\[0\] has 1 items, not 2"),
        ('{"ratio": 0.5, "widths": [], "about": {"a": 1}}', "about.a is 1, not a text"),
        ('{"ratio": 0.5, "widths": [13]}', "13 is no width"),
    ],
)
def test_a_dataclass_takes_its_fields_and_no_others(text, message) -> None:
    with pytest.raises(JsonError, match=message):
        parse_json(text, Record)


def test_what_a_file_names_does_not_reach_the_sentence_at_length_or_with_escapes() -> None:
    with pytest.raises(JsonError) as error:
        parse_json('{"%s\\u001b[2J": 1, "ratio": 1, "widths": []}' % ("z" * 5000), Record)
    assert len(str(error.value)) < 200
    assert str(error.value).isprintable()


def test_configurations_of_python_s_json_have_infinities_and_no_nan() -> None:
    text = '{"limit": [0.0, Infinity], "low": -Infinity}'
    assert parse_json(text, dict, infinite=True) == {"limit": [0.0, math.inf], "low": -math.inf}
    for text in ('{"a": NaN}', '{"a": 1e999}'):
        with pytest.raises(JsonError, match="is no finite number"):
            parse_json(text, dict, infinite=True)
    with pytest.raises(JsonError, match="layers is inf, not a whole number"):
        parse_json('{"layers": Infinity}', Some, infinite=True)


def test_nesting_up_to_the_bound_is_read() -> None:
    text = "[" * DEPTH + "]" * DEPTH
    assert parse_json(text, list)
    with pytest.raises(JsonError, match="nested"):
        parse_json(f"[{text}]", list)


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert parse_json('{"a": "\\ud83d\\ude00"}', dict) == {"a": "\N{GRINNING FACE}"}


def test_a_file_is_named_with_the_remedy_and_the_error_is_of_the_class_asked_for(tmp_path) -> None:
    class Mine(ValueError):
        pass

    path = tmp_path / "some.json"
    path.write_text('{"layers": -1}')
    with pytest.raises(Mine, match=r"some\.json is damaged: layers is -1, .*; fetch it again$"):
        read_json(path, Some, error=Mine, remedy="fetch it again")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", Some, error=Mine, remedy="fetch it again")


def test_pipes_devices_folders_and_huge_files_are_not_read(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(SIZE + 1)
    for name, message in (
        ("pipe", "not a regular file"),
        ("link", "not a regular file"),
        ("folder", "not a regular file"),
        ("huge", "more than"),
    ):
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / name, Some, remedy="give another")
