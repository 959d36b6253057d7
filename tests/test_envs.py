"""The environment keeps its specification."""

import gymnasium
import numpy as np
import pytest
import torch
from families import tiny_model
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

from prunenet.envs import ENV_ID, LayerwisePruningEnv, LayerwisePruningVectorEnv, SpectralReward
from prunenet.envs.sweep import Sweep, View

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
        (np.zeros(D_FF), "keep at least one channel"),
        (np.ones(D_FF - 1), f"has {D_FF} entries"),
        (np.ones((1, D_FF)), "one keep mask"),
        (np.full(D_FF, 2), "zeros and ones"),
    ],
)
def test_a_mask_that_breaks_a_rule_is_a_clear_error_and_changes_nothing(model, mask, message):
    env = LayerwisePruningEnv(model)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(mask)
    assert env.step(halves(1)[0])[4]["width"] == D_FF // 2


def test_a_mask_that_leaves_later_layers_without_budget_is_an_error(model):
    env = LayerwisePruningEnv(model, ratio=0.9, slack=0.0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="breaks the budget: at most"):
        env.step(np.ones(D_FF))


def test_fewer_channels_than_min_width_is_an_error(model):
    env = LayerwisePruningEnv(model, min_width=8)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="must keep at least 8 channels, got 4"):
        env.step(halves(1, 4)[0])


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
