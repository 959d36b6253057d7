"""One budget over channels, heads and layers: exact, legal, and priced as the matrix says."""

import gymnasium
import numpy as np
import pytest
import torch
from families import tiny_model, token_ids
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

from prunenet.envs import BUDGET_ENV_ID, BudgetPruningEnv, BudgetPruningVectorEnv
from prunenet.envs.budget import game_of
from prunenet.evaluation.costs import unit_costs
from prunenet.evaluation.interaction import Ablation, Interaction, measure_interaction
from prunenet.evaluation.shares import allocated, cost
from prunenet.evaluation.slots import Episodes, Game
from prunenet.evaluation.units import Unit, units_of
from prunenet.features.from_weights import layer_context
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.depth import without_layers
from prunenet.models.layers import count_parameters, ffn_widths
from prunenet.models.surgery import narrowed

BINS = 4
ALL = ("channels", "heads", "attention", "layers")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def parts(model):
    scores = [torch.arange(width).float() for width in ffn_widths(model)]
    return measure_interaction(model, token_ids(4, 12), scores, Ablation(bins=BINS))


@pytest.fixture(scope="module")
def game(model, parts):
    return Game.of(parts, layer_context(model))


def played(game: Game, ratio: float, count: int = 32, **options) -> tuple[Episodes, torch.Tensor]:
    episodes, paid = Episodes(game, count, ratio, **options), torch.zeros(count)
    generator = torch.Generator().manual_seed(0)
    while not episodes.done:
        paid += episodes.play(torch.randint(game.levels, (count,), generator=generator))
    return episodes, paid


