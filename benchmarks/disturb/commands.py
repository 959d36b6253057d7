"""The commands that are disturbed, on tiny models; what a result is, and what may not be left over.

`Yard.made` builds the models and runs every command undisturbed. A trial runs in a copy of the
folder in which the command began, so that results can be compared byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .children import Ended, preload, ran
from .operations import Disturbance

_LOG = re.compile(r"/run_\d+(/|$)|/events\.out\.tfevents")
"""TensorBoard's logs: named by the clock, and of a resumed run in several files or folders."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command that is disturbed.

    Attributes:
        name: of the kind.
        argv: its arguments; what it reads and writes lies in its current folder.
        before: commands whose results it begins with.
        writes: what holds its result; none where it only prints.
        old: whether something older lies at `writes` that stays whole until it is replaced.
    """

    name: str
    argv: tuple[str, ...]
    before: tuple[str, ...] = ()
    writes: tuple[str, ...] = ("out",)
    old: bool = False


_SCORED = ("--window", "32", "--max-windows", "2")
_COMPARED = ("--ratios", "0.3", "--text", "t.txt", *_SCORED, "--out", "l.jsonl")
COMMANDS = (
    Command("prune weights", ("prune", "m", "--moments", "none", "--ratio", "0.3", "--out", "out")),
    Command("prune self", ("prune", "m", "--ratio", "0.3", "--tokens", "512", "--out", "out")),
    Command(
        "prune streamed",
        ("prune", "m", "--moments", "none", "--stream", "--ratio", "0.3", "--out", "out"),
    ),
    Command(
        "train",
        (*("train", "m", "--preset", "spectral", "--updates", "3", "--masks", "2"), "--out", "out"),
    ),
    Command(
        "compare",
        ("compare", "m", "random", "magnitude", *_COMPARED, "--markdown", "t.md"),
        before=("compare one",),
        writes=("l.jsonl", "t.md"),
        old=True,
    ),
    Command(
        "recover",
        (
            *("recover", "cut", "--teacher", "m", "--tokens", "512"),
            *("--steps", "2", "--batch", "2", "--rank", "2", "--out", "out"),
        ),
        before=("cut",),
    ),
    Command("export", ("export", "cut", "--pad", "--out", "out"), before=("cut",)),
    Command("eval", ("eval", "m", "--text", "t.txt", *_SCORED, "--no-speed", "--json"), writes=()),
    Command("report", ("report", "r.json", "--out", "r.png"), writes=("r.png",), old=True),
)
_FIRST = (
    Command(
        "cut",
        (
            *("prune", "m", "--moments", "none", "--widths", "per-layer"),
            *("--ratio", "0.3", "--out", "cut"),
        ),
        writes=("cut",),
    ),
    Command(
        "compare one",
        ("compare", "m", "random", *_COMPARED, "--markdown", "t.md"),
        writes=("l.jsonl", "t.md"),
    ),
)


@dataclass(frozen=True, slots=True)
class Reference:
    """An undisturbed run.

    Attributes:
        command: that ran.
        start: the folder in which it began.
        files: what lay there at its end: path -> hash of what counts in it.
        printed: on standard output, where that is the result.
        seconds: that it took.
        operations: on files, in their order.
        before: as `files`, when it began.
    """

    command: Command
    start: Path
    files: dict[str, str]
    printed: str
    seconds: float
    operations: tuple[str, ...]
    before: dict[str, str]


@dataclass(slots=True)
class Yard:
    """A folder for trials, with undisturbed runs to compare with.

    Attributes:
        home: the folder.
        only: a part of the names of the commands that are disturbed.
        runs: undisturbed ones, by name.
    """

    home: Path
    only: str = ""
    runs: dict[str, Reference] = field(default_factory=dict)

    @property
    def all_commands(self) -> tuple[Command, ...]:
        """Every one."""
        return COMMANDS

    @property
    def commands(self) -> list[Command]:
        """Those whose name holds `only`."""
        return [command for command in COMMANDS if self.only in command.name]

    def reference(self, command: Command) -> Reference:
        """The undisturbed run of a command, made once."""
        if command.name not in self.runs:
            start = self.home / "starts" / command.name.replace(" ", "-")
            earlier = [c for c in _FIRST if c.name in command.before]
            if earlier:
                made = self.reference(earlier[0]).start
                shutil.copytree(made.with_name(f"{made.name}-end"), start, symlinks=True)
            else:
                begin(start)
            self.runs[command.name] = self._run(command, start)
        return self.runs[command.name]

    def _run(self, command: Command, start: Path) -> Reference:
        before = snapshot(start)
        for _ in range(2):  # the first imports
            end = start.with_name(f"{start.name}-end")
            shutil.rmtree(end, ignore_errors=True)
            shutil.copytree(start, end, symlinks=True)
            done = ran(command.argv, end, self.home / "spool", watch=Disturbance())
            assert done.code == 0, (command.name, done)
            preload(done)
        return Reference(
            command,
            start,
            snapshot(end),
            done.out,
            done.seconds,
            tuple(done.told["operations"]),
            before,
        )

    @contextmanager
    def copy(self, reference: Reference) -> Iterator[Path]:
        """A copy of the folder in which a command begins."""
        place = self.home / "trial"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(reference.start, place, symlinks=True)
        yield place


def snapshot(folder: Path) -> dict[str, str]:
    """Everything in a folder by its path: the hash of what counts in a file, or what else it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if _LOG.search(name) or name == "tmp":
            continue
        if path.is_symlink() or not path.is_file():
            found[name] = "link" if path.is_symlink() else "folder"
        else:
            found[name] = hashlib.sha256(_counts(path)).hexdigest()[:16]
    return found


