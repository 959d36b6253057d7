import families
import pytest
import torch
from families import D_FF, D_MODEL, LAYERS, tiny_model, token_ids

from prunenet.models.layers import count_parameters, down_linears, ffn_widths, iter_ffns
from prunenet.models.masks import top_channels
from prunenet.models.surgery import masking
from prunenet.policies.methods import METHODS, Budget, Evidence, Method, cut, pruned_model
from prunenet.policies.methods.evidence import gradients
from prunenet.policies.methods.papers import flap, wanda_sp
from prunenet.refit.moments import Energies
from prunenet.text.calibration import CalibrationSet

BLOCKS = CalibrationSet(token_ids(6, 20), "data", {})
DRAWS = ["random", "folding", "prunenet_published", "prunenet_published_trained", "llm_pruner_mix"]

# A search is no quick call: test_adapruner, test_soft_masks. What cuts no channels: test_slicegpt.
NAMES = [name for name, row in METHODS.items() if not row.searches and row.rebuild is None]

each_family = pytest.mark.parametrize("model_type", ["llama", "opt", "phi3"])


@pytest.fixture
def twelve_layers(monkeypatch) -> None:
    """For methods that leave layers whole."""
    monkeypatch.setitem(families._FIELDS, "num_hidden_layers", 12)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def activations(model, ids) -> list[torch.Tensor]:
    """(tokens, d_ff) of each layer."""
    found = []
    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, -2)))
        for linear in down_linears(model)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi3"])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_runs_on_every_kind_of_ffn_and_meets_the_same_budget(
    name, model_type, request
) -> None:
    first, last = METHODS[name].protects
    if first + last:
        request.getfixturevalue("twelve_layers")
    model = tiny_model(model_type, bias=True)
    layers = len(ffn_widths(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evidence = Evidence(model, None if METHODS[name].needs == "weights" else BLOCKS)
    made = cut(evidence, name, 0.3)
    narrow = made.applied(model)
    assert ffn_widths(narrow) == made.widths == [int(mask.sum()) for mask in made.keep]
    budget = Budget.of(model, 0.3)
    assert budget.cost(made.widths) == budget.parameters == budget.cost([32] * layers)
    had_bias = down_linears(model)[0].bias is not None
    added = layers * D_MODEL if made.biases is not None and not had_bias else 0
    assert (
        count_parameters(model)[0] - count_parameters(narrow)[0]
        == budget.cost([16] * layers) - added
    )
    assert all(width == D_FF for width in [*made.widths[:first], *made.widths[layers - last :]])
    assert bool(torch.isfinite(logits(narrow)).all())
    assert all(before[key].equal(value) for key, value in model.state_dict().items()), (
        "the dense model changed"
    )
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_reproduces_a_cut_and_another_one_changes_what_is_drawn(name) -> None:
    model = tiny_model("llama")
    same = [
        logits(pruned_model(Evidence(model, BLOCKS, seed), name, 0.3, allocation="uniform"))
        for seed in (0, 0, 1)
    ]
    assert same[0].equal(same[1])
    assert same[0].equal(same[2]) == (name not in DRAWS and METHODS[name].needs != "gradients")


def test_the_table_names_each_method_once_with_scores_or_a_merge_or_a_model() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert [method.score, method.merge, method.rebuild].count(None) == 2
        assert method.source


@pytest.mark.parametrize("name", ["wanda_sp", "flap", "llm_pruner_mix", "random"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "protected", "owl", "influence"])
def test_scores_and_allocations_combine_freely(name, allocation, twelve_layers) -> None:
    made = cut(Evidence(tiny_model("llama"), BLOCKS), name, 0.3, allocation=allocation, round_to=1)
    assert sum(made.widths) == 12 * 34
    even = made.widths == [34] * 12
    assert even == (
        allocation == "uniform" or (allocation == "protected" and METHODS[name].protects == (0, 0))
    )


@pytest.mark.parametrize("comparable", [False, True])
def test_a_global_sort_sees_the_scale_of_a_layer_only_where_scores_are_comparable(
    comparable,
) -> None:
    evidence = Evidence(tiny_model("llama"))
    rows = [torch.rand(D_FF, generator=torch.Generator().manual_seed(i)) for i in range(LAYERS)]
    scales = [(1, 1, 1), (1, 100, 10)]
    own = [
        Method(
            "own",
            "weights",
            "-",
            lambda _, s=s: [row * x for row, x in zip(rows, s, strict=True)],
            comparable=comparable,
        )
        for s in scales
    ]
    widths = [cut(evidence, method, 0.3, allocation="global", round_to=1).widths for method in own]
    assert (widths[0] == widths[1]) == (not comparable)


def test_widths_can_be_given_and_must_fit_the_budget() -> None:
    evidence = Evidence(tiny_model("llama"))
    assert cut(evidence, "random", 0.3, allocation=[48, 16, 32]).widths == [48, 16, 32]
    for widths in ([48, 32, 32], [32, 32]):
        with pytest.raises(ValueError, match="do not fit"):
            cut(evidence, "random", 0.3, allocation=widths)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wandasp", {}, "unknown method 'wandasp'"),
        ("flap", {}, "blocks=None"),
        ("folding", {"allocation": "global"}, "no scores to sort"),
        ("llm_pruner_mix", {"blocks": BLOCKS}, "protect fewer layers"),
    ],
)
def test_what_cannot_be_cut_is_said(name, options, message) -> None:
    evidence = Evidence(tiny_model("llama"), options.pop("blocks", None))
    with pytest.raises(ValueError, match=message):
        cut(evidence, name, 0.3, **options)


