"""One file of every kind: what reads it, and who else says what it holds.

The other readers are transformers, and Python's own reader of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from prunenet.checkpoints.contents import _DROPPED
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.records import find_masks, load_provenance
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.cli.inputs import printed_rows
from prunenet.cli.tables import provenance_facts
from prunenet.compare.results import Results
from prunenet.compare.summary import markdown, summarise
from prunenet.evaluation.report import draw_report
from prunenet.evaluation.task_files import COLUMNS, read_task
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.training.recipe import recipe_for
from prunenet.policies.training.train import train
from prunenet.text.cached import Wanted, cached_text
from prunenet.text.corpora import CalibrationText, load_text

from .commands import measured, tiny

_TEXT = "w1 w2 w3 w7 unknown"


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of file.

    Attributes:
        kind: its name.
        file: where one lies.
        read: what is made of it; compared by ==.
        says: what another reader makes of it; None: it may hold one thing only.
    """

    kind: str
    file: Path
    read: Callable[[], Any]
    says: Callable[[], Any] = lambda: None


@cache
def libraries() -> tuple[str, ...]:
    """Where a process may read, whatever it is given."""
    repository = Path(__file__).resolve().parents[2]
    found = {
        sys.prefix,
        sys.base_prefix,
        str(repository),
        *("/proc", "/dev", "/sys", "/usr", "/lib"),
    }
    found |= {os.path.realpath(place) for place in (sys.prefix, sys.base_prefix)}
    found |= {str(Path.home() / ".cache"), str(Path.home() / ".config" / "matplotlib")}
    return tuple(found)


def made(root: Path) -> list[Target]:
    """Every kind, with its files in a new folder."""
    root.mkdir()
    model = tiny(root / "m")
    model.save_pretrained(root / "s", max_shard_size="20KB")
    policy = Policy.untrained(PolicyConfig(hidden=(8,)))
    with torch.no_grad():
        policy.scorer.widths.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    prune(model, policy, ratio=0.4, widths="per-layer").save_pretrained(root / "cut")
    kept = [
        *_of_models(root / "m", root / "s", root / "cut"),
        *_of_tokenizer(root / "m"),
        *_of_cut(root / "cut"),
        *_of_policy(model, policy, root / "policy"),
        _of_run(model, root / "run"),
        *_of_texts(model, root),
        *_of_results(root),
    ]
    _traps(root)
    return kept


def _of_tokenizer(dense: Path) -> list[Target]:
    def read() -> Any:
        return _ids(load_tokenizer(dense))

    def said() -> Any:
        return _ids(AutoTokenizer.from_pretrained(dense, trust_remote_code=False))

    return [
        Target("tokenizer config", dense / "tokenizer_config.json", read, said),
        Target("tokenizer", dense / "tokenizer.json", read, said),
    ]


def _of_cut(cut: Path) -> list[Target]:
    masks = cut / "prunenet_masks.safetensors"
    return [
        Target("provenance", cut / "prunenet.json", lambda: _recorded(cut), lambda: _plain(cut)),
        Target(
            "masks",
            masks,
            lambda: [m.tolist() for m in find_masks(cut)[0] or ()],
            lambda: None if masks.exists() else [],
        ),
    ]


def _of_policy(model: PreTrainedModel, policy: Policy, folder: Path) -> list[Target]:
    policy.save_pretrained(folder)
    files = {"policy": "config.json", "policy weights": "model.safetensors"}
    return [Target(n, folder / file, lambda: _applied(folder, model)) for n, file in files.items()]


def _of_run(model: PreTrainedModel, run: Path) -> Target:
    """The state of a training, which goes on."""
    recipe = recipe_for("spectral", {"updates": 2, "masks": 2, "evaluate_every": 1})
    train(model, recipe, out=run)

    def trained() -> str:
        with TemporaryDirectory() as home:  # for it writes there
            copy = Path(home, "run")
            shutil.copytree(run, copy, copy_function=os.link)
            return train(model, recipe, out=copy, resume=True).policy.sha256

    return Target("state", run / "training" / "channels" / "state.safetensors", trained)


