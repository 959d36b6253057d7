"""Estimated spectral distances: within their stated bound of the exact ones, on every shape and
every degenerate case.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model

from prunenet.envs import rewards
from prunenet.envs.rewards import SpectralReward
from prunenet.models.layers import iter_ffns
from prunenet.policies.training.recipe import PRESETS, Recipe, as_json
from prunenet.spectra import estimated as spectral_density
from prunenet.spectra.estimated import SpectralSketch
from prunenet.spectra.exact import SpectralReference

SHAPES = [(320, 120), (120, 120), (80, 120)]
SPECTRA = {
    "flat": lambda d: torch.ones(d),
    "falling": lambda d: torch.linspace(1, 0.1, d),
    "power law": lambda d: torch.arange(1, d + 1) ** -1.0,
    "one outlier": lambda d: torch.cat((torch.full((1,), 30.0), torch.linspace(1, 0.5, d - 1))),
    "half of it zero": lambda d: torch.cat(
        (torch.linspace(1, 0.5, d // 2), torch.zeros(d - d // 2))
    ),
    "nearly flat": lambda d: torch.linspace(1, 1 - 1e-4, d),
    "two values": lambda d: torch.where(torch.arange(d) < d // 2, 1.0, 0.5),
    "few high": lambda d: torch.where(torch.arange(d) < d // 8, 1.0, 0.3),
    "half of it flat": lambda d: torch.cat(
        (torch.ones(d // 2), torch.linspace(0.9, 0.1, d - d // 2))
    ),
}


def weight_with(values: torch.Tensor, d_ff: int, d_model: int, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(d_ff, len(values), generator=generator).to(values)).Q
    right = torch.linalg.qr(torch.randn(d_model, len(values), generator=generator).to(values)).Q
    return (left * values) @ right.T


def masks(d_ff: int, widths: list[int], seed: int = 1) -> torch.Tensor:
    order = (
        torch.rand(len(widths), d_ff, generator=torch.Generator().manual_seed(seed))
        .argsort(-1)
        .argsort(-1)
    )
    return order < torch.tensor(widths)[:, None]


def widths_of(d_ff: int) -> list[int]:
    return [max(1, int(d_ff * share)) for share in (0.95, 0.8, 0.7, 0.5, 0.3, 0.1)]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("held", [True, False])
def test_ks_distances_are_within_the_stated_bound(
    shape: tuple[int, int], spectrum: str, held: bool
) -> None:
    side = min(shape)
    weight = weight_with(SPECTRA[spectrum](side), *shape)
    keep = masks(shape[0], widths_of(shape[0]))
    exact = SpectralReference.of(weight.double()).distance(keep)
    sketch = SpectralSketch.of(weight, held=held)
    off, bound = (sketch.distance(keep) - exact).abs(), sketch.bound(keep)
    assert (off <= bound).all(), (off, bound)


@pytest.mark.parametrize("noise", [1, 8])
@pytest.mark.parametrize("spectrum", ["flat", "two values", "few high", "half of it zero"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_scattered_by_rounding_are_estimated_within_the_bound_of_equal_ones(
    shape: tuple[int, int], spectrum: str, noise: int
) -> None:
    values = SPECTRA[spectrum](min(shape)).double()
    keep = masks(shape[0], widths_of(shape[0]))
    exact = SpectralReference.of(weight_with(values, *shape)).distance(keep)
    for seed in range(3):
        off = torch.randn(
            len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        sketch = SpectralSketch.of(
            weight_with(values + noise * torch.finfo(torch.float32).eps * off, *shape).float()
        )
        assert ((sketch.distance(keep) - exact).abs() <= sketch.bound(keep)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["falling", "power law", "one outlier"])
def test_wasserstein_distances_are_within_their_bound(
    shape: tuple[int, int], spectrum: str
) -> None:
    side = min(shape)
    weight = weight_with(SPECTRA[spectrum](side), *shape)
    keep = masks(shape[0], widths_of(shape[0]))
    exact = SpectralReference.of(weight).distance(keep, "wasserstein")
    sketch = SpectralSketch.of(weight)
    off, bound = (
        (sketch.distance(keep, "wasserstein") - exact).abs(),
        sketch.bound(keep, "wasserstein"),
    )
    assert (off <= bound).all(), (off, bound)


def test_the_bound_is_narrow_where_values_are_spread_and_says_where_they_are_not() -> None:
    keep = masks(640, [448])
    spread, alike = (
        SpectralSketch.of(weight_with(SPECTRA[name](240), 640, 240))
        for name in ("falling", "power law")
    )
    assert spread.bound(keep) < 0.1 < alike.bound(keep)
    assert spread.bound(keep, "energy") == 0


@pytest.mark.long
def test_more_probes_bring_the_estimate_nearer() -> None:
    keep, off = masks(320, [224] * 8), torch.zeros(2)
    for seed in range(6):
        weight = weight_with(SPECTRA["falling"](120), 320, 120, seed)
        few, many = (SpectralSketch.of(weight, probes=probes) for probes in (1, 64))
        exact = SpectralReference.of(weight).distance(keep)
        off += torch.stack(
            [(sketch.distance(keep) - exact).square().mean() for sketch in (few, many)]
        )
        assert (many.bound(keep) < few.bound(keep)).all()
    assert off[0] > 4 * off[1]


def test_energy_is_exact() -> None:
    weight, keep = weight_with(SPECTRA["falling"](40), 96, 40), masks(96, [70, 30])
    assert torch.equal(
        SpectralSketch.of(weight).distance(keep, "energy"),
        SpectralReference.of(weight).distance(keep, "energy"),
    )


@pytest.mark.parametrize("kind", ["ks", "wasserstein", "energy"])
@pytest.mark.parametrize("shape", [*SHAPES, (60, 1), (1, 12)])
def test_keeping_everything_is_distance_exactly_zero_and_every_distance_is_in_range(
    shape: tuple[int, int], kind: str
) -> None:
    keep = masks(shape[0], [shape[0], *widths_of(shape[0])])
    distances = SpectralSketch.of(weight_with(SPECTRA["falling"](min(shape)), *shape)).distance(
        keep, kind
    )
    assert distances[keep.all(-1)].unique().tolist() == [0.0]
    assert ((distances >= 0) & (distances <= 1)).all()


def test_removing_channels_that_are_zero_costs_nothing() -> None:
    weight = weight_with(SPECTRA["falling"](40), 96, 40)
    weight[60:] = 0
    keep = torch.arange(96) < torch.tensor([[60], [80]])
    assert SpectralSketch.of(weight).distance(keep).max() < 1e-3


def test_a_zero_matrix_moves_nowhere() -> None:
    sketch = SpectralSketch.of(torch.zeros(24, 8))
    assert [sketch.distance(masks(24, [12]), kind).tolist() for kind in ("ks", "wasserstein")] == [
        [0.0],
        [0.0],
    ]


def test_both_routes_of_the_product_give_the_same_distances() -> None:
    sketch = SpectralSketch.of(weight_with(SPECTRA["falling"](120), 320, 120))
    for width in (300, 220, 100, 60):
        keep = masks(320, [width])
        by_rows, through = sketch.distance(keep), replace(sketch, gram=None).distance(keep)
        torch.testing.assert_close(by_rows, through, rtol=0, atol=1e-3)


def test_a_batch_of_masks_agrees_with_one_mask_at_a_time_in_any_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sketch = SpectralSketch.of(weight_with(SPECTRA["falling"](40), 96, 40))
    keep = masks(96, [96, 90, 48, 30, 1])
    together = sketch.distance(keep)
    alone = torch.cat([sketch.distance(mask[None]) for mask in keep])
    monkeypatch.setattr(spectral_density, "_MOST", 1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(together, sketch.distance(keep), rtol=0, atol=1e-4)


def test_the_same_matrix_gives_the_same_distances_to_the_bit_and_leaves_the_global_generator_alone() -> (
    None
):
    weight, keep = weight_with(SPECTRA["falling"](40), 96, 40), masks(96, [70, 30])
    before = torch.get_rng_state()
    first, second = (SpectralSketch.of(weight).distance(keep) for _ in range(2))
    kept = SpectralSketch.of(weight, SpectralSketch.of(weight).density).distance(keep)
    assert torch.equal(first, second)
    assert torch.equal(first, kept)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_input_is_one_clear_sentence() -> None:
    sketch = SpectralSketch.of(torch.eye(8)[:, :4])
    with pytest.raises(ValueError, match="keep at least one"):
        sketch.distance(torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="damaged"):
        SpectralSketch.of(torch.full((8, 4), torch.nan))


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_estimated_rewards_are_within_the_bounds_of_their_matrices(family: str) -> None:
    model = tiny_model(family)
    keep = masks(48, [40, 30])
    ffn = next(iter_ffns(model))
    weights = [weight for weight in (ffn.gate, ffn.up, ffn.down.T) if weight is not None]
    bound = torch.stack([SpectralSketch.of(weight).bound(keep) for weight in weights]).mean(0)
    exact, estimated = (
        SpectralReward(model, spectrum=spectrum) for spectrum in ("exact", "stochastic")
    )
    (right,), (close,) = exact.layer(0, keep).values(), estimated.layer(0, keep).values()
    assert ((close - right).abs() <= bound).all()
    assert not torch.equal(close, right)


def test_auto_is_exact_up_to_a_side_and_estimates_above(
    unchecked, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    assert SpectralReward(model).spectrum == "exact"
    monkeypatch.setattr(rewards, "EXACT_UP_TO", 31)
    assert SpectralReward(model).spectrum == "stochastic"
    assert SpectralReward(model, spectrum="exact").spectrum == "exact"
    with pytest.raises(
        ValueError, match="unknown spectrum 'guessed'; it is one of auto, exact, stochastic"
    ):
        SpectralReward(model, spectrum="guessed")


def test_an_estimated_inverse_reward_keeps_its_cap() -> None:
    reward = SpectralReward(tiny_model("llama"), form="inverse", spectrum="stochastic")
    (paid,) = reward.layer(0, torch.ones(1, 48, dtype=torch.bool)).values()
    assert float(paid) == 32


def test_a_record_says_how_spectra_were_found_only_where_that_was_chosen() -> None:
    assert "spectrum" not in as_json(Recipe())  # as in the records of before there was a choice
    assert as_json(replace(PRESETS["paper"], spectrum="stochastic"))["spectrum"] == "stochastic"


@pytest.mark.slow
def test_on_a_real_model_every_layer_is_within_the_bound() -> None:
    from prunenet.checkpoints.load import load_model
    from prunenet.runtime.files import cache_folder

    folder = Path(os.environ.get("PRUNENET_MODEL", cache_folder() / "SmolLM2-135M-Instruct"))
    if not folder.is_dir():
        pytest.skip("no model in the cache; make demo fetches it")
    for ffn in iter_ffns(load_model(folder)):
        for weight in (ffn.gate, ffn.up, ffn.down.T):
            assert weight is not None
            keep = masks(len(weight), [1382, 1229, 1075, 768], seed=ffn.index)
            sketch = SpectralSketch.of(weight)
            assert (
                (sketch.distance(keep) - SpectralReference.of(weight).distance(keep)).abs()
                <= sketch.bound(keep)
            ).all()
