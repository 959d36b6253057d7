from dataclasses import replace
from functools import partial

import pytest
import torch
from families import D_FF, LAYERS, tiny_model, token_ids
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM

from prunenet.evaluation.divergence import mask_divergences
from prunenet.models.known import class_of
from prunenet.models.masks import top_channels
from prunenet.models.surgery import masking
from prunenet.models.twin import twin
from prunenet.policies.methods import METHODS, Budget, Evidence, cut
from prunenet.policies.methods.papers import soft_masks
from prunenet.policies.methods.papers.soft_masks import SoftMaskOptions, learned
from prunenet.policies.relaxed import (
    NARROWEST,
    WIDEST,
    RelaxedModel,
    budgeted,
    sharpened,
    soft_keep,
)
from prunenet.runtime.batches import batch_of
from prunenet.text.calibration import CalibrationSet

BLOCKS = CalibrationSet(token_ids(6, 20), "data", {})
QUICK = SoftMaskOptions(steps=40)


def same(one, other) -> bool:
    return all(map(torch.equal, one, other))


def test_a_mask_is_off_at_zero_half_at_mu_and_on_at_twice_mu_whatever_mu_is() -> None:
    for mu in (WIDEST, 0.2, NARROWEST):
        found = soft_keep(mu * torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0]), mu)
        torch.testing.assert_close(found, torch.tensor([0, 0, 0.5, 1, 1]), atol=1e-3, rtol=0)
    assert [sharpened(step, 11) for step in (0, 10)] == pytest.approx([WIDEST, NARROWEST])
    assert sharpened(5, 11) == pytest.approx((WIDEST * NARROWEST) ** 0.5)


def test_masks_meet_one_budget_in_parameters_and_only_differences_of_z_matter() -> None:
    costs = torch.tensor([1.0, 1.0, 2.0, 4.0]).repeat(25)
    costs /= costs.sum()
    z = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for share in (0.1, 0.7, 1.0):
        for mu in (WIDEST, NARROWEST):
            masks = budgeted(z, torch.tensor(share), costs, mu)
            assert float(masks @ costs) == pytest.approx(share, abs=2e-3)
            torch.testing.assert_close(
                masks, budgeted(z + 3, torch.tensor(share), costs, mu), atol=1e-3, rtol=0
            )


def test_every_block_comes_once_before_any_comes_again() -> None:
    drawn = torch.cat([batch_of(step, 3, 7, 0) for step in range(7)])
    for turn in drawn.split(7):
        assert sorted(turn.tolist()) == list(range(7))
    assert not torch.equal(drawn[:7], drawn[7:14])
    assert not torch.equal(batch_of(0, 7, 7, 0), batch_of(0, 7, 7, 1))


@pytest.mark.parametrize(
    "model_type", ["llama", "starcoder2", "glm4", "gpt2", "qwen3_moe", "gpt_oss", "llama4_text"]
)
def test_masks_of_zeros_and_ones_cut_every_kind_of_ffn_and_gradients_reach_them(model_type) -> None:
    model, ids = twin(class_of(model_type), CONFIG_MAPPING[model_type])
    judge = RelaxedModel(model.float(), ids[:2])
    drawn = torch.Generator().manual_seed(0)
    draws = [torch.rand(size, generator=drawn) for size in judge.sizes]
    keep = [top_channels(row, int(0.7 * len(row))) for row in draws]
    masks = torch.cat(keep).float().requires_grad_()
    rows = torch.arange(2)
    lost = judge.lost(masks, rows)
    (gradient,) = torch.autograd.grad(lost, [masks])
    assert bool(gradient.isfinite().all())
    assert bool((gradient != 0).any())
    with masking(model, keep), torch.no_grad():
        logits = model(input_ids=ids[:2], use_cache=False).logits
    torch.testing.assert_close(lost.detach(), judge._expected(rows).lost(logits, "kl"))
    assert float(lost.detach()) > 1e-5
    assert float(judge.lost(torch.ones(len(masks)), rows)) == pytest.approx(0, abs=1e-6)
    assert float(judge.costs.sum()) == pytest.approx(1)


