"""The interaction matrix holds what ablations do, and prices their sums."""

import pytest
import torch
from families import FAMILIES, tiny_model, token_ids
from test_group_refit import tiny
from torch.nn.functional import kl_div

from prunenet.evaluation import interaction
from prunenet.evaluation.interaction import Ablation, Interaction, measure_interaction
from prunenet.evaluation.units import units_of
from prunenet.models.layers import count_parameters, ffn_widths
from prunenet.models.surgery import masking, narrowed

BINS = 4


def scores_of(model):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(width, generator=generator) for width in ffn_widths(model)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def measured(model):
    return measure_interaction(model, token_ids(2, 12), scores_of(model), Ablation(bins=BINS))[0]


def divergence(dense, cut):
    found = [logits.log_softmax(-1) for logits in (cut, dense)]
    return float(kl_div(*found, log_target=True, reduction="none").sum(-1).mean())


def masked_logits(model, unit):
    keep = [torch.ones(width, dtype=torch.bool) for width in ffn_widths(model)]
    groups = [torch.ones(2, dtype=torch.bool) for _ in keep]
    if unit.structure == "channels":
        size = len(keep[0]) // BINS
        order = scores_of(model)[unit.layer].argsort()
        keep[unit.layer][order[size * unit.number : size * (unit.number + 1)]] = False
    else:
        groups[unit.layer][unit.number] = False
    heads = None if unit.structure == "channels" else groups
    with masking(model, keep, heads), torch.no_grad():
        return model(input_ids=token_ids(2, 12)).logits


def test_a_pass_from_stored_hidden_states_is_the_whole_pass_of_the_masked_model(model, measured):
    with torch.no_grad():
        dense = model(input_ids=token_ids(2, 12)).logits
    for number, unit in enumerate(measured.units):
        if unit.structure in ("channels", "heads"):
            true = divergence(dense, masked_logits(model, unit))
            # the successors beyond the top are one bin: a vocabulary of 64 has none
            assert float(measured.kl[number]) == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_channels_that_stand_in_rows_or_in_columns_are_ablated_alike(family):
    other = tiny(family) if family == "gpt2" else tiny_model(family)
    found = Ablation(bins=BINS, structures=("channels",))
    (part,) = measure_interaction(other, token_ids(2, 12), scores_of(other), found)
    with torch.no_grad():
        dense = other(input_ids=token_ids(2, 12)).logits
    for kl, unit in zip(part.kl.tolist(), part.units, strict=True):
        assert kl == pytest.approx(divergence(dense, masked_logits(other, unit)), rel=1e-3)


def test_a_skipped_layer_and_a_silent_attention_are_ablated_as_a_whole(model, measured):
    with torch.no_grad():
        dense = model(input_ids=token_ids(2, 12)).logits
        skipped = tiny_model("llama")
        del skipped.model.layers[1]
        silent = tiny_model("llama")
        silent.model.layers[1].self_attn.o_proj.weight.zero_()
        for structure, other in (("layers", skipped), ("attention", silent)):
            place = [(u.structure, u.layer) for u in measured.units].index((structure, 1))
            logits = other(input_ids=token_ids(2, 12), use_cache=False).logits
            assert float(measured.kl[place]) == pytest.approx(divergence(dense, logits), rel=1e-3)


def test_half_the_matrix_s_sum_is_the_damage_where_logits_are_linear(monkeypatch):
    # Small weights: each ablation moves the logits a little, and so nearly linearly.
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 1e-3
    found = measure_interaction(model, token_ids(2, 12), scores_of(model), Ablation(bins=BINS))[0]
    chosen = [n for n, unit in enumerate(found.units) if unit.structure == "channels"][::2]
    predicted = float(found.quadratic[chosen][:, chosen].sum()) / 2
    keep = [torch.ones(width, dtype=torch.bool) for width in ffn_widths(model)]
    for number in chosen:
        unit, size = found.units[number], len(keep[0]) // BINS
        order = scores_of(model)[unit.layer].argsort()
        keep[unit.layer][order[size * unit.number : size * (unit.number + 1)]] = False
    with torch.no_grad():
        dense = model(input_ids=token_ids(2, 12)).logits.double()
        with masking(model, keep):
            cut = model(input_ids=token_ids(2, 12)).logits.double()
    assert predicted == pytest.approx(divergence(dense, cut), rel=0.05)


