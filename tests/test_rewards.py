"""Rewards are bounded, exact, and higher where the spectrum survives better."""

import pytest
import torch
from families import tiny_model
from scipy.stats import ks_2samp, wasserstein_distance

from prunenet.envs.rewards import SpectralReward
from prunenet.models.layers import iter_ffns


def masks(d_ff: int, count: int = 5) -> torch.Tensor:
    keep = torch.rand(count, d_ff, generator=torch.Generator().manual_seed(0)) < 0.6
    keep[:, 0] = True
    return keep


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
@pytest.mark.parametrize("distance", ["ks", "wasserstein", "energy"])
def test_bounded_rewards_lie_in_the_unit_interval_and_a_full_mask_earns_one(family, distance):
    model = tiny_model(family)
    reward = SpectralReward(model, distance=distance)
    keep = masks(48)
    (paid,) = reward.layer(0, keep).values()
    assert ((paid >= 0) & (paid < 1)).all()
    (full,) = reward.layer(0, torch.ones(1, 48, dtype=torch.bool)).values()
    assert float(full) == pytest.approx(1, abs=1e-6)


def test_the_published_reward_is_one_over_the_ks_distance_of_the_gate_matrix():
    model = tiny_model("llama")
    reward = SpectralReward(model, distance="ks", matrices=("gate",), form="inverse")
    gate = next(iter_ffns(model)).gate.double()
    for keep in masks(48):
        dense, narrow = torch.linalg.svdvals(gate), torch.linalg.svdvals(gate[keep])
        expected = 1 / ks_2samp(dense, narrow).statistic
        assert float(reward.layer(0, keep[None])["spectral_ks"]) == pytest.approx(
            expected, rel=1e-6
        )


def test_the_reward_is_the_mean_over_the_matrices():
    model = tiny_model("llama")
    ffn = next(iter_ffns(model))
    keep = masks(48, 1)
    distances = []
    for weight in (ffn.gate, ffn.up, ffn.down.T):
        dense = torch.linalg.svdvals(weight.double())
        distances.append(
            wasserstein_distance(dense, torch.linalg.svdvals(weight.double()[keep[0]]))
            / float(dense.mean())
        )
    paid = float(
        SpectralReward(model, distance="wasserstein").layer(0, keep)["spectral_wasserstein"]
    )
    assert paid == pytest.approx(1 - sum(distances) / 3, abs=1e-6)


def test_the_inverse_form_is_capped_where_the_distance_vanishes():
    reward = SpectralReward(tiny_model("llama"), form="inverse")
    (paid,) = reward.layer(0, torch.ones(1, 48, dtype=torch.bool)).values()
    assert float(paid) == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "euclid"}, "unknown distance 'euclid'; it is one of ks"),
        ({"form": "square"}, "unknown form 'square'"),
        ({"matrices": ("query",)}, "unknown matrix 'query'"),
    ],
)
def test_unknown_names_are_clear_errors(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        SpectralReward(tiny_model("llama"), **options)


def test_a_family_without_a_gate_has_no_separate_up_matrix():
    with pytest.raises(ValueError, match="none of the matrices up"):
        SpectralReward(tiny_model("opt"), matrices=("up",))
