"""Training is reproducible, resumable bit for bit, and never ends worse than it began."""

import multiprocessing
import random
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model, token_ids

from prunenet.models.layers import down_linears
from prunenet.policies.artifact import Policy, PolicyError
from prunenet.policies.training.recipe import PRESETS, Recipe, recipe_for
from prunenet.policies.training.reports import Reports
from prunenet.policies.training.train import train
from prunenet.text.calibration import CalibrationSet

SHORT = Recipe(
    reward="spectral", updates=4, masks=4, hidden=(8,), evaluate_every=2, distance="energy"
)
WHERE = Recipe(
    reward="divergence",
    subset="widths",
    updates=4,
    masks=8,
    learning_rate=0.1,
    gamma=1.0,
    round_to=4,
    evaluate_every=2,
    evaluate_at=(0.5,),
)
STAGES = ("channels", "widths")


def state(folder: Path, stage: str = "channels") -> Path:
    return folder / "training" / stage / "state.safetensors"


def own_text(n: int = 5, tokens: int = 16) -> CalibrationSet:
    return CalibrationSet(token_ids(n, tokens), "self", {"text": "self-generated"})


def long_run(algorithm: str, out: Path, resume: bool = False) -> None:
    """Each stage takes longer than it takes to kill it."""
    first = replace(SHORT, algorithm=algorithm, epochs=2, updates=60)
    where = replace(WHERE, algorithm=algorithm, epochs=2, updates=15)
    train(
        tiny_model("llama"),
        replace(first, allocation=where),
        blocks=own_text(5, 8),
        out=out,
        resume=resume,
    )


def kill_in(stage: str, out: Path, algorithm: str) -> None:
    """Starts the run, or resumes it, in a forked process, and kills that at some moment of the
    stage.
    """
    resume = stage != STAGES[0]
    run = multiprocessing.get_context("fork").Process(
        target=long_run, args=(algorithm, out, resume)
    )
    run.start()
    seen: set[int] = set()  # times of the state's versions: the first is from before any update
    while len(seen) < 3 and run.is_alive():
        time.sleep(0.005)
        with suppress(FileNotFoundError):
            seen.add(state(out, stage).stat().st_mtime_ns)
    time.sleep(random.SystemRandom().uniform(0, 0.1))
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL, "the run ended before it could be killed"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.long
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
    from prunenet.policies.training.run import mode_reward

    value = mode_reward(
        trained.policy.scorer, View.of(model), SpectralReward(model, distance="energy"), SHORT
    )
    assert value == max(reward for _, reward in trained.history)
    assert value > trained.history[0][1]


@pytest.mark.long
def test_a_policy_that_starts_from_another_goes_on_from_its_rewards(tmp_path):
    both = replace(SHORT, allocation=WHERE)
    first = train(tiny_model("llama"), both, blocks=own_text())
    bytes_before = first.policy.sha256
    again = train(tiny_model("llama"), both, blocks=own_text(), start=first.policy)
    assert again.history[0][1] == pytest.approx(max(reward for _, reward in first.history))
    assert again.policy.config.gain >= first.policy.config.gain
    assert again.policy.config.trained_on["start"] == first.policy.sha256 == bytes_before
    with pytest.raises(ValueError, match=r"`start` has other hidden .*\(8,\) in place of \(4,\)"):
        train(tiny_model("llama"), replace(SHORT, hidden=(4,)), start=first.policy)


def test_a_policy_does_not_tell_where_its_model_lay(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "secret" / "tiny")
    from prunenet.checkpoints.load import load_model

    assert (
        train(load_model(tmp_path / "secret" / "tiny"), SHORT).policy.config.trained_on["model"]
        == "tiny"
    )


