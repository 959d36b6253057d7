"""Refined widths: the policy's allocation, changed on text, at as many parameters."""

from functools import partial

import pytest
import torch
from families import tiny_model, token_ids

import prunenet
from prunenet.checkpoints.records import load_head_masks
from prunenet.evaluation.divergence import divergence, mask_distances, mask_divergences
from prunenet.models.layers import count_parameters
from prunenet.models.surgery import masking
from prunenet.policies import apply
from prunenet.policies import refine as refining
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.options import PruneOptions
from prunenet.policies.refine import Refining, refine
from prunenet.refit.folds import held_back
from prunenet.runtime import files
from prunenet.text.calibration import CalibrationSet


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(refining, "PREDICTED", (6, 8))
    monkeypatch.setattr(refining, "MEASURED", (3, 4))
    assert files.cache_folder() == tmp_path / "cache"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def policy():
    made = Policy.untrained(PolicyConfig(hidden=(8,)))
    with torch.no_grad():
        made.scorer.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    return made


BLOCKS = CalibrationSet(token_ids(10, 24), "self", {"text": "random"})


def test_the_divergence_of_masks_is_that_of_zeroed_columns(model):
    keep = [torch.arange(48) < 30 for _ in range(3)]
    groups = [torch.ones(2, dtype=torch.bool) for _ in keep]
    by_columns = divergence(model, lambda layer, down: down * keep[layer], BLOCKS.ids)
    whole = mask_divergences(model, [(keep, None), (keep, groups)], BLOCKS.ids)
    torch.testing.assert_close(whole, torch.full((2,), by_columns), rtol=1e-4, atol=1e-6)
    groups[0] = torch.tensor([True, False])
    assert float(mask_divergences(model, [(keep, groups)], BLOCKS.ids)) > by_columns


def test_the_three_distances_are_what_they_are_called(model):
    keep = [torch.arange(48) < 20 for _ in range(3)]
    found = mask_distances(model, [(keep, None)], BLOCKS.ids)
    with torch.no_grad():
        dense = model(input_ids=BLOCKS.ids).logits.softmax(-1)
        with masking(model, keep):
            cut = model(input_ids=BLOCKS.ids).logits.softmax(-1)
    differences = (dense - cut).clamp_min(0).sum(-1).mean()
    assert float(found.tv) == pytest.approx(float(differences), rel=1e-4)
    flips = (dense.argmax(-1) != cut.argmax(-1)).float().mean()
    assert float(found.flips) == pytest.approx(float(flips))
    assert 2 * float(found.tv) ** 2 <= float(found.kl)  # Pinsker, of the means by Jensen


@pytest.mark.long
@pytest.mark.parametrize("structures", ["channels", "channels,heads"])
def test_refined_widths_lower_the_measured_divergence_at_as_many_parameters(
    model, policy, structures
):
    options = {"ratio": 0.4, "round_to": 4, "refit": "off", "channels": "policy"}
    uniform = prunenet.prune(model, policy, blocks=BLOCKS, widths="uniform", **options)
    pruned = prunenet.prune(
        model, policy, blocks=BLOCKS, widths="refined", structures=structures, **options
    )
    total, size = (count_parameters(made.model)[0] for made in (uniform, pruned))
    channel = 3 * model.config.hidden_size
    # groups of heads cost a whole number of channels only by chance
    assert -4 * channel < size - total <= 4 * channel
    judged = BLOCKS.ids[-2:]
    losses = mask_divergences(model, [(uniform.keep, None), (pruned.keep, pruned.groups)], judged)
    assert losses[1] < 0.95 * losses[0]
    assert pruned.provenance.how["widths"] == "refined"
    assert (pruned.groups is None) == (structures == "channels")


