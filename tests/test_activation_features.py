"""Policies that read activations: what the statistics are, and that such a policy learns, is saved,
applied and refused.
"""

import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from families import tiny_model, token_ids
from safetensors.torch import load_file
from test_cli import facts, refused, save_tiny

import prunenet
from prunenet.envs.rewards import ReconstructionReward, SpectralReward
from prunenet.envs.sweep import View
from prunenet.features import from_activations as activation_stats
from prunenet.features.from_activations import (
    MOMENT_STATISTICS,
    channel_features,
    layer_moment_statistics,
    moment_statistics,
)
from prunenet.features.from_weights import STATISTICS, channel_statistics
from prunenet.models.layers import down_linears, iter_ffns
from prunenet.models.masks import top_channels
from prunenet.policies import artifact
from prunenet.policies.artifact import Policy, PolicyConfig, PolicyError, zoo
from prunenet.policies.training import train as training
from prunenet.policies.training.recipe import MOMENT_PRIOR, PRESETS, Recipe
from prunenet.policies.training.reports import Reports
from prunenet.policies.training.train import train
from prunenet.refit.moments import LayerWalk, Moments, ffn_moments
from prunenet.text.calibration import CalibrationSet

SHORT = Recipe(features="moments", updates=4, masks=4, hidden=(8,), evaluate_every=2)
WHERE = replace(PRESETS["widths"], updates=2, masks=2, round_to=4, evaluate_at=(0.5,))


def own_text(n: int = 10, tokens: int = 24, regime: str = "self", seed: int = 0) -> CalibrationSet:
    return CalibrationSet(token_ids(n, tokens, seed), regime, {"text": "random"})


def some_policy(**config) -> Policy:
    """It reads activations, and its residual is random."""
    policy = Policy.untrained(PolicyConfig(moments=MOMENT_STATISTICS, hidden=(8,), **config))
    with torch.no_grad():
        policy.scorer.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    return policy


def column(rows: torch.Tensor, name: str) -> torch.Tensor:
    return rows[:, MOMENT_STATISTICS.index(name)]


@pytest.fixture
def raw(monkeypatch):
    """Statistics as they are before they are standardised inside the layer."""
    monkeypatch.setattr(activation_stats, "standardised", lambda columns: columns)


def test_a_layer_computed_by_hand(raw):
    second = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 4.0]])
    weight = torch.tensor([[3.0, 0.0, 1.0], [4.0, 2.0, 0.0]])  # columns of norm 5, 2 and 1
    rows = layer_moment_statistics(weight, Moments(second, torch.tensor([0.5, 0.0, 1.0]), 10))
    # What the channels write: energies 25, 4 and 4, and 5 between the first two; 1 % of their mean
    # is 0.11.
    unique = [25 - 5**2 / 4.11, 4 - 5**2 / 25.11, 4]
    expected = {
        "moment_energy": [math.log(v) for v in (1, 1, 4)],
        "moment_write": [math.log(v) for v in (25, 4, 4)],
        "moment_fluctuation": [math.log(v) for v in (0.75 * 25, 4, 0.75 * 4)],
        "moment_mean_share": [0.25, 0, 0.25],
        "moment_unique": [math.log(v) for v in unique],
        "moment_unique_share": [
            math.log(v / whole) for v, whole in zip(unique, (25, 4, 4), strict=True)
        ],
    }
    assert set(expected) == set(MOMENT_STATISTICS)
    for name, values in expected.items():
        torch.testing.assert_close(column(rows, name), torch.tensor(values), rtol=1e-5, atol=1e-5)


def test_the_unique_energy_is_what_a_ridge_regression_on_the_other_channels_leaves(raw):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    weight = torch.randn(4, 6, generator=generator)
    rows = layer_moment_statistics(weight, Moments(h.T @ h / 200, h.mean(0), 200))
    written = (h * weight.norm(dim=0)).double()
    lam = 0.01 * written.square().mean()
    for j in range(6):
        others = written[:, torch.arange(6) != j]
        stacked = torch.cat((others / 200**0.5, lam.sqrt() * torch.eye(5, dtype=torch.float64)))
        wanted = torch.cat((written[:, j] / 200**0.5, torch.zeros(5, dtype=torch.float64)))
        left = (
            (wanted - stacked @ torch.linalg.lstsq(stacked, wanted[:, None]).solution[:, 0])
            .square()
            .sum()
        )
        assert float(column(rows, "moment_unique")[j]) == pytest.approx(float(left.log()), abs=1e-4)


