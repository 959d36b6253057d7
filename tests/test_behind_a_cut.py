"""The interaction matrix measured behind a cut: a local form of KL(dense || .), in both directions."""

import pytest
import torch
from families import tiny_model, token_ids
from scipy.stats import spearmanr

from prunenet.evaluation import interaction
from prunenet.evaluation.divergence import mask_divergences
from prunenet.evaluation.interaction import Ablation, Interaction, measure_interaction
from prunenet.evaluation.shares import damages
from prunenet.evaluation.slots import Episodes, Game
from prunenet.features.from_weights import layer_context
from prunenet.models.layers import ffn_widths
from prunenet.policies.methods.widths.joint import search_shares

BINS, IDS = 6, token_ids(2, 24)
STRUCTURES = ("channels", "heads")


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    for layer in made.model.layers:
        layer.mlp.down_proj.weight.data *= 0.3  # one bin of six is a small part of what there is
    return made


@pytest.fixture(scope="module")
def scores(model):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(width, generator=generator) for width in ffn_widths(model)]


def measured(model, scores, behind=None, **options):
    ablation = Ablation(bins=BINS, structures=STRUCTURES, behind=behind, batch=2)
    return measure_interaction(model, IDS, scores, ablation, **options)[0]


def masks_of(gone, units, scores):
    keep = [torch.ones(len(row), dtype=torch.bool) for row in scores]
    groups = [torch.ones(2, dtype=torch.bool) for _ in scores]
    for unit, share in zip(units, gone.tolist(), strict=True):
        if unit.structure == "heads" and share == 1:
            groups[unit.layer][unit.number] = False
        elif unit.structure == "channels":
            size = len(keep[unit.layer]) // BINS
            order = scores[unit.layer].argsort(stable=True)[size * unit.number :]
            keep[unit.layer][order[: round(size * share)]] = False
    return keep, groups


@pytest.fixture(scope="module")
def dense(model, scores):
    return measured(model, scores)


