"""The environment keeps its specification."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from families import tiny_model
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

from prunenet.envs import ENV_ID, LayerwisePruningEnv, LayerwisePruningVectorEnv, SpectralReward
from prunenet.envs.sweep import Sweep, View
from prunenet.evaluation.units import units_of

D_FF = 48


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def halves(count: int, width: int = D_FF // 2) -> np.ndarray:
    keep = np.zeros((count, D_FF), dtype=np.int8)
    keep[:, :width] = 1
    return keep


def test_both_env_checkers_pass_without_a_warning(model):
    # gymnasium.make only wraps; the checkers ask for the bare environment.
    made = gymnasium.make(ENV_ID, model=model, disable_env_checker=True)
    gymnasium_check(made.unwrapped, skip_render_check=True)
    sb3_check(LayerwisePruningEnv(model), warn=True)


def test_the_model_is_neither_copied_nor_changed(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    env = gymnasium.make(ENV_ID, model=model)
    assert env.unwrapped.model is model
    env.reset(seed=0)
    for _ in range(env.unwrapped.observation_space["layer"].n):
        env.step(halves(1)[0])
    env.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_sweep_visits_every_layer_once_and_adds_up_what_it_removed(model):
    env = LayerwisePruningEnv(model, ratio=0.5)
    observation, info = env.reset(seed=0)
    layers = int(env.observation_space["layer"].n)
    assert info["budget_left"] == layers * D_FF // 2
    for layer in range(layers):
        assert observation["layer"] == layer
        observation, reward, terminated, truncated, info = env.step(halves(1)[0])
        assert 0 <= reward <= 1
        assert not truncated
        assert terminated == (layer == layers - 1)
    assert info["budget_left"] == 0
    assert info["parameters_removed"] == layers * D_FF // 2 * 3 * model.config.hidden_size
    assert info["reward/overdraft"] == 0
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(halves(1)[0])


def test_same_seed_same_sweep(model):
    def rewards(seed):
        env = LayerwisePruningEnv(model, ratio=(0.1, 0.5))
        observation, info = env.reset(seed=seed)
        env.action_space.seed(seed)
        steps = [env.step(env.action_space.sample())[1] for _ in range(observation["layer"] + 2)]
        return info["ratio"], steps

    assert rewards(3) == rewards(3)
    assert rewards(3) != rewards(4)


def test_a_reset_option_fixes_the_ratio(model):
    env = LayerwisePruningEnv(model, ratio=(0.1, 0.5))
    assert env.reset(seed=0, options={"ratio": 0.25})[1]["ratio"] == 0.25


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(D_FF - 1), f"has {D_FF} entries"),
        (np.ones((1, D_FF)), "one keep mask"),
        (np.full(D_FF, 2), "zeros and ones"),
    ],
)
def test_what_is_no_mask_is_a_clear_error_and_changes_nothing(model, mask, message):
    env = LayerwisePruningEnv(model)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(mask)
    assert env.step(halves(1)[0])[4]["width"] == D_FF // 2


def swept(model, ratio: float, **rules) -> Sweep:
    sweep = Sweep(View.of(model), SpectralReward(model, distance="energy"), **rules)
    sweep.start(ratio)
    return sweep


@pytest.mark.parametrize(
    ("width", "ratio", "rules", "message"),
    [
        (0, 0.3, {}, "keep at least one channel"),
        (4, 0.3, {"min_width": 8}, "must keep at least 8 channels, got 4"),
        (D_FF, 0.9, {"slack": 0.0}, "breaks the budget: at most"),
    ],
)
def test_the_rules_of_a_sweep_refuse_a_mask_and_legal_makes_the_nearest_one(
    model, width, ratio, rules, message
):
    sweep, keep = swept(model, ratio, **rules), torch.from_numpy(halves(1, width)).bool()
    with pytest.raises(ValueError, match=message):
        sweep.play(keep)
    legal = sweep.legal(keep)
    least, most = sweep.min_width, int(sweep.most())
    assert int((legal != keep).sum()) == max(least - width, width - most)
    sweep.play(legal)
    kept = torch.from_numpy(halves(1)).bool()
    assert torch.equal(swept(model, 0.5).legal(kept), kept)


@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.95])
def test_every_action_of_the_space_is_legal_and_what_the_rules_change_costs_reward(model, ratio):
    env = LayerwisePruningEnv(model, ratio=ratio)
    batch = LayerwisePruningVectorEnv(model, 2, ratio=ratio)
    env.action_space.seed(0)
    actions = [np.zeros(D_FF), np.ones(D_FF), np.ones(D_FF)]
    for played in (actions, [env.action_space.sample() for _ in actions]):
        env.reset(seed=0)
        batch.reset(seed=0)
        for action in played:
            _, paid, done, _, info = env.step(action)
            changed = abs(int(action.sum()) - info["width"]) / D_FF
            assert info["reward/clipped"] == pytest.approx(-changed)
            assert paid == pytest.approx(sum(v for k, v in info.items() if k[:7] == "reward/"))
            together = batch.step(np.stack([action, action]))
            np.testing.assert_allclose(together[1], paid, rtol=1e-6)
        assert done
        assert info["budget_left"] >= -int(0.25 * D_FF)


def test_overdrawing_the_budget_costs_reward(model):
    view = View.of(model)
    sweep = Sweep(view, SpectralReward(model, distance="energy"), slack=1.0)
    sweep.start(0.5)
    wide = torch.ones(1, D_FF, dtype=torch.bool)
    half = torch.from_numpy(halves(1)).bool()
    for keep in [half] * (view.layers - 1):
        _, terms = sweep.play(keep)
        assert "overdraft" not in terms
    _, terms = sweep.play(wide)
    assert float(terms["overdraft"]) == -0.5


@pytest.mark.parametrize("ratio", [1.0, -0.1, (0.5, 0.2), (0.2, 1.0)])
def test_a_ratio_out_of_range_is_refused_when_the_environment_is_made(model, ratio):
    with pytest.raises(ValueError, match="ratio"):
        LayerwisePruningEnv(model, ratio=ratio)


def test_observations_lie_in_their_space_and_say_the_target(model):
    env = LayerwisePruningEnv(model, ratio=0.25)
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    assert observation["context"][-2] == pytest.approx(0.75)
    observation, *_ = env.step(halves(1)[0])
    assert observation in env.observation_space
    assert observation["context"][-2] > 0.75


def test_the_batched_environment_pays_what_single_ones_pay(model):
    single, batch = (
        LayerwisePruningEnv(model, ratio=0.3),
        LayerwisePruningVectorEnv(model, 3, ratio=0.3),
    )
    batch.reset(seed=0)
    rng = np.random.default_rng(0)
    actions = (rng.random((int(single.observation_space["layer"].n), 3, D_FF)) < 0.6).astype(
        np.int8
    )
    batched = [batch.step(step)[1] for step in actions]
    for mask in range(3):
        single.reset(seed=0)
        np.testing.assert_allclose(
            [single.step(step[mask])[1] for step in actions], [r[mask] for r in batched], rtol=1e-6
        )


def test_batched_sweeps_restart_by_themselves_and_hand_over_the_last_observation(model):
    env = LayerwisePruningVectorEnv(model, 2, ratio=(0.1, 0.6))
    observation, first = env.reset(seed=0)
    assert observation in env.observation_space
    for _ in range(env.view.layers):
        observation, _, ended, _, infos = env.step(halves(2))
    assert ended.all()
    assert observation["layer"].tolist() == [0, 0]
    assert infos["final_obs"]["context"].shape == observation["context"].shape
    assert env._sweep.ratio != first["ratio"][0]


def test_batches_without_a_seed_differ(model):
    batches = [LayerwisePruningVectorEnv(model, 1, ratio=(0.1, 0.6)) for _ in range(2)]
    first, second = (batch.reset()[1]["ratio"] for batch in batches)
    assert (first != second).all()


@pytest.mark.parametrize("kind", [LayerwisePruningEnv, LayerwisePruningVectorEnv])
def test_ratios_at_which_layers_cannot_keep_the_least_width_are_refused_at_once(model, kind):
    with pytest.raises(ValueError, match=r"at ratio 0\.9 the \d+ layers cannot keep 40 channels"):
        kind(model, ratio=(0.1, 0.9), min_width=40)


def test_the_ratio_of_a_sweep_depends_on_seed_and_number_alone(model):
    env = LayerwisePruningVectorEnv(model, 2, ratio=(0.1, 0.6))
    env.reset(seed=7)
    ratios = []
    for _ in range(3):
        ratios.append(env._sweep.ratio)
        for _ in range(env.view.layers):
            env.step(halves(2))
    late = LayerwisePruningVectorEnv(model, 2, ratio=(0.1, 0.6))
    late.reset(seed=7, options={"sweep": 2})
    assert late._sweep.ratio == ratios[2]
    assert len(set(ratios)) == 3


def test_gymnasium_makes_the_batched_environment_too(model):
    env = gymnasium.make_vec(
        ENV_ID, num_envs=2, vectorization_mode="vector_entry_point", model=model
    )
    assert isinstance(env.unwrapped, LayerwisePruningVectorEnv)
    env.close()


def test_a_model_with_layers_of_different_widths_is_refused(model):
    from prunenet.models.surgery import narrowed

    keep = [torch.ones(D_FF, dtype=torch.bool) for _ in range(View.of(model).layers)]
    keep[0][8:] = False
    with pytest.raises(ValueError, match="2 different widths"):
        LayerwisePruningEnv(narrowed(model, keep))


def test_importing_prunenet_registers_the_environments_before_or_after_gymnasium():
    tell = "print('prunenet/LayerwisePruning-v0' in gymnasium.registry, 'torch' in sys.modules)"
    for order in ("import prunenet, gymnasium", "import gymnasium, prunenet"):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; {order}; {tell}"], capture_output=True, text=True
        )
        assert done.stdout.strip() == "True False", done.stderr


def test_an_environment_takes_a_folder_or_nothing_and_its_spec_is_json(model, tmp_path):
    model.save_pretrained(tmp_path)
    env = gymnasium.make(ENV_ID, model=str(tmp_path), ratio=0.4)
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    seen, seen_again = env.reset(seed=0)[0], again.reset(seed=0)[0]
    assert all(np.array_equal(seen[key], seen_again[key]) for key in seen)
    assert gymnasium.make(ENV_ID).reset(seed=0)[1]["budget_left"] == round(0.7 * 4 * 96)


def test_a_wrong_reward_option_or_drawing_is_refused_at_once(model, unchecked):
    for cls in (LayerwisePruningEnv, LayerwisePruningVectorEnv):
        with pytest.raises(TypeError, match="has no layer"):
            cls(model, reward=lambda masks: masks)
        with pytest.raises(ValueError, match="`render_mode` must be one of ansi, rgb_array"):
            cls(model, render_mode="human")
        with pytest.raises(ValueError, match="unknown reset option 'ratios'; options: ratio"):
            cls(model).reset(options={"ratios": 0.5})


def test_a_step_before_the_first_reset_and_numbers_that_are_none_are_refused(model, unchecked):
    env, batch = LayerwisePruningEnv(model), LayerwisePruningVectorEnv(model, 2)
    for play in (lambda: env.step(halves(1)[0]), lambda: batch.step(halves(2))):
        with pytest.raises(RuntimeError, match=r"there is no sweep: call reset\(\)"):
            play()
    for number, message in (("x", "a whole number, got 'x'"), (-1, "counted from 0, got -1")):
        with pytest.raises(ValueError, match=message):
            batch.reset(options={"sweep": number})
    with pytest.raises(ValueError, match=r"num_envs must be at least 1, a whole number, got 1\.5"):
        LayerwisePruningVectorEnv(model, 1.5)
    with pytest.raises(ValueError, match=r"min_width must be in \[1, 48\], got 1.5"):
        LayerwisePruningEnv(model, min_width=1.5)


def test_whole_numbers_of_numpy_count_as_those_of_python(model, unchecked):
    batch = LayerwisePruningVectorEnv(model, np.int64(2), min_width=np.int32(3))
    assert batch.reset(seed=0)[1]["ratio"].shape == (2,)
    assert type(batch.num_envs) is int
    assert units_of(model, bins=np.int64(4)) == units_of(model, bins=4)


def test_widths_are_drawn_bar_by_bar(model):
    env = LayerwisePruningEnv(model, ratio=0.5, render_mode="ansi")
    env.reset(seed=0)
    env.step(halves(1)[0])
    lines = env.render().splitlines()
    assert len(lines) == 1 + 3
    assert lines[1].endswith("| 50%")
    assert lines[1].count("#") == 20
    assert "." in lines[2]
    image = LayerwisePruningVectorEnv(model, 2, render_mode="rgb_array")
    image.reset(seed=0)
    image.step(halves(2))
    first, second = image.render()
    assert first.shape == (32, 324, 3)
    assert np.array_equal(first, second)
    assert (first[5, 10] != first[5, 300]).any()


def test_information_of_the_batched_environment_comes_with_masks_and_ends_with_the_sweep(model):
    env = LayerwisePruningVectorEnv(model, 2, ratio=0.5)
    _, infos = env.reset(seed=0)
    keys = set()
    for layer in range(env.view.layers):
        _, _, ended, _, infos = env.step(halves(2))
        keys.add(frozenset(key for key in infos if not key.startswith(("final", "_final"))))
        assert ("final_info" in infos) == (layer == env.view.layers - 1)
    assert len(keys) == 1
    assert ended.all()
    last = infos["final_info"]
    removed = env.view.layers * D_FF // 2 * 3 * model.config.hidden_size
    assert last["parameters_removed"].tolist() == [removed] * 2
    assert last["budget_left"].tolist() == [0, 0]
    for known in (infos, last):
        assert all(known[f"_{key}"].all() for key in known if not key.startswith("_"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["PPO", "A2C"])
def test_a_stock_trainer_plays_the_single_and_the_batched_environment(model, name):
    import stable_baselines3

    import prunenet

    trainer, whole = getattr(stable_baselines3, name), {"batch_size": 6} if name == "PPO" else {}
    batched = prunenet.SB3VecEnv(LayerwisePruningVectorEnv(model, 2, ratio=0.7))
    for env in (LayerwisePruningEnv(model, ratio=0.7), batched):
        agent = trainer("MultiInputPolicy", env, n_steps=6, seed=0, **whole)
        agent.learn(24)
        assert agent.num_timesteps >= 24
        assert agent.ep_info_buffer[0]["l"] == 3


def test_a_maskable_trainer_reads_the_masks(model):
    contrib = pytest.importorskip("sb3_contrib")
    import prunenet

    batched = prunenet.SB3VecEnv(LayerwisePruningVectorEnv(model, 2, ratio=0.7))
    for env in (LayerwisePruningEnv(model, ratio=0.7), batched):
        agent = contrib.MaskablePPO("MultiInputPolicy", env, n_steps=6, batch_size=6, seed=0)
        agent.learn(24)