def _counts(path: Path) -> bytes:
    """The content of a file without the time that its making took."""
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in content.splitlines() if line.endswith(b"}")]
        return json.dumps([_timeless(line) for line in lines], sort_keys=True).encode()
    if path.suffix == ".md":
        return re.sub(rb"\| [\d.,]+ s \|", b"| s |", content)
    return content


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if not k.startswith(("seconds", "peak", "machine"))}


def judged(place: Path, reference: Reference) -> list[tuple[str, str]]:
    """What differs, in a folder, from the end of the undisturbed run."""
    found = snapshot(place)
    faults = [("leftover", name) for name in sorted(found.keys() - reference.files.keys())]
    for name, digest in sorted(reference.files.items()):
        if found.get(name) != digest:
            how = "differs" if name in found else "is missing"
            faults.append(("different", f"{name} {how}"))
    return faults


def torn(place: Path, reference: Reference) -> list[tuple[str, str]]:
    """What is neither as it was before the command nor as it is after it.

    A folder is there whole or not at all, a ledger keeps its older lines, and what a command only
    reads stays as it was. A run of training is a folder that fills; it is judged when it is done.
    """
    command, faults = reference.command, []
    for name in command.writes:
        path, whole = place / name, reference.files[name]
        if path.is_dir() and command.name != "train":
            inner = {f"{name}/{part}": digest for part, digest in snapshot(path).items()}
            due = {n: d for n, d in reference.files.items() if n.startswith(f"{name}/")}
            if inner and inner != due:
                faults.append(("torn", f"{name} holds {sorted(inner.items() ^ due.items())[:3]}"))
        elif path.suffix == ".jsonl":
            older = (reference.start / name).read_bytes()
            if not path.read_bytes().startswith(older):
                faults.append(("torn", f"{name} has lost lines"))
        elif path.is_file() or name in reference.before:
            found = snapshot(place).get(name) if path.suffix != ".jsonl" else whole
            if found not in (whole, reference.before.get(name)):
                faults.append(("torn", f"{name} is neither old nor new"))
    read = [name for name in reference.before if name.split("/")[0] not in command.writes]
    faults += [("torn", f"{name} is gone") for name in read if not (place / name).exists()]
    return faults


def hidden(place: Path, reference: Reference) -> list[tuple[str, str]]:
    """Temporary files and locks that lie there now."""
    found = [*place.rglob(".*"), *(place / "tmp").glob("*")]
    names = sorted(str(path.relative_to(place)) for path in found)
    return [("leftover", f"{name} (at once)") for name in names if name not in reference.before]


def again(reference: Reference, place: Path, spool: Path, **how: Any) -> tuple[Ended, bool]:
    """Run the command once more, with --resume where it asks for that.

    Returns:
        How that ended, and whether the result was there already, so that nothing was left to do.
    """
    argv = reference.command.argv
    end = ran(argv, place, spool, **how)
    if end.code == 1 and "--resume" in end.err:
        end = ran((*argv, "--resume"), place, spool, **how)
    return end, end.code == 1 and "exists already" in end.err


def begin(home: Path) -> None:
    """Put a tiny model, a text, the lines of an evaluation and an old figure into a folder."""
    home.mkdir(parents=True)
    tiny(home / "m")
    (home / "t.txt").write_text(" ".join(f"w{i * 7 % 290}" for i in range(600)))
    rows = [measured(0.0), measured(0.3)]
    (home / "r.json").write_text(json.dumps({"models": rows}))
    (home / "r.png").write_bytes(b"an older figure")


def tiny(folder: Path) -> LlamaForCausalLM:
    """Write a tiny Llama and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ends = {"bos_token_id": 298, "eos_token_id": 297}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, **heads, **ends)).eval()
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(298)} | {"<s>": 298, "[UNK]": 299}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>"
    ).save_pretrained(folder)
    return model


def measured(ratio: float) -> dict[str, Any]:
    """A row of `prunenet eval --json`, as far as a report reads it."""
    speeds = {"prefill_tokens_per_second": 600.0, "decode_tokens_per_second": 30.0}
    return {"ratio": ratio, "parameters": 1000, "perplexity": 20.0, **speeds}
