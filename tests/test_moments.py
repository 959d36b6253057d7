"""Moments: of all tokens or without the first ones, and paired with the dense model's."""

import copy

import pytest
import torch
from families import D_FF, FAMILIES, VOCABULARY, tiny_model, token_ids

from prunenet.models.layers import down_linears
from prunenet.refit.moments import LayerWalk, Moments, ffn_moments, paired_moments
from prunenet.text.random_tokens import random_blocks

BLOCKS = token_ids(6, 10)


def activations(model, blocks: torch.Tensor = BLOCKS) -> list[torch.Tensor]:
    """h of every layer, (tokens, d_ff), as the whole model computes it."""
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, inputs, i=i: seen.__setitem__(i, inputs[0].flatten(0, -2))
        )
        for i, linear in enumerate(down_linears(model))
    ]
    with torch.no_grad():
        model(blocks)
    for hook in hooks:
        hook.remove()
    return [seen[i] for i in range(len(seen))]


def assert_moments(moments: Moments, h: torch.Tensor) -> None:
    h = h.double()
    for measured, expected in ((moments.second, h.T @ h), (moments.mean, h.sum(0))):
        torch.testing.assert_close(measured.double(), expected / len(h), rtol=1e-3, atol=1e-4)
    assert moments.tokens == len(h)


def counted(h: torch.Tensor, skip: int) -> torch.Tensor:
    """Without the first positions of each block."""
    return h.unflatten(0, BLOCKS.shape)[:, skip:].flatten(0, 1)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
@pytest.mark.parametrize("skip", [0, 3])
def test_the_first_positions_can_be_left_out_but_are_still_read(family, skip):
    model = tiny_model(family)
    for moments, h in zip(
        ffn_moments(model, BLOCKS, batch=4, skip=skip), activations(model), strict=True
    ):
        assert_moments(moments, counted(h, skip))
        assert torch.equal(moments.second, moments.second.T)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_energies_are_the_diagonal_of_the_moments_and_pass_the_same_hidden_states_on(family):
    model = tiny_model(family)
    walks = LayerWalk(model, BLOCKS, batch=4, skip=2), LayerWalk(model, BLOCKS, batch=4, skip=2)
    for index, _ in zip(*walks, strict=True):
        full, alone = walks[0].moments(index), walks[1].energies(index)
        torch.testing.assert_close(alone.energy, full.second.diagonal())
        assert torch.equal(alone.mean, full.mean)
        assert alone.tokens == full.tokens


def test_moments_are_bit_equal_to_sums_of_batches():
    model = tiny_model("llama")
    plain = next(ffn_moments(model, BLOCKS, batch=4))
    h = torch.split(activations(model, BLOCKS)[0], 40)
    second = torch.zeros(D_FF, D_FF).addmm_(h[0].T, h[0]).addmm_(h[1].T, h[1])
    walk = LayerWalk(model, BLOCKS, batch=4)
    assert walk.tokens == 60
    torch.testing.assert_close(plain.second, second / 60, rtol=1e-5, atol=1e-6)


def test_skips_beyond_the_block_are_refused():
    for skip in (-1, 10):
        with pytest.raises(ValueError, match=f"cannot skip their first {skip}; give 0 to 9"):
            LayerWalk(tiny_model("llama"), BLOCKS, skip=skip)


@pytest.mark.parametrize("family", FAMILIES)
def test_paired_moments_relate_the_pruned_model_to_the_dense_one_token_by_token(family):
    dense = tiny_model(family)
    pruned = copy.deepcopy(dense)
    walks = (
        LayerWalk(dense, BLOCKS, batch=4, skip=1),
        LayerWalk(pruned, BLOCKS, batch=4, changing=True, skip=1),
    )
    measured = []
    for index, _ in zip(*walks, strict=False):
        measured.append(paired_moments(*walks, index))
        with torch.no_grad():  # cut and refitted, in one
            down_linears(pruned)[index].weight[:, ::2] *= 1.5
            down_linears(pruned)[index].weight[:, :5] = 0
    assert len(measured) == 3
    rows = zip(measured, activations(dense), activations(pruned), down_linears(dense), strict=True)
    for index, ((moments, target), t, h, linear) in enumerate(rows):
        h, t = counted(h, 1).double(), counted(t, 1).double()
        assert_moments(moments, h)
        torch.testing.assert_close(target.cross.double(), t.T @ h / len(h), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(target.mean.double(), t.mean(0), rtol=1e-3, atol=1e-4)
        energy = float((t @ linear.weight.detach().double().T).square().sum(1).mean())
        assert target.energy == pytest.approx(energy, rel=1e-3)
        assert torch.allclose(target.cross, moments.second, rtol=1e-3, atol=1e-4) == (index == 0)


def test_a_model_paired_with_itself_has_its_own_moments_as_target():
    model = tiny_model("opt", bias=True)
    walks = LayerWalk(model, BLOCKS), LayerWalk(model, BLOCKS)
    for (index, _), alone in zip(
        zip(*walks, strict=False), ffn_moments(model, BLOCKS), strict=False
    ):
        moments, target = paired_moments(*walks, index)
        torch.testing.assert_close(target.cross, moments.second)
        torch.testing.assert_close(target.mean, moments.mean)
        assert torch.equal(moments.second, alone.second)
        weight = down_linears(model)[index].weight.detach()
        assert target.energy == pytest.approx(
            float(torch.trace(weight @ alone.second @ weight.T)), rel=1e-4
        )


def test_walks_that_do_not_go_together_are_refused():
    model = tiny_model("llama")
    for other in (
        LayerWalk(model, BLOCKS.flip(0)),
        LayerWalk(model, BLOCKS, batch=3),
        LayerWalk(model, BLOCKS, skip=1),
    ):
        with pytest.raises(ValueError, match="give both walks the same blocks, batch and skip"):
            paired_moments(LayerWalk(model, BLOCKS), other, 0)


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
    with pytest.raises(ValueError, match="more than the 64 positions"):
        random_blocks(model, 2, 65, seeded(0))
    with pytest.raises(ValueError, match="got 0 and 8"):
        random_blocks(model, 0, 8, seeded(0))
