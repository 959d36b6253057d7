"""A saved policy: exact on reload, deterministic, nested over ratios, and clear about what it
cannot read.
"""

import json
import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from families import FAMILIES, tiny_model, token_ids

import prunenet
from prunenet.checkpoints.regimes import REGIMES, Regime
from prunenet.checkpoints.sources import check_loaded
from prunenet.features.from_weights import CONTEXT, STATISTICS
from prunenet.models.layers import down_linears, ffn_widths
from prunenet.models.masks import top_channels
from prunenet.policies import apply, artifact
from prunenet.policies.artifact import Policy, PolicyConfig, PolicyError, policy_for, zoo
from prunenet.policies.scorer import ChannelScorer
from prunenet.text.calibration import CalibrationSet

RATIOS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def some_policy(**config) -> Policy:
    """Its scores and widths are random."""
    policy = Policy.untrained(PolicyConfig(hidden=(8,), **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in (policy.scorer.out, policy.scorer.widths.out):
            linear.weight.normal_(generator=generator)
    return policy


def some_blocks(regime: str = "self") -> CalibrationSet:
    return CalibrationSet(token_ids(10, 24), regime, {"text": "random"})


@pytest.mark.parametrize(
    ("family", "per_layer"),
    [*((family, False) for family in FAMILIES), ("llama", True), ("opt", True)],
)
def test_masks_nest_as_the_ratio_rises_and_ratio_zero_keeps_all(family, per_layer):
    policy, model = some_policy(), tiny_model(family)
    by_ratio = [policy.masks(model, ratio, per_layer=per_layer) for ratio in RATIOS]
    assert all(mask.all() for mask in by_ratio[0])
    for wider, narrower in pairwise(by_ratio):
        for a, b in zip(wider, narrower, strict=True):
            assert not (b & ~a).any()
            assert b.sum() <= a.sum()
    if per_layer:
        assert len({int(mask.sum()) for mask in by_ratio[4]}) > 1


def test_an_untrained_scorer_is_its_prior():
    scorer = ChannelScorer(STATISTICS, CONTEXT, prior={STATISTICS[2]: 2.0})
    rows = torch.randn(10, len(STATISTICS), generator=torch.Generator().manual_seed(0))
    expected = 2 * rows[:, 2]
    torch.testing.assert_close(scorer(rows, torch.zeros(len(CONTEXT))), expected - expected.mean())


def test_a_prior_on_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="unknown statistics: colour"):
        ChannelScorer(STATISTICS, CONTEXT, prior={"colour": 1.0})


def test_scores_follow_a_permutation_of_the_channels():
    policy, model = some_policy(), tiny_model("llama")
    before = policy.scores(model)[0]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(2))
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    torch.testing.assert_close(policy.scores(model)[0], before[order], rtol=1e-3, atol=1e-3)


def test_a_saved_policy_reloads_to_the_same_bits(tmp_path):
    policy = some_policy()
    policy.save_pretrained(tmp_path / "a")
    again = prunenet.Policy.from_pretrained(tmp_path / "a")
    assert again.sha256 == policy.sha256
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_pruning_leaves_the_dense_model_alone_and_writes_an_ordinary_checkpoint(tmp_path):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prunenet.prune(model, some_policy(), ratio=0.5)
    assert ffn_widths(pruned.model) == [24] * len(pruned.keep)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    pruned.save_pretrained(tmp_path / "narrow")
    fields = json.loads((tmp_path / "narrow" / "prunenet.json").read_text())
    assert fields["ratio"] == 0.5
    assert fields["regime"] == "weights"
    assert fields["policy_sha256"] == some_policy().sha256


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_a_share_of_all_parameters_is_met_as_nearly_as_whole_channels_allow(share):
    model = tiny_model("gpt_neox", tied=False)
    pruned = prunenet.prune(model, some_policy(), params=share, round_to=1)
    removed = 1 - pruned.provenance.parameters_after / pruned.provenance.parameters_before
    one_channel = len(pruned.keep) * 65 / pruned.provenance.parameters_before
    assert abs(removed - share) <= 0.51 * one_channel


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({}, "got neither"),
        ({"ratio": 0.2, "params": 0.2}, "got both"),
        ({"ratio": 1.0}, r"`ratio` must be in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, "got -0.1"),
        ({"params": 0.95}, "the FFN channels hold"),
        ({"ratio": 0.2, "round_to": 0}, "multiple of 1 or more, got 0"),
    ],
)
def test_amounts_out_of_range_are_one_sentence(amount, message):
    with pytest.raises(ValueError, match=message):
        prunenet.prune(tiny_model("llama"), some_policy(), **amount)


