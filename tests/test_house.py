"""The house rules that a machine can check (import floors are import-linter's, see
pyproject.toml).
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prunenet

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(prunenet.__file__).resolve().parent
# Every folder, and those behind the links `envs` and `policies` (rglob does not follow links).
SOURCES = sorted(
    Path(folder, name)
    for folder, _, names in os.walk(PACKAGE, followlinks=True)
    for name in names
    if name.endswith(".py")
)
Function = ast.FunctionDef | ast.AsyncFunctionDef

each_source = pytest.mark.parametrize(
    "source", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix()
)


def parse(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"), filename=str(source))


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def code_lines(function: Function) -> int:
    """Lines of a function from `def` to its end, its docstring and decorators not counted."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def dangerous(tree: ast.Module) -> Iterator[str]:
    """Everything in a module that could run code found in a file: pickle and its kin, torch.load,
    eval, exec.
    """
    unpicklers = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = [name.name for name in names if name.name.split(".")[0] in unpicklers]
            case ast.ImportFrom(module=str(module), names=names):
                found = [module] if module.split(".")[0] in unpicklers else []
                found += (
                    ["torch.load"]
                    if module == "torch" and "load" in {name.name for name in names}
                    else []
                )
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                found = [name]
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                found = ["torch.load"]
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                found = ["allow_pickle"]
            case _:
                continue
        yield from (f"line {getattr(node, 'lineno', '?')}: {name}" for name in found)


def test_the_rules_look_at_every_folder_of_the_package() -> None:
    names = {path.relative_to(PACKAGE).as_posix() for path in SOURCES}
    assert {"__init__.py", "envs/__init__.py", "policies/methods/__init__.py"} <= names
    assert len(names) == len(list(PACKAGE.rglob("*.py"))) + sum(
        len(list((PACKAGE / link).resolve().rglob("*.py")))
        for link in ("envs", "policies")
        if (PACKAGE / link).is_symlink()
    )


@each_source
def test_no_file_is_longer_than_450_lines(source: Path) -> None:
    assert len(source.read_text(encoding="utf-8").splitlines()) <= 450


@each_source
def test_no_function_is_longer_than_50_lines(source: Path) -> None:
    functions = [node for node in ast.walk(parse(source)) if isinstance(node, Function)]
    assert {f.name: code_lines(f) for f in functions if code_lines(f) > 50} == {}


@each_source
def test_nothing_that_is_loaded_can_run_code(source: Path) -> None:
    assert list(dangerous(parse(source))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "from torch import load",
        "torch.load('x')",
        "eval('1')",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_the_search_for_dangerous_loading_finds(code: str) -> None:
    assert list(dangerous(ast.parse(code)))


@each_source
def test_every_public_function_and_class_has_a_docstring(source: Path) -> None:
    tree = parse(source)
    public = [
        node
        for node in tree.body
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
    assert ast.get_docstring(tree), "the module itself has no docstring"


@each_source
def test_only_the_command_line_prints(source: Path) -> None:
    if source.parent.name == "cli":
        pytest.skip("the command line prints")
    prints = [
        n.lineno
        for n in ast.walk(parse(source))
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"
    ]
    assert prints == []


def test_importing_prunenet_and_a_saved_policy_needs_neither_gymnasium_nor_stable_baselines3() -> (
    None
):
    code = """
import sys
import prunenet, prunenet.policies.artifact, prunenet.policies.apply
print([name for name in ("gymnasium", "stable_baselines3") if name in sys.modules])
"""
    done = run_python(code, cwd=Path(sys.prefix))
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_help_of_every_command_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    run = run_python(
        """
import sys
from typer.testing import CliRunner
from prunenet.cli.app import app
for command in ([], *([name] for name in ("train", "prune", "eval", "compare", "recover", "demo"))):
    said = CliRunner().invoke(app, [*command, "--help"])
    assert said.exit_code == 0, said.output
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
""",
        tmp_path,
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_a_call_that_breaks_the_shape_of_an_annotation_fails_in_tests() -> None:
    from prunenet.models.masks import top_channels

    with pytest.raises(jaxtyping.TypeCheckError, match="top_channels"):
        top_channels(torch.ones(2, 3, dtype=torch.int64), 1)


@pytest.mark.parametrize("folder", ["envs", "policies"])
def test_the_bare_name_of_a_source_folder_is_no_package(folder: str) -> None:
    if not (ROOT / folder).is_dir():
        pytest.skip("the tests run outside a checkout")
    done = run_python(f"import {folder}", cwd=ROOT)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert f"import prunenet.{folder}" in done.stderr


def test_constraints_pin_every_direct_dependency_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    wanted = {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    assert set(pinned) == set(wanted)
    assert {name: version for name, version in pinned.items() if version not in wanted[name]} == {}


def test_the_python_blocks_of_the_readme_compile() -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    if not blocks:
        pytest.skip("the README has no Python yet")
    for block in blocks:
        compile(block, "README.md", "exec")
