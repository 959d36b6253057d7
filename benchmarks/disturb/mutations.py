"""Draws a mutation of a file: bytes, values where it holds JSON, or what the file is."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 0.5, -0.0, 1e308, 10**9, 10**18, 2**63, "", "x", "3", "../x"),
    *("/etc/passwd", "auto", "llama", "x\u001b[2J", "z" * 5000, [], {}, [1], ["x"], {"a": 1}, [[]]),
    *("../secret/model.safetensors", "../secret", "../../secret/s.json", "model.safetensors"),
    *(
        "evil.py",
        "evil",
        "evil--x.Evil",
        {"AutoModelForCausalLM": "evil.Evil"},
        "file:///etc/group",
    ),
    {
        "AutoConfig": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", None],
        "AutoModel": "../m--evil.Evil",
    },
    "{{ self.__init__.__globals__['os'].system('touch canary') }}",
    "{% for c in ().__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
)
# Written into the text, for Python's own writer would not.
_RAW = ("NaN", "Infinity", "1e999", "1" + "0" * 400, '"\\ud83d"', "[" * 3000 + "]" * 3000)
_NAMES = (
    *("to_dict", "save_pretrained", "__class__", "_name_or_path", "attn_implementation", "x"),
    *("auto_map", "tokenizer_file", "chat_template", "custom_generate", "quantization_config"),
    *("__metadata__", "trust_remote_code", "base_model_name_or_path", "pad_token", "dtype"),
)
_HUGE = 2**33


def mutate(path: Path, draw: random.Random) -> str:
    """Change a file in a drawn way.

    Returns:
        What was done, in a few words.
    """
    if draw.random() < 0.04:
        return _other_thing(path, draw)
    content = path.read_bytes()
    changed, how = mutated(content, draw)
    path.unlink()  # the same file may have another name
    path.write_bytes(changed)
    return how


def mutated(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Another content, drawn: bytes changed anywhere, or values where the file holds JSON."""
    header = struct.unpack("<Q", content[:8])[0] if len(content) > 8 else 0
    if draw.random() < 0.25:
        return _bytes_changed(content, draw)
    if 8 + header < len(content):  # safetensors: the header is JSON, the rest numbers
        if draw.random() < 0.4:
            tail, how = _bytes_changed(content[8 + header :], draw)
            return content[: 8 + header] + tail, how
        text, how = _values_changed(content[8 : 8 + header], draw)
        return struct.pack("<Q", len(text)) + text + content[8 + header :], how
    lines = content.splitlines(keepends=True)
    if content[:1] == b"{" and len(lines) > 1 and lines[0].rstrip().endswith(b"}"):  # JSON lines
        number = draw.randrange(len(lines))
        text, how = _values_changed(lines[number], draw)
        lines[number] = text + b"\n"
        return b"".join(lines), f"line {number + 1}, {how}"
    if content[:1] not in (b"{", b"["):
        return _bytes_changed(content, draw)
    return _values_changed(content, draw)


def _other_thing(path: Path, draw: random.Random) -> str:
    """Puts something else in the place of a file."""
    path.unlink()
    what = draw.choice(("nothing", "empty", "folder", "pipe", "a link to itself", "huge"))
    if what == "empty":
        path.touch()
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "a link to itself":
        path.symlink_to(path.name)
    elif what == "huge":  # sparse
        path.touch()
        os.truncate(path, _HUGE)
    return what


def _bytes_changed(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    changed, done = bytearray(content), []
    for _ in range(draw.choice((1, 1, 3, 20))):
        place = draw.randrange(len(changed) + 1)
        how = draw.randrange(4)
        if how == 0 and place < len(changed):
            changed[place] = draw.randrange(256)
        elif how == 1:
            del changed[place : place + draw.choice((1, 8, 1000))]
        elif how == 2:
            changed[place:place] = draw.randbytes(draw.choice((1, 8, 100)))
        else:
            del changed[place:]
        done.append(place)
    return bytes(changed), f"bytes at {done[:3]}"


def _values_changed(text: bytes, draw: random.Random) -> tuple[bytes, str]:
    value = json.loads(text)
    raw, done = None, []
    for _ in range(draw.choice((1, 1, 1, 3))):
        places = list(_places(value))
        holder, key = draw.choice(places) if places else ({}, "")
        how = draw.randrange(7)
        if how == 0:
            raw = draw.choice(_RAW)
            holder[key] = "RAW"
        elif how == 1:
            del holder[key]
        elif how == 2 and isinstance(holder, dict):
            key = draw.choice((*_NAMES, *holder))
            holder[key] = copy.deepcopy(draw.choice(_VALUES))
        elif how == 3:
            holder[key] = [copy.deepcopy(holder[key])]
        elif how == 4 and isinstance(value, dict):  # a name twice
            raw = f"0, {json.dumps(key if isinstance(key, str) else 'x')}: 1"
            value["RAW"] = "RAW"
        else:
            holder[key] = copy.deepcopy(draw.choice(_VALUES))
        now = holder.get(key, "gone") if isinstance(holder, dict) else "?"
        done.append(f"{str(key)[:40]} = {str(now)[:40]!r}")
    changed = json.dumps(value).replace('"RAW"', raw or "0").encode()
    return changed, ", ".join(done)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(object or list, key or index) of every value inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(inner):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)