@pytest.mark.parametrize("structures", [ALL[:1], ALL[:2], ALL[:3], ALL])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.55])
def test_any_actions_end_at_the_quadratic_form_s_damage_within_the_budget(
    model, parts, structures, ratio
):
    game = Game.of(parts, layer_context(model), structures=structures)
    for worst in (True, False):
        episodes, paid = played(game, ratio, worst=worst)
        gone = 1 - episodes.kept
        each = torch.einsum("nu,duv,nv->nd", gone, game.matrices, gone) / 2
        true = each.amax(1) if worst else each.mean(1)
        torch.testing.assert_close(episodes.damage, true, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(paid, true, rtol=1e-4, atol=1e-5)
        if "layers" not in structures:
            assert float(episodes.left.abs().max()) < 1e-6
        assert float(episodes.left.min()) > -1e-6


SHARED = [
    ("channels", "heads"),
    ("channels", "layers"),
    ("heads",),
    ("layers",),
    ("heads", "attention", "layers"),
    ALL,
]


@pytest.mark.parametrize("structures", SHARED, ids=",".join)
def test_every_budget_that_can_be_met_is_met_by_whatever_is_played_or_asked(structures):
    parts = [planted(layers=4, bins=2, groups=2, structures=structures)]
    game = Game.of(parts, torch.zeros(4, 1), structures=structures)
    asked = torch.randn(32, len(game.slots), generator=torch.Generator().manual_seed(0)) * 3
    whole = torch.zeros(1, len(game.slots))
    holds = 1 - float(cost(game, allocated(game, whole, 1 - 1e-9))) / game.total
    for ratio in (0.1, 0.2, 0.3, 0.45, 0.6, 0.9):
        if ratio <= holds:
            budget = (1 - ratio) * game.total
            assert float(cost(game, allocated(game, asked, ratio)).max()) <= budget * (1 + 1e-6)
            episodes, _ = played(game, ratio)
            assert float(episodes.left.min()) > -1e-6
            if "channels" not in structures:
                assert set(episodes.kept.unique().tolist()) <= {0.0, 1.0}, "units go whole"


def planted(layers: int, bins: int, groups: int, structures) -> Interaction:
    """A random quadratic form of a model whose bins have 100 parameters and groups of heads 70."""
    sizes = {"channels": [100] * bins, "heads": [70] * groups, "attention": [70 * groups]}
    sizes["layers"] = [100 * bins + 70 * groups + 20]
    units = tuple(
        Unit(structure, layer, number, size)
        for layer in range(layers)
        for structure, each in sizes.items()
        for number, size in enumerate(each)
        if structure in structures
    )
    phi = torch.randn(len(units), 40, generator=torch.Generator().manual_seed(0))
    return Interaction(units, phi @ phi.T / 40, phi.square().sum(1) / 80, 40)


def test_the_budget_is_met_to_the_parameter_by_a_narrow_model(model, game):
    episodes, _ = played(game, 0.3, count=1)
    kept = episodes.kept[0]
    keep, groups = [], []
    for layer in range(3):
        heads, channels = game.slots[2 * layer : 2 * layer + 2]
        stays = kept[list(channels.units)] * 12  # channels of a bin
        keep.append(torch.arange(48) >= 48 - int(stays.sum().round()))
        groups.append(kept[sorted(heads.units)] > 0)
    before, after = (count_parameters(net)[0] for net in (model, narrowed(model, keep, groups)))
    channel = 3 * model.config.hidden_size
    assert abs((before - after) - 0.3 * game.total) <= channel


def test_only_legal_numbers_are_played_and_there_is_always_one(model, parts):
    game = Game.of(parts, layer_context(model), structures=ALL)
    episodes = Episodes(game, 64, 0.5)
    while not episodes.done:
        legal = episodes.legal()
        assert legal.any(1).all()
        asked = torch.randint(game.levels, (64,))
        nearest = episodes.nearest(asked)
        assert legal[torch.arange(64), nearest].all()
        assert torch.equal(nearest[legal[torch.arange(64), asked]], asked[legal[range(64), asked]])
        episodes.play(asked)


def test_a_silent_attention_and_a_dropped_layer_are_priced_by_their_own_units(model, parts):
    game = Game.of(parts, layer_context(model), structures=ALL)
    names = [(unit.structure, unit.layer) for unit in parts[0].units]

    def gone(ratio: float, **dropped: int) -> list[float]:
        episodes = Episodes(game, 1, ratio)
        for slot in game.slots:
            drop = dropped.get(slot.structure) == slot.layer
            episodes.play(torch.tensor([0 if drop else len(slot.units)]))
        return (1 - episodes.kept[0]).tolist()

    for ratio, dropped, unit in (
        (0.35, {"layers": 0}, ("layers", 0)),
        (0.2, {"heads": 1}, ("attention", 1)),
    ):
        share = gone(ratio, **dropped)
        assert share[names.index(unit)] == 1
        layer = unit[1]
        parts_of = {("heads", layer)} | ({("channels", layer)} if unit[0] == "layers" else set())
        assert not any(share[n] for n, name in enumerate(names) if name in parts_of)


def test_costs_are_parameters_operations_or_bytes_of_the_cache(model):
    units = units_of(model, BINS)
    by = {cost: unit_costs(units, model.config, cost, 100) for cost in ("params", "flops")}
    cache = unit_costs(units, model.config, "kv-bytes")
    for number, unit in enumerate(units):
        heads = {"channels": 0, "heads": 1, "attention": 2, "layers": 2}[unit.structure]
        assert by["params"][number] == unit.parameters
        # 2 query heads a group, of 8 dimensions; 50 earlier tokens in the mean, 4 operations each
        assert by["flops"][number] == 2 * unit.parameters + heads * 2 * 8 * 50 * 4
        assert cache[number] == heads * 2 * 8 * 2  # keys and values of 2 bytes


def test_the_worst_domain_is_what_an_episode_pays(model, parts):
    one, two = (Game.of([part], layer_context(model)) for part in parts)
    both = Game.of(parts, layer_context(model))
    # the same order of groups in all three, so that the same cut is meant
    one, two = (Game(both.slots, game.matrices, game.features, game.length) for game in (one, two))
    ends = [played(game, 0.4)[0].damage for game in (one, two, both)]
    torch.testing.assert_close(torch.maximum(ends[0], ends[1]), ends[2])


def test_both_env_checkers_pass(game):
    env = BudgetPruningEnv(games=game, render_mode="ansi")
    gymnasium_check(env, skip_render_check=True)
    sb3_check(BudgetPruningEnv(games=game), warn=True)


def test_the_batch_pays_what_single_episodes_pay_and_restarts_by_itself(game):
    single, batch = BudgetPruningEnv(games=game), BudgetPruningVectorEnv(None, 3, games=game)
    seen, _ = batch.reset(seed=0)
    assert seen in batch.observation_space
    actions = np.random.default_rng(0).integers(game.levels, size=(game.length, 3))
    steps = [batch.step(row) for row in actions]
    assert steps[-1][2].all()
    assert steps[-1][0]["slot"].tolist() == [0, 0, 0]
    for number in range(3):
        single.reset(seed=0)
        alone = [single.step(row[number]) for row in actions]
        paid = [step[1][number] for step in steps]
        np.testing.assert_allclose([step[1] for step in alone], paid, rtol=1e-5, atol=1e-7)
        final = steps[-1][4]["final_info"]
        assert final["damage"][number] == pytest.approx(alone[-1][4]["damage"], rel=1e-5)
        assert final["_damage"].all()
        assert alone[-1][4]["budget_left"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        single.step(0)


def test_games_of_several_models_are_drawn_and_padded_to_one_length(game):
    longer = game_of()
    env = BudgetPruningVectorEnv(None, 2, games=[game, longer], ratio=(0.1, 0.5))
    drawn = {env.reset(seed=seed)[1]["game"][0] for seed in range(12)}
    assert drawn == {0, 1}
    _, infos = env.reset(seed=0, options={"game": 0, "ratio": 0.25})
    assert infos["ratio"].tolist() == [0.25, 0.25]
    for step in range(len(longer.slots)):
        _, reward, ended, _, infos = env.step(np.zeros(2, dtype=np.int64))
        assert (step < len(game.slots)) or (reward == 0).all()
    assert ended.all()
    with pytest.raises(ValueError, match="games 0 to 1, got 2"):
        env.reset(options={"game": 2})


@pytest.mark.long
def test_gymnasium_makes_both_on_a_tiny_model_and_writes_the_spec(tmp_path):
    env = gymnasium.make(BUDGET_ENV_ID, ratio=0.4, bins=3, render_mode="rgb_array")
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    seen, info = env.reset(seed=0)
    assert np.array_equal(seen["context"], again.reset(seed=0)[0]["context"])
    assert env.action_space.n == 4
    assert info["action_mask"].tolist() == env.unwrapped.action_masks().tolist()
    env.step(1)
    assert env.render().shape == (8 * 10 + 2, 324, 3)
    batch = gymnasium.make_vec(BUDGET_ENV_ID, 2, vectorization_mode="vector_entry_point")
    batch.reset(seed=0)
    assert batch.unwrapped.action_masks().shape == (2, batch.single_action_space.n)


def test_masked_random_play_is_never_changed(game):
    env = BudgetPruningEnv(games=game, ratio=0.5)
    _, info = env.reset(seed=0)
    env.action_space.seed(0)
    done = False
    while not done:
        action = env.action_space.sample(mask=info["action_mask"].astype(np.int8))
        assert int(env._episodes.nearest(torch.tensor([action]))) == action
        _, _, done, _, info = env.step(action)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ratio": (0.1, 0.99)}, r"at ratio 0\.99 .* at most 0\.7"),
        ({"ratio": "a"}, r"`ratio` is a share in \[0, 1\), or a range \(low, high\).* got 'a'"),
        ({"ratio": (0.1,)}, r"a range \(low, high\) of them, got \(0\.1,\)"),
        ({"ratio": None}, "`ratio` is a share .* got None"),
        ({"structures": []}, r"`structures` is a list of any of channels, .* got \[\]"),
        ({"structures": "channels,heads"}, "`structures` is a list .* got 'channels,heads'"),
        ({"structures": ["attention"]}, "name heads among the structures too"),
        ({"structures": ["channels"], "cost": "kv-bytes"}, "channels cost nothing by 'kv-bytes'"),
        ({"bins": 1.5}, r"bins must be in \[1, 96\], got 1\.5"),
        ({"games": []}, "`games` are one or more measured games, and no model, got none"),
    ],
)
def test_an_environment_that_cannot_be_played_is_refused_before_its_matrix_is_measured(
    asked, message, monkeypatch, unchecked
):
    if "ratio" not in asked or not isinstance(asked["ratio"], tuple) or len(asked["ratio"]) < 2:
        monkeypatch.setattr("prunenet.envs.budget.measure_interaction", None)
    with pytest.raises(ValueError, match=message):
        gymnasium.make(BUDGET_ENV_ID, **asked)


