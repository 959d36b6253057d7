import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import families
import pytest
import torch
from families import D_FF, LAYERS, tiny_model, token_ids

from prunenet.models.layers import count_parameters, decoder_layers, down_linears, iter_ffns
from prunenet.policies.methods import (
    METHODS,
    Evidence,
    GroupTuning,
    cut,
    group_tuned,
    pruned_model,
)
from prunenet.policies.methods.evidence import gradients
from prunenet.policies.methods.papers import saap
from prunenet.policies.methods.papers.saap_tuning import Adapter, pooled, quantised, spread
from prunenet.text.calibration import CalibrationSet

BLOCKS = CalibrationSet(token_ids(12, 20), "data", {})

each_family = pytest.mark.parametrize("model_type", ["llama", "opt", "phi3"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def doubles(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def linears(model) -> list[torch.nn.Linear]:
    return [
        m
        for layer in decoder_layers(model)
        for m in layer.modules()
        if isinstance(m, torch.nn.Linear)
    ]


def test_importances_are_fused_with_the_scale_of_their_layer_by_hand() -> None:
    # Means 2 and 2, then 8 and 2: in units of the smallest, s is 1 and 1, then 2 and 1.
    small, large = saap.fused([doubles([1, 3], [2, 2]), doubles([8, 8], [0, 4])])
    torch.testing.assert_close(small, doubles([1 / 4 + 2 / 4, 3 / 4 + 2 / 4])[0])
    torch.testing.assert_close(large, doubles([8 / 16 + 0, 8 / 16 + 4 / 4])[0] + math.log(2))


def test_the_fusion_does_not_depend_on_the_scale_of_the_loss() -> None:
    rows = [torch.rand(2, 5, generator=seeded(i), dtype=torch.float64) for i in range(3)]
    scaled = [row * doubles([1e-9], [3e-15]) for row in rows]
    for a, b in zip(saap.fused(rows), saap.fused(scaled), strict=True):
        torch.testing.assert_close(a, b)


def test_the_fluctuation_is_a_spread_over_sequences_by_hand() -> None:
    # Sums over s^2 = (1/2, 1/4): channel 0 has 1 + 2 and 5 + 2, channel 1 has 4 + 0 twice, channel
    # 2 nothing.
    each = torch.stack([doubles([1, 4, 0], [1, 0, 0]), doubles([5, 4, 0], [1, 0, 0])])
    found = saap.fluctuation(each, doubles([0.5, 0.25])[0])
    torch.testing.assert_close(found, doubles([2 / 5, 0, 0])[0])


@each_family
def test_the_score_is_that_of_gradients_by_backward(model_type) -> None:
    model = tiny_model(model_type)
    evidence = Evidence(model, BLOCKS, seed=3)
    windows = gradients.draw_windows(BLOCKS.ids, 10, 64, evidence.generator())

    def slices(layer, of: Callable) -> list[torch.Tensor]:
        ffn = list(iter_ffns(model))[layer]
        modules = dict(decoder_layers(model)[layer].named_modules())
        if model_type == "phi3":
            joint = of(modules["mlp.gate_up_proj"].weight)
            return [joint[:D_FF], joint[D_FF:], of(modules["mlp.down_proj"].weight).T]
        names = (
            ["fc1", "fc2"]
            if ffn.gate is None
            else ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        )
        rows = [of(modules[name].weight) for name in names]
        if ffn.up_bias is not None:
            rows[0] = torch.cat([rows[0], of(modules[names[0]].bias)[:, None]], 1)
        return [*rows[:-1], rows[-1].T]

    per_sequence = []  # of each sequence and layer: [(w, g) of each slice]
    for window in windows:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        layers = range(LAYERS)
        pairs = [
            list(zip(slices(i, lambda p: p.detach()), slices(i, lambda p: p.grad), strict=True))
            for i in layers
        ]
        per_sequence.append([[(w.double(), g.double().clone()) for w, g in pair] for pair in pairs])
    model.zero_grad()

    def importance(layer: int, chosen: list) -> torch.Tensor:
        total = torch.zeros(2, D_FF, dtype=torch.float64)
        for number, (w, _) in enumerate(chosen[0][layer]):
            each = [one[layer][number][1] for one in chosen]
            g, square = sum(each) / len(each), sum(e**2 for e in each) / len(each)
            total[0] += (w * g).sum(1).abs()
            total[1] += (w * g - w**2 * square / 2).abs().sum(1)
        return total

    whole = [importance(i, per_sequence) for i in range(LAYERS)]
    s2 = torch.stack([row.mean(1) for row in whole])
    logs = (s2 / s2.amin(0)).sqrt().log().sum(1)
    fused = [
        sum(row[m] / (2 * s[m]) for m in (0, 1)) + log
        for row, s, log in zip(whole, s2, logs, strict=True)
    ]
    ranked = torch.cat(fused).log()
    ranked = ((ranked - ranked.mean()) / ranked.std()).view(LAYERS, D_FF)
    for layer, row in enumerate(saap.scores(evidence, beta=0.25)):
        alone = torch.stack([importance(layer, [one]) for one in per_sequence])
        values = (alone / (2 * s2[layer][:, None])).sum(1)
        fluctuation = values.std(0) / values.mean(0)
        stability = (fluctuation - fluctuation.mean()) / fluctuation.std()
        torch.testing.assert_close(row, ranked[layer] - 0.25 * stability, rtol=1e-3, atol=1e-3)


def test_the_sign_of_the_stability_term_can_be_turned_over() -> None:
    evidence = Evidence(tiny_model("llama"), BLOCKS)
    plain, flipped, fusion = (
        METHODS[name].score(evidence) for name in ("saap", "saap_flipped", "saap_fusion")
    )
    strong = saap.scores(evidence, beta=1.0)
    for a, b, middle, far in zip(plain, flipped, fusion, strong, strict=True):
        torch.testing.assert_close((a + b) / 2, middle)
        torch.testing.assert_close(far - middle, 2 * (a - middle))
        assert (a - b).abs().max() > 0.5


def test_dead_channels_are_last_and_do_not_shape_the_other_scores() -> None:
    model = tiny_model("llama")
    for linear in (decoder_layers(model)[1].mlp.gate_proj, decoder_layers(model)[1].mlp.up_proj):
        linear.weight.data[7] = 0
    found = saap.scores(Evidence(model, BLOCKS), beta=0.0)
    assert all(bool(row.isfinite().all()) for row in found)
    assert found[1].argmin() == 7


@pytest.mark.long
def test_one_sort_cuts_all_layers_but_the_first_three_and_the_last_two(monkeypatch) -> None:
    monkeypatch.setitem(families._FIELDS, "num_hidden_layers", 12)
    model = tiny_model("llama")
    evidence = Evidence(model, BLOCKS)
    made, other = (cut(evidence, name, 0.3, round_to=1) for name in ("saap", "llm_pruner_mix"))
    assert made.widths[:3] + made.widths[-2:] == [D_FF] * 5
    assert count_parameters(made.applied(model)) == count_parameters(other.applied(model))
    inner = list(zip(METHODS["saap"].score(evidence), made.keep, strict=True))[3:-2]
    kept, dropped = (
        torch.cat([row[keep == side] for row, keep in inner]) for side in (True, False)
    )
    assert kept.min() >= dropped.max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: saap.scores(Evidence(tiny_model("llama"), BLOCKS), beta=-0.5), "removes='stable'"),
        (lambda: cut(Evidence(tiny_model("llama")), "saap", 0.3), "blocks=None"),
        (lambda: cut(Evidence(tiny_model("llama"), BLOCKS), "saap", 0.3), "protect fewer layers"),
        (lambda: quantised(torch.ones(2, 2), bits=9), "1 to 8 bits, got 9"),
        (
            lambda: group_tuned(tiny_model("llama"), BLOCKS.ids, seeded(), GroupTuning(steps=-1)),
            "steps >= 0",
        ),
        (lambda: group_tuned(tiny_model("llama"), BLOCKS.ids[:, :1], seeded()), "2 tokens or more"),
    ],
)
def test_what_cannot_be_done_is_said(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_are_quantised_between_the_extremes_of_their_group_by_hand() -> None:
    weight = torch.tensor([[0.0, 0.4, 1.6, 3.0, 5.0, 5.0], [-1.0, -1.0, 2.0, 0.4, -2.0, 4.0]])
    expected = torch.tensor([[0.0, 0.0, 2.0, 3.0, 5.0, 5.0], [-1.0, -1.0, 2.0, 0.0, -2.0, 4.0]])
    torch.testing.assert_close(quantised(weight, bits=2, group=4), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_weight_is_off_by_half_a_level_at_most_and_keeps_its_dtype(dtype) -> None:
    weight = torch.randn(6, 80, generator=seeded()).to(dtype)
    coarse = quantised(weight)
    assert coarse.dtype == dtype
    for a, b in zip(weight.split(32, 1), coarse.split(32, 1), strict=True):
        step = (a.float().amax(1) - a.float().amin(1)) / 15
        rounding = 0 if dtype == torch.float32 else 2**-8 * a.float().abs().amax(1)
        assert bool(((a - b).float().abs().amax(1) <= step / 2 + rounding + 1e-6).all())
        assert all(len(row.unique()) <= 16 for row in b)


@pytest.mark.parametrize("d_in", [64, 70, 5])
def test_an_adapter_and_its_merge_compute_the_same(d_in) -> None:
    linear = torch.nn.Linear(d_in, 9, bias=False)
    x = torch.randn(4, d_in, generator=seeded())
    assert torch.allclose(pooled(x, 32)[:, -1], x[:, (d_in - 1) // 32 * 32 :].mean(1))
    adapter = Adapter.of(linear, 3, 32, seeded())
    assert adapter.merged(linear.weight).equal(linear.weight), "an adapter starts as no change"
    adapter.up.data.normal_(generator=seeded(1))
    torch.testing.assert_close(x @ adapter.merged(linear.weight).T, linear(x) + adapter(x))
    change = spread(adapter.up @ adapter.down, d_in, 32)
    assert all(part.eq(part[:, :1]).all() for part in change.split(32, 1))


@each_family
def test_group_tuning_lowers_the_loss_moves_group_offsets_only_and_leaves_the_model(
    model_type,
) -> None:
    dense = tiny_model(model_type)
    model = pruned_model(Evidence(dense), "random", 0.3, allocation=[40, 16, 40])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = GroupTuning(rank=4, learning_rate=3e-2)
    tuned = partial(group_tuned, model, BLOCKS.ids)
    untrained = tuned(seeded(), replace(options, steps=0)).model
    trained = tuned(seeded(), replace(options, steps=15))
    with torch.no_grad():
        losses = [
            float(gradients.next_token_loss(m, BLOCKS.ids)) for m in (untrained, trained.model)
        ]
    assert len(trained.losses) == 15
    assert losses[1] < losses[0] - 0.2
    assert sum(trained.losses[-3:]) < sum(trained.losses[:3])
    for old, new in zip(linears(untrained), linears(trained.model), strict=True):
        for part in (new.weight - old.weight).detach().split(32, 1):
            torch.testing.assert_close(part, part[:, :1].expand_as(part), rtol=1e-3, atol=1e-5)
        assert not new.weight.equal(old.weight)
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in dense.parameters())
    assert count_parameters(trained.model) == count_parameters(model)
    assert [linear.in_features for linear in down_linears(trained.model)] == [40, 16, 40]
    assert not any(linear._forward_hooks for linear in linears(trained.model))


def test_a_seed_reproduces_group_tuning_and_no_bits_and_no_steps_change_nothing() -> None:
    model, ids = tiny_model("llama"), token_ids()
    with torch.no_grad():
        found = [
            group_tuned(model, BLOCKS.ids, seeded(seed), GroupTuning(steps=3)).model(ids).logits
            for seed in (0, 0, 1)
        ]
        same = (
            group_tuned(model, BLOCKS.ids, seeded(), GroupTuning(steps=0, bits=None))
            .model(ids)
            .logits
        )
        assert same.equal(model(ids).logits)
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])


def test_a_loss_that_is_not_finite_stops_group_tuning() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        group_tuned(model, BLOCKS.ids, seeded())
