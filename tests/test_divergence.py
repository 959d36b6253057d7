"""KL(dense || cut): against a direct computation, and as a reward."""

import pytest
import torch
from families import tiny_model

from prunenet.envs.divergence import DivergenceReward
from prunenet.envs.layerwise import LayerwisePruningEnv
from prunenet.evaluation.divergence import divergence, divergences
from prunenet.models.layers import ffn_widths
from prunenet.models.surgery import masking
from prunenet.refit.cut import Cut


def some_masks(model, share=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(width, generator=generator) < share for width in ffn_widths(model)]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "phi3"])
def test_it_is_the_divergence_of_the_masked_model(family):
    model, blocks = tiny_model(family), torch.randint(3, 60, (5, 12))
    keep = some_masks(model)
    with torch.no_grad():
        dense = model(input_ids=blocks).logits.log_softmax(-1)
        with masking(model, keep):
            cut = model(input_ids=blocks).logits.log_softmax(-1)
    expected = float((dense.exp() * (dense - cut)).sum(-1).mean())
    assert divergence(model, Cut(keep, None).down, blocks) == pytest.approx(
        expected, rel=1e-4, abs=1e-7
    )


def test_the_dense_model_has_none_and_is_left_as_it_was():
    model, blocks = tiny_model("llama"), torch.randint(3, 60, (2, 12))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = [torch.ones(width, dtype=torch.bool) for width in ffn_widths(model)]
    values = divergences(model, [Cut(whole, None).down, Cut(some_masks(model), None).down], blocks)
    assert abs(float(values[0])) < 1e-6 < float(values[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_logits_that_are_not_finite_are_an_error():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.inf
    keep = [torch.ones(width, dtype=torch.bool) for width in ffn_widths(model)]
    with pytest.raises(ValueError, match="not finite"):
        divergence(model, Cut(keep, None).down, torch.randint(3, 60, (2, 12)))


def test_the_reward_is_paid_once_at_the_end_of_a_sweep_and_is_bounded():
    model, blocks = tiny_model("llama"), torch.randint(3, 60, (3, 12))
    env = LayerwisePruningEnv(model, reward=DivergenceReward(model, blocks), ratio=0.1)
    env.reset(seed=0)
    paid, keep = [], some_masks(model)
    for mask in keep:
        _, reward, done, _, _ = env.step(mask.numpy().astype("int8"))
        paid.append(reward)
    assert done
    assert paid[:-1] == [0.0] * (len(keep) - 1)
    assert 0 < paid[-1] < 1
    assert paid[-1] == pytest.approx(
        float(torch.tensor(-divergence(model, Cut(keep, None).down, blocks)).exp()), abs=1e-5
    )


def test_a_refit_of_one_s_own_is_what_is_judged():
    model, blocks = tiny_model("llama"), torch.randint(3, 60, (3, 12))
    keep = [mask[None] for mask in some_masks(model)]
    whole = DivergenceReward(model, blocks, refit=lambda _layer, _keep, dense: dense)
    assert float(whole.sweep(keep)["divergence"]) == pytest.approx(1, abs=1e-6)
