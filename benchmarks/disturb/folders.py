"""Odd and hostile folders through `prunenet prune`, in memory and streamed.

Both ways must have the same result, or end in one sentence; nothing is executed, and nothing
outside the folder is read. The odd ones are those of `tests/test_odd_folders.py`, the hostile ones
are here.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .children import outcome, ran
from .commands import Yard, snapshot
from .fuzz import Guard, allowed
from .kinds import Kind, Outcome

Change = Callable[[Path], object]
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_ASKED = ("prune", "m", "--moments", "none", "--ratio", "0.3", "--out")


def kinds(yard: Yard) -> Iterator[Kind]:
    """Odd ones and hostile ones."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
    from families import tiny_model
    from test_odd_folders import HARMLESS, REFUSED

    plain = yard.home / "plain"
    if not plain.exists():
        tiny_model("llama", tied=True).save_pretrained(plain)
    odd = HARMLESS | {name: change for name, (change, _) in REFUSED.items()}
    for name, changes in (("odd folders", odd), ("hostile folders", hostile())):
        attempt = partial(_pruned, yard, plain, list(changes.items()))
        yield Kind("folders", name, attempt, len(changes))


def _pruned(
    yard: Yard, plain: Path, changes: list[tuple[str, Change]], number: int, _: random.Random
) -> Outcome:
    name, change = changes[number]
    place = yard.home / "trial"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(plain, place / "m")
    (place / "secret").mkdir()
    (place / "secret" / "s.json").write_text('{"secret": 1}')
    shutil.copyfile(plain / _WEIGHTS, place / "secret" / "s.safetensors")
    change(place / "m")
    guard = Guard(place)
    ends = []
    for out, more in (("out", ()), ("streamed", ("--stream",))):
        argv = (*_ASKED, out, *more)
        ends.append(ran(argv, place, yard.home / "spool", allowed=partial(allowed, place)))
    faults = [fault for end in ends for fault in end.faults()] + guard.seen()
    os.close(guard.notes)
    if {end.code for end in ends} - {0, 1}:
        faults.append(("exit code", f"{[end.code for end in ends]}: {ends[0].err[-200:]}"))
    if ends[0].code != ends[1].code:
        faults.append(("different", f"{[end.sentence for end in ends]}"))
    elif not ends[0].code:
        weights = [snapshot(place / out)[_WEIGHTS] for out in ("out", "streamed")]
        if weights[0] != weights[1]:
            faults.append(("different", "in memory and streamed"))
    seen = [(fault, f"{name}: {text}") for fault, text in faults]
    return outcome("pruned" if not ends[0].code else "clean", seen)


def hostile() -> dict[str, Change]:
    """Every hostile folder by its name."""
    found: dict[str, Change] = {}
    for name in (_CONFIG, _WEIGHTS, "generation_config.json", "tokenizer.json"):
        for what, put in _THINGS.items():
            found[f"{name} is {what}"] = partial(_instead, name, put)
    for place in _PLACES:
        found[f"an index that names {place[:40]!r}"] = partial(_pointing, place)
    for number, code in enumerate(_CODE):
        found[f"code {number}"] = partial(_with_code, code)
    for name in _PICKLES:
        found[f"a pickle {name}"] = partial(_pickled, name, True)
        found[f"a pickle {name} alone"] = partial(_pickled, name, False)
    for name, header in _HEADERS.items():
        found[f"a header with {name}"] = partial(_headed, header)
    for name in _NAMES:
        found[f"a file {name!r}"] = partial(_beside, name)
    return found