def test_how_a_channel_splits_its_size_between_activation_and_down_column_does_not_matter():
    model, ids = tiny_model("llama"), token_ids(8, 24)
    before = moment_statistics(model, ids)
    generator = torch.Generator().manual_seed(0)
    for ffn in iter_ffns(model):
        scale = torch.exp(torch.randn(ffn.d_ff, generator=generator))
        ffn.up.mul_(scale[:, None])
        ffn.down.div_(scale)
    for a, b in zip(before, moment_statistics(model, ids), strict=True):
        for name in MOMENT_STATISTICS:
            changed = float((column(a, name) - column(b, name)).abs().max())
            assert changed > 0.5 if name == "moment_energy" else changed < 1e-2, name


def test_a_layer_twice_as_wide_gives_each_of_its_halves_the_same_statistics():
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(64, 16, generator=generator), torch.randn(8, 16, generator=generator)
    mean = 0.5 * torch.randn(16, generator=generator)
    second = h.T @ h / 64 + torch.outer(mean, mean)
    once = layer_moment_statistics(weight, Moments(second, mean, 64))
    twice = layer_moment_statistics(
        torch.cat((weight, weight), 1),
        Moments(torch.block_diag(second, second), mean.repeat(2), 64),
    )
    torch.testing.assert_close(twice, torch.cat((once, once)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_statistics_are_bounded_and_say_something(family):
    model = tiny_model(family)
    for rows, weights in zip(
        channel_features(model, token_ids(4, 24)), channel_statistics(model), strict=True
    ):
        assert torch.equal(rows[:, : len(STATISTICS)], weights)
        measured = rows[:, len(STATISTICS) :]
        assert measured.shape == (48, len(MOMENT_STATISTICS))
        assert float(measured.abs().max()) <= 4
        assert bool((measured.std(0) > 0.1).all())


def test_channels_and_layers_that_write_nothing_are_finite_and_come_last():
    model = tiny_model("llama")
    first, second, _ = iter_ffns(model)
    first.up[:5] = 0
    first.down[:, 5] = 0
    second.up.zero_()
    one, silent, _ = moment_statistics(model, token_ids(4, 24))
    for name in ("moment_write", "moment_fluctuation", "moment_unique"):
        assert float(column(one, name)[:6].max()) < float(column(one, name)[6:].min())
    assert bool(torch.isfinite(one).all())
    assert not silent.any()


def test_statistics_follow_a_permutation_of_the_channels():
    generator = torch.Generator().manual_seed(0)
    h, weight, order = (
        torch.rand(64, 16, generator=generator),
        torch.randn(8, 16, generator=generator),
        torch.randperm(16),
    )
    plain = layer_moment_statistics(weight, Moments(h.T @ h / 64, h.mean(0), 64))
    h = h[:, order]
    torch.testing.assert_close(
        layer_moment_statistics(weight[:, order], Moments(h.T @ h / 64, h.mean(0), 64)),
        plain[order],
        rtol=1e-4,
        atol=1e-4,
    )


def test_memory_holds_the_moments_of_one_layer(monkeypatch):
    alive: list[weakref.ref] = []
    measure = LayerWalk.moments

    def watched(walk: LayerWalk, index: int) -> Moments:
        moments = measure(walk, index)
        alive.append(weakref.ref(moments.second))
        # the last layer's name goes as this one's comes
        assert sum(reference() is not None for reference in alive) <= 2
        return moments

    monkeypatch.setattr(LayerWalk, "moments", watched)
    steps: list[tuple[int, int]] = []
    moment_statistics(
        tiny_model("llama"), token_ids(4, 24), progress=lambda done, of: steps.append((done, of))
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert all(reference() is None for reference in alive)


def test_activations_that_are_not_finite_are_one_sentence():
    model = tiny_model("llama")
    list(iter_ffns(model))[1].up.fill_(3e38)
    with pytest.raises(ValueError, match="activations of layer 1 are not finite"):
        moment_statistics(model, token_ids(2, 8))


def test_untrained_it_is_the_closed_form_it_starts_from():
    model, blocks = tiny_model("llama"), own_text()
    policy = Policy.untrained(PolicyConfig(moments=MOMENT_STATISTICS, prior=MOMENT_PRIOR))
    scores = policy.scores(model, blocks)
    keep = policy.masks(model, 0.5, blocks=blocks)
    for row, mask, moments, linear in zip(
        scores, keep, ffn_moments(model, blocks.ids), down_linears(model), strict=True
    ):
        wanda = moments.second.diagonal().sqrt() * linear.weight.detach().norm(dim=0)
        assert row.argsort().tolist() == wanda.argsort().tolist()
        assert torch.equal(mask, top_channels(wanda, 24))


def test_no_statistic_alone_reconstructs_more_on_other_text_than_the_prior():
    paid = dict.fromkeys(MOMENT_STATISTICS, 0.0)
    for seed in range(3):
        model, generator = tiny_model("llama", seed=seed), torch.Generator().manual_seed(seed)
        for ffn in iter_ffns(model):
            ffn.down.mul_(torch.exp(0.7 * torch.randn(ffn.d_ff, generator=generator)))
        reward = ReconstructionReward(model, token_ids(16, 32, seed=10 + seed))
        for layer, rows in enumerate(moment_statistics(model, token_ids(16, 32, seed=seed))):
            for name in paid:
                keep = torch.stack(
                    [top_channels(column(rows, name), width) for width in (20, 30, 40)]
                )
                paid[name] += float(reward.layer(layer, keep)["reconstruction"].mean())
    (prior,) = MOMENT_PRIOR
    assert paid[prior] > 0.99 * max(paid.values())
    assert paid[prior] > 1.1 * paid["moment_energy"]


@pytest.mark.long
def test_training_improves_on_its_start_on_text_that_neither_half_saw():
    model = tiny_model("llama")
    # twelve quiet channels that say the same: together they write most
    for ffn in iter_ffns(model):
        ffn.gate[:12], ffn.up[:12] = ffn.gate[0].clone(), ffn.up[0].clone()
        ffn.down[:, :12] = 0.3 * ffn.down[:, :1].clone()
    blocks = own_text(16, 24)
    recipe = replace(
        SHORT,
        updates=12,
        masks=16,
        hidden=(16,),
        learning_rate=3e-2,
        ratio=(0.2, 0.5),
        evaluate_at=(1 / 3,),
    )
    trained = train(model, recipe, blocks=blocks)
    fresh = ReconstructionReward(model, token_ids(16, 24, seed=1))

    def paid(policy: Policy) -> float:
        kept = policy.masks(model, 1 / 3, blocks=blocks)
        return sum(
            float(fresh.layer(layer, mask[None])["reconstruction"][0])
            for layer, mask in enumerate(kept)
        ) / len(kept)

    untrained = Policy.untrained(trained.policy.config)
    assert max(reward for _, reward in trained.history) > trained.history[0][1] + 0.05
    assert paid(trained.policy) > paid(untrained) + 0.05


def test_the_scorer_reads_one_half_of_the_text_and_the_rewards_the_other(monkeypatch):
    model, blocks, seen = tiny_model("llama"), own_text(5), {}
    view, reward = View.of, ReconstructionReward

    def viewed(model, ids):
        seen["features"] = ids
        return view(model, ids)

    def rewarded(model, ids):
        seen["reward"] = ids
        return reward(model, ids)

    monkeypatch.setattr(training.View, "of", viewed)
    monkeypatch.setattr(training, "ReconstructionReward", rewarded)
    config = train(model, SHORT, blocks=blocks).policy.config
    assert torch.equal(seen["features"], blocks.ids[:2])
    assert torch.equal(seen["reward"], blocks.ids[2:])
    assert config.moments == MOMENT_STATISTICS
    assert config.recipe["features"] == "moments"
    assert config.prior == MOMENT_PRIOR
    assert train(
        model, replace(SHORT, prior={"moment_unique": 2.0}), blocks=blocks
    ).policy.config.prior == {"moment_unique": 2.0}
    train(model, replace(SHORT, features="weights"), blocks=blocks)
    assert seen["features"] is None
    assert torch.equal(seen["reward"], blocks.ids)


@pytest.mark.long
def test_a_run_that_was_stopped_resumes_to_the_same_policy_bit_for_bit(tmp_path):
    class Stopped(Exception):
        pass

    def stop(done: int, of: int, best: float) -> None:
        if done == 3:
            raise Stopped

    def run(folder: str, recipe: Recipe = SHORT, **choices) -> None:
        train(
            tiny_model("llama"),
            replace(recipe, allocation=WHERE),
            blocks=own_text(),
            out=tmp_path / folder,
            **choices,
        )

    with pytest.raises(Stopped):
        run("stopped", reports=Reports(progress=stop))
    with pytest.raises(PolicyError, match="was started with recipe"):
        run("stopped", replace(SHORT, features="weights"), resume=True)
    run("stopped", resume=True)
    run("whole")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_a_saved_policy_reloads_to_the_same_scores(tmp_path):
    model, blocks, policy = tiny_model("llama"), own_text(), some_policy()
    policy.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path)
    assert again.config.moments == MOMENT_STATISTICS
    assert again.sha256 == policy.sha256
    pairs = zip(again.scores(model, blocks), policy.scores(model, blocks), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_policies_from_before_read_weights_alone_and_keep_their_files_and_hash(tmp_path):
    folder = zoo()["llama"]
    policy = Policy.from_pretrained("llama")
    assert policy.config.moments == ()
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    before, now = (load_file(at / "model.safetensors") for at in (folder, tmp_path))
    assert before.keys() == now.keys()
    assert all(before[name].equal(now[name]) for name in before)
    assert Policy.from_pretrained(tmp_path).sha256 == policy.sha256
    model = tiny_model("llama")
    view = View.of(model)
    with torch.no_grad():
        expected = policy.scorer(torch.stack(view.statistics), view.context)
    torch.testing.assert_close(torch.stack(policy.scores(model)), expected)
    assert all(
        torch.equal(a, b)
        for a, b in zip(policy.scores(model), policy.scores(model, own_text()), strict=True)
    )


@pytest.mark.parametrize("changes", [{"moments": ["moment_write"]}, {"moments_version": 0}])
def test_other_moment_statistics_are_refused(tmp_path, changes):
    path = some_policy().save_pretrained(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(
        PolicyError, match=r"reads moment statistics version .* train the policy again"
    ):
        Policy.from_pretrained(tmp_path)


def test_without_text_it_says_what_is_missing():
    model, policy = tiny_model("llama"), some_policy()
    scores = policy.scores(model, own_text())
    for ask in (
        lambda: policy.scores(model),
        lambda: policy.masks(model, 0.5),
        lambda: prunenet.prune(model, policy, ratio=0.5),
        # of which text, the record could not say
        lambda: prunenet.prune(model, policy, ratio=0.5, scores=scores),
    ):
        with pytest.raises(
            ValueError,
            match=r"by their activations: give it text .*\(`blocks`\)",
        ):
            ask()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (None, "the reconstruction reward is measured on text"),
        (own_text(1), "give 2 token blocks or more .*got 1"),
    ],
)
def test_training_without_enough_text_is_refused_before_it_starts(tmp_path, blocks, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_model("llama"), SHORT, blocks=blocks, out=tmp_path / "out")
    with pytest.raises(ValueError, match="a policy that reads moments measures them on text"):
        train(
            tiny_model("llama"),
            replace(SHORT, reward="spectral"),
            blocks=None,
            out=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_features_that_a_recipe_does_not_know_are_refused(unchecked):
    with pytest.raises(
        ValueError, match="`features` must be one of weights, moments, got 'activations'"
    ):
        replace(SHORT, features="activations")


@pytest.mark.parametrize("refit", ["off", "layerwise"])
@pytest.mark.parametrize("regime", ["self", "data"])
def test_pruning_by_it_is_of_the_regime_of_its_text(regime, refit):
    model, policy, blocks = tiny_model("llama"), some_policy(), own_text(regime=regime)
    stages = []
    pruned = prunenet.prune(
        model,
        policy,
        ratio=0.5,
        blocks=blocks,
        refit=refit,
        progress=lambda what, done, of: stages.append((what, done, of)),
    )
    assert policy.config.regime == "weights"
    assert pruned.provenance.regime == regime
    assert pruned.provenance.how["channels"] == "policy"
    assert ("scoring", 3, 3) in stages
    expected = [top_channels(row, 24) for row in policy.scores(model, blocks)]
    assert all(torch.equal(a, b) for a, b in zip(pruned.keep, expected, strict=True))
    given = prunenet.prune(
        model, policy, ratio=0.5, blocks=blocks, refit=refit, scores=policy.scores(model, blocks)
    )
    assert all(torch.equal(a, b) for a, b in zip(given.keep, expected, strict=True))


@pytest.mark.long
def test_training_on_moments_is_of_the_regime_of_its_text_whatever_the_reward():
    model = tiny_model("llama")
    spectral = train(
        model, replace(SHORT, reward="spectral"), blocks=own_text(regime="data")
    ).policy.config
    assert (spectral.regime, spectral.text) == ("data", {"text": "random"})
    own = train(
        model, SHORT, reward=SpectralReward(model), regime="weights", blocks=own_text()
    ).policy.config
    assert own.regime == "self"


@pytest.mark.long
def test_the_command_line_trains_it_prunes_by_it_and_asks_for_text(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(artifact, "ZOO", tmp_path / "zoo")
    model, policy = save_tiny(tmp_path / "model"), tmp_path / "policy"
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{i % 61}" for i in range(2200)))
    text = ("--moments", "data", "--text", words)
    ask = (
        "train",
        model,
        "--features",
        "moments",
        "--widths",
        "uniform",
        "--updates",
        2,
        "--masks",
        2,
    )
    assert facts(*ask, *text, "--out", policy)["regime"] == "data"
    assert Policy.from_pretrained(policy).config.moments == MOMENT_STATISTICS
    prune = ("prune", model, "--policy", policy, "--ratio", 0.5, "--out", tmp_path / "out")
    said = refused(*prune, "--moments", "none")
    assert "scores channels by their activations: give it text" in said
    assert not (tmp_path / "out").exists()
    done = facts(*prune, *text)
    assert (done["regime"], done["channels"], done["width"]) == ("data", "policy", 24)
