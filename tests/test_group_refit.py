"""Moments and refit of every kind of channel group: experts, Conv1D, hybrids, text towers."""

import math

import pytest
import torch
from transformers import CONFIG_MAPPING

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.known import class_of
from prunenet.models.twin import twin
from prunenet.refit.cut import Cut, cut_layers, refit_sequentially
from prunenet.refit.few_tokens import few_tokens, from_weights, least_tokens
from prunenet.refit.moments import LayerWalk, Moments, paired_moments
from prunenet.refit.ridge import DAMPINGS, lost

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


def blocks(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (count, 16), generator=torch.Generator().manual_seed(seed))


def tiny(model_type: str):
    """A random model of a type, in float32."""
    model, _ = twin(class_of(model_type), CONFIG_MAPPING[model_type])
    return model.float()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("model_type", KINDS.values(), ids=KINDS)
def test_a_refit_of_each_kind_lowers_the_error_on_other_text_and_at_ratio_0_is_the_identity(
    model_type,
):
    model, fit, held = tiny(model_type), blocks(32), blocks(12, seed=1)
    anatomy = Anatomy.of(model)
    cut, whole = cut_layers(model, fit, [anatomy.uniform_widths(0.4, 8), anatomy.widths])
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


def test_an_expert_that_too_few_tokens_reach_is_cut_from_weights_and_not_refitted():
    model, ids = tiny("qwen3_moe"), blocks(24)
    anatomy = Anatomy.of(model)
    banks = [g for g in anatomy.groups if g.layer == 1]
    router = model.get_submodule(banks[0].path.rpartition(".experts")[0]).gate
    with torch.no_grad():  # nothing is sent to the first expert of layer 1
        router.weight[0] = -router.weight[1:].abs().sum(0)
        norm = model.model.layers[1].post_attention_layernorm.weight
        norm.abs_()
    walk = LayerWalk(model, ids)
    starved = {index for index in walk if few_tokens(anatomy.groups[index], [walk.moments(index)])}
    widths = anatomy.uniform_widths(0.4, 8)
    (cut,) = cut_layers(model, ids, [widths])
    assert starved <= set(cut.few)
    assert len(cut.few) < len(anatomy.groups)
    for index in cut.few:
        ffn, keep = anatomy.ffn(index), cut.keep[index]
        assert torch.equal(cut.downs[index], ffn.down[:, keep])
        energies = ffn.gate.norm(dim=1) * ffn.up.norm(dim=1) * ffn.down.norm(dim=0)
        assert float(energies[keep].min()) > float(energies[~keep].max())
    again = refit_sequentially(model, cut, ids, dense_targets=False)
    assert set(again.few) >= starved


@pytest.mark.parametrize("d_ff", [1, 7, 768])
def test_few_tokens_are_fewer_than_the_degrees_of_freedom_of_the_strongest_damping(d_ff):
    spread = torch.rand(d_ff, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    damping = max(DAMPINGS)
    for eigenvalues in (torch.ones(d_ff), spread / spread.mean()):
        freedom = float((eigenvalues / (eigenvalues + damping)).sum())
        assert freedom <= least_tokens(d_ff) + 1e-9
    assert least_tokens(d_ff) == math.ceil(d_ff / 4)


def test_a_dense_ffn_has_all_of_the_text_however_little_that_is():
    group = Anatomy.of(tiny("gpt2")).groups[0]
    moments = Moments(torch.eye(group.width), torch.zeros(group.width), 1)
    assert not few_tokens(group, [moments, moments])


@pytest.mark.parametrize("model_type", ["gpt2", "nemotron_h"])
def test_a_sequential_refit_of_each_kind_leaves_the_dense_model_alone(model_type):
    model, ids = tiny(model_type), blocks(32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (cut,) = cut_layers(model, ids, [Anatomy.of(model).uniform_widths(0.4, 8)])
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
