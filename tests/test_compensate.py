"""Cutting a model by its activations: channels, refit, sequential refit."""

import pytest
import torch
from families import tiny_model

from prunenet.evaluation.divergence import divergence
from prunenet.models.heads import attentions, head_outputs
from prunenet.models.layers import down_linears, ffn_widths
from prunenet.models.masks import top_channels, width_at
from prunenet.refit.cut import (
    Cut,
    Refits,
    blended,
    cut_layers,
    output_energy,
    refit_sequentially,
)
from prunenet.refit.folds import folds_of, pooled
from prunenet.refit.heads import refit_heads
from prunenet.refit.moments import LayerWalk, ffn_moments
from prunenet.refit.ridge import lost, ridge


def model_and_blocks(family="llama"):
    return tiny_model(family), torch.randint(
        3, 60, (30, 24), generator=torch.Generator().manual_seed(7)
    )


def uniform(model, ratio=0.5):
    return [width_at(width, ratio) for width in ffn_widths(model)]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "phi3", "gemma2"])
def test_the_narrow_model_is_the_one_that_was_judged(family):
    model, blocks = model_and_blocks(family)
    (cut,) = cut_layers(model, blocks, [uniform(model)])
    narrow = cut.model(model)
    assert ffn_widths(narrow) == uniform(model)
    with torch.no_grad():
        dense, pruned = (m(input_ids=blocks[:4]).logits.log_softmax(-1) for m in (model, narrow))
    direct = float((dense.exp() * (dense - pruned)).sum(-1).mean())
    assert divergence(model, cut.down, blocks[:4]) == pytest.approx(direct, rel=1e-3, abs=1e-6)


def test_refit_lowers_what_each_layer_loses():
    model, blocks = model_and_blocks()
    plain, refitted = (
        cut_layers(model, blocks, [uniform(model)], refit=refit)[0] for refit in (False, True)
    )
    assert plain.downs is None
    for index, moments in enumerate(ffn_moments(model, blocks)):
        weight = down_linears(model)[index].weight.detach()
        assert torch.equal(plain.keep[index], refitted.keep[index])
        before = lost(weight, moments.second, plain.keep[index])
        assert lost(weight, moments.second, plain.keep[index], refitted.downs[index]) < before


@pytest.mark.parametrize("count", [30, 31])
def test_a_refit_is_fitted_on_all_blocks(count):
    model, blocks = model_and_blocks()
    blocks = torch.cat((blocks, blocks[:1]))[:count]
    (cut,) = cut_layers(model, blocks, [uniform(model)])
    folds = [list(ffn_moments(model, fold)) for fold in folds_of(blocks)]
    for index, (whole, *parts) in enumerate(zip(ffn_moments(model, blocks), *folds, strict=True)):
        torch.testing.assert_close(pooled(parts), whole.second, rtol=1e-4, atol=1e-6)
        weight = down_linears(model)[index].weight.detach()
        expected = ridge(weight, whole.second, cut.keep[index], damping=cut.dampings[index])
        torch.testing.assert_close(cut.downs[index], expected, rtol=1e-3, atol=1e-5)


def test_several_ways_in_one_walk_are_what_each_is_alone():
    model, blocks = model_and_blocks()
    ways = [uniform(model, 0.3), uniform(model, 0.6)]
    together = cut_layers(model, blocks, ways)
    for way, cut in zip(ways, together, strict=True):
        (alone,) = cut_layers(model, blocks, [way])
        assert all(torch.equal(a, b) for a, b in zip(cut.keep, alone.keep, strict=True))


def test_given_scores_choose_the_channels():
    model, blocks = model_and_blocks()
    scores = [torch.arange(width, dtype=torch.float32) for width in ffn_widths(model)]
    (cut,) = cut_layers(model, blocks, [uniform(model)], scores=scores)
    for keep, width in zip(cut.keep, uniform(model), strict=True):
        assert bool(keep[-width:].all())
        assert int(keep.sum()) == width


def test_a_blend_is_of_ranks():
    down, second = (
        torch.tensor([[3.0, 1.0, 1.0, 1.0]]),
        torch.diag(torch.tensor([1.0, 4.0, 2.0, 0.5])) + 0.1,
    )
    energy = output_energy(down, second)
    assert energy.tolist() == pytest.approx([9.9, 4.1, 2.1, 0.6])  # ranks 3, 2, 1, 0
    scores = torch.tensor([0.1, -7.0, 30.0, 0.2])  # ranks 1, 0, 3, 2
    assert torch.equal(blended(scores, energy, 0.0), scores)
    assert blended(scores, energy, 0.25).tolist() == [1.5, 0.5, 2.5, 1.5]
    assert blended(scores, energy, 1.0).tolist() == [3.0, 2.0, 1.0, 0.0]
    assert blended(100 * scores + 3, 5 * energy, 0.25).tolist() == [1.5, 0.5, 2.5, 1.5]
    # equal energies rank nothing
    assert torch.equal(blended(scores, torch.zeros_like(energy), 0.25), scores)


def test_measured_energies_have_their_share_in_the_channels():
    model, blocks = model_and_blocks()
    scores = [
        torch.randn(width, generator=torch.Generator().manual_seed(3))
        for width in ffn_widths(model)
    ]
    plain, mixed, measured = (
        cut_layers(model, blocks, [uniform(model)], scores=scores, measured=share, refit=False)[
            0
        ].keep
        for share in (0.0, 0.25, 1.0)
    )
    for layer, moments in enumerate(ffn_moments(model, blocks)):
        weight = down_linears(model)[layer].weight.detach()
        energy = moments.second.diagonal() * weight.square().sum(0)
        assert torch.equal(measured[layer], top_channels(energy, int(plain[layer].sum())))
        assert torch.equal(plain[layer], top_channels(scores[layer], int(plain[layer].sum())))
    assert any(not torch.equal(*pair) for pair in zip(plain, mixed, strict=True))
    assert any(not torch.equal(*pair) for pair in zip(measured, mixed, strict=True))