def test_models_that_lack_the_structures_are_refused_by_their_family(model, game, unchecked):
    with pytest.raises(UnsupportedArchitecture, match="heads of model type 'phi3' cannot be cut"):
        BudgetPruningEnv(tiny_model("phi3"))
    alone = without_layers(model, torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match="this one has no other: leave layers out"):
        BudgetPruningEnv(alone, structures=["layers"])
    with pytest.raises(ValueError, match="got model, bins beside them"):
        BudgetPruningEnv(model, games=game, bins=3)
    with pytest.raises(TypeError, match=r"are of `game_of` or .*, got a str"):
        BudgetPruningEnv(games="x")
    with pytest.raises(TypeError, match=r"`model` is a causal LM, its folder .* got int"):
        BudgetPruningEnv(3)


def test_moves_that_are_no_moves_are_refused_and_the_episode_stays(game):
    env, batch = BudgetPruningEnv(games=game), BudgetPruningVectorEnv(num_envs=2, games=game)
    for started in (env.action_masks, batch.action_masks, lambda: batch.step(np.zeros(2, int))):
        with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
            started()
    env.reset(seed=0), batch.reset(seed=0)
    for action in (1.5, None, "x", np.nan, np.array([1, 2])):
        with pytest.raises(ValueError, match="a whole number, got"):
            env.step(action)
    with pytest.raises(ValueError, match="actions are 2 numbers"):
        batch.step(np.array([1.5, 2]))
    for number in ("x", 0.5):
        with pytest.raises(ValueError, match="a whole number, got"):
            env.reset(options={"game": number})
    env.reset(seed=0)
    assert env.step(np.int64(1))[4] != {}


def test_what_cannot_be_met_or_is_not_there_is_a_clear_error(model, parts, game, unchecked):
    with pytest.raises(ValueError, match=r"at ratio 0\.99 .* at most 0\.6"):
        BudgetPruningEnv(games=game, ratio=0.99).reset(seed=0)
    env = BudgetPruningEnv(games=game)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"an action is in \[0, 5\), got 7"):
        env.step(7)
    with pytest.raises(ValueError, match="no experts: measure them"):
        Game.of(parts, layer_context(model), structures=("experts",))
    with pytest.raises(ValueError, match="params, active, flops, kv-bytes"):
        game_of(model, cost="joules")
