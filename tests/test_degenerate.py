"""Dead layers, zero matrices and extreme weights: every computation has a finite answer, or says in
one sentence why it has none.
"""

import dataclasses
import warnings

import pytest
import torch
from families import LAYERS, tiny_model

from prunenet.envs.rewards import ReconstructionReward, SpectralReward
from prunenet.features.from_activations import moment_statistics
from prunenet.features.from_weights import channel_statistics, layer_context
from prunenet.models.layers import down_linears, ffn_widths, iter_ffns
from prunenet.policies.methods import METHODS, Evidence, cut
from prunenet.policies.training.recipe import Recipe
from prunenet.policies.training.train import train
from prunenet.refit.cut import Refits, cut_layers, refit_sequentially
from prunenet.spectra.estimated import SpectralSketch
from prunenet.spectra.exact import SpectralReference
from prunenet.text.calibration import CalibrationSet

IDS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(7))
WIDTH = 24


@torch.no_grad()
def damaged(kind: str, family: str = "llama"):
    model = tiny_model(family, bias=kind == "nan bias")
    ffns = list(iter_ffns(model))
    ffn = ffns[1]
    first = ffn.up if ffn.gate is None else ffn.gate
    match kind:
        case "dead gate":
            first.zero_()
        case "dead down":
            ffn.down.zero_()
        case "dead FFNs":
            for one in ffns:
                for part in (one.gate, one.up, one.down, one.gate_bias, one.up_bias):
                    if part is not None:
                        part.zero_()
        case "all zero":
            for parameter in model.parameters():
                parameter.zero_()
        case "nan":
            ffn.up[0, 0] = torch.nan
        case "inf":
            ffn.up[0, 0] = torch.inf
        case "nan bias":
            ffn.up_bias[0] = torch.nan
        case _:
            for one in ffns:
                for part in (one.gate, one.up, one.down):
                    if part is not None:
                        part.mul_(float(kind))
    return model


DEAD = ["dead gate", "dead down", "dead FFNs", "all zero"]
SCALED = ["1e-38", "1e-30", "1e-20", "1e-12", "1e10", "1e19", "1e30"]
BROKEN = ["nan", "inf"]
KEEP = torch.rand(4, 48, generator=torch.Generator().manual_seed(1)).argsort(1) < WIDTH


def blocks() -> CalibrationSet:
    return CalibrationSet(IDS, "data", {"text": "random"})


def widths(model) -> list[int]:
    return [WIDTH] * len(ffn_widths(model))


def trained(model, **changes) -> list[torch.Tensor]:
    recipe = Recipe(updates=1, masks=2, evaluate_every=1, hidden=(4,), **changes)
    found = train(model, recipe, blocks=blocks())
    return [torch.tensor([reward for _, reward in found.history])]


COMPUTATIONS = {
    "statistics": channel_statistics,
    "context": lambda model: [layer_context(model)],
    "moment statistics": lambda model: moment_statistics(model, IDS),
    "cut": lambda model: cut_layers(model, IDS, [widths(model)])[0].downs,
    "sequential": lambda model: (
        refit_sequentially(model, cut_layers(model, IDS, [widths(model)])[0], IDS).downs
    ),
    "refits": lambda model: [
        Refits(model, IDS, levels=2).down(0, KEEP[0], down_linears(model)[0].weight.detach())
    ],
    "exact": lambda model: SpectralReward(model).layer(1, KEEP).values(),
    "estimated": lambda model: SpectralReward(model, spectrum="stochastic").layer(1, KEEP).values(),
    "wasserstein": lambda model: (
        SpectralReward(model, distance="wasserstein").layer(1, KEEP).values()
    ),
    "energy": lambda model: SpectralReward(model, distance="energy").layer(1, KEEP).values(),
    "reconstruction": lambda model: ReconstructionReward(model, IDS).layer(1, KEEP).values(),
    "training": lambda model: trained(model, reward="spectral"),
    "training on moments": lambda model: trained(model, features="moments"),
}


def answer(compute, model) -> list[torch.Tensor] | str:
    """Finite tensors, or the sentence; anything else is a failure."""
    try:
        found = list(compute(model))
    except ValueError as error:
        said = str(error)
    else:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in found)
        return found
    assert "\n" not in said
    assert 20 < len(said) < 300
    return said


