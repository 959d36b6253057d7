"""Widths learned over the matrices of several models."""

import json
from dataclasses import replace

import pytest
import torch
from families import tiny_model, token_ids
from test_cli import refused, run, save_tiny
from test_kinds import tiny as mixture_of

from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.training.matrices import Measured, train_widths
from prunenet.policies.training.slots import AllocatorRecipe
from prunenet.text.calibration import CalibrationSet

TEXT = CalibrationSet(token_ids(6, 16), "self", {"text": "self-generated"})
SHORT = AllocatorRecipe(updates=12, episodes=16, learning_rate=3e-2, evaluate_every=4)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def start():
    return Policy.untrained(PolicyConfig(), seed=1)


def measured(policy, *families):
    return [Measured.of(tiny_model(family), TEXT, policy) for family in families]


@pytest.mark.long
def test_channels_stay_and_widths_lower_what_every_matrix_predicts(start):
    known = measured(start, "llama", "qwen3")
    learned = train_widths(start, known, SHORT)
    before, after = (policy.scorer.state_dict() for policy in (start, learned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("widths.") for name in changed)
    assert learned.config.gain > 0
    assert learned.config.regime == "self"
    types = [model["model_type"] for model in learned.config.recipe["where"]["models"]]
    assert types == ["llama", "qwen3"]
    other = tiny_model("gemma", seed=3)
    assert len(set(learned.offsets(other))) > 1
    for ratio in (0.2, 0.6):
        widths = learned.widths(other, ratio, per_layer=True, round_to=1)
        assert sum(widths) == sum(start.widths(other, ratio, round_to=1))


@pytest.mark.long
def test_anew_forgets_the_widths_of_the_start_and_otherwise_they_are_the_start(start):
    known = measured(start, "llama")
    first = train_widths(start, known, SHORT)
    none = replace(SHORT, updates=1, learning_rate=1e-12)
    model = tiny_model("llama")
    kept = train_widths(first, known, none).offsets(model)
    torch.testing.assert_close(torch.tensor(kept), torch.tensor(first.offsets(model)))
    assert max(map(abs, train_widths(first, known, none, anew=True).offsets(model))) < 1e-6


@pytest.mark.long
def test_the_command_writes_a_policy_that_prunes_and_twice_the_same(start, tmp_path):
    folders = [save_tiny(tmp_path / family, family) for family in ("llama", "qwen3")]
    start.save_pretrained(tmp_path / "start")
    ask = ("train-widths", *folders, "--start", tmp_path / "start", "--updates", 2)
    for name in ("once", "twice"):
        shown = json.loads(run(*ask, "--episodes", 4, "--out", tmp_path / name, "--json").stdout)
        assert shown["episodes"] == 8
        assert shown["models"] == 2
    once, twice = (Policy.from_pretrained(tmp_path / name) for name in ("once", "twice"))
    assert once.sha256 == twice.sha256
    cut = ("prune", folders[0], "--policy", tmp_path / "once", "--moments", "none")
    assert run(*cut, "--ratio", 0.3, "--out", tmp_path / "cut").exit_code == 0
    said = refused(*ask, "--out", tmp_path / "once")
    assert "holds a policy" in said
    assert "resume" not in said, "there is no such option here"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--episodes", 1), "2 or more episodes"),
        (("--learning-rate", 0), "learning_rate must be above 0"),
        (("--learning-rate", "inf"), "learning_rate must be above 0 and at most 1, got inf"),
        (("--start", "nowhere"), "policy 'nowhere' does not exist"),
        (("--seed", -1), "seed"),
    ],
)
def test_what_cannot_be_learned_is_said_before_a_model_is_read(options, said, tmp_path):
    asked = ("train-widths", tmp_path / "absent", "--out", tmp_path / "out")
    given = options if "--start" in options else (*options, "--start", "llama")
    assert said in refused(*asked, *given)
    assert not (tmp_path / "out").exists()


def test_the_preset_of_widths_takes_no_other_widths(tmp_path):
    asked = ("train", tmp_path / "absent", "--out", tmp_path / "out", "--preset", "widths")
    for given in ("uniform", "per-layer"):
        assert f"leave --widths {given} out" in refused(*asked, "--widths", given)


def test_a_second_model_without_a_tokenizer_is_said_before_the_first_is_measured(tmp_path):
    whole = save_tiny(tmp_path / "whole")
    tiny_model("qwen3").save_pretrained(tmp_path / "bare")
    asked = ("train-widths", whole, tmp_path / "bare", "--start", "llama")
    assert "has no tokenizer" in refused(*asked, "--out", tmp_path / "out")
    assert not (tmp_path / "cache").exists()


def test_a_mixture_is_refused_before_a_model_is_measured(tmp_path):
    whole = save_tiny(tmp_path / "whole")
    mixture, _ = mixture_of("experts, concat")
    mixture.save_pretrained(tmp_path / "mixture")
    asked = ("train-widths", whole, tmp_path / "mixture", "--start", "llama")
    assert "channels are ablated where each layer has one FFN" in refused(
        *asked, "--out", tmp_path / "out"
    )
    assert not (tmp_path / "cache").exists()


def test_a_policy_that_reads_activations_and_no_models_are_clear_errors(start):
    with pytest.raises(ValueError, match="one model or more, got none"):
        train_widths(start, [])
    with pytest.raises(ValueError, match="scores channels by their activations"):
        measured(Policy.untrained(PolicyConfig(moments=("moment_write",))), "llama")