def edited(folder, **changes):
    some_policy().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"statistics": ["one", "two"]}, "reads statistics version .* train the policy again"),
        ({"statistics_version": -1}, "reads statistics version -1"),
        ({"format_version": 99}, "has format 99"),
        ({"colour": "red"}, "fields that this version cannot read"),
        ({"hidden": [5]}, "is damaged"),
        ({"hidden": None}, "cannot read"),
        ({"hidden": ["a"]}, "cannot read"),
        ({"recipe": None}, "cannot read"),
    ],
)
def test_a_policy_of_another_making_is_refused(tmp_path, changes, message):
    with pytest.raises(PolicyError, match=message):
        Policy.from_pretrained(edited(tmp_path / "policy", **changes))


def test_missing_and_damaged_policies_are_one_sentence(tmp_path):
    with pytest.raises(PolicyError, match="does not exist; make one with 'prunenet train'"):
        Policy.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PolicyError, match="holds no policy"):
        Policy.from_pretrained(tmp_path / "empty")
    folder = some_policy().save_pretrained(tmp_path / "policy")
    (folder / "config.json").write_text("{")
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.from_pretrained(folder)
    folder = some_policy().save_pretrained(tmp_path / "policy")
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(PolicyError, match="is damaged"):
        Policy.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(PolicyError, match=r"has no model\.safetensors"):
        Policy.from_pretrained(folder)


def test_a_model_s_folder_is_not_taken_for_a_policy(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="not the configuration of a policy"):
        Policy.from_pretrained(tmp_path)


def test_one_s_own_policy_is_not_recorded_as_the_one_that_ships(tmp_path, monkeypatch):
    some_policy().save_pretrained(tmp_path / "llama")
    assert policy_for(str(tmp_path / "llama"), "llama")[1] == "./llama"
    assert policy_for("llama", "llama")[1] == policy_for(None, "llama")[1] == "llama"
    monkeypatch.chdir(tmp_path / "llama")
    assert policy_for(".", "llama")[1] == "./llama"
    monkeypatch.chdir(tmp_path)
    assert policy_for("./llama", "llama")[0].sha256 == some_policy().sha256


def test_names_in_place_of_what_is_loaded_are_one_sentence():
    with pytest.raises(TypeError, match=r"give prunenet.load_model\('some/model'\)"):
        check_loaded(model="some/model", policy=some_policy())
    with pytest.raises(TypeError, match=r"give prunenet.Policy.from_pretrained\('llama'\)"):
        check_loaded(model=tiny_model("llama"), policy="llama")


def test_a_policy_replaces_a_policy_and_nothing_else(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"x")
    for name in ("model", "weights"):
        before = (tmp_path / name / "model.safetensors").read_bytes()
        with pytest.raises(PolicyError, match="files that are no policy"):
            some_policy().save_pretrained(tmp_path / name)
        assert (tmp_path / name / "model.safetensors").read_bytes() == before
    folder = some_policy().save_pretrained(tmp_path / "policy")
    assert some_policy().save_pretrained(folder) == folder


def test_a_policy_s_files_can_be_read_by_whoever_may_read_its_folder(tmp_path):
    folder = some_policy().save_pretrained(tmp_path / "policy")
    (tmp_path / "plain").write_text("")
    usual = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {usual}


def test_per_layer_widths_add_up_to_as_many_channels_as_uniform_ones():
    policy, model = some_policy(), tiny_model("llama")
    for ratio in RATIOS:
        learned = policy.widths(model, ratio, per_layer=True)
        assert sum(learned) == sum(policy.widths(model, ratio))
        if ratio > 0:
            assert len(set(learned)) > 1


