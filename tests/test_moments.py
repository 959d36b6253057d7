"""Moments: weighted, without the first tokens, paired with the dense model's, and from inputs that are no text."""

import copy

import pytest
import torch
from families import D_FF, D_MODEL, FAMILIES, VOCABULARY, tiny_model, token_ids

from prunenet.architectures import ARCHITECTURES
from prunenet.layers import decoder_layers, down_linears
from prunenet.moments import LayerWalk, Moments, ffn_moments, paired_moments
from prunenet.synthetic import random_blocks, sphere_moments

BLOCKS = token_ids(6, 10)


def activations(model, blocks: torch.Tensor = BLOCKS) -> list[torch.Tensor]:
    """h of every layer, (tokens, d_ff), as the whole model computes it."""
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, i=i: seen.__setitem__(i, inputs[0].flatten(0, -2)))
        for i, linear in enumerate(down_linears(model))
    ]
    with torch.no_grad():
        model(blocks)
    for hook in hooks:
        hook.remove()
    return [seen[i] for i in range(len(seen))]


def assert_moments(moments: Moments, h: torch.Tensor, weights: torch.Tensor) -> None:
    h, weights = h.double(), weights.double().flatten()[:, None]
    for measured, expected in ((moments.second, (h * weights).T @ h), (moments.mean, (h * weights).sum(0))):
        torch.testing.assert_close(measured.double(), expected / weights.sum(), rtol=1e-3, atol=1e-4)


