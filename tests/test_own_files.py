"""Files that only prunenet writes come back as they were written, or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunenet.runtime.own_files import ContentError, check_layout, layout_of, packed, unpacked

TENSORS = {
    "ids": torch.arange(12).view(3, 4),
    "weights": torch.linspace(-1, 1, 5),
    "half": torch.ones(2, 2).bfloat16(),
    "step": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
}
FACTS = {"run": {"name": "é", "rate": 0.1}, "updates": 3}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "own.safetensors"
    file.write_bytes(packed(TENSORS, FACTS))
    return file


def test_tensors_and_facts_come_back_and_every_reader_of_safetensors_reads_them(path) -> None:
    tensors, facts = unpacked(path)
    assert facts == FACTS
    for found in (tensors, load_file(path)):
        assert found.keys() == TENSORS.keys()
        assert all(found[name].equal(tensor) for name, tensor in TENSORS.items())
    check_layout(tensors, layout_of(TENSORS))


def test_the_same_content_gives_the_same_bytes() -> None:
    backwards = dict(reversed(TENSORS.items()))
    assert packed(backwards, FACTS) == packed(TENSORS, FACTS)


@pytest.mark.parametrize("where", ["ids", "weights", "half", "step"])
def test_a_changed_number_is_noticed(path, where) -> None:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[8 + length + header[where]["data_offsets"][0]] ^= 1
    path.write_bytes(content)
    load_file(path)
    with pytest.raises(ContentError, match="not what was written"):
        unpacked(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'\\"updates\\": 3', b'\\"updates\\": 4'),
        (b'"ids"', b'"idz"'),
        (b'"shape":[3,4]', b'"shape":[4,3]'),
    ],
)
def test_a_changed_header_is_noticed(path, old, new) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    load_file(path)
    with pytest.raises(ContentError, match="not what was written"):
        unpacked(path)


def test_files_of_versions_without_a_hash_are_read(path) -> None:
    save_file(TENSORS, path, metadata={"prunenet": json.dumps(FACTS)})
    assert unpacked(path)[1] == FACTS
    save_file(TENSORS, path)
    assert unpacked(path)[1] == {}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"0",
        lambda content: b"garbage" * 99,
        lambda content: content.replace(b'"I64"', b'"I65"'),
        lambda content: content.replace(b'\\"updates\\": 3', b'\\"updates\\": {'),
    ],
)
def test_damaged_files_are_one_short_sentence(path, spoil) -> None:
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ContentError) as error:
        unpacked(path)
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", [b"", (2).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_larger_than_its_header_says_is_not_read_into_memory(
    path, start, monkeypatch
) -> None:
    path.write_bytes(start)
    os.truncate(path, 2**40)  # sparse
    monkeypatch.setattr(type(path), "read_bytes", lambda _: pytest.fail("all of it was read"))
    with pytest.raises(ContentError, match=r"no safetensors file|its header says 0"):
        unpacked(path)


def test_a_pipe_or_a_folder_is_not_read(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ContentError, match="not a regular file"):
            unpacked(path)
    with pytest.raises(FileNotFoundError):
        unpacked(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, "it has no ids"),
        ({"more": torch.zeros(1)}, "it has 'more', which does not belong there"),
        ({"ids": torch.zeros(3, 4)}, r"ids is float32 \[3, 4\], not int64 \[3, 4\]"),
        ({"ids": torch.arange(12)}, r"ids is int64 \[12\], not int64 \[3, 4\]"),
        ({"weights": torch.full((5,), torch.nan)}, "weights has numbers that are not finite"),
    ],
)
def test_names_dtypes_and_shapes_are_those_that_were_asked_for(changes, message) -> None:
    found = {k: v for k, v in (TENSORS | changes).items() if v is not None}
    with pytest.raises(ContentError, match=message):
        check_layout(found, layout_of(TENSORS))