@pytest.mark.parametrize(
    ("gain", "chosen"), [(-0.1, "uniform"), (0.05, "uniform"), (0.051, "per-layer")]
)
@pytest.mark.parametrize("measured", [False, True])
def test_auto_takes_per_layer_widths_for_a_predicted_gain_above_5_percent(
    monkeypatch, measured, gain, chosen
):
    policy = some_policy(gain=None if measured else gain)
    if measured:
        monkeypatch.setattr(apply, "_gain", lambda *_: gain)
    blocks = some_blocks() if measured else None
    pruned = prunenet.prune(tiny_model("llama"), policy, ratio=0.5, blocks=blocks)
    assert pruned.provenance.how["widths"] == chosen
    assert pruned.provenance.how["predicted_gain"] == gain
    assert (len(set(ffn_widths(pruned.model))) > 1) == (chosen == "per-layer")
    assert sum(ffn_widths(pruned.model)) == 3 * 24


def test_auto_is_uniform_where_nothing_else_was_learned():
    assert (
        prunenet.prune(tiny_model("llama"), some_policy(), ratio=0.5).provenance.how["widths"]
        == "uniform"
    )
    untrained = Policy.untrained(PolicyConfig(gain=0.5))
    how = prunenet.prune(tiny_model("llama"), untrained, ratio=0.5).provenance.how
    assert (how["widths"], how["predicted_gain"]) == ("uniform", None)


def test_the_predicted_gain_is_that_of_the_pruned_models_before_their_refit_on_blocks_held_back():
    model, blocks = tiny_model("llama"), some_blocks()

    def loss(widths: str) -> float:
        narrow = prunenet.prune(
            model, some_policy(), ratio=0.5, blocks=blocks, widths=widths, refit="off"
        ).model
        with torch.no_grad():
            dense, pruned = (
                m(blocks.ids[-2:]).logits.double().log_softmax(-1) for m in (model, narrow)
            )
        return float((dense.exp() * (dense - pruned)).sum(-1).mean())

    gain = 1 - math.exp(loss("per-layer") - loss("uniform"))
    for refit in ("off", "layerwise"):
        how = prunenet.prune(
            model, some_policy(), ratio=0.5, blocks=blocks, refit=refit
        ).provenance.how
        assert how["predicted_gain"] == pytest.approx(gain, abs=1e-4)


@pytest.mark.parametrize(
    ("trained", "measured", "recorded"),
    [
        ("weights", None, "weights"),
        ("self", None, "self"),
        ("data", None, "data"),
        ("weights", "self", "self"),
        ("data", "self", "data"),
        ("self", "data", "data"),
        (None, "self", "self"),
        (None, "data", "data"),
    ],
)
def test_the_regime_recorded_is_the_most_that_any_step_looked_at(trained, measured, recorded):
    policy = None if trained is None else some_policy(regime=trained)
    blocks = None if measured is None else some_blocks(measured)
    pruned = prunenet.prune(tiny_model("llama"), policy, ratio=0.5, blocks=blocks)
    assert pruned.provenance.regime == recorded


def test_the_regimes_have_one_source():
    assert tuple(REGIMES) == get_args(Regime) == ("weights", "self", "data")