def random_weights(layers: int = 3) -> list[torch.Tensor]:
    """Exponential, a fifth of them zero."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.empty(BLOCKS.shape).exponential_(generator=generator) for _ in range(layers)]
    return [w * (torch.rand(BLOCKS.shape, generator=generator) > 0.2) for w in weights]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_tokens_count_by_their_weight_in_each_layer(family):
    model, weights = tiny_model(family), random_weights()
    for given in (weights, weights.__getitem__, [w.double() * 1e-9 for w in weights]):
        measured = list(ffn_moments(model, BLOCKS, batch=4, weights=given))
        for moments, h, w in zip(measured, activations(model), weights, strict=True):
            assert_moments(moments, h, w)
            assert moments.tokens == int((w > 0).sum())
            assert torch.equal(moments.second, moments.second.T)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_first_positions_can_be_left_out_but_are_still_read(family):
    model, weights = tiny_model(family), random_weights()
    skipped = torch.ones(BLOCKS.shape)
    skipped[:, :3] = 0
    for moments, h in zip(ffn_moments(model, BLOCKS, batch=4, skip=3), activations(model), strict=True):
        assert_moments(moments, h, skipped)
        assert moments.tokens == 6 * 7
    for moments, h, w in zip(ffn_moments(model, BLOCKS, weights=weights, skip=3), activations(model), weights, strict=True):
        assert_moments(moments, h, w * skipped)
    assert not (weights[0] * (1 - skipped) == 0).all()  # the caller's weights are as they were


def test_equal_weights_are_no_weights_and_no_options_are_bit_equal_to_plain_sums():
    model = tiny_model("llama")
    plain = list(ffn_moments(model, BLOCKS, batch=4))
    for moments, even in zip(
        plain, ffn_moments(model, BLOCKS, batch=4, weights=[torch.full(BLOCKS.shape, 3.0)] * 3), strict=True
    ):
        torch.testing.assert_close(even.second, moments.second)
        torch.testing.assert_close(even.mean, moments.mean)
    h = torch.split(activations(model, BLOCKS)[0], 40)
    second = torch.zeros(D_FF, D_FF).addmm_(h[0].T, h[0]).addmm_(h[1].T, h[1])
    walk = LayerWalk(model, BLOCKS, batch=4)
    assert walk.tokens == 60
    torch.testing.assert_close(plain[0].second, second / 60, rtol=1e-5, atol=1e-6)


def test_a_token_of_weight_zero_may_overflow():
    model = tiny_model("llama").half()
    with torch.no_grad():
        model.model.embed_tokens.weight[BLOCKS[0, 0]] = torch.nan
    touched = torch.isin(BLOCKS, BLOCKS[0, 0]).any(1, keepdim=True).expand_as(BLOCKS)  # attention takes it everywhere
    assert 0 < int(touched[:, 0].sum()) < 6
    assert torch.isfinite(next(ffn_moments(model, BLOCKS, weights=[(~touched).float()] * 3)).second).all()
    assert not torch.isfinite(next(ffn_moments(model, BLOCKS)).second).all()


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf, 0.0])
def test_weights_that_cannot_be_averaged_with_are_refused(value):
    weights = torch.ones(BLOCKS.shape) if value else torch.zeros(BLOCKS.shape)
    weights[2, 5] = value
    with pytest.raises(ValueError, match="layer 0: token weights must be finite, at least 0, and above 0 for some"):
        next(ffn_moments(tiny_model("llama"), BLOCKS, weights=[weights] * 3))


def test_weights_of_another_shape_and_skips_beyond_the_block_are_refused():
    with pytest.raises(ValueError, match=r"the blocks' shape \(6, 10\), got \(10, 6\)"):
        next(ffn_moments(tiny_model("llama"), BLOCKS, weights=lambda _: torch.ones(10, 6)))
    for skip in (-1, 10):
        with pytest.raises(ValueError, match=f"cannot skip their first {skip}; give 0 to 9"):
            LayerWalk(tiny_model("llama"), BLOCKS, skip=skip)


@pytest.mark.parametrize("family", FAMILIES)
def test_paired_moments_relate_the_pruned_model_to_the_dense_one_token_by_token(family):
    dense = tiny_model(family)
    pruned = copy.deepcopy(dense)
    weights = random_weights()
    walks = LayerWalk(dense, BLOCKS, batch=4), LayerWalk(pruned, BLOCKS, batch=4, changing=True, weights=weights, skip=1)
    measured = []
    for index, _ in zip(*walks, strict=False):
        measured.append(paired_moments(*walks, index))
        with torch.no_grad():  # cut and refitted, in one
            down_linears(pruned)[index].weight[:, ::2] *= 1.5
            down_linears(pruned)[index].weight[:, :5] = 0
    assert len(measured) == 3
    rows = zip(measured, activations(dense), activations(pruned), weights, down_linears(dense), strict=True)
    for index, ((moments, target), t, h, w, linear) in enumerate(rows):
        w[:, 0] = 0
        assert_moments(moments, h, w)
        share = (w.flatten() / w.sum()).double()[:, None]
        h, t = h.detach().double(), t.detach().double()
        torch.testing.assert_close(target.cross.double(), (t * share).T @ h, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(target.mean.double(), (t * share).sum(0), rtol=1e-3, atol=1e-4)
        energy = float(((t @ linear.weight.detach().double().T).square() * share).sum())
        assert target.energy == pytest.approx(energy, rel=1e-3)
        assert torch.allclose(target.cross, moments.second, rtol=1e-3, atol=1e-4) == (index == 0)


def test_a_model_paired_with_itself_has_its_own_moments_as_target():
    model = tiny_model("opt", bias=True)
    walks = LayerWalk(model, BLOCKS), LayerWalk(model, BLOCKS)
    for (index, _), alone in zip(zip(*walks, strict=False), ffn_moments(model, BLOCKS), strict=False):
        moments, target = paired_moments(*walks, index)
        torch.testing.assert_close(target.cross, moments.second)
        torch.testing.assert_close(target.mean, moments.mean)
        assert torch.equal(moments.second, alone.second)
        weight = down_linears(model)[index].weight.detach()
        assert target.energy == pytest.approx(float(torch.trace(weight @ alone.second @ weight.T)), rel=1e-4)


def test_walks_that_do_not_go_together_are_refused():
    model = tiny_model("llama")
    for other in (LayerWalk(model, BLOCKS.flip(0)), LayerWalk(model, BLOCKS, batch=3), LayerWalk(model, BLOCKS[:3])):
        with pytest.raises(ValueError, match="give both walks the same blocks and the same batch"):
            paired_moments(LayerWalk(model, BLOCKS), other, 0)


def ffn_of(family: str, layer: torch.nn.Module):
    """The modules' own way from the FFN's input to its output."""
    if family == "opt":
        return lambda x: layer.fc2(layer.activation_fn(layer.fc1(x)))
    return layer.mlp


@pytest.mark.parametrize("family", FAMILIES)
def test_sphere_moments_are_those_of_the_family_s_own_ffn(family):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(4)
    norms = ARCHITECTURES[family].norms
    for layer, linear, moments in zip(
        decoder_layers(model),
        down_linears(model),
        sphere_moments(model, samples=40, generator=torch.Generator().manual_seed(4)),
        strict=True,
    ):
        z = torch.randn(40, D_MODEL, generator=generator)
        x = z / z.norm(dim=1, keepdim=True) * D_MODEL**0.5
        name = next((name for name in norms if getattr(layer, name, None) is not None), None)
        if name is not None:
            x = x * (layer.get_submodule(name).weight.detach() + (1 if family.startswith("gemma") else 0))
        seen: list[torch.Tensor] = []
        hook = linear.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            ffn_of(family, layer)(x[None])
        hook.remove()
        assert_moments(moments, seen[0][0], torch.ones(40))
        assert moments.tokens == 40


def test_sphere_moments_are_drawn_with_the_generator_and_computed_in_float32():
    model = tiny_model("llama")
    first, again, other = ([m.second for m in sphere_moments(model, samples=9, generator=g)] for g in map(seeded, (0, 0, 1)))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    half = next(sphere_moments(model.bfloat16(), samples=9, generator=seeded(0)))
    assert half.second.dtype == half.mean.dtype == torch.float32
    torch.testing.assert_close(half.second, first[0], rtol=0.1, atol=0.1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_random_blocks_are_uniform_over_the_vocabulary():
    model = tiny_model("llama")
    blocks = random_blocks(model, 400, 32, seeded(0))
    assert torch.equal(blocks, random_blocks(model, 400, 32, seeded(0)))
    assert blocks.shape == (400, 32)
    counts = torch.bincount(blocks.flatten(), minlength=VOCABULARY)
    assert len(counts) == VOCABULARY
    # 200 expected of each, standard deviation 14.
    assert int(counts.min()) > 130
    assert int(counts.max()) < 270
    assert next(ffn_moments(model, blocks[:2])).tokens == 64


def test_random_blocks_leave_the_padding_of_the_embedding_out_and_fit_the_model():
    model = tiny_model("opt")
    model.config.vocab_size = 20
    assert int(random_blocks(model, 50, 30, seeded(0)).max()) == 19
    with pytest.raises(ValueError, match="do not fit the model's 64 positions"):
        random_blocks(model, 2, 65, seeded(0))
    with pytest.raises(ValueError, match="got 0 and 8"):
        random_blocks(model, 0, 8, seeded(0))
