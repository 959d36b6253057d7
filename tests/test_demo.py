"""The demo, on a tiny model: what it makes, that a second run uses it, and what it refuses."""

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model
from rich.console import Console
from test_cli import save_tiny
from typer.testing import CliRunner

from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.save import load_provenance
from prunenet.cli import demo_steps as demo
from prunenet.cli import tables
from prunenet.cli.app import app
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy
from prunenet.policies.training.recipe import Recipe
from prunenet.text.calibration import CalibrationSet

RECIPE = Recipe(updates=2, masks=4, hidden=(4,), evaluate_every=1)


@pytest.fixture
def run(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model")
    tiny_model("llama", seed=7).config.save_pretrained(tmp_path)
    monkeypatch.setenv("PRUNENET_DEMO_MODEL", str(folder))
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "cache"))
    # A tiny model has 64 positions.
    evaluate, write = demo.evaluate, demo.self_blocks

    def briefly(models, text, options, **rest):
        return evaluate(models, text, replace(options, window=16), **rest, speed=None)

    monkeypatch.setattr(demo, "evaluate", briefly)
    monkeypatch.setattr(
        demo, "self_blocks", lambda *a, **k: write(*a, **{**k, "sequences": 4, "tokens": 16})
    )
    monkeypatch.setattr(demo, "draw_report", lambda rows, path: path.write_bytes(b"drawn"))
    return lambda ratios=(0.5,), recipe=RECIPE: demo.run_demo(
        tmp_path / "out", ratios, Console(stderr=True), windows=2, recipe=recipe
    )


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


@pytest.mark.long
def test_a_second_run_uses_what_the_first_one_made(run, tmp_path, monkeypatch):
    first = run()
    assert [row["name"] for row in first] == ["dense", "ratio-0.5", "trained-0.5"]
    assert [row["ratio"] for row in first] == [0.0, 0.5, 0.5]
    story = load_provenance(tmp_path / "out" / "ratio-0.5")
    assert story.policy == "llama"  # that of the family, which ships
    assert load_provenance(tmp_path / "out" / "trained-0.5").policy == "demo"
    assert all(story.how[name] == getattr(demo.HOW, name) for name in ("channels", "refit"))
    assert story.regime == "self"  # that of the policy's training
    assert "text" not in story.how
    assert Policy.from_pretrained(tmp_path / "out" / "policy").config.recipe["where"] is None
    made = stamps(tmp_path / "out")
    monkeypatch.setattr(demo, "self_blocks", None)  # nothing is written, trained or pruned again
    second = run()
    assert stamps(tmp_path / "out") == made
    assert [row["perplexity"] for row in second] == [row["perplexity"] for row in first]


@pytest.mark.long
def test_the_page_shows_the_slider_the_training_and_what_each_model_writes(run, tmp_path):
    rows = run()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for shown in ("ratio 0.30 (uniform", "environment steps", *(row["name"] for row in rows)):
        assert shown in page
    assert all(row["sentence"][:8] in page for row in rows if row["sentence"][:8].isalnum())


@pytest.mark.parametrize(
    ("terminal", "display", "opened"), [(True, ":0", 1), (True, "", 0), (False, ":0", 0)]
)
def test_the_demo_ends_by_opening_the_report_where_somebody_can_see_it(
    tmp_path, monkeypatch, terminal, display, opened
):
    seen = []
    monkeypatch.setattr(demo, "run_demo", lambda *_: [{"name": "dense"}])
    monkeypatch.setattr("prunenet.cli.demo.show", lambda *_: None)
    monkeypatch.setattr(
        "prunenet.cli.demo.errors", Console(file=io.StringIO(), force_terminal=terminal)
    )
    monkeypatch.setattr("prunenet.cli.demo.sys.platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.setattr("typer.launch", seen.append)
    CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")], catch_exceptions=False)
    assert seen == [str(tmp_path / "demo" / "report.html")] * opened


@pytest.mark.long
def test_results_of_another_recipe_or_model_are_not_passed_off_as_this_one(run, tmp_path):
    run()
    with pytest.raises(ValueError, match="another recipe or model"):
        run(recipe=replace(RECIPE, seed=1))
    tiny_model("llama", seed=3).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="another recipe or model"):
        run()


@pytest.mark.long
def test_a_checkpoint_pruned_in_another_way_is_not_passed_off_as_the_demo_s(run, tmp_path):
    run()
    policy = Policy.from_pretrained("llama")
    shutil.rmtree(tmp_path / "out" / "ratio-0.5")
    blocks = CalibrationSet(torch.randint(3, 60, (4, 16)), "data", {"text": "x"})
    prune(load_model(tmp_path / "model"), policy, ratio=0.5, blocks=blocks).save_pretrained(
        tmp_path / "out" / "ratio-0.5"
    )
    with pytest.raises(ValueError, match="holds another pruned model"):
        run()


@pytest.mark.long
def test_a_size_asked_for_later_is_added_to_those_that_are_there(run, tmp_path):
    run()
    made = stamps(tmp_path / "out")
    rows = run(ratios=(0.5, 0.25))
    assert [row["name"] for row in rows] == ["dense", "ratio-0.5", "ratio-0.25", "trained-0.5"]
    assert made.items() <= stamps(tmp_path / "out").items()


def test_the_demo_s_folder_is_locked_while_it_runs(tmp_path, monkeypatch):
    def watched(out, *_):
        assert (out.parent / f".{out.name}.lock").exists()
        raise ValueError("seen")

    monkeypatch.setattr(demo, "run_demo", watched)
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "new" / "demo")])
    assert "seen" in done.output
    assert not (tmp_path / "new").exists()


def test_a_demo_model_that_cannot_be_had_is_one_sentence():
    result = CliRunner().invoke(
        app, ["demo", "--out", "nowhere"], env={**os.environ, "PRUNENET_DEMO_MODEL": "/nonexistent"}
    )
    assert result.exit_code == 1
    assert "/nonexistent" in result.stderr
    assert "Traceback" not in result.output


def test_the_comparison_keeps_names_and_numbers_whole_in_a_pipe():
    row = {
        "name": "ratio-0.3[/x]",
        "parameters": 110_461_248,
        "non_embedding_parameters": 82_100_000,
        "bytes": 442_000_000,
        "perplexity": 12_345.6,
        "text": "t",
        "window": 512,
        "tokens": 4088,
        "prefill_tokens_per_second": 12_345.0,
        "decode_tokens_per_second": 123.4,
    }
    console = Console(width=110, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(tables.comparison([row, dict(row)]))
    console.file.close()
    shown = console.export_text()
    for whole in ("ratio-0.3[/x]", "110.5 M (+0%)", "12,345.6", "12,345 (+0%)", "123.4 (+0%)"):
        assert whole in shown
