"""The README's code runs, and the commands that it shows exist."""

import re
import shlex
from pathlib import Path

import pytest
from test_cli import save_tiny
from typer.testing import CliRunner

from prunenet.cli.app import app
from prunenet.models.architectures import ARCHITECTURES
from prunenet.models.listing import known_types, summary_of

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
] + [
    line.partition("-m ")[2] or line
    for line in re.findall(r"`((?:prunenet|torchrun) [^`]+)`", README)
]


@pytest.mark.parametrize("code", PYTHON)
def test_the_readme_s_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "smaller"):
        save_tiny(Path(folder))
    exec(compile(code, "README.md", "exec"), {})


def test_the_readme_has_at_most_900_words():
    assert len(README.split()) <= 900


def test_the_readme_lists_the_supported_models_of_the_table():
    section = README.partition("## Supported models\n")[2].partition("\n## ")[0]
    listed = re.findall(r"[a-z0-9_]+", section.strip().partition("\n")[0])
    assert listed == sorted(ARCHITECTURES)


@pytest.mark.long
def test_the_readme_s_table_of_types_is_the_one_that_the_code_makes(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path))  # what ships, and nothing of this machine
    table = README.partition("<!--types-->\n")[2].partition("<!--/types-->")[0]
    assert table == summary_of(known_types(cached=False)), "run `make readme`"


def test_every_file_that_the_readme_links_to_is_in_a_clone():
    root = Path(__file__).resolve().parents[1]
    if not (root / "docs").is_dir():
        pytest.skip("the wheel is tested without the documents")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (root / link).is_file()] == []


def test_the_readme_shows_python_and_commands():
    assert len(PYTHON) >= 2
    assert any(line.startswith("prunenet prune") for line in COMMANDS)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("prunenet ")])
def test_every_option_that_the_readme_shows_is_one_that_the_command_knows(line):
    command, *options = shlex.split(line.partition(">")[0])[1:]
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    for option in (word for word in options if word.startswith("--")):
        assert re.search(rf"{option}\b", shown.stdout)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_every_make_target_of_the_readme_exists(line):
    makefile = Path(__file__).resolve().parents[1] / "Makefile"
    if not makefile.exists():
        pytest.skip("the wheel is tested without the Makefile")
    assert f"\n{line.split()[1]}: " in makefile.read_text(encoding="utf-8")