@pytest.mark.long
@pytest.mark.parametrize("divergence", ["kl", "tv"])
def test_learned_masks_meet_the_budget_lose_what_does_nothing_and_beat_magnitude(divergence):
    model = tiny_model("llama")
    idle = torch.arange(5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, idle] = 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evidence = Evidence(model, BLOCKS)
    score = partial(soft_masks.scores, options=replace(QUICK, divergence=divergence))
    made = cut(evidence, replace(METHODS["soft_masks"], score=score), 0.3)
    budget = Budget.of(model, 0.3)
    assert budget.cost(made.widths) == budget.parameters
    assert not any(bool(mask[idle].any()) for mask in made.keep)
    by_norm = cut(evidence, "magnitude", 0.3)
    ours, theirs = mask_divergences(model, [(made.keep, None), (by_norm.keep, None)], BLOCKS.ids)
    assert ours < theirs
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_seed_repeats_its_masks_and_another_one_has_others() -> None:
    model = tiny_model("opt")
    options = replace(QUICK, steps=8)
    found = [learned(Evidence(model, BLOCKS, seed), options=options) for seed in (0, 0, 1)]
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.long
@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_goes_on_and_ends_with_the_same_masks(damaged, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(soft_masks, "_SECONDS", -1.0)
    evidence, options = Evidence(tiny_model("llama"), BLOCKS), replace(QUICK, steps=9)
    done = []

    def killed(step, of, lost) -> None:
        if step == 5:
            raise KeyboardInterrupt

    whole = learned(evidence, options=options)
    with pytest.raises(KeyboardInterrupt):
        learned(evidence, options=options, cache=tmp_path, progress=killed)
    (state,) = tmp_path.iterdir()
    if damaged:
        state.write_bytes(state.read_bytes()[:-1] + b"\xff")
    other = replace(evidence, seed=1)
    learned(other, options=options, cache=tmp_path)
    assert state.exists()
    found = learned(
        evidence, options=options, cache=tmp_path, progress=lambda step, *_: done.append(step)
    )
    assert done[0] == (1 if damaged else 5)
    assert same(whole, found)
    assert not list(tmp_path.iterdir())


def test_masks_of_a_ratio_are_learned_at_that_ratio(tmp_path, monkeypatch) -> None:
    asked = []

    def score(evidence, *, ratio):
        asked.append(ratio)
        return [torch.arange(D_FF).float() for _ in range(LAYERS)]

    cut(Evidence(tiny_model("llama"), BLOCKS), replace(METHODS["soft_masks"], score=score), 0.5)
    assert asked == [0.5]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"divergence": "js"}, "`divergence` must be one of kl, tv, got 'js'"),
        ({"steps": 0}, "`steps` must be 1 or more, got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0 and finite, got 0.0"),
        ({"binary": -1.0}, "`binary` must be 0 or more and finite, got -1.0"),
    ],
)
def test_bad_options_are_refused(options, wanted, unchecked) -> None:
    with pytest.raises(ValueError, match=wanted):
        SoftMaskOptions(**options)


def test_a_loss_that_is_not_finite_is_one_sentence() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        learned(Evidence(model, BLOCKS), options=QUICK)
    with pytest.raises(ValueError, match="needs text"):
        learned(Evidence(model), options=QUICK)


def chain(rows: int, tokens: int, seed: int) -> torch.Tensor:
    """Text of a fixed chain of order 2 over 64 tokens: each context has four successors."""
    successors = torch.randint(0, 64, (8, 64, 4), generator=torch.Generator().manual_seed(7))
    chances = torch.tensor([0.6, 0.25, 0.1, 0.05]).expand(rows, 4)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (rows, tokens), generator=generator)
    for at in range(2, tokens):
        drawn = torch.multinomial(chances, 1, generator=generator)
        ids[:, at] = successors[ids[:, at - 2] % 8, ids[:, at - 1]].gather(1, drawn)[:, 0]
    return ids


@pytest.mark.slow
def test_on_a_trained_model_learned_masks_lose_less_on_other_text_than_taylor_and_wanda() -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=4, **sizes
    )
    model = LlamaForCausalLM(config)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        for group in adam.param_groups:
            group["lr"] = 3e-3 * (1 - step / 200)
        ids = chain(16, 32, 1000 + step)
        adam.zero_grad()
        torch.autograd.backward(model(ids, labels=ids).loss)
        adam.step()
    evidence = Evidence(model.eval(), CalibrationSet(chain(64, 48, 1), "data", {}))
    score = partial(soft_masks.scores, options=SoftMaskOptions(steps=120, batch=8))
    rows = [replace(METHODS["soft_masks"], score=score), METHODS["llm_pruner_element1"]]
    cuts = [cut(evidence, row, 0.5, allocation="global") for row in rows]
    cuts.append(cut(evidence, "wanda_sp", 0.5, allocation="uniform"))
    masks = [(made.keep, None) for made in cuts]
    ours, taylor, wanda = mask_divergences(model, masks, chain(32, 48, 2)).tolist()
    assert ours < min(taylor, wanda)