@pytest.mark.parametrize("channels", ["policy", "elimination"])
@pytest.mark.parametrize("refit", ["off", "layerwise", "sequential"])
def test_measuring_and_refitting_leave_the_dense_model_alone(channels, refit):
    model, policy = tiny_model("llama"), some_policy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stages = []
    pruned = prunenet.prune(
        model,
        policy,
        ratio=0.5,
        blocks=some_blocks(),
        channels=channels,
        refit=refit,
        progress=lambda what, done, of: stages.append((what, done, of)),
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [stage for stage in stages if stage[1] == stage[2]] == [
        (what, 3, 3) for what in ("cutting", *(["refitting"] if refit == "sequential" else []))
    ]
    narrow = [linear.weight for linear in down_linears(pruned.model)]
    kept = [
        linear.weight[:, keep]
        for linear, keep in zip(down_linears(model), pruned.keep, strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(narrow, kept, strict=True)) == (refit == "off")
    if channels == "policy":
        scores = zip(policy.scores(model), ffn_widths(pruned.model), strict=True)
        assert all(
            torch.equal(top_channels(*a), b) for a, b in zip(scores, pruned.keep, strict=True)
        )


@pytest.mark.long
def test_a_refit_comes_nearer_to_the_dense_model_than_none():
    model, blocks = tiny_model("llama"), CalibrationSet(token_ids(40, 24), "self", {})
    ids = token_ids(8, 24, seed=1)

    def distance(refit: str) -> float:
        narrow = prunenet.prune(model, ratio=0.5, blocks=blocks, refit=refit).model
        with torch.no_grad():
            return float((narrow(ids).logits - model(ids).logits).square().mean())

    assert distance("layerwise") < distance("off")
    assert distance("sequential") < distance("off")


def test_scores_that_the_caller_has_are_not_computed_again(monkeypatch):
    model, policy = tiny_model("llama"), some_policy()
    expected = prunenet.prune(model, policy, ratio=0.5).keep
    scores = policy.scores(model)
    monkeypatch.setattr(Policy, "scores", None)
    keep = prunenet.prune(model, policy, ratio=0.5, scores=scores).keep
    assert all(torch.equal(a, b) for a, b in zip(keep, expected, strict=True))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"widths": "wide"},
            "`widths` must be one of auto, uniform, per-layer, refined, got 'wide'",
        ),
        (
            {"channels": "best"},
            "`channels` must be one of policy, blend, elimination or None, got 'best'",
        ),
        (
            {"refit": "on"},
            "`refit` must be one of off, layerwise, sequential, blocks or None, got 'on'",
        ),
        ({"refit": "layerwise"}, "give text"),
        ({"channels": "elimination"}, "give text"),
        ({"policy": None}, "no policy to choose the channels"),
        (
            {"policy": None, "blocks": some_blocks(), "channels": "policy"},
            "no policy to choose the channels",
        ),
        (
            {"policy": None, "blocks": some_blocks(), "widths": "per-layer"},
            "no policy to allocate widths",
        ),
        ({"blocks": CalibrationSet(token_ids(1, 24), "self", {})}, "give 2 blocks or more, got 1"),
    ],
)
def test_choices_that_cannot_be_met_are_one_sentence(unchecked, choices, message):
    with pytest.raises(ValueError, match=message):
        prunenet.prune(tiny_model("llama"), **{"policy": some_policy(), "ratio": 0.5} | choices)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A zoo with a policy for Llama, and with a folder that holds none."""
    some_policy(trained_on={"model_type": "llama"}).save_pretrained(tmp_path / "zoo" / "llama")
    (tmp_path / "zoo" / "empty").mkdir()
    monkeypatch.setattr(artifact, "ZOO", tmp_path / "zoo")
    return tmp_path / "zoo"


def test_the_zoo_is_found_by_name_and_by_family(shipped):
    assert zoo() == {"llama": shipped / "llama"}
    assert (
        Policy.from_pretrained("llama").sha256
        == some_policy(trained_on={"model_type": "llama"}).sha256
    )
    asked = (
        (None, "llama", True),
        ("llama", "opt", True),
        (None, "opt", False),
        ("none", "llama", False),
    )
    for choice, family, found in asked:
        policy, name = policy_for(choice, family)
        assert (policy is not None, name) == (found, "llama" if found else "none")
    for name in ("gemma", "universal"):
        some_policy().save_pretrained(shipped / name)
    gated = [policy_for(None, family, gated=True)[1] for family in ("llama", "gemma", "qwen2")]
    assert gated == ["llama", "gemma", "universal"]
    assert policy_for(None, "opt") == (None, "none")


def test_a_policy_that_is_neither_a_folder_nor_in_the_zoo_lists_what_is(shipped, tmp_path):
    with pytest.raises(
        PolicyError, match=r"policy 'alpaca' does not exist; .*\(or take one that ships: llama\)"
    ):
        policy_for("alpaca", "llama")
    with pytest.raises(PolicyError, match="holds no policy"):
        policy_for(str(tmp_path), "llama")


def test_a_folder_of_the_same_name_does_not_hide_the_family_s_policy(
    shipped, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("llama")
    policy, _ = policy_for(None, "llama")
    assert policy is not None


def test_an_empty_zoo_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "ZOO", tmp_path / "nothing")
    assert zoo() == {}
    assert policy_for(None, "llama") == (None, "none")
    with pytest.raises(PolicyError, match=r"make one with 'prunenet train'$"):
        policy_for("llama", "llama")


def test_no_network_is_made_of_a_configuration_that_is_not_the_weights_own(tmp_path, monkeypatch):
    Policy.untrained(PolicyConfig(hidden=(4,))).save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | {"hidden": [4096] * 8}))
    monkeypatch.setattr(Policy, "untrained", None)
    with pytest.raises(PolicyError, match=r"not written with this config\.json"):
        Policy.from_pretrained(tmp_path)