def _of_texts(model: PreTrainedModel, root: Path) -> list[Target]:
    """Text that the model has written, and one from outside."""
    text, cache = root / "text.txt", root / "cache"
    text.write_text("Eine Zeile, déjà vu.\n\n" * 20, encoding="utf-8")

    def written() -> torch.Tensor:
        return cached_text(model, {"seed": 0}, _WANTED, cache, _written)

    written()
    (cached,) = cache.iterdir()
    return [
        Target("cached text", cached, lambda: written().tolist()),
        Target(
            "text",
            text,
            lambda: load_text(text, CalibrationText).content,
            lambda: _characters(text),
        ),
    ]


def _of_results(root: Path) -> list[Target]:
    """What commands have measured, and the questions of a task."""
    task, lines, report = root / "arc_easy.jsonl", root / "lines.jsonl", root / "report.json"
    row = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    task.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    lines.write_text("".join(json.dumps(_line(cell)) + "\n" for cell in "ab"))
    report.write_text(json.dumps({"models": [measured(0.0), measured(0.3)]}))
    return [
        Target("comparison", lines, lambda: _compared(lines), lambda: _objects(lines)),
        Target(
            "report",
            report,
            lambda: _drawn(report, root / "r.png"),
            lambda: json.loads(report.read_text())["models"],
        ),
        Target("task", task, lambda: _asked(task), lambda: _read_columns(task)),
    ]


_WANTED_BESIDE = ("model.safetensors.index.json", "generation_config.json", "modeling.py")
_WANTED = Wanted(rows=4, tokens=8, start=298, vocabulary=300)


def _written() -> torch.Tensor:
    ids = torch.arange(32).view(4, 8)
    ids[:, 0] = 298
    return ids


def _of_models(dense: Path, shards: Path, cut: Path) -> list[Target]:
    """The files that make a model, of three models."""
    said = {folder: lambda folder=folder: _by_transformers(folder) for folder in (dense, shards)}
    code = cut / "config.json"
    known = json.loads(code.read_text())

    def of_cut() -> Any:
        """Only what is beside the structure may change, and then transformers is asked."""
        fields = json.loads(code.read_text())
        if fields.get("auto_map") != known["auto_map"]:
            fields["auto_map"] = known["auto_map"]
        return _by_transformers(cut, fields)

    return [
        Target("config.json", dense / "config.json", lambda: both_ways(dense), said[dense]),
        Target("config.json, per-layer", code, lambda: both_ways(cut), of_cut),
        Target(
            "index",
            shards / "model.safetensors.index.json",
            lambda: both_ways(shards),
            said[shards],
        ),
        Target("weights", dense / "model.safetensors", lambda: both_ways(dense), said[dense]),
        Target(
            "generation", dense / "generation_config.json", lambda: both_ways(dense), said[dense]
        ),
    ]


def both_ways(folder: Path) -> str:
    """Loads and streams a model, and computes with it; both ways must agree.

    Raises:
        AssertionError: they do not.
    """
    answers: list[Any] = []
    for read in (load_model, _streamed):
        try:
            answers.append(read(folder))
        except ValueError as error:
            answers.append(error)
    first, second = answers
    failed = [isinstance(answer, ValueError) for answer in answers]
    if all(failed):
        raise first
    assert not any(failed), f"in memory: {str(first)[:150]!r}, streamed: {str(second)[:150]!r}"
    found = dict(first.state_dict())
    assert all(found[name].equal(tensor) for name, tensor in second.items()), "tensors differ"
    return _logits(first)


def _streamed(folder: Path) -> dict[str, torch.Tensor]:
    stored = StreamedCheckpoint.open(folder).stored
    return {name: tensor.whole() for name, tensor in stored.items()}


def _by_transformers(folder: Path, fields: dict[str, Any] | None = None) -> str:
    """The logits of the model that transformers reads, without what says how it is run."""
    fields = fields or json.loads((folder / "config.json").read_text())
    fields = {name: value for name, value in fields.items() if name not in _DROPPED}
    with TemporaryDirectory() as home:
        place = Path(home, "m")
        place.mkdir()
        for path in folder.iterdir():
            if path.suffix == ".safetensors" or path.name in _WANTED_BESIDE:
                (place / path.name).symlink_to(path)
        (place / "config.json").write_text(json.dumps(fields))
        ours = "per_layer_ffn" in fields  # our own code, and our own only
        return _logits(
            AutoModelForCausalLM.from_pretrained(place, trust_remote_code=ours, dtype="auto")
        )


