"""Recovery as one command with the cut, and what it is said to take."""

from dataclasses import replace
from pathlib import Path

import pytest
from families import LAYERS, random_keep, tiny_model, token_ids
from test_cli import contents, facts, refused, run, save_tiny

from prunenet.checkpoints.save import load_provenance
from prunenet.cli import recovering
from prunenet.models.surgery import narrowed
from prunenet.policies.apply import Pruned
from prunenet.recover import training
from prunenet.recover.options import Tuning
from prunenet.recover.training import estimated
from prunenet.text.calibration import CalibrationSet

QUICK = Tuning(batch=4, micro_batch=4, rank=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def _small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNENET_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(recovering, "PRESETS", {"fast": (QUICK, 1280)})
        yield


def test_one_command_cuts_and_recovers_and_a_killed_one_goes_on_to_the_same_bytes(
    dense, tmp_path, monkeypatch
):
    ask = (
        "prune",
        dense,
        "--policy",
        "none",
        "--ratio",
        0.5,
        "--tokens",
        1024,
        "--recover",
        "fast",
    )
    whole, out = tmp_path / "whole", tmp_path / "out"
    said = facts(*ask, "--out", whole)
    assert said["loss_after"] < said["loss_before"]
    made = load_provenance(whole)
    assert (made.regime, made.how["refit"], len(made.recovered)) == ("self", "layerwise", 1)
    assert made.recovered[0]["tokens"] == 5 * 4 * 64
    step = training._Run._step

    def killed(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_step", killed)
        assert run(*ask, "--out", out).exit_code == 130
    assert not out.exists()
    assert "holds an unfinished run; say --resume" in refused(*ask, "--out", out)
    other = ["--resume", "--out", out, *ask[1:]]
    other[other.index(0.5)] = 0.4
    assert "was started with ratio 0.5, not 0.4" in refused("prune", *other)
    with monkeypatch.context() as patch:
        patch.setattr(Pruned, "save_pretrained", None)  # the cut is there
        facts(*ask, "--out", out, "--resume")
    assert contents(out) == contents(whole)
    left = {path.name for path in out.with_name("out.recovery").iterdir()}
    assert not [name for name in left if not name.startswith("events")]


def test_a_training_that_could_not_be_done_is_refused_before_the_cut(dense, tmp_path):
    ask = ("prune", dense, "--ratio", 0.5, "--out", tmp_path / "out")
    stream = ("--recover", "fast", "--stream", "--moments", "none")
    assert "leave --stream and --device auto out" in refused(*ask, *stream)
    assert "say --recover fast too" in refused(*ask, "--resume")
    assert "nothing to resume" in refused(*ask, "--recover", "fast", "--resume")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_time_and_memory_are_said_before_the_text_is_written(dense, tmp_path, monkeypatch):
    from prunenet.recover import record
    from prunenet.recover.record import recover

    facts("prune", dense, "--policy", "none", "--ratio", 0.5, "--out", tmp_path / "cut")
    said = []

    def stop(*_):
        raise RuntimeError("text")

    monkeypatch.setattr(record, "learning_text", stop)
    with pytest.raises(RuntimeError, match="text"):
        recover(tmp_path / "cut", tmp_path / "out", QUICK, teacher=dense, estimate=said.append)
    (found,) = said
    assert found.tokens == 204800
    assert found.text_seconds > 0
    assert "204,800 tokens at about" in str(found)
    assert "GB of memory" in str(found)


def test_an_estimate_grows_with_steps_and_with_what_is_trained():
    model = tiny_model("llama")
    narrow = narrowed(model, random_keep([24] * LAYERS))
    blocks = CalibrationSet(token_ids(20, 16), "self", {"text": "random"})
    few, many = (
        estimated(narrow, blocks, replace(QUICK, steps=steps), teacher=model) for steps in (1, 1000)
    )
    assert (few.tokens, many.tokens) == (64, 64000)
    assert many.seconds > 50 * few.seconds
    full = estimated(narrow, blocks, replace(QUICK, updates="full"), teacher=model)
    averaged = estimated(narrow, blocks, replace(QUICK, updates="full", average=0.9))
    held = 4 * sum(p.numel() for p in narrow.model.layers.parameters())
    assert full.bytes - few.bytes > 3 * held
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert averaged.bytes > full.bytes - weights
