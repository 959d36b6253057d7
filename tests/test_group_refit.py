"""Moments and refit of every kind of channel group: experts, Conv1D, hybrids, text towers."""

import math
from functools import cache

import pytest
import torch
from transformers import CONFIG_MAPPING

from prunenet.envs.rewards import ReconstructionReward
from prunenet.envs.sweep import groups_played
from prunenet.evaluation.divergence import divergence
from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.known import class_of
from prunenet.models.twin import twin
from prunenet.policies.apply import prune
from prunenet.policies.training.recipe import Recipe
from prunenet.policies.training.train import train
from prunenet.refit.cut import Cut, cut_layers, refit_sequentially
from prunenet.refit.expert_use import squared_weights
from prunenet.refit.few_tokens import few_tokens, from_weights, least_tokens, moments_of_all
from prunenet.refit.folds import folds_of, pooled
from prunenet.refit.moments import LayerWalk, paired_moments
from prunenet.refit.ridge import DAMPINGS, lost, ridge
from prunenet.text.calibration import CalibrationSet

KINDS = {
    "Conv1D": "gpt2",
    "experts, concat": "qwen3_moe",
    "experts, interleaved, biases": "gpt_oss",
    "experts, transposed, all at once, and a shared one": "llama4_text",
    "dense layers, experts and shared experts": "deepseek_v3",
    "experts, ungated, and layers without an FFN": "nemotron_h",
    "dense beside experts": "gemma4_text",
    "a text tower": "gemma3",
}

LATER = ("experts, concat", "dense beside experts", "a text tower")  # as others are


def blocks(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (count, 16), generator=torch.Generator().manual_seed(seed))


def tiny(model_type: str):
    """A random model of a type, in float32."""
    model, _ = twin(class_of(model_type), CONFIG_MAPPING[model_type])
    return model.float()


@cache
def prepared(model_type: str):
    """A model, its text, and its cuts to 0.6 and to all of its channels; not to be changed."""
    model, ids = tiny(model_type), blocks(40)
    anatomy = Anatomy.of(model)
    return model, ids, *cut_layers(model, ids, [anatomy.uniform_widths(0.4, 8), anatomy.widths])


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.long
@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, id=kind, marks=[pytest.mark.slow] if kind in LATER else [])
        for kind, name in KINDS.items()
    ],
)
def test_a_refit_of_each_kind_lowers_the_error_on_other_text_and_at_ratio_0_is_the_identity(
    model_type,
):
    (model, _, cut, whole), held = prepared(model_type), blocks(12, seed=1)
    anatomy = Anatomy.of(model)
    plain = Cut(cut.keep, None)
    assert not cut.few
    lost_of = [0.0, 0.0]
    walk = LayerWalk(model, held)
    for index in walk:
        moments, down = walk.moments(index), anatomy.ffn(index).down
        for place, refitted in enumerate((None, cut.downs[index])):
            share = lost(down, moments.second, cut.keep[index], refitted)
            lost_of[place] += moments.tokens * share
    assert lost_of[1] < 0.99 * lost_of[0]
    dense, narrow = logits(model, held), cut.model(model)
    without, refitted = (logits(m, held) for m in (plain.model(model), narrow))
    assert (refitted - dense).norm() < (without - dense).norm()
    assert torch.equal(logits(whole.model(model), held), dense)
    for group, down in zip(Anatomy.of(narrow).groups, cut.downs, strict=True):
        assert torch.equal(group.read().down, down)  # every matrix stands where it belongs


def test_moments_of_an_expert_are_of_the_tokens_that_are_routed_to_it():
    model, ids, calls = tiny("qwen3_moe"), blocks(6), {}
    anatomy, walk = Anatomy.of(model), LayerWalk(model, ids, batch=6)
    for group in anatomy.groups:
        group.down.module.register_forward_pre_hook(
            lambda _, args, layer=group.layer: calls.__setitem__(layer, args[:2])
        )
    dense = logits(model, ids)
    for index in walk:
        group, moments, ffn = anatomy.groups[index], walk.moments(index), anatomy.ffn(index)
        hidden, chosen = calls[group.layer]
        x = hidden[(chosen == group.expert).any(1)]
        h = (torch.nn.functional.silu(x @ ffn.gate.T) * (x @ ffn.up.T)).detach()
        assert moments.tokens == len(h)
        torch.testing.assert_close(moments.second, h.T @ h / len(h), rtol=1e-4, atol=1e-6)
        energies = walk.energies(index)
        torch.testing.assert_close(energies.energy, moments.second.diagonal())
        assert energies.tokens == moments.tokens
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text"])
def test_every_routed_token_is_counted_once_for_each_of_its_experts(model_type):
    model, ids, tokens = tiny(model_type), blocks(4), {}
    anatomy, walk = Anatomy.of(model), LayerWalk(model, ids)
    for index in walk:
        if (group := anatomy.groups[index]).expert is not None:
            seen = walk.energies(index).tokens
            tokens[group.layer] = tokens.get(group.layer, 0) + seen
    assert set(tokens.values()) == {ids.numel() * model.config.num_experts_per_tok}