def _logits(model: Any) -> str:
    """A hash of the logits of fixed token ids."""
    ids = torch.arange(24).view(2, 12) % model.config.vocab_size
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, return_dict=True, use_cache=False).logits
    return hashlib.sha256(logits.float().contiguous().numpy().tobytes()).hexdigest()


def _ids(tokenizer: Any) -> list[Any]:
    from prunenet.text.windows import bos_token, tokenise

    text = CalibrationText(name="t", content=_TEXT)
    return [tokenise(tokenizer, text).tolist(), bos_token(tokenizer)]


def _recorded(cut: Path) -> Any:
    made = load_provenance(cut)
    provenance_facts(made, cut)
    return json.loads(made.to_json())


def _plain(cut: Path) -> Any:
    """What provenance must say of a file: its fields, and for those that are missing, what it has
    always said.
    """
    fields, read = json.loads((cut / "prunenet.json").read_text()), _recorded(cut)
    return {name: fields.get(name, value) for name, value in read.items()}


def _applied(folder: Path, model: Any) -> Any:
    policy = Policy.from_pretrained(folder)
    cut = prune(model, policy, ratio=0.3)
    return [policy.sha256, [mask.tolist() for mask in cut.keep], asdict(policy.config)]


def _compared(path: Path) -> Any:
    results = Results(path)
    lines = [results[cell] for cell in "ab" if results.complete(cell)]
    if lines:
        markdown(summarise(lines), lines)
    return _by_cell(results._lines.values())


def _objects(path: Path) -> Any:
    """The objects of JSON lines; of a comparison, without one that is cut off."""
    content = path.read_bytes() if path.exists() or path.stem != "lines" else b""
    if path.stem == "lines":
        content = content[: content.rfind(b"\n") + 1]
    rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    return _by_cell(rows) if path.stem == "lines" else rows


def _read_columns(path: Path) -> Any:
    """The objects, with the columns that the task reads and no others."""
    return [
        {name: row[name] for name in row if name in COLUMNS["arc_easy"]} for row in _objects(path)
    ]


def _by_cell(lines: Any) -> Any:
    return {line["cell"]: line for line in lines}


def _drawn(path: Path, out: Path) -> Any:
    rows = printed_rows(path)
    draw_report(rows, out)
    return rows


def _asked(path: Path) -> Any:
    return list(read_task("arc_easy", path)[0])


def _characters(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")


def _line(cell: str) -> dict[str, Any]:
    asked = {"texts": [{"text": "t", "sha256": "0"}], "tasks": {}, "window": 8, "stride": 8}
    return {
        "cell": cell,
        "error": None,
        "method": f"random {cell}",
        "ratio": 0.3,
        "seed": 0,
        "model": "m",
        "dtype": "float32",
        "regime": "weights",
        "applied_regime": "weights",
        "evaluation": asked | {"limit": None, "max_windows": None},
        "parameters": 1000,
        "perplexity": [{"text": "t", "value": 20.0, "tokens": 64}],
        "accuracy": None,
        "tasks": None,
        "seconds_pruning": 1.0,
        "seconds_calibration": None,
        "versions": {"prunenet": "0"},
    }


class _Bomb:
    def __reduce__(self) -> Any:
        return (os.system, ("touch canary",))


def _traps(root: Path) -> None:
    """Puts code, pickles and templates beside every model, and secrets beside them all."""
    (root / "secret").mkdir()
    (root / "secret" / "s.json").write_text('{"secret": 1}')
    (root / "secret" / "model.safetensors").write_bytes(
        (root / "m" / "model.safetensors").read_bytes()
    )
    code = f"open({str(root / 'canary')!r}, 'w').close()\nclass Evil: pass\n"
    for folder in (root / name for name in ("m", "s", "cut", "policy")):
        for name in ("evil.py", "tokenization.py", "configuration.py"):
            (folder / name).write_text(code)
        for name in ("pytorch_model.bin", "optimizer.pt", "vocab.pkl"):
            (folder / name).write_bytes(pickle.dumps(_Bomb()))
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
