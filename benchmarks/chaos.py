r"""Mutates files and hands them to the loaders, and counts what comes of it.

    python benchmarks/chaos.py fuzz --count 2000 --out benchmarks/results/chaos.jsonl

Each line is one kind of file: how many mutations were tried, how many ended in one sentence
(`clean`), were taken as they are (`accepted`), in another exception (`tracebacks`), in no answer
within 20 seconds (`hangs`), or in two answers from the two ways to read a model (`differ`). A
mutation is drawn by the seed, the kind and its number, so any of them can be made again.
"""

from __future__ import annotations

import copy
import json
import random
import signal
import struct
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import append_line, parser
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.records import load_masks, load_provenance
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.cli.tables import provenance_facts
from prunenet.compare.results import Results
from prunenet.compare.summary import markdown, summarise
from prunenet.evaluation.report import draw_report
from prunenet.evaluation.task_files import read_task
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.training.recipe import recipe_for
from prunenet.policies.training.train import train
from prunenet.runtime.json_files import read_json

SECONDS, LONGEST = 20.0, 600
_CLEAN = (ValueError, OSError, ImportError)  # what the command line turns into one sentence
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 0.5, -0.0, 1e308, 10**9, 10**18, 2**63, "", "x", "3", "../x"),
    *("/etc/passwd", "auto", "llama", "x\u001b[2J", "z" * 5000, [], {}, [1], ["x"], {"a": 1}, [[]]),
)
# Written into the text, for Python's own writer would not.
_RAW = ("NaN", "Infinity", "1e999", "1" + "0" * 400, '"\\ud83d"', "[" * 3000 + "]" * 3000)
_NAMES = ("to_dict", "save_pretrained", "__class__", "_name_or_path", "attn_implementation", "x")


class Differ(Exception):
    """Two ways to read a model gave two answers."""