def test_magnitude_multiplies_the_norms_that_the_family_has() -> None:
    for model_type in ("llama", "opt"):
        ffn = next(iter_ffns(model := tiny_model(model_type)))
        j = 7
        expected = (
            ffn.up[j].norm()
            * ffn.down[:, j].norm()
            * (1 if ffn.gate is None else ffn.gate[j].norm())
        )
        torch.testing.assert_close(METHODS["magnitude"].score(Evidence(model))[0][j], expected)


@each_family
def test_wanda_and_flap_scores_are_those_of_the_activations_by_brute_force(model_type) -> None:
    model = tiny_model(model_type, bias=True)
    evidence = Evidence(model, BLOCKS)
    wanda, fluctuation = wanda_sp.scores(evidence), flap.scores(evidence)
    for layer, (linear, h) in enumerate(
        zip(down_linears(model), activations(model, BLOCKS.ids), strict=True)
    ):
        expected = torch.stack(
            [linear.weight[:, j].abs().mean() * h[:, j].norm() for j in range(D_FF)]
        ).detach()
        torch.testing.assert_close(wanda[layer], expected, rtol=1e-4, atol=1e-5)
        raw = torch.stack(
            [h[:, j].var(correction=0) * linear.weight[:, j].square().sum() for j in range(D_FF)]
        ).detach()
        torch.testing.assert_close(
            fluctuation[layer], (raw - raw.mean()) / raw.std(), rtol=1e-3, atol=1e-3
        )


def test_channels_that_never_fluctuate_score_alike() -> None:
    assert flap.zscore(torch.full((5,), 3.0)).equal(torch.zeros(5))
    assert flap.zscore(torch.tensor([3.0])).equal(torch.zeros(1))


