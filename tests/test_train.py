"""Training is reproducible, resumable bit for bit, and never ends worse than it began."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model

from prunenet.policies.artifact import Policy, PolicyError
from prunenet.policies.recipe import PRESETS, Recipe, recipe_for
from prunenet.policies.train import STATE, train

SHORT = Recipe(reward="spectral", updates=4, masks=4, hidden=(8,), evaluate_every=2, distance="energy")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_same_recipe_same_policy_and_another_seed_another_one(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_model("llama"), replace(SHORT, seed=seed), out=tmp_path / name)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "ppo", "epochs": 2},
        {"baseline": "value", "gamma": 0.9},
        {"baseline": "none", "subset": "bernoulli", "masks": 1},
        {"hidden": (), "form": "inverse", "matrices": ("gate",), "distance": "ks"},
    ],
)
def test_every_choice_of_the_recipe_trains(changes):
    trained = train(tiny_model("opt"), replace(SHORT, **changes))
    assert [update for update, _ in trained.history] == [0, 2, 4]


def test_the_policy_returned_is_the_best_one_seen():
    trained = train(tiny_model("llama"), replace(SHORT, updates=6, evaluate_every=1))
    model = tiny_model("llama")
    from prunenet.envs import SpectralReward
    from prunenet.envs.sweep import View
    from prunenet.policies.train import mode_reward

    value = mode_reward(trained.policy.scorer, View.of(model), SpectralReward(model, distance="energy"), SHORT.evaluate_at)
    assert value == max(reward for _, reward in trained.history)
    assert value > trained.history[0][1]


def test_a_policy_does_not_tell_where_its_model_lay(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "secret" / "tiny")
    from prunenet.checkpoint import load_model

    assert train(load_model(tmp_path / "secret" / "tiny"), SHORT).policy.config.trained_on["model"] == "tiny"


def test_the_model_is_as_it_was_after_training():
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, SHORT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("algorithm", ["a2c", "ppo"])
def test_a_killed_run_resumes_to_the_same_policy_bit_for_bit(tmp_path, algorithm):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from families import tiny_model
from prunenet.policies.recipe import Recipe
from prunenet.policies.train import train
recipe = Recipe("spectral", "energy", updates=150, masks=4, hidden=(8,), evaluate_every=10, algorithm={algorithm!r})
train(tiny_model("llama"), recipe, out=sys.argv[1], resume="resume" in sys.argv)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-c", script]
    whole = subprocess.Popen([*start, str(tmp_path / "whole")], env=environment)
    killed = subprocess.Popen([*start, str(tmp_path / "killed")], env=environment)
    state = tmp_path / "killed" / STATE
    while not state.exists() and killed.poll() is None:
        time.sleep(0.01)
    time.sleep(random.SystemRandom().uniform(0, 0.5))
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    subprocess.run([*start, str(tmp_path / "killed"), "resume"], env=environment, check=True)
    assert whole.wait() == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert (tmp_path / "killed" / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()


def test_a_finished_run_resumes_to_itself(tmp_path):
    train(tiny_model("llama"), SHORT, out=tmp_path)
    before = weights(tmp_path)
    train(tiny_model("llama"), SHORT, out=tmp_path, resume=True)
    assert weights(tmp_path) == before


def test_resuming_with_other_settings_is_refused(tmp_path):
    train(tiny_model("llama"), SHORT, out=tmp_path)
    with pytest.raises(PolicyError, match="was started with recipe"):
        train(tiny_model("llama"), replace(SHORT, seed=5), out=tmp_path, resume=True)


def test_a_folder_in_use_is_refused_and_nothing_to_resume_is_said(tmp_path):
    train(tiny_model("llama"), SHORT, out=tmp_path / "used")
    with pytest.raises(PolicyError, match="say --resume, or give another folder"):
        train(tiny_model("llama"), SHORT, out=tmp_path / "used")
    with pytest.raises(PolicyError, match="nothing to resume"):
        train(tiny_model("llama"), SHORT, out=tmp_path / "fresh", resume=True)
    assert not (tmp_path / "fresh").exists()


def test_a_damaged_state_is_one_clear_sentence(tmp_path):
    train(tiny_model("llama"), SHORT, out=tmp_path)
    (tmp_path / STATE).write_bytes(b"not a state")
    with pytest.raises(PolicyError, match="is damaged"):
        train(tiny_model("llama"), SHORT, out=tmp_path, resume=True)


def test_tensorboard_shows_the_reward(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_model("llama"), SHORT, out=tmp_path)
    (log,) = (tmp_path / "training").glob("run_*")
    events = EventAccumulator(str(log)).Reload()
    assert [event.step for event in events.Scalars("prunenet/reward_of_mode")][-1] == SHORT.updates * SHORT.masks * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"masks": 1}, "take 2 masks or more"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"ratio": (0.5, 0.1)}, "must rise"),
        ({"reward": "specktral"}, "unknown reward 'specktral'; it is one of spectral"),
        ({"algorithm": "sac"}, "unknown algorithm 'sac'"),
        ({"evaluate_at": (1.5,)}, "got 1.5"),
        ({"seed": -1}, "seed must be in"),
        ({"entropy": 0.1}, "needs subset 'bernoulli'"),
    ],
)
def test_recipes_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **changes)


def test_presets_are_found_by_name():
    assert recipe_for("paper", {"seed": 3}) == replace(PRESETS["paper"], seed=3)
    with pytest.raises(ValueError, match="unknown preset 'fast'; presets: default, spectral, paper"):
        recipe_for("fast", {})


def test_a_policy_trained_on_one_width_applies_to_another():
    trained = train(tiny_model("llama"), SHORT)
    keep = trained.policy.masks(tiny_model("opt"), 0.5, round_to=1)
    assert [int(mask.sum()) for mask in keep] == [24] * len(keep)
    assert isinstance(trained.policy, Policy)


def test_a_reward_of_one_s_own_says_its_regime_and_is_recorded():
    from prunenet.envs import SpectralReward

    model = tiny_model("llama")
    with pytest.raises(ValueError, match="say which regime"):
        train(model, SHORT, reward=SpectralReward(model))
    config = train(model, SHORT, reward=SpectralReward(model), regime="data").policy.config
    assert config.regime == "data"
    assert config.recipe["reward"] == "SpectralReward"


def test_resuming_on_other_weights_is_refused(tmp_path):
    train(tiny_model("llama"), SHORT, out=tmp_path)
    with pytest.raises(PolicyError, match="was started with trained_on"):
        train(tiny_model("llama", seed=9), SHORT, out=tmp_path, resume=True)


def test_the_caller_s_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    train(tiny_model("llama"), SHORT)
    assert torch.equal(torch.get_rng_state(), state)