def test_the_matrix_is_symmetric_and_positive_and_its_diagonal_is_the_measured_damage(measured):
    assert torch.allclose(measured.raw, measured.raw.T)
    assert float(torch.linalg.eigvalsh(measured.raw.double())[0]) > -1e-6
    assert torch.allclose(measured.quadratic.diagonal() / 2, measured.kl, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_every_family_cost_what_goes_away_with_them(family):
    model = tiny_model(family)
    units = units_of(model, BINS)
    whole, before = units_of(model, BINS, ["layers"]), count_parameters(model)[0]
    assert len(whole) == 3
    in_bins = sum(unit.parameters for unit in units if unit.structure == "channels")
    keep = [torch.arange(width) >= width // BINS for width in ffn_widths(model)]
    first = sum(u.parameters for u in units if (u.structure, u.number) == ("channels", 0))
    assert before - count_parameters(narrowed(model, keep))[0] == first
    assert in_bins == BINS * first
    if any(unit.structure == "heads" for unit in units):
        groups = [torch.tensor([True, False])] * 3
        full = [torch.ones_like(mask) for mask in keep]
        one = sum(u.parameters for u in units if (u.structure, u.number) == ("heads", 1))
        assert before - count_parameters(narrowed(model, full, groups))[0] == one


def test_a_measurement_goes_on_with_the_batch_that_it_was_at(model, tmp_path, monkeypatch):
    ids, scores = token_ids(4, 12), scores_of(model)
    first = measure_interaction(model, ids[:2], scores, Ablation(bins=BINS), cache=tmp_path)
    passes = []
    real = interaction._measured
    monkeypatch.setattr(interaction, "_measured", lambda *a: passes.append(1) or real(*a))
    again = measure_interaction(model, ids, scores, Ablation(bins=BINS), cache=tmp_path)
    assert len(passes) == 1
    assert torch.equal(again[0].raw, first[0].raw)
    assert again[0].units == first[0].units
    damaged = sorted(tmp_path.glob("q-*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    measure_interaction(model, ids, scores, Ablation(bins=BINS), cache=tmp_path)
    assert len(passes) == 2
    one, other = sorted(tmp_path.glob("q-*.safetensors"))
    one.write_bytes(other.read_bytes())  # of another text, as sound as its own
    last = measure_interaction(model, ids, scores, Ablation(bins=BINS), cache=tmp_path)
    assert len(passes) == 3
    assert all(map(torch.equal, [part.raw for part in last], [part.raw for part in again]))


def test_matrices_average_by_their_tokens_and_only_over_the_same_units(model, measured):
    twice = Interaction(measured.units, measured.raw * 3, measured.kl * 3, measured.tokens * 3)
    mean = Interaction.mean([measured, twice])
    assert torch.allclose(mean.raw, measured.raw * 2.5)
    assert mean.tokens == 4 * measured.tokens
    other = measure_interaction(model, token_ids(1, 4), scores_of(model), Ablation(bins=2))
    with pytest.raises(ValueError, match="all of the same units"):
        Interaction.mean([measured, *other])


def test_wrong_bins_structures_and_scores_are_clear_errors(model, unchecked):
    with pytest.raises(ValueError, match=r"bins must be in \[1, 48\], got 49"):
        units_of(model, 49)
    with pytest.raises(ValueError, match="experts"):
        units_of(model, 4, ["experts"])
    with pytest.raises(ValueError, match="one score a channel"):
        measure_interaction(model, token_ids(1, 4), scores_of(model)[:2])
