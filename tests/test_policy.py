"""A saved policy: exact on reload, deterministic, nested over ratios, and clear about what it cannot read."""

import json
from itertools import pairwise

import pytest
import torch
from families import FAMILIES, tiny_model

import prunenet
from prunenet.layers import ffn_widths
from prunenet.policies.artifact import Policy, PolicyConfig, PolicyError
from prunenet.policies.scorer import ChannelScorer
from prunenet.stats import CONTEXT, STATISTICS

RATIOS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def some_policy() -> Policy:
    policy = Policy.untrained(PolicyConfig(hidden=(8,)))
    with torch.no_grad():
        policy.scorer.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_nest_as_the_ratio_rises_and_ratio_zero_keeps_all(family):
    policy, model = some_policy(), tiny_model(family)
    by_ratio = [policy.masks(model, ratio) for ratio in RATIOS]
    assert all(mask.all() for mask in by_ratio[0])
    for wider, narrower in pairwise(by_ratio):
        for a, b in zip(wider, narrower, strict=True):
            assert not (b & ~a).any()
            assert b.sum() <= a.sum()


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
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\), got 1.0"),
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


def test_a_policy_s_files_can_be_read_by_whoever_may_read_its_folder(tmp_path):
    folder = some_policy().save_pretrained(tmp_path / "policy")
    (tmp_path / "plain").write_text("")
    usual = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {usual}
