"""Spectral distances: exact against full decompositions and scipy, on every shape and every
degenerate case.
"""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import stats

from prunenet.spectra import exact as spectra
from prunenet.spectra.choices import DISTANCES
from prunenet.spectra.distances import ks_distance, tie_bands, wasserstein_distance
from prunenet.spectra.exact import SpectralReference, energy_kept, gram
from prunenet.spectra.tridiagonal import counts_below, tridiagonal

SHAPES = [(96, 40), (40, 40), (24, 40), (60, 1), (1, 12)]


def _weight(d_ff: int, d_model: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -2, d_model)
    return torch.randn(d_ff, d_model, generator=generator) @ torch.diag(spread)


def _masks(d_ff: int, widths: list[int], seed: int = 1) -> torch.Tensor:
    order = torch.rand(len(widths), d_ff, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return order < torch.tensor(widths)[:, None]


def _masked_values(weight: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values of each W[K] in float64, falling, padded with zeros, and how many count:
    behind every distance.
    """
    eigenvalues, counts = spectra._masked_eigenvalues(weight, gram(weight), keep, torch.float64)
    return spectra._roots(eigenvalues), counts


def _widths(d_ff: int) -> list[int]:
    return sorted({1, d_ff, *(max(1, int(d_ff * share)) for share in (0.2, 0.4, 0.6, 0.9))})


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_a_full_decomposition(shape: tuple[int, int]) -> None:
    weight = _weight(*shape)
    expected = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(SpectralReference.of(weight).values, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_singular_values_are_those_of_the_kept_rows(shape: tuple[int, int]) -> None:
    weight = _weight(*shape)
    keep = _masks(shape[0], _widths(shape[0]))
    values, counts = _masked_values(weight, keep)
    for mask, row, count in zip(keep, values, counts, strict=True):
        expected = torch.linalg.svdvals(weight[mask].double())
        assert int(count) == len(expected)
        torch.testing.assert_close(row[:count], expected, rtol=1e-6, atol=1e-7)
        assert (row[count:] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_removing_rows_never_raises_a_singular_value(shape: tuple[int, int]) -> None:
    weight = _weight(*shape)
    # nested: 1 row, 2 rows, ... all rows
    keep = _masks(shape[0], [shape[0]]).repeat(shape[0], 1).tril()
    values, _ = _masked_values(weight, keep)
    assert (values.diff(dim=0) > -1e-9 * values.max()).all()


@pytest.mark.parametrize("most", [2**28, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_solved_together_as_on_a_gpu_have_the_values_of_each_alone(
    shape: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectra, "_MOST", most)
    weight = _weight(*shape).double()
    for widths in (_widths(shape[0]), [max(1, shape[0] // 5)] * 2, [shape[0]]):
        keep = _masks(shape[0], widths)
        alone, _ = spectra._masked_eigenvalues(weight, gram(weight), keep, torch.float64)
        together = spectra._stacked_eigenvalues(weight, gram(weight), keep)
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_ks_distance_equals_scipy(ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    reference, candidates = (
        torch.rand(30, generator=generator),
        torch.rand(7, 25, generator=generator),
    )
    if ties:
        reference, candidates = (reference * 6).round(), (candidates * 6).round()
    counts = torch.tensor([25, 1, 2, 10, 17, 24, 3])
    distances = ks_distance(reference, candidates, counts)
    for row, count, distance in zip(candidates, counts, distances, strict=True):
        assert float(distance) == pytest.approx(
            stats.ks_2samp(reference, row[:count]).statistic, rel=1e-15, abs=1e-15
        )


@pytest.mark.parametrize("ties", [False, True])
def test_wasserstein_distance_equals_scipy(ties: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    reference, candidates = (
        torch.rand(30, generator=generator),
        torch.rand(4, 25, generator=generator) * 2,
    )
    if ties:
        reference, candidates = (reference * 6).round(), (candidates * 6).round()
    counts = torch.tensor([25, 1, 10, 24])
    distances = wasserstein_distance(reference, candidates, counts)
    relative = wasserstein_distance(reference, candidates, counts, relative=True)
    for row, count, distance, share in zip(candidates, counts, distances, relative, strict=True):
        expected = stats.wasserstein_distance(reference.double(), row[:count].double())
        assert float(distance) == pytest.approx(expected, rel=1e-12)
        assert float(share) == pytest.approx(
            min(expected / float(reference.double().mean()), 1), rel=1e-9
        )


def test_relative_wasserstein_is_clipped_and_zero_for_a_zero_reference() -> None:
    assert wasserstein_distance(torch.ones(3), torch.full((1, 3), 9.0), relative=True).tolist() == [
        1.0
    ]
    assert wasserstein_distance(torch.zeros(3), torch.ones(1, 3), relative=True).tolist() == [0.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_of_a_mask_are_scipys_on_full_decompositions(shape: tuple[int, int]) -> None:
    weight = _weight(*shape)
    keep = _masks(shape[0], _widths(shape[0]))
    reference = SpectralReference.of(weight)
    dense = torch.linalg.svdvals(weight.double())
    ks, wasserstein, energy = (reference.distance(keep, kind) for kind in DISTANCES)
    for index, mask in enumerate(keep):
        kept = torch.linalg.svdvals(weight[mask].double())
        if not bool(mask.all()):  # rounding breaks the ties of a full mask in scipy's input
            assert float(ks[index]) == pytest.approx(
                stats.ks_2samp(dense, kept).statistic, abs=1e-6
            )
        expected = stats.wasserstein_distance(dense, kept) / float(dense.mean())
        assert float(wasserstein[index]) == pytest.approx(min(expected, 1), abs=1e-5)
        assert float(energy[index]) == pytest.approx(
            1 - float(kept.square().sum() / dense.square().sum()), abs=1e-6
        )


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_keeping_everything_is_distance_exactly_zero_and_every_distance_is_in_range(
    shape: tuple[int, int], kind: str
) -> None:
    keep = _masks(shape[0], _widths(shape[0]))
    distances = SpectralReference.of(_weight(*shape)).distance(keep, kind)
    assert distances[keep.all(-1)].tolist() == [0.0]
    assert ((distances >= 0) & (distances <= 1)).all()
    assert (distances[~keep.all(-1)] > 0).all()


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_batch_of_masks_equals_one_mask_at_a_time(kind: str) -> None:
    reference = SpectralReference.of(_weight(96, 40))
    keep = _masks(96, [96, 90, 48, 30, 1])
    alone = torch.cat([reference.distance(mask[None], kind) for mask in keep])
    assert torch.equal(reference.distance(keep, kind), alone)


@pytest.mark.parametrize("kind", ["ks", "wasserstein"])
def test_removing_channels_that_are_zero_costs_nothing(kind: str) -> None:
    weight = _weight(96, 40)
    weight[60:] = 0
    keep = (torch.arange(96) < torch.tensor([[60], [80]])).contiguous()
    distances = SpectralReference.of(weight).distance(keep, kind)
    assert distances.abs().max() < (1e-12 if kind == "ks" else 1e-5)


def test_rank_deficient_weights_compare_their_zeros_as_equal() -> None:
    weight = (
        torch.cat([_weight(96, 20), torch.zeros(96, 20)], dim=1)
        @ torch.linalg.qr(_weight(40, 40, seed=3)).Q
    )
    keep = _masks(96, [70, 50])
    dense = torch.linalg.svdvals(weight.double())
    distances = SpectralReference.of(weight.double()).distance(keep)
    for mask, distance in zip(keep, distances, strict=True):
        kept = torch.linalg.svdvals(weight[mask].double())
        clean = [torch.where(values > 1e-5, values, 0.0) for values in (dense, kept)]
        assert float(distance) == pytest.approx(stats.ks_2samp(*clean).statistic, abs=1e-6)


def test_equal_singular_values_are_ties() -> None:
    basis = torch.linalg.qr(_weight(40, 40, seed=5).double()).Q
    weight = torch.cat([basis, basis])  # 40 singular values, all sqrt(2)
    keep = torch.ones(1, 80, dtype=torch.bool)
    keep[0, :10] = False  # ten of them fall to 1
    assert SpectralReference.of(weight).distance(keep).tolist() == pytest.approx([10 / 40])


SPECTRA_WITH_TIES = {
    "all equal": lambda n: torch.ones(n),
    "two values": lambda n: torch.where(torch.arange(n) < n // 3, 1.0, 0.4),
    "half of them zero": lambda n: (torch.arange(n) < n // 2) * torch.linspace(1, 0.5, n),
    "one of them zero": lambda n: (torch.arange(n) < n - 1) * torch.linspace(1, 0.5, n),
}


@pytest.mark.parametrize("noise", [0, 1, 4])
@pytest.mark.parametrize("spectrum", SPECTRA_WITH_TIES)
@pytest.mark.parametrize("shape", [(96, 40), (40, 40), (24, 40)])
def test_singular_values_equal_but_for_rounding_are_ties_on_every_route(
    shape: tuple[int, int], spectrum: str, noise: int
) -> None:
    side = min(shape)
    left, right = (
        torch.linalg.qr(_weight(length, side, seed).double()).Q for seed, length in enumerate(shape)
    )
    values = SPECTRA_WITH_TIES[spectrum](side).double()
    keep = _masks(shape[0], _widths(shape[0])[:-1])
    expected = SpectralReference.of((left * values) @ right.T).distance(keep)
    off = torch.randn(side, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weight = (left * (values + noise * torch.finfo(torch.float32).eps * off)) @ right.T
    for stored in (weight, weight.float()):
        reference = SpectralReference.of(stored)
        together = spectra._stacked_eigenvalues(stored, reference.gram, keep)  # as on a GPU
        counts = keep.sum(-1).clamp(max=side)
        for route in (
            reference.distance(keep),
            reference._ks_solved(keep),
            ks_distance(reference.eigenvalues, together, counts, tie_bands(reference.eigenvalues)),
        ):
            torch.testing.assert_close(route.float(), expected, rtol=0, atol=1e-6)
    # rows are orthonormal, so that a mask's values are all 1 too
    if spectrum == "all equal" and shape != (96, 40):
        assert expected.tolist() == [0.0] * len(keep)


@pytest.mark.parametrize("seed", range(5))
def test_multiple_values_scattered_by_rounding_keep_the_distance_of_equal_ones(seed: int) -> None:
    generator = np.random.default_rng(seed)
    places = generator.choice(np.linspace(0, 1, 21), 6, replace=False)
    reference = np.repeat(places, generator.integers(2, 9, 6))
    candidates = generator.choice(np.concatenate((places, [places.max() / 3])), 17)

    def scattered(values: np.ndarray) -> torch.Tensor:
        off = generator.uniform(-15, 15, len(values)) * np.finfo(np.float32).eps * places.max()
        return torch.from_numpy(values + off).clamp(min=0).square().sort(descending=True).values

    squares = scattered(reference)
    distance = ks_distance(squares, scattered(candidates)[None], bands=tie_bands(squares))
    assert float(distance) == pytest.approx(
        stats.ks_2samp(reference, candidates).statistic, abs=1e-12
    )


def test_simple_values_are_told_apart_by_all_that_float64_tells() -> None:
    squares = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    near, equal = (squares * (1 - share) for share in (1e-12, 1e-15))
    distances = ks_distance(squares, torch.stack((near, equal)), bands=tie_bands(squares))
    assert distances.tolist() == pytest.approx([1 / 3, 0])


def test_a_doubtful_float32_spectrum_is_solved_again_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, keep = _weight(96, 40), _masks(96, [70, 60, 50])
    reference = SpectralReference.of(weight)
    expected = reference.distance(keep)
    # An absurd bound makes every mask doubtful; the answer may not change, and float64 must have
    # been used.
    monkeypatch.setattr(spectra, "_SLACK", 0.1)
    solved_in = []
    eigenvalues = spectra._masked_eigenvalues
    monkeypatch.setattr(
        spectra,
        "_masked_eigenvalues",
        lambda *args: solved_in.append(args[3]) or eigenvalues(*args),
    )
    assert torch.equal(reference.distance(keep), expected)
    assert solved_in == [torch.float64]  # in float32 values were only counted


@pytest.mark.parametrize("seed", range(4))
def test_values_that_are_only_counted_give_the_distance_of_computed_ones(seed: int) -> None:
    weight = _weight(96, 40, seed)
    weight[:, 30:] *= 1e-3 if seed % 2 else 0
    reference, keep = SpectralReference.of(weight), _masks(96, [95, 70, 48, 40], seed)
    slack = spectra._SLACK * reference.eigenvalues[0]
    counted, computed = reference._ks_counted(keep, slack), reference._ks_between(keep, slack)
    torch.testing.assert_close(torch.stack(counted), torch.stack(computed), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [2, 3, 64, 65, 66, 130])
def test_counts_survive_pivots_that_are_zero_or_infinite(side: int) -> None:
    generator = np.random.default_rng(side)
    diagonal, beside = (generator.integers(-1, 2, (3, n)).astype(float) for n in (side, side - 1))
    # minors of T - x vanish at most of them
    points = np.array([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    counts = counts_below(diagonal, beside, points)
    for row, d, e in zip(counts, diagonal, beside, strict=True):
        values = np.linalg.eigvalsh(np.diag(d) + np.diag(e, 1) + np.diag(e, -1))
        assert ((values < points[:, None] - 1e-9).sum(1) <= row).all()
        assert (row <= (values < points[:, None] + 1e-9).sum(1)).all()


def test_counts_below_points_are_those_of_the_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 30, 30, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    matrix[2, 10:, :10] = matrix[2, :10, 10:] = 0  # falls apart into two
    diagonal, beside = (np.stack(part) for part in zip(*map(tridiagonal, matrix), strict=True))
    points = torch.linspace(-20, 20, 101, dtype=torch.float64)
    expected = (torch.linalg.eigvalsh(matrix)[:, None] < points[:, None]).sum(-1)
    assert (counts_below(diagonal, beside, points.numpy()) == expected.numpy()).all()
    apart = np.array([[1.0, 2.0, 3.0]]), np.zeros((1, 2))
    assert counts_below(*apart, np.array([0.5, 1.5, 2.5, 9.0])).tolist() == [[0, 1, 2, 3]]


def test_half_precision_weights_give_the_distances_of_their_float32_copies() -> None:
    weight, keep = _weight(96, 40).bfloat16(), _masks(96, [70, 30])
    for kind in DISTANCES:
        half = SpectralReference.of(weight).distance(keep, kind)
        assert torch.equal(half, SpectralReference.of(weight.float()).distance(keep, kind))


def test_energy_kept_is_the_share_of_squared_norm() -> None:
    weight = torch.diag(torch.tensor([3.0, 4.0]))
    assert energy_kept(
        weight, torch.tensor([[True, False], [True, True]])
    ).tolist() == pytest.approx([9 / 25, 1])
    assert energy_kept(torch.zeros(2, 2), torch.tensor([[True, False]])).tolist() == [1.0]


def test_bad_input_is_one_clear_sentence() -> None:
    reference = SpectralReference.of(_weight(8, 4))
    with pytest.raises(ValueError, match="keep at least one"):
        reference.distance(torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="damaged"):
        SpectralReference.of(torch.full((8, 4), torch.nan))
    jaxtyping.config.update("jaxtyping_disable", True)  # as for a caller without a type checker
    try:
        with pytest.raises(ValueError, match="8 booleans, got 7"):
            reference.distance(torch.ones(1, 7, dtype=torch.bool))
        with pytest.raises(ValueError, match="'chi'; it is one of ks, wasserstein, energy"):
            reference.distance(torch.ones(1, 8, dtype=torch.bool), "chi")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
