"""The distributions over keep masks are exact: checked by enumerating every mask of a small
layer.
"""

from itertools import product

import pytest
import torch

from prunenet.policies.training.subset import Bernoulli, FixedWidth, solve_offset

KINDS = [Bernoulli, FixedWidth]


def all_masks(d_ff: int) -> torch.Tensor:
    return torch.tensor(list(product((False, True), repeat=d_ff)))


def small(kind: type[Bernoulli], *, grad: bool = False) -> Bernoulli:
    logits = torch.randn(
        2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=grad
    )
    return kind(2 * logits, torch.tensor([3, 5]))


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_masks_sum_to_one(kind):
    masks = all_masks(7)
    log_probs = torch.stack([small(kind).log_prob(mask.expand(2, -1)) for mask in masks])
    torch.testing.assert_close(log_probs.exp().sum(0), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_expected_width_is_the_target(kind):
    masks = all_masks(7)
    weights = torch.stack([small(kind).log_prob(mask.expand(2, -1)) for mask in masks]).exp()
    torch.testing.assert_close(
        (weights * masks.sum(1, keepdim=True)).sum(0), torch.tensor([3.0, 5.0], dtype=torch.float64)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_log_probability_matches_finite_differences(kind):
    logits = torch.randn(
        2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True
    )
    width = torch.tensor([2, 5])
    keep = kind(logits, width).mode()
    assert torch.autograd.gradcheck(lambda z: kind(z, width).log_prob(keep), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_come_with_the_frequencies_that_log_prob_says(kind):
    draws = 40_000
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]])
    rows = torch.zeros(draws, dtype=torch.int64)
    distribution = kind(logits, torch.tensor([2]), rows)
    keep = distribution.sample(torch.Generator().manual_seed(0))
    masks = [mask for mask in all_masks(4) if mask.any()]
    one = kind(logits, torch.tensor([2]))
    expected = torch.stack([one.log_prob(mask[None]) for mask in masks]).exp().flatten()
    expected /= expected.sum()  # Bernoulli draws an empty mask again
    seen = torch.stack([(keep == mask).all(1).float().mean() for mask in masks])
    assert (seen - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_fixed_width_masks_have_exactly_the_target_width_in_wide_layers():
    logits = 3 * torch.randn(2, 1536, generator=torch.Generator().manual_seed(3))
    width = torch.tensor([1075, 8])
    distribution = FixedWidth(logits, width, torch.tensor([0, 1, 1, 0]))
    keep = distribution.sample(torch.Generator().manual_seed(4))
    assert keep.sum(1).tolist() == [1075, 8, 8, 1075]
    assert distribution.log_prob(keep).isfinite().all()


def test_fixed_width_gives_no_probability_to_another_width():
    keep = torch.tensor([[True] * 4 + [False] * 3, [True] * 5 + [False] * 2])
    log_prob = small(FixedWidth).log_prob(keep)
    assert log_prob[0] == -torch.inf
    assert log_prob[1].isfinite()


def test_few_frequencies_give_the_same_mass_as_all_of_them():
    logits = torch.randn(1, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    width = torch.tensor([1300])
    distribution = FixedWidth(logits, width)
    p = torch.sigmoid(distribution.shifted)[0]
    mass = torch.zeros(2001, dtype=torch.float64)  # the Poisson-binomial masses by their recursion
    mass[0] = 1
    for chance in p:
        mass[1:] = mass[1:] * (1 - chance) + mass[:-1] * chance
        mass[0] *= 1 - chance
    torch.testing.assert_close(distribution._log_mass[0], mass[1300].log(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_a_shared_case_equal_masks_of_their_own(kind):
    logits = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    width, rows = torch.tensor([4, 6]), torch.tensor([1, 0, 1])
    shared, own = kind(logits, width, rows), kind(logits[rows], width[rows])
    torch.testing.assert_close(shared.log_prob(own.mode()), own.log_prob(own.mode()))
    torch.testing.assert_close(shared.entropy(), own.entropy())


def test_bernoulli_entropy_is_the_mean_surprise():
    distribution = small(Bernoulli)
    log_probs = torch.stack([distribution.log_prob(mask.expand(2, -1)) for mask in all_masks(7)])
    torch.testing.assert_close(distribution.entropy(), -(log_probs.exp() * log_probs).sum(0))


@pytest.mark.parametrize("width", [1, 50, 99, 100])
def test_the_offset_meets_the_width_at_every_target_even_with_extreme_logits(width):
    logits = torch.linspace(-30, 30, 100, dtype=torch.float64)[None]
    offset = solve_offset(logits, torch.tensor([width]))
    assert float(torch.sigmoid(logits + offset).sum()) == pytest.approx(width, abs=1e-3)