def test_nothing_removed_is_nothing_changed():
    model, blocks = model_and_blocks()
    (cut,) = cut_layers(model, blocks, [ffn_widths(model)])
    assert divergence(model, cut.down, blocks[:4]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dense_targets", [False, True])
def test_sequential_refit_keeps_the_channels_and_leaves_the_dense_model_alone(dense_targets):
    model, blocks = model_and_blocks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (cut,) = cut_layers(model, blocks, [uniform(model)])
    again = refit_sequentially(model, cut, blocks, dense_targets=dense_targets)
    assert all(torch.equal(a, b) for a, b in zip(cut.keep, again.keep, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # The first layer stands behind nothing that was cut.
    torch.testing.assert_close(again.downs[0], cut.downs[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(again.downs[1], cut.downs[1], rtol=1e-4, atol=1e-5)


def test_with_dense_targets_layers_come_nearer_to_what_the_dense_ones_write():
    model, blocks = model_and_blocks()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(20)  # so that errors of early layers reach later ones
    (cut,) = cut_layers(model, blocks, [uniform(model)])
    sequential = refit_sequentially(model, cut, blocks, dense_targets=True)

    def error(candidate):
        written = []
        narrow = candidate.model(model)
        for network in (model, narrow):
            seen = []
            hook = down_linears(network)[-1].register_forward_hook(
                lambda _m, _i, out, seen=seen: seen.append(out)
            )
            with torch.no_grad():
                network(input_ids=blocks[:24])
            hook.remove()
            written.append(seen[0])
        return float((written[0] - written[1]).square().mean())

    assert error(sequential) < error(cut)


def test_one_block_is_too_few_to_refit_on():
    model, blocks = model_and_blocks()
    with pytest.raises(ValueError, match="2 blocks or more, got 1"):
        cut_layers(model, blocks[:1], [uniform(model)])


def test_damaged_activations_are_an_error():
    model, blocks = model_and_blocks()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="activations of layer 1 are not finite"):
        cut_layers(model, blocks, [uniform(model)])


def test_a_cut_without_refit_zeroes_columns_alone():
    dense = torch.randn(4, 6)
    keep = torch.tensor([True, False, True, True, False, True])
    down = Cut([keep], None).down(0, dense)
    assert torch.equal(down[:, keep], dense[:, keep])
    assert not bool(down[:, ~keep].any())


@pytest.mark.parametrize("own", [False, True])
def test_refits_at_levels_are_the_refits_of_their_masks(own):
    model, blocks = model_and_blocks()
    scores = [
        torch.randn(48, generator=torch.Generator().manual_seed(layer))
        for layer in range(len(ffn_widths(model)))
    ]
    refits = Refits(model, blocks, scores=scores if own else None, levels=6, damping=0.3)
    assert refits.step == 8
    assert torch.equal(refits.scores, torch.stack(scores)) == own
    for layer, moments in enumerate(ffn_moments(model, blocks)):
        dense = down_linears(model)[layer].weight.detach()
        for width in (8, 24, 40):
            keep = top_channels(refits.scores[layer], width)
            expected = torch.zeros_like(dense)
            expected[:, keep] = ridge(dense, moments.second, keep, damping=0.3)
            torch.testing.assert_close(refits.down(layer, keep, dense), expected)
        assert torch.equal(refits.down(layer, torch.ones(48, dtype=torch.bool), dense), dense)


def test_levels_divide_the_width():
    model, blocks = model_and_blocks()
    assert Refits(model, blocks, levels=5).step == 12  # of 48 channels, 4 levels


def test_attention_that_lost_heads_is_refitted_and_all_other_tensors_stay_as_they_are():
    model, blocks = model_and_blocks()
    whole = [torch.ones(width, dtype=torch.bool) for width in ffn_widths(model)]
    count = attentions(model)[0].groups
    heads = [torch.arange(count) != layer for layer in range(len(whole))]
    heads[-1][:] = True
    cut = Cut(whole, None, groups=heads)
    refitted = refit_heads(model, cut, blocks)
    names = [output.down.name for output in head_outputs(model)]
    assert list(refitted.tensors) == names[:-1]
    plain, narrow = cut.model(model), refitted.model(model)
    held = torch.randint(3, 60, (60, 24), generator=torch.Generator().manual_seed(8))
    walk = LayerWalk(model, held, groups=head_outputs(model))
    for index in walk:
        weight, second = attentions(model)[index].out, walk.moments(index).second
        keep = heads[index].repeat_interleave(weight.shape[1] // count)
        before, after = (
            lost(weight, second, keep, attentions(made)[index].out) for made in (plain, narrow)
        )
        assert after < before or (before == after == 0 and bool(keep.all()))
    pairs = zip(plain.named_parameters(), narrow.named_parameters(), strict=True)
    changed = [name for (name, one), (_, other) in pairs if not torch.equal(one, other)]
    assert changed == names[:-1]


def test_a_cut_that_leaves_heads_whole_has_no_attention_to_refit():
    model, blocks = model_and_blocks()
    (cut,) = cut_layers(model, blocks, [uniform(model)])
    assert refit_heads(model, cut, blocks) is cut