class Hang(BaseException):
    """No answer in time; no library catches it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of file: where one lies, and what reads it."""

    kind: str
    file: Path
    read: Callable[[], object]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Another content, drawn: bytes changed anywhere, or values where the file holds JSON."""
    header = struct.unpack("<Q", content[:8])[0] if len(content) > 8 else 0
    if draw.random() < 0.25:
        return _bytes_changed(content, draw)
    if 8 + header < len(content):  # safetensors: the header is JSON, the rest numbers
        if draw.random() < 0.4:
            return content[: 8 + header] + _bytes_changed(content[8 + header :], draw)
        text = _values_changed(content[8 : 8 + header], draw)
        return struct.pack("<Q", len(text)) + text + content[8 + header :]
    lines = content.splitlines(keepends=True)
    if content[:1] == b"{" and len(lines) > 1 and lines[0].rstrip().endswith(b"}"):  # JSON lines
        number = draw.randrange(len(lines))
        lines[number] = _values_changed(lines[number], draw) + b"\n"
        return b"".join(lines)
    return _values_changed(content, draw)


def _bytes_changed(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
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
    return bytes(changed)


def _values_changed(text: bytes, draw: random.Random) -> bytes:
    value = json.loads(text)
    raw = None
    for _ in range(draw.choice((1, 1, 1, 3))):
        places = list(_places(value))
        holder, key = draw.choice(places) if places else ({}, "")
        how = draw.randrange(6)
        if how == 0:
            raw = draw.choice(_RAW)
            holder[key] = "RAW"
        elif how == 1:
            del holder[key]
        elif how == 2 and isinstance(holder, dict):
            holder[draw.choice((*_NAMES, *holder))] = draw.choice(_VALUES)
        elif how == 3:
            holder[key] = [copy.deepcopy(holder[key])]
        else:
            holder[key] = copy.deepcopy(draw.choice(_VALUES))
    return json.dumps(value).replace('"RAW"', raw or "0").encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(object or list, key or index) of every value inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(inner):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def outcome(read: Callable[[], object]) -> tuple[str, str]:
    """(what came of reading, the end of its traceback where it is a fault)."""
    try:
        with _in_time():
            read()
        return "accepted", ""
    except Hang as error:
        return "hangs", _end(error)
    except Differ as error:
        return "differ", str(error)[:300]
    except _CLEAN as error:
        fits = len(str(error)) <= LONGEST and "\n" not in str(error)
        return ("clean", "") if fits else ("unbounded", str(error)[:300])
    except Exception as error:
        return "tracebacks", _end(error)


def fuzz(target: Target, count: int, seed: int) -> dict[str, Any]:
    """Counts what comes of `count` mutations of a file, which is put back at the end."""
    content, counts, examples = target.file.read_bytes(), Counter[str](), Counter[str]()
    for number in range(count):
        draw = random.Random(f"{seed} {target.kind} {number}")
        try:
            target.file.write_bytes(mutated(content, draw))
            result, example = outcome(target.read)
        finally:
            target.file.write_bytes(content)
        counts[result] += 1
        if example:
            examples[f"{example} (number {number})"] += 1
    names = ("clean", "accepted", "tracebacks", "hangs", "differ", "unbounded")
    return {
        "part": "fuzz",
        "kind": target.kind,
        "seed": seed,
        "tried": count,
        **{name: counts[name] for name in names},
        "examples": list(examples)[:20],
    }


def targets(root: Path) -> list[Target]:
    """One file of every kind, with what reads it."""
    dense, shards, cut, policy, run = (root / n for n in ("m", "s", "cut", "policy", "run"))
    model = _tiny(dense)
    model.save_pretrained(shards, max_shard_size="20KB")
    chooser = Policy.untrained(PolicyConfig(hidden=(8,)))
    chooser.save_pretrained(policy)
    with torch.no_grad():
        chooser.scorer.widths.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    prune(model, chooser, ratio=0.4, widths="per-layer").save_pretrained(cut)
    recipe = recipe_for("spectral", {"updates": 2, "masks": 2, "evaluate_every": 1})
    train(model, recipe, out=run)
    task, lines, report = root / "arc_easy.jsonl", root / "lines.jsonl", root / "report.json"
    row = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    task.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    lines.write_text("".join(json.dumps(_line(cell)) + "\n" for cell in "ab"))
    report.write_text(json.dumps({"models": [_measured(0.0), _measured(0.3)]}))
    ids = torch.arange(24).view(2, 12)
    state = run / "training" / "channels" / "state.safetensors"
    return [
        Target("config.json", dense / "config.json", lambda: _both_ways(dense, ids)),
        Target("config.json, per-layer", cut / "config.json", lambda: _both_ways(cut, ids)),
        Target("index", shards / "model.safetensors.index.json", lambda: _both_ways(shards, ids)),
        Target("weights", dense / "model.safetensors", lambda: _both_ways(dense, ids)),
        Target("generation", dense / "generation_config.json", lambda: _both_ways(dense, ids)),
        Target(
            "tokenizer", dense / "tokenizer_config.json", lambda: load_tokenizer(dense)("w1 w2")
        ),
        Target("tokenizer.json", dense / "tokenizer.json", lambda: load_tokenizer(dense)("w1 w2")),
        Target(
            "provenance",
            cut / "prunenet.json",
            lambda: (provenance_facts(load_provenance(cut), cut), load_masks(cut)),
        ),
        Target("masks", cut / "prunenet_masks.safetensors", lambda: load_masks(cut)),
        Target("policy", policy / "config.json", lambda: _applied(policy, model)),
        Target("policy weights", policy / "model.safetensors", lambda: _applied(policy, model)),
        Target("state", state, lambda: train(model, recipe, out=run, resume=True)),
        Target("comparison", lines, lambda: _table(lines)),
        Target("report", report, lambda: _drawn(report, root / "report.png")),
        Target("task", task, lambda: read_task("arc_easy", task)),
    ]


def _tiny(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, **heads)).eval()
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(298)} | {"<s>": 298, "[UNK]": 299}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>"
    ).save_pretrained(folder)
    return model


def _measured(ratio: float) -> dict[str, Any]:
    speeds = {"prefill_tokens_per_second": 600.0, "decode_tokens_per_second": 30.0}
    return {"ratio": ratio, "parameters": 1000, "perplexity": 20.0, **speeds}


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


def _both_ways(folder: Path, ids: torch.Tensor) -> None:
    """Loads and streams a model, and computes with it; both ways must agree."""

    def loaded() -> dict[str, torch.Tensor]:
        model = load_model(folder)
        with torch.no_grad():
            assert model(input_ids=ids % model.config.vocab_size).logits.ndim == 3
        return dict(model.state_dict())

    def streamed() -> dict[str, torch.Tensor]:
        stored = StreamedCheckpoint.open(folder).stored
        return {name: tensor.whole() for name, tensor in stored.items()}

    answers: list[dict[str, torch.Tensor] | ValueError] = []
    for read in (loaded, streamed):
        try:
            answers.append(read())
        except ValueError as error:
            answers.append(error)
    first, second = answers
    if isinstance(first, ValueError) and isinstance(second, ValueError):
        raise first
    if isinstance(first, ValueError) or isinstance(second, ValueError):
        raise Differ(f"in memory: {str(first)[:120]!r}, streamed: {str(second)[:120]!r}")
    if not all(first[name].equal(tensor) for name, tensor in second.items()):
        raise Differ("the tensors differ")


def _applied(folder: Path, model: LlamaForCausalLM) -> None:
    policy = Policy.from_pretrained(folder)
    prune(model, policy, ratio=0.3)


def _table(path: Path) -> None:
    results = Results(path)
    lines = [results[cell] for cell in "ab" if results.complete(cell)]
    if lines:
        markdown(summarise(lines), lines)


def _drawn(path: Path, out: Path) -> None:
    report = read_json(path, dict[str, Any], remedy="make it anew")
    draw_report(report.get("models") or [], out)


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _end(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = [f for f in traceback.extract_tb(error.__traceback__) if "prunenet" in f.filename]
    place = own[-1] if own else frame
    said = f"{type(error).__name__}: {str(error)[:80]}"
    return f"{said} at {Path(place.filename).name}:{place.lineno} ({Path(frame.filename).name})"


def main() -> None:
    """Runs a part and appends its lines."""
    options = parser(__doc__)
    options.add_argument("part", choices=["fuzz"])
    options.add_argument("--count", type=int, default=2000, help="mutations in all")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kind", help="one kind of file alone")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [t for t in targets(Path(folder)) if arguments.kind in (None, t.kind)]
        for target in found:
            line = fuzz(target, -(-arguments.count // len(found)), arguments.seed)
            append_line(arguments.out, line)
            print({name: value for name, value in line.items() if value or name == "tried"})


if __name__ == "__main__":
    main()