def test_the_model_is_as_it_was_after_training():
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, SHORT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.long
@pytest.mark.parametrize("algorithm", ["a2c", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_run_killed_in_each_stage_in_turn_resumes_to_the_same_policy_bit_for_bit(
    tmp_path, algorithm
):
    for stage in STAGES:
        kill_in(stage, tmp_path / "killed", algorithm)
        assert [state(tmp_path / "killed", name).exists() for name in STAGES].count(
            True
        ) == STAGES.index(stage) + 1
        assert not (tmp_path / "killed" / "model.safetensors").exists()
    long_run(algorithm, tmp_path / "killed", resume=True)
    long_run(algorithm, tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert (tmp_path / "killed" / "config.json").read_bytes() == (
        tmp_path / "whole" / "config.json"
    ).read_bytes()


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
    with pytest.raises(PolicyError, match="say `resume`, or give another folder"):
        train(tiny_model("llama"), SHORT, out=tmp_path / "used")
    with pytest.raises(PolicyError, match="nothing to resume"):
        train(tiny_model("llama"), SHORT, out=tmp_path / "fresh", resume=True)
    assert not (tmp_path / "fresh").exists()


def test_a_damaged_state_is_one_clear_sentence(tmp_path):
    train(tiny_model("llama"), SHORT, out=tmp_path)
    state(tmp_path).write_bytes(b"not a state")
    with pytest.raises(PolicyError, match="is damaged"):
        train(tiny_model("llama"), SHORT, out=tmp_path, resume=True)


def test_tensorboard_shows_the_reward(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_model("llama"), SHORT, out=tmp_path)
    (log,) = state(tmp_path).parent.glob("run_*")
    events = EventAccumulator(str(log)).Reload()
    assert [event.step for event in events.Scalars("prunenet/reward_of_mode")][
        -1
    ] == SHORT.updates * SHORT.masks * 3


def test_tensorboard_shows_terms_widths_and_the_recipe_and_no_critic_where_there_is_none(tmp_path):
    from stable_baselines3.common.callbacks import BaseCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Counting(BaseCallback):
        steps = 0

        def _on_step(self) -> bool:
            self.steps += 1
            return True

    counting = Counting()
    train(tiny_model("llama"), SHORT, out=tmp_path, reports=Reports(callbacks=[counting]))
    assert counting.steps == 3 * SHORT.updates
    (log,) = state(tmp_path).parent.glob("run_*")
    events = EventAccumulator(str(log)).Reload()
    shown = {*events.Tags()["scalars"]}
    assert {f"widths/layer_{layer:02}" for layer in range(3)} <= shown
    assert {"reward/overdraft", "reward/clipped"} < {tag for tag in shown if tag[:7] == "reward/"}
    assert not {"train/explained_variance", "train/value_loss"} & shown
    (width,) = {event.value for event in events.Scalars("widths/layer_00")[:1]}
    assert 0 < width <= 48
    plugin = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert b"learning_rate" in plugin


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"masks": 1}, "take 2 masks or more"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0 and at most 1"),
        ({"ratio": (0.5, 0.1)}, "must rise"),
        ({"evaluate_at": (1.5,)}, "got 1.5"),
        ({"seed": -1}, "`seed` must be in"),
        ({"entropy": 0.1}, "needs subset 'bernoulli'"),
    ],
)
def test_recipes_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reward": "specktral"},
            "`reward` must be one of spectral, reconstruction, divergence, got 'specktral'",
        ),
        ({"algorithm": "sac"}, "`algorithm` must be one of a2c, ppo, got 'sac'"),
        ({"subset": "best"}, "`subset` must be one of fixed, bernoulli, widths, got 'best'"),
    ],
)
def test_names_that_a_recipe_does_not_know_are_refused(unchecked, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **changes)


def test_presets_are_found_by_name():
    assert recipe_for("paper", {"seed": 3}) == replace(PRESETS["paper"], seed=3)
    with pytest.raises(
        ValueError, match="unknown preset 'fast'; presets: default, widths, spectral, paper"
    ):
        recipe_for("fast", {})