@pytest.fixture(scope="module")
def base(dense):
    """Half of the channels of each layer are gone, and one group of heads."""
    units = [(u.structure == "channels" and u.number < BINS // 2) for u in dense.units]
    gone = torch.tensor(units).float()
    gone[[u[:3] for u in dense.units].index(("heads", 1, 0))] = 1
    return gone


@pytest.fixture(scope="module")
def near(model, scores, dense, base):
    return measured(model, scores, masks_of(base, dense.units, scores))


def game(model, part):
    return Game.of([part], layer_context(model), structures=STRUCTURES)


def neighbours(base, count):
    """Two or three units of a cut are turned: what is gone comes back, what stays goes."""
    generator, rows = torch.Generator().manual_seed(0), []
    for number in range(count):
        row = base.clone()
        chosen = torch.randperm(len(row), generator=generator)[: 2 + number % 2]
        row[chosen] = 1 - row[chosen]
        rows.append(row)
    return torch.stack(rows)


def test_near_the_cut_its_form_ranks_and_matches_measured_damage_better_than_the_dense_one(
    model, scores, dense, near, base
):
    rows = neighbours(base, 40)
    cuts = [masks_of(row, dense.units, scores) for row in rows]
    whole = [all(mask.any() for mask in [*keep, *groups]) for keep, groups in cuts]
    rows, cuts = rows[whole], [cut for cut, fits in zip(cuts, whole, strict=True) if fits]
    true = mask_divergences(model, cuts, IDS)
    ranks, errors = [], []
    for part in (dense, near):
        predicted = game(model, part).damages(rows)[0]
        ranks.append(float(spearmanr(predicted, true).statistic))
        errors.append(float(((predicted - true) / true).abs().mean()))
    assert ranks[1] > max(ranks[0], 0.95)
    assert errors[1] < 0.1 < errors[0]


def test_at_the_cut_and_one_unit_from_it_the_form_is_the_measured_damage(
    model, scores, dense, near, base
):
    rows = base.repeat(len(base) + 1, 1)
    turned = range(len(base))
    rows[turned, turned] = 1 - rows[turned, turned]
    cuts = [masks_of(row, dense.units, scores) for row in rows]
    whole = [all(mask.any() for mask in [*keep, *groups]) for keep, groups in cuts]
    true = mask_divergences(model, [c for c, w in zip(cuts, whole, strict=True) if w], IDS)
    # a vocabulary of 64 has no successors beyond the top
    torch.testing.assert_close(
        game(model, near).damages(rows[whole])[0], true, rtol=1e-3, atol=1e-5
    )


def test_behind_nothing_the_form_is_the_dense_one(model, scores, dense):
    whole = masks_of(torch.zeros(len(dense.units)), dense.units, scores)
    found = measured(model, scores, whole)
    assert torch.equal(found.raw, dense.raw)
    assert torch.equal(found.kl, dense.kl)
    assert float(found.around.kl) == 0
    assert not found.around.gone.any()
    torch.testing.assert_close(found.around.pull, torch.zeros_like(dense.kl), atol=1e-6, rtol=0)


def test_a_bin_that_is_partly_gone_counts_its_rest(model, scores, dense):
    gone = torch.zeros(len(dense.units))
    places = [u[:3] for u in dense.units]
    less, more = places.index(("channels", 0, 0)), places.index(("channels", 2, 0))
    gone[less], gone[more] = 0.25, 0.75
    found = measured(model, scores, masks_of(gone, dense.units, scores))
    assert torch.equal(found.around.gone, gone)
    rows = gone.repeat(2, 1)
    rows[0, less], rows[1, more] = 1, 0  # the larger part of each: one goes, one comes back
    cuts = [masks_of(row, dense.units, scores) for row in rows]
    torch.testing.assert_close(
        game(model, found).damages(rows)[0], mask_divergences(model, cuts, IDS), rtol=1e-3, atol=0
    )


@pytest.mark.long
def test_episodes_and_searches_price_with_the_form_behind_the_cut(model, near, base):
    one = game(model, near)
    episodes, paid = Episodes(one, 8, 0.4), torch.zeros(8)
    generator = torch.Generator().manual_seed(0)
    while not episodes.done:
        paid += episodes.play(torch.randint(one.levels, (8,), generator=generator))
    torch.testing.assert_close(episodes.damage, one.damages(1 - episodes.kept)[0])
    torch.testing.assert_close(paid, episodes.damage)
    price = {
        search: float(damages(one, search_shares(one, 0.4, search)[None]))
        for search in ("uniform", "random", "greedy", "dynamic", "evolution")
    }
    assert max(price["random"], price["evolution"], price["greedy"]) <= price["uniform"]


def test_a_measurement_behind_a_cut_is_kept_beside_the_dense_one(
    model, scores, dense, near, base, tmp_path, monkeypatch
):
    cut = masks_of(base, dense.units, scores)
    for behind in (None, cut):
        measured(model, scores, behind, cache=tmp_path)
    monkeypatch.setattr(interaction, "_measured", lambda *_: pytest.fail("measured again"))
    assert measured(model, scores, cache=tmp_path).around is None
    again = measured(model, scores, cut, cache=tmp_path)
    for name in ("gone", "pull", "kl"):
        assert torch.equal(getattr(again.around, name), getattr(near.around, name))
    assert torch.equal(again.raw, near.raw)


def test_matrices_behind_one_cut_average_and_others_do_not_mix(dense, near):
    twice = Interaction.mean([near, near])
    assert torch.allclose(twice.around.pull, near.around.pull)
    assert torch.allclose(twice.quadratic, near.quadratic)
    with pytest.raises(ValueError, match="behind different cuts"):
        Interaction.mean([dense, near])


def test_masks_and_structures_that_do_not_fit_are_one_sentence(model, scores, dense, base):
    keep, groups = masks_of(base, dense.units, scores)
    with pytest.raises(ValueError, match="needs one keep mask for each, got 2"):
        measured(model, scores, (keep[:2], groups))
    for structures in (("channels",), ("channels", "heads", "layers")):
        ablation = Ablation(bins=BINS, structures=structures, behind=(keep, groups))
        with pytest.raises(ValueError, match="behind a cut, channels and heads are ablated"):
            measure_interaction(model, IDS, scores, ablation)