@each_family
def test_the_mean_bias_restores_what_the_first_ffn_writes_on_average(model_type) -> None:
    model = tiny_model(model_type, bias=True)
    narrow = pruned_model(Evidence(model, BLOCKS), "flap", 0.3, allocation="uniform")
    outputs = []
    for cut_model in (model, narrow):
        h = activations(cut_model, BLOCKS.ids)[0]
        outputs.append(down_linears(cut_model)[0](h).mean(0))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def test_wanda_measures_each_layer_behind_the_cut_ones() -> None:
    model = tiny_model("llama")
    made = cut(Evidence(model, BLOCKS), "wanda_sp", 0.5)
    for layer in range(LAYERS):
        done = [*made.keep[:layer], *[torch.ones(D_FF, dtype=torch.bool)] * (LAYERS - layer)]
        with masking(model, done):
            h = activations(model, BLOCKS.ids)[layer]
        ffn = list(iter_ffns(model))[layer]
        score = wanda_sp.layer_score(ffn, Energies(h.square().mean(0), h.mean(0), len(h)))
        assert made.keep[layer].equal(top_channels(score, 24))
    once = cut(Evidence(model, BLOCKS), "wanda_sp", 0.5, sequential=False)
    assert not all(a.equal(b) for a, b in zip(once.keep, made.keep, strict=True))


# Norms and softmax of Llama and Phi-3 work in float32 whatever the model's dtype.
@pytest.mark.long
@pytest.mark.parametrize(
    ("model_type", "step", "tolerance"),
    [("llama", 2e-2, 2e-3), ("phi3", 2e-2, 2e-3), ("opt", 1e-4, 1e-6)],
)
def test_taylor_sums_are_those_of_finite_differences(model_type, step, tolerance) -> None:
    model = tiny_model(model_type, bias=True).double()
    windows, layer, channel = token_ids(3, 6), 1, 5
    sums = gradients.taylor_sums(model, windows)[layer]
    ffn = list(iter_ffns(model))[layer]
    slices = [
        [weight[channel]] if bias is None else [weight[channel], bias[channel : channel + 1]]
        for weight, bias in ((ffn.gate, ffn.gate_bias), (ffn.up, ffn.up_bias), (ffn.down.T, None))
        if weight is not None
    ]

    def slopes(row: torch.Tensor, i: int) -> torch.Tensor:
        """Of the loss of each window, by central differences of the fourth order."""
        weight, losses = float(row[i]), []
        for shift in (step, -step, 2 * step, -2 * step):
            row[i] = weight + shift
            logs = model(windows).logits[:, :-1].log_softmax(-1)
            losses.append(-logs.gather(2, windows[:, 1:, None]).mean((1, 2)))
        row[i] = weight
        return (8 * (losses[0] - losses[1]) - (losses[2] - losses[3])) / (12 * step)

    for number, rows in enumerate(slices):
        with torch.no_grad():
            found = [(float(row[i]), slopes(row, i)) for row in rows for i in range(len(row))]
        first = torch.stack([weight * slope.mean() for weight, slope in found])
        second = torch.stack([weight**2 * slope.square().mean() for weight, slope in found])
        expected = [first.sum(), first.abs().sum(), second.sum(), (first - second / 2).abs().sum()]
        measured = [
            getattr(sums, name)[number, channel]
            for name in ("vector", "element1", "element2", "mix")
        ]
        scale = float(first.abs().sum())
        torch.testing.assert_close(
            torch.stack(measured), torch.stack(expected), rtol=tolerance, atol=tolerance * scale
        )


def test_llm_pruner_adds_up_the_size_of_its_slices() -> None:
    evidence = Evidence(tiny_model("llama"), BLOCKS)
    vector = evidence.taylor[0].vector
    assert vector.shape == (3, D_FF)
    torch.testing.assert_close(
        METHODS["llm_pruner_vector"].score(evidence)[0],
        vector[0].abs() + vector[1].abs() + vector[2].abs(),
    )


def test_windows_lie_in_their_blocks_and_use_different_ones() -> None:
    ids = torch.arange(12 * 100).view(12, 100)
    windows = gradients.draw_windows(ids, 10, 64, torch.Generator().manual_seed(0))
    assert windows.shape == (10, 64)
    assert (windows.diff(dim=1) == 1).all()
    assert len((windows[:, 0] // 100).unique()) == 10
    assert (windows[:, 0] // 100 == windows[:, -1] // 100).all()
    assert gradients.draw_windows(ids[:2], 10, 200, torch.Generator()).shape == (10, 100)