def test_a_policy_trained_on_one_width_applies_to_another():
    trained = train(tiny_model("llama"), SHORT)
    keep = trained.policy.masks(tiny_model("opt"), 0.5, round_to=1)
    assert [int(mask.sum()) for mask in keep] == [24] * len(keep)
    assert isinstance(trained.policy, Policy)


@pytest.mark.long
@pytest.mark.parametrize("important", [0, 1, 2])
def test_the_second_stage_leaves_most_channels_to_the_layer_that_matters_most(important):
    model = tiny_model("llama")
    with torch.no_grad():
        for layer, linear in enumerate(down_linears(model)):
            linear.weight.mul_(1 if layer == important else 0.01)
    trained = train(model, replace(SHORT, allocation=WHERE), blocks=own_text())
    config = trained.policy.config
    widths = trained.policy.widths(model, 0.5, per_layer=True, round_to=4)
    assert (
        widths[important]
        > 24
        > max(width for layer, width in enumerate(widths) if layer != important)
    )
    assert sum(widths) == 3 * 24
    assert config.gain == pytest.approx(
        1 - trained.widths_history[0][1] / max(reward for _, reward in trained.widths_history)
    )
    assert config.gain > 0


@pytest.mark.long
def test_the_second_stage_leaves_the_channels_scores_as_they_are():
    model = tiny_model("llama")
    first = train(model, SHORT)
    whole = train(model, replace(SHORT, allocation=WHERE), blocks=own_text())
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.policy.scores(model), whole.policy.scores(model), strict=True)
    )
    assert first.history == whole.history
    assert (first.widths_history, first.policy.config.gain, first.policy.offsets(model)) == (
        [],
        None,
        [0.0] * 3,
    )


@pytest.mark.long
def test_a_policy_that_has_learned_where_to_cut_reloads_to_the_same_bits(tmp_path):
    model = tiny_model("llama")
    trained = train(
        model, replace(SHORT, allocation=WHERE), blocks=own_text(), out=tmp_path / "a"
    ).policy
    again = Policy.from_pretrained(tmp_path / "a")
    assert again.offsets(model) == trained.offsets(model) != [0.0] * 3
    assert all(
        torch.equal(a, b) for a, b in zip(again.scores(model), trained.scores(model), strict=True)
    )
    assert again.sha256 == trained.sha256
    assert again.config.gain == trained.config.gain
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.long
def test_the_regime_is_the_most_that_either_stage_looked_at():
    from prunenet.envs import SpectralReward

    model, data = tiny_model("llama"), replace(own_text(), regime="data")
    assert train(model, SHORT, blocks=data).policy.config.regime == "weights"
    assert (
        train(model, replace(SHORT, allocation=WHERE), blocks=own_text()).policy.config.regime
        == "self"
    )
    own = train(
        model,
        replace(SHORT, allocation=WHERE),
        blocks=data,
        reward=SpectralReward(model),
        regime="weights",
    )
    assert own.policy.config.regime == "data"


def test_a_second_stage_without_text_is_refused_before_the_first_one_runs(tmp_path):
    with pytest.raises(
        ValueError, match="the divergence reward is measured on text: give token blocks"
    ):
        train(tiny_model("llama"), replace(SHORT, allocation=WHERE), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_resuming_with_another_second_stage_is_refused(tmp_path):
    train(tiny_model("llama"), replace(SHORT, allocation=WHERE), blocks=own_text(), out=tmp_path)
    for other in (None, replace(WHERE, updates=5)):
        with pytest.raises(PolicyError, match="was started with recipe"):
            train(
                tiny_model("llama"),
                replace(SHORT, allocation=other),
                blocks=own_text(),
                out=tmp_path,
                resume=True,
            )


@pytest.mark.long
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
    before = torch.get_rng_state()
    train(tiny_model("llama"), SHORT)
    assert torch.equal(torch.get_rng_state(), before)