@pytest.mark.long
def test_refining_is_never_worse_than_the_policy_on_its_own_measure_and_deterministic(
    model, policy
):
    scores, offsets = policy.scores(model), [1.0, 0.0, -1.0]
    first, second = (
        refine(model, BLOCKS, scores, offsets, 0.3, Refining(round_to=4)) for _ in range(2)
    )
    assert first.end <= first.start
    assert first.end == pytest.approx(
        float(mask_divergences(model, [(first.keep, None)], BLOCKS.ids[-2:])), rel=1e-5
    )
    assert all(torch.equal(a, b) for a, b in zip(first.keep, second.keep, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("refit", ["layerwise", pytest.param("blocks", marks=pytest.mark.slow)])
def test_a_search_that_loses_behind_the_refit_gives_way_to_the_policys_own_allocation(
    model, policy, monkeypatch, refit
):
    blocks = CalibrationSet(token_ids(60, 24), "self", {"text": "random"})
    cut = partial(prunenet.prune, model, policy, blocks=blocks, ratio=0.4, round_to=4, refit=refit)
    seen = []

    def measured(_, ways, judged, **__):
        seen.append(judged)
        return torch.tensor([loss, 1.0])

    monkeypatch.setattr(apply, "model_divergences", measured)
    refined = partial(cut, widths="refined", structures="channels,heads")
    loss = 2.0
    own, plain = refined(), cut(widths="per-layer")
    assert own.groups is None
    assert own.provenance == plain.provenance
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(own.model.state_dict()[name], tensor)
    loss = 1.0
    won = refined()
    assert won.groups is not None
    assert won.provenance.how["widths"] == "refined"
    searched = {tuple(row) for row in held_back(blocks.ids)[1][: refining._JUDGED].tolist()}
    for judged in seen:
        assert len(judged)
        assert searched.isdisjoint(map(tuple, judged.tolist()))


@pytest.mark.long
def test_a_refreshed_matrix_and_a_cap_refine_too(model, policy):
    ablated = []
    found = refine(
        model,
        BLOCKS,
        policy.scores(model),
        [2.0, 0.0, -2.0],
        0.4,
        Refining(structures=("channels", "heads"), round_to=4, cap=1.25, refreshed=True),
        progress=lambda done, of: ablated.append((done, of)),
    )
    assert found.end <= found.start
    assert min(int(mask.sum()) for mask in found.keep) >= 48 * (1 - 1.25 * 0.4) - 4
    assert ablated[-1] == ablated[len(ablated) // 2 - 1], "as many passes as the first matrix"


@pytest.mark.long
def test_a_fixed_number_of_cuts_is_measured_and_the_matrix_only_once(model, policy, monkeypatch):
    cuts = []
    real = refining.mask_divergences
    monkeypatch.setattr(
        refining, "mask_divergences", lambda m, c, *a, **k: cuts.extend(c) or real(m, c, *a, **k)
    )
    ablated = []
    for _ in range(2):
        refine(
            model,
            BLOCKS,
            policy.scores(model),
            [0.0] * 3,
            0.3,
            progress=lambda done, of: ablated.append((done, of)),
        )
    assert len(cuts) == 2 * (2 + 3 * 4)
    units = 3 * refining.BINS
    assert ablated == [(n, 2 * units) for n in range(1, 2 * units + 1)]


@pytest.mark.long
def test_a_checkpoint_with_refined_heads_reloads_and_says_which(model, policy, tmp_path):
    made = prunenet.prune(
        model,
        policy,
        blocks=BLOCKS,
        ratio=0.5,
        round_to=4,
        widths="refined",
        structures="channels,heads",
    )
    made.save_pretrained(tmp_path / "out")  # verifies the reload, logits included
    if all(mask.all() for mask in made.groups):
        assert load_head_masks(tmp_path / "out") is None
    else:
        kept = load_head_masks(tmp_path / "out")
        assert all(torch.equal(a, b) for a, b in zip(kept, made.groups, strict=True))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"structures": "channels,heads"}, "only refined widths cut channels,heads"),
        ({"widths": "refined", "refit": "sequential"}, "no elimination and no sequential refit"),
        ({"widths": "refined", "channels": "elimination"}, "no elimination and no sequential"),
    ],
)
def test_choices_that_do_not_go_together_are_one_sentence(policy, choices, message):
    with pytest.raises(ValueError, match=message):
        PruneOptions(ratio=0.3, **choices).filled(policy, measured=True)


def test_refined_widths_need_text_and_a_policy(policy):
    asked = PruneOptions(ratio=0.3, widths="refined")
    with pytest.raises(ValueError, match="refined widths are measured on text"):
        asked.filled(policy, measured=False)
    with pytest.raises(ValueError, match="no policy to allocate widths"):
        asked.filled(None, measured=True)


def test_heads_that_cannot_be_cut_are_one_sentence(policy):
    with pytest.raises(prunenet.UnsupportedArchitecture):
        prunenet.prune(
            tiny_model("phi3"),
            policy,
            blocks=BLOCKS,
            ratio=0.3,
            widths="refined",
            structures="channels,heads",
        )
