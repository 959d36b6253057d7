"""The examples run, and so does the Python that the documentation shows; the options that it shows exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from families import tiny_model
from typer.testing import CliRunner

import prunenet
from prunenet.cli import app

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SHOWN = {
    "prune.py": ["among those kept at 0.25: True", "same logits after reload: True"],
    "custom_reward.py": ["after  0 updates", "after 30 updates"],
    "add_method.py": ["up_down_norm: 34,528 parameters", "random: 34,528 parameters"],
    "add_family.py": [
        "'starcoder2' is not supported",
        "48 of 96 channels",
        "masked model: 0.0e+00",
    ],
}
pytestmark = pytest.mark.skipif(
    not EXAMPLES.is_dir(), reason="the wheel is tested without the examples"
)


def commands() -> list[str]:
    """Lines of the pages' console blocks that call prunenet, by torchrun or not; `cli.md` is made of the code itself."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES).replace("\\\n", "")
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    lines = [
        line.partition("-m ")[2] if line.startswith("torchrun") else line
        for block in blocks
        for line in block.splitlines()
    ]
    return sorted({line for line in lines if line.startswith("prunenet ")})


def run_example(name: str, folder: Path) -> str:
    """What an example prints; warnings are errors."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_is_at_most_40_lines_long_and_shows_what_it_says(name, tmp_path):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 40
    printed = run_example(name, tmp_path)
    for line in SHOWN[name]:
        assert line in printed


def test_training_on_a_reward_of_one_s_own_raises_it(tmp_path):
    rewards = [
        float(reward)
        for reward in re.findall(r": (\d\.\d+) of", run_example("custom_reward.py", tmp_path))
    ]
    # The first masks come from scores that are all alike; any step at all leaves those behind.
    assert rewards[-1] > rewards[1] + 0.01


def test_the_python_of_the_page_about_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    blocks = re.findall(
        r"```python\n(.*?)```", (DOCS / "python.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "python.md", "exec"), {})


def test_the_reference_of_python_lists_every_public_name():
    listed = re.findall(
        r"^::: prunenet\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert set(listed) == set(prunenet.__all__)


def test_the_pages_show_every_command():
    assert {line.split()[1] for line in commands()} == {
        command.name or command.callback.__name__ for command in app.registered_commands
    } - {"demo"}


@pytest.mark.parametrize("line", commands() if DOCS.is_dir() else [])
def test_every_option_that_a_page_shows_is_one_that_the_command_knows(line):
    command, *options = shlex.split(line.partition(">")[0])[1:]
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    for option in (word for word in options if word.startswith("--")):
        assert re.search(rf"{option}(?![\w-])", shown.stdout), f"{option} in {line!r}"