_THINGS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "empty": Path.touch,
    "sparse": lambda path: (path.touch(), os.truncate(path, 2**36)),
}
_PLACES = (
    *("../secret/s.safetensors", "/etc/passwd", "m/../../secret/s.safetensors"),
    *("..\\secret\\s.safetensors", "%2e%2e/secret/s.safetensors", "file:///etc/passwd"),
    *("https://example.org/s.safetensors", "~/s.safetensors", ".safetensors", "."),
    *("s.safetensors\0", "x" * 5000 + ".safetensors", "\u202esafetensors.s", "evil.py"),
    *("-model.safetensors", "*.safetensors", "pytorch_model.bin", "|id.safetensors"),
)
_CODE = (
    {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}},
    {"auto_map": {"AutoModelForCausalLM": "owner/repo--evil.Evil"}},
    {"auto_map": {"AutoModelForCausalLM": ["evil.Evil", "evil.Evil"]}},
    {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}, "architectures": ["Evil"]},
    {"auto_map": "evil.Evil"},
    {"custom_pipelines": {"x": {"impl": "evil.Evil", "pt": ["AutoModelForCausalLM"]}}},
    {"attn_implementation": "evil/kernel:evil", "_attn_implementation": "evil"},
    {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
    {"quantization_config": {"quant_method": "evil", "modules": ["evil"]}},
    {"dtype": "os.system", "torch_dtype": "evil"},
    {"hidden_act": "evil"},
    {"hidden_act": "__import__"},
    {"_class_name": "evil.Evil", "_name_or_path": "../secret"},
    {"base_model_name_or_path": "../secret", "peft_type": "LORA"},
    {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
    {"rope_parameters": {"rope_type": "evil", "rope_theta": 1e4}},
    {"transformers_version": "0.0.0; import evil"},
)
_PICKLES = ("pytorch_model.bin", "model.pt", "model.safetensors.bin", "training_args.bin")
_TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
_HEADERS: dict[str, object] = {
    "nothing": {},
    "a length beyond the file": 2**40,
    "a length beyond all numbers": 2**64 - 1,
    "no JSON": b"evil",
    "a list": [],
    "an unknown dtype": {"x": _TENSOR | {"dtype": "F7"}},
    "a negative shape": {"x": _TENSOR | {"shape": [-2]}},
    "a huge shape": {"x": _TENSOR | {"shape": [2**62, 2**62]}},
    "overlapping tensors": {"x": _TENSOR, "y": _TENSOR},
    "offsets beyond the file": {"x": _TENSOR | {"data_offsets": [0, 2**50]}},
    "offsets that fall": {"x": _TENSOR | {"data_offsets": [8, 0]}},
    "numbers as metadata": {"__metadata__": {"format": 1}, "x": _TENSOR},
    "another framework": {"__metadata__": {"format": "flax"}, "x": _TENSOR},
    "tensors of other models": {"../../secret": _TENSOR},
    "deep nesting": b"[" * 5000,
}
_NAMES = (
    *("sitecustomize.py", "torch.py", "json.py", "conftest.py", "setup.py", "modeling.py"),
    *("x\ny.json", "\u001b[2J.safetensors", "tokenizer\u202e.json", "x" * 255, ".prunenet.lock"),
    *(".m.lock", "model.safetensors.lock", "chat_template.jinja", "tf_model.h5", "-rf"),
)


def _code(folder: Path) -> str:
    return f"open({str(folder.parent / 'canary')!r}, 'w').close()\nclass Evil: pass\n"


def _instead(name: str, put: Callable[[Path], object], folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    put(folder / name)


def _pointing(place: str, folder: Path) -> None:
    header = (folder / _WEIGHTS).read_bytes()
    names = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
    names.pop("__metadata__", None)
    (folder / _WEIGHTS).unlink()
    (folder / "evil.py").write_text(_code(folder))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
    (folder / _INDEX).write_text(json.dumps(index))


def _with_code(fields: dict[str, object], folder: Path) -> None:
    known = json.loads((folder / _CONFIG).read_text())
    (folder / _CONFIG).write_text(json.dumps(known | fields))
    for name in ("evil.py", "modeling.py", "__init__.py", "kernel.py"):
        (folder / name).write_text(_code(folder))


class _Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


def _pickled(name: str, beside: bool, folder: Path) -> None:
    (folder / name).write_bytes(pickle.dumps(_Bomb(folder.parent / "canary")))
    if not beside:
        (folder / _WEIGHTS).unlink()


def _headed(header: object, folder: Path) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = header if isinstance(header, int) else len(text)
    (folder / _WEIGHTS).write_bytes(struct.pack("<Q", length) + text + bytes(64))


def _beside(name: str, folder: Path) -> None:
    (folder / name).write_text(_code(folder) if name.endswith(".py") else "{{ evil }}")