@pytest.mark.parametrize("name", COMPUTATIONS)
@pytest.mark.parametrize("kind", DEAD)
def test_dead_layers_have_an_answer(kind, name):
    if kind == "all zero" and name == "training on moments":
        pytest.skip("as statistics and training")
    assert not isinstance(answer(COMPUTATIONS[name], damaged(kind)), str)


@pytest.mark.parametrize("name", COMPUTATIONS)
@pytest.mark.parametrize("kind", [*SCALED, *BROKEN])
def test_extreme_weights_have_an_answer_or_one_sentence(kind, name):
    found = answer(COMPUTATIONS[name], damaged(kind))
    if kind in BROKEN:
        assert isinstance(found, str)
        assert "layer 1" in found or "a weight matrix holds NaN" in found


@pytest.mark.parametrize("kind", [*DEAD, "1e-30", "1e30", *BROKEN])
@pytest.mark.parametrize(
    "name",
    [name for name, row in METHODS.items() if not row.searches and row.shrinks == "both"],
)
def test_methods_have_an_answer_or_one_sentence(name, kind):
    model = damaged(kind)
    row = METHODS[name]
    if row.rebuild is not None:
        found = answer(
            lambda model: row.rebuild(Evidence(model, blocks()), 0.3, 8).parameters(), model
        )
        assert not (kind in DEAD and isinstance(found, str))
        return
    row = dataclasses.replace(row, protects=(0, 0))
    with warnings.catch_warnings(record=True):
        found = answer(
            lambda model: map(torch.clone, cut(Evidence(model, blocks()), row, 0.3).keep), model
        )
    if kind in DEAD:
        assert not isinstance(found, str), found
        assert len(found) == LAYERS
    if kind in BROKEN:
        assert isinstance(found, str)


def test_a_dead_layer_keeps_its_dense_columns_and_the_lowest_channels_go_first():
    model, sound = damaged("dead gate"), tiny_model("llama")
    (found,) = cut_layers(model, IDS, [widths(model)])
    dense = down_linears(model)[1].weight.detach()
    assert torch.equal(found.keep[1], torch.arange(48) >= 48 - WIDTH)
    assert torch.equal(found.downs[1], dense[:, found.keep[1]])
    # the others are refitted as ever
    (other,) = cut_layers(sound, IDS, [widths(sound)])
    assert torch.equal(found.downs[0], other.downs[0])
    assert not torch.equal(found.downs[2], down_linears(model)[2].weight[:, found.keep[2]])


def test_a_dead_layer_keeps_the_order_of_given_scores():
    model = damaged("dead gate")
    scores = [torch.rand(48, generator=torch.Generator().manual_seed(i)) for i in range(LAYERS)]
    for measured in (0.0, 1 / 3):
        (found,) = cut_layers(model, IDS, [widths(model)], scores=scores, measured=measured)
        assert torch.equal(found.keep[1], scores[1] > scores[1].sort().values[47 - WIDTH])


@pytest.mark.parametrize("power", [-100, -66, -33, 0, 33, 66, 100])
@pytest.mark.parametrize("kind", ["ks", "wasserstein", "energy"])
def test_spectral_distances_do_not_depend_on_the_scale_of_the_weights(kind, power):
    weight = torch.randn(48, 16, generator=torch.Generator().manual_seed(3))
    for route in (SpectralReference, SpectralSketch):
        plain, scaled = (route.of(w).distance(KEEP, kind) for w in (weight, weight * 2.0**power))
        torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_weights_that_overflow_are_told_from_damaged_ones(family):
    with pytest.raises(
        ValueError, match=r"layer 0, the largest of which is [\d.]+e\+30, are too large"
    ):
        channel_statistics(damaged("1e30", family))
    with pytest.raises(
        ValueError, match=r"layer 0, the largest of which is [\d.]+e\+30, are too large"
    ):
        layer_context(damaged("1e30", family))
    for kind in BROKEN:
        for compute in (channel_statistics, layer_context):
            with pytest.raises(ValueError, match="weights of layer 1 are NaN or infinite"):
                compute(damaged(kind, family))
    with pytest.raises(ValueError, match="weights of layer 1 are NaN or infinite"):
        layer_context(damaged("nan bias", "opt"))
    model = tiny_model(family)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(1e30)
    with pytest.raises(ValueError, match="embeddings are too large: their squares overflow"):
        channel_statistics(model)