def test_all_groups_of_a_layer_are_measured_in_one_pass(monkeypatch):
    model, passes = tiny("qwen3_moe"), []
    through = LayerWalk._through
    monkeypatch.setattr(
        LayerWalk, "_through", lambda *args: passes.append(args[1]) or through(*args)
    )
    walk = LayerWalk(model, blocks(4))
    for index in walk:
        walk.moments(index)
    assert passes == list(range(len(walk.layers)))


def starved(ids: torch.Tensor):
    """A mixture whose router sends nothing to the first expert of the first layer."""
    model, seen = tiny("qwen3_moe"), []
    bank = Anatomy.of(model).groups[0].down.module
    router = model.model.layers[0].mlp.gate
    hook = router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits(model, ids)
    hook.remove()
    hidden = seen[0].flatten(0, -2).double()
    with torch.no_grad():  # where no other logit is lower
        others = router.weight[1:].double()
        least = (hidden @ others.T).min(1).values - 1
        router.weight[0] = torch.linalg.lstsq(hidden, least[:, None]).solution[:, 0].float()
    return model, bank, hidden.float()


def test_an_expert_that_too_few_tokens_reach_is_measured_on_all_tokens_of_its_layer():
    ids = blocks(2)  # fewer tokens than hidden states have dimensions
    model, _, hidden = starved(ids)
    ffn = Anatomy.of(model).ffn(0)
    walk = LayerWalk(model, ids)
    index = next(iter(walk))
    group = walk.groups(0)[index]
    own = walk.moments(index)
    assert few_tokens(group, [own.tokens])
    found = moments_of_all(walk, [group])[index]
    h = (torch.nn.functional.silu(hidden @ ffn.gate.T) * (hidden @ ffn.up.T)).detach()
    assert (own.tokens, found.tokens) == (0, len(h))
    torch.testing.assert_close(found.second, h.T @ h / len(h), rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_an_expert_that_too_few_tokens_reach_is_refitted_on_those_of_its_layer():
    ids = blocks(2)
    model, _, _ = starved(ids)
    anatomy = Anatomy.of(model)
    (cut,) = cut_layers(model, ids, [anatomy.uniform_widths(0.4, 8)])
    again = refit_sequentially(model, cut, ids, dense_targets=False)
    assert 0 in cut.few
    assert 0 in again.few
    walks = [LayerWalk(model, fold) for fold in folds_of(ids)]
    next(zip(*walks, strict=True))
    folds = [moments_of_all(walk, walk.groups(0)[:1])[0] for walk in walks]
    expected = ridge(anatomy.ffn(0).down, pooled(folds), cut.keep[0], damping=cut.dampings[0])
    torch.testing.assert_close(cut.downs[0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again.downs[0], expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(expected, anatomy.ffn(0).down[:, cut.keep[0]])


def test_experts_that_cannot_be_sent_other_tokens_are_cut_from_weights():
    model, ids = tiny("llama4_text"), blocks(2)
    anatomy = Anatomy.of(model)
    (cut,) = cut_layers(model, ids, [anatomy.uniform_widths(0.4, 8)])
    assert 0 < len(cut.few) < len(anatomy.groups)
    for index in cut.few:
        ffn, keep = anatomy.ffn(index), cut.keep[index]
        assert torch.equal(cut.downs[index], ffn.down[:, keep])
        energies = ffn.gate.norm(dim=1) * ffn.up.norm(dim=1) * ffn.down.norm(dim=0)
        assert float(energies[keep].min()) > float(energies[~keep].max())


@pytest.mark.parametrize("d_ff", [1, 7, 768])
def test_few_tokens_are_fewer_than_the_degrees_of_freedom_of_the_strongest_damping(d_ff):
    spread = torch.rand(d_ff, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    damping = max(DAMPINGS)
    for eigenvalues in (torch.ones(d_ff), spread / spread.mean()):
        freedom = float((eigenvalues / (eigenvalues + damping)).sum())
        assert freedom <= least_tokens(d_ff) + 1e-9
    assert least_tokens(d_ff) == math.ceil(d_ff / 4)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_dense_ffn_has_all_of_the_text_however_little_unless_text_does_not_pass_it(tokens):
    group = Anatomy.of(tiny("gpt2")).groups[0]
    assert few_tokens(group, [tokens, 9]) == (tokens == 0)


def test_layers_that_text_does_not_pass_are_cut_from_weights():
    model, ids = tiny("mllama"), blocks(4)  # some of its layers attend to images alone
    anatomy = Anatomy.of(model)
    (cut,) = cut_layers(model, ids, [anatomy.uniform_widths(0.4, 8)])
    assert 0 < len(cut.few) < len(anatomy.groups)
    for index in cut.few:
        assert torch.equal(cut.downs[index], anatomy.ffn(index).down[:, cut.keep[index]])


@pytest.mark.parametrize("model_type", ["gpt2", "nemotron_h"])
def test_a_sequential_refit_of_each_kind_leaves_the_dense_model_alone(model_type):
    model, ids, cut, _ = prepared(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = refit_sequentially(model, cut, ids, dense_targets=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(map(torch.equal, cut.keep, again.keep))
    first, last = cut.downs[0], cut.downs[-1]
    torch.testing.assert_close(again.downs[0], first, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(again.downs[-1], last, rtol=1e-3, atol=1e-4)


def test_experts_are_not_paired_with_those_of_another_model():
    model, ids = tiny("qwen3_moe"), blocks(4)
    walks = LayerWalk(model, ids), LayerWalk(model, ids)
    next(zip(*walks, strict=True))
    with pytest.raises(UnsupportedArchitecture, match="`dense_targets` False"):
        paired_moments(*walks, 0)
    with pytest.raises(UnsupportedArchitecture, match="give `skip` 0"):
        LayerWalk(model, ids, skip=1)


def test_moments_from_weights_relate_no_channels():
    ffn = Anatomy.of(tiny("qwen3_moe")).ffn(0)
    moments = from_weights(ffn)
    assert torch.equal(moments.second, torch.diag(moments.second.diagonal()))
    expected = ffn.gate[5].square().sum() * ffn.up[5].square().sum()
    torch.testing.assert_close(moments.second[5, 5], expected)


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "bamba", "gemma4_text", "nemotron_h"])
def test_hidden_states_pass_layer_by_layer_as_through_the_whole_model(model_type):
    model, ids, seen = tiny(model_type), blocks(4), []
    walk = LayerWalk(model, ids, batch=4)
    for index in walk:
        walk.energies(index)
    hook = walk.layers[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    logits(model, ids)
    hook.remove()
    whole = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(walk._hidden[0], whole)


def test_an_expert_pays_for_its_share_of_what_its_layer_writes():
    model, ids = tiny("qwen3_moe"), blocks(12)
    anatomy, written = Anatomy.of(model), {}
    squares = squared_weights(model, ids)
    walk = LayerWalk(model, ids)
    for index in walk:
        moments, down = walk.moments(index), anatomy.ffn(index).down
        energy = float(((down @ moments.second) * down).sum()) * moments.tokens * squares[index]
        written.setdefault(anatomy.groups[index].layer, {})[index] = energy
    reward = ReconstructionReward(model, ids)
    for groups in written.values():
        for index, energy in groups.items():
            keep = torch.zeros(1, anatomy.widths[index], dtype=torch.bool)
            paid = float(reward.layer(index, keep)["reconstruction"])
            assert paid == pytest.approx(1 - energy / sum(groups.values()), abs=1e-4)


def test_router_weights_are_those_of_the_tokens_of_each_expert():
    model, ids, calls = tiny("qwen3_moe"), blocks(6), []
    bank = Anatomy.of(model).groups[0].down.module
    hook = bank.register_forward_pre_hook(lambda _, args: calls.append(args))
    squares = squared_weights(model, ids, batch=6)
    hook.remove()
    _, index, weights = calls[0]
    for expert in range(6):
        mean = float(weights[index == expert].square().mean())
        assert squares[expert] == pytest.approx(mean, rel=1e-5)
    assert set(squared_weights(tiny("gpt2"), ids)) == {1.0}


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe", "llama4_text"])
def test_the_divergence_of_down_matrices_is_that_of_the_narrow_model(model_type):
    (model, _, cut, _), ids = prepared(model_type), blocks(8)
    dense, narrow = (logits(m, ids).log_softmax(-1) for m in (model, cut.model(model)))
    direct = float((dense.exp() * (dense - narrow)).sum(-1).mean())
    assert divergence(model, cut.down, ids) == pytest.approx(direct, rel=1e-3)
    assert torch.equal(logits(model, ids).log_softmax(-1), dense)


@pytest.mark.long
def test_a_policy_is_trained_on_experts_beside_dense_layers_and_prunes_them_to_one_width():
    model, ids = tiny("deepseek_v3"), blocks(8)
    anatomy = Anatomy.of(model)
    played = groups_played(model)
    assert {anatomy.widths[number] for number in played} == {56}
    assert len(played) > 1
    text = CalibrationSet(ids, "self", {"text": "self"})
    recipe = Recipe(updates=1, masks=2, evaluate_every=1)
    trained = train(model, recipe, blocks=text)
    assert all(0 <= reward <= 1 for _, reward in trained.history)
    pruned = prune(model, trained.policy, ratio=0.4, blocks=text)
    assert pruned.provenance.how["channels"] == "blend"
    for path in {group.path for group in anatomy.groups if group.expert is not None}:
        masks = [pruned.keep[g.number] for g in anatomy.groups if g.path == path]
        assert len({int(mask.sum()) for mask in masks}) == 1
        assert any(not torch.equal(masks[0], mask) for mask in masks[1:])
    with pytest.raises(ValueError, match="leave `allocation` out"):
        train(model, Recipe(allocation=Recipe(subset="widths")), blocks=text)
