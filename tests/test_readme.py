"""The README's code runs, and the commands that it shows exist."""

import re
import shlex
from pathlib import Path

import pytest
from families import tiny_model
from typer.testing import CliRunner

from prunenet.cli.app import app
from prunenet.policies.artifact import Policy, PolicyConfig

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("code", PYTHON)
def test_the_readme_s_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    Policy.untrained(PolicyConfig()).save_pretrained("runs/llama")
    exec(compile(code, "README.md", "exec"), {})


def test_the_readme_shows_python_and_commands():
    assert len(PYTHON) >= 2
    assert any(line.startswith("prunenet prune") for line in COMMANDS)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("prunenet ")])
def test_every_option_that_the_readme_shows_is_one_that_the_command_knows(line):
    command, *options = shlex.split(line.partition(">")[0])[1:]
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    for option in (word for word in options if word.startswith("--")):
        assert option in shown.stdout


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_every_make_target_of_the_readme_exists(line):
    makefile = Path(__file__).resolve().parents[1] / "Makefile"
    if not makefile.exists():
        pytest.skip("the wheel is tested without the Makefile")
    assert f"\n{line.split()[1]}: " in makefile.read_text(encoding="utf-8")
