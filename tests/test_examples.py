"""The examples run, and the Python and the commands that the documentation shows do too."""

import contextlib
import multiprocessing
import os
import re
import runpy
import shlex
import tempfile
import warnings
from pathlib import Path
from typing import TextIO

import pytest
from families import tiny_model
from typer.testing import CliRunner

import prunenet
from prunenet.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs"
SHOWN = {
    "prune.py": ["kept at 0.5 means kept at 0.25: True", "same logits after a reload: True"],
    "custom_reward.py": ["after  0 updates", "after 30 updates"],
    "add_method.py": ["ours: 34,528 parameters", "random: 34,528 parameters"],
    "ppo.py": ["KL to the dense model at 0.4", "random actions: ", "PPO: "],
    "add_family.py": [
        "discovered: model.layers.*.mlp.c_proj.weight",
        "48 of 96 channels",
        "model: 0.0e+00",
    ],
}
if not EXAMPLES.is_dir():
    pytest.skip("the wheel is tested without examples and docs", allow_module_level=True)


def blocks_of(language: str, page: str = "*.md") -> list[str]:
    """Code blocks of the pages, lines that a backslash continues put together."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob(page)))
    return re.findall(rf"```{language}\n(.*?)```", text.replace("\\\n", ""), flags=re.DOTALL)


def commands() -> list[str]:
    """Lines of the pages that call prunenet, by torchrun too."""
    lines = [line for block in blocks_of("console") for line in block.splitlines()]
    lines = [re.sub(r"^torchrun .*-m (?=prunenet )", "", line) for line in lines]
    return sorted({line for line in lines if line.startswith("prunenet ")})


def run_example(name: str) -> str:
    """What an example prints; warnings are errors.

    A forked child runs it: it leaves this process as it is, and imports nothing anew.
    """
    with tempfile.TemporaryFile("w+") as printed:
        child = multiprocessing.get_context("fork").Process(target=_run, args=(name, printed))
        child.start()
        child.join(300)
        assert child.exitcode == 0
        printed.seek(0)
        return printed.read()


def _run(name: str, printed: TextIO) -> None:
    os.chdir(EXAMPLES)
    warnings.simplefilter("error")
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed.flush()


def test_every_example_has_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.long
@pytest.mark.parametrize("name", SHOWN)
def test_an_example_has_at_most_40_lines_and_shows_what_it_says(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 40
    printed = run_example(name)
    for line in SHOWN[name]:
        assert line in printed
    if name == "custom_reward.py":  # training raises a reward of one's own
        rewards = [float(reward) for reward in re.findall(r": (\d\.\d+) of", printed)]
        # The first masks come from scores that are all alike; any step at all leaves those behind.
        assert rewards[-1] > rewards[1] + 0.01
    if name == "ppo.py":  # a stock trainer beats random actions
        random, trained = map(float, re.findall(r": (\d\.\d+)$", printed, re.MULTILINE))
        assert trained < 0.7 * random


@pytest.mark.long
def test_the_python_of_the_page_about_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    blocks = blocks_of("python", "python.md")
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "python.md", "exec"), {})


def test_the_reference_of_python_lists_every_public_name():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: prunenet\.(\w+)$", page, flags=re.MULTILINE)
    assert set(listed) == set(prunenet.__all__)


def test_the_pages_show_every_command():
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {line.split()[1] for line in commands()} == known - {"demo"}  # which `make demo` runs


@pytest.mark.parametrize("line", commands())
def test_every_option_that_a_page_shows_is_one_that_the_command_knows(line):
    command, *words = shlex.split(line.partition(">")[0])[1:]
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}(?![\w-])", shown.stdout), option
