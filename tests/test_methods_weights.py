"""Methods that read the weights alone: LILA, folding, PruneNet as published."""

import itertools

import pytest
import torch
from families import D_FF, tiny_model, token_ids
from scipy.stats import ks_2samp

from prunenet.models.layers import FFN, iter_ffns
from prunenet.models.surgery import narrowed
from prunenet.policies.methods import METHODS, Evidence, cut, pruned_model
from prunenet.policies.methods.papers import folding, lila
from prunenet.policies.methods.papers import prunenet_published as published


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(60, 20, generator=generator, dtype=torch.float64).abs()
    repeated = torch.linalg.qr(tall)[0] * torch.tensor([3.0] * 6 + [2.0] * 8 + [1.0] * 6)
    return {
        "tall": tall,
        "wide": tall.T.contiguous(),
        "repeated singular values": repeated,
        "equal and zero rows": torch.cat(
            [tall[:30], tall[:3], torch.zeros(2, 20, dtype=torch.float64)]
        ),
        "rank one": tall[:, :1] * tall[:1],
        "axes": torch.diag(torch.arange(1.0, 21.0, dtype=torch.float64)),
        "huge": 1e8 * tall,
        "one row dominates": torch.cat([1e4 * tall[:1], tall]),
    }


each_matrix = pytest.mark.parametrize("name", matrices())


def without(matrix: torch.Tensor, row: int, count: int) -> torch.Tensor:
    values = torch.linalg.svdvals(torch.cat([matrix[:row], matrix[row + 1 :]]))[:count]
    return torch.nn.functional.pad(values, (0, count - len(values)))


@each_matrix
@pytest.mark.parametrize("count", [1, 5, 20])
def test_leave_one_out_singular_values_are_those_of_the_matrix_without_the_row(name, count) -> None:
    matrix = matrices()[name]
    eigenvalues, drops = lila.leave_one_out(matrix, count)
    top = float(eigenvalues[0])
    assert (drops >= 0).all()
    for row in range(len(matrix)):
        expected = without(matrix, row, count)
        # Squares first: a Gram matrix knows small singular values only to the square root of eps.
        torch.testing.assert_close(
            (eigenvalues - drops[row]) / top, expected.square() / top, rtol=0, atol=2e-14
        )
        if name in ("tall", "huge", "axes"):
            values = (eigenvalues - drops[row]).clamp_min(0).sqrt()
            leading = expected > 1e-2 * expected[0]
            torch.testing.assert_close(
                values[leading] / top**0.5, expected[leading] / top**0.5, rtol=0, atol=1e-12
            )


def test_lila_scores_by_brute_force() -> None:
    up = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    absolute = up.double().abs()
    before = torch.linalg.svdvals(absolute)[:8]
    mass, two_sample = (
        lila.layer_score(up, count=8),
        lila.layer_score(up, count=8, form="two_sample"),
    )
    for row in range(50):
        after = without(absolute, row, 8)
        spread = (before.cumsum(0) / before.sum() - after.cumsum(0) / after.sum()).abs().max()
        assert float(mass[row]) == pytest.approx(float(spread), abs=1e-12)
        assert float(two_sample[row]) == pytest.approx(
            ks_2samp(before.numpy(), after.numpy()).statistic
        )


def test_the_two_sample_distance_ranks_nothing() -> None:
    up = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    up[3] = 0
    distances = lila.layer_score(up, form="two_sample")
    assert distances[3] == 0
    others = torch.cat([distances[:3], distances[4:]])
    assert torch.allclose(others, torch.full_like(others, 1 / 32))


def test_a_zero_matrix_has_zero_scores() -> None:
    for form in ("mass", "two_sample"):
        assert lila.layer_score(torch.zeros(9, 4), form=form).equal(
            torch.zeros(9, dtype=torch.float64)
        )


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi3"])
def test_folding_into_as_many_clusters_as_channels_is_the_dense_model(model_type) -> None:
    model = tiny_model(model_type, bias=True)
    folded = pruned_model(Evidence(model), "folding", 0.0)
    torch.testing.assert_close(logits(folded), logits(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi3"])
def test_folding_merges_channels_that_are_copies_without_loss(model_type) -> None:
    model = tiny_model(model_type, bias=True)
    for ffn in iter_ffns(model):
        for tensor in (ffn.gate, ffn.up, ffn.gate_bias, ffn.up_bias, ffn.down.T):
            if tensor is not None:
                tensor[32:] = tensor[:16]
    folded = cut(Evidence(model), "folding", 0.3)
    assert folded.widths == [32] * 3
    torch.testing.assert_close(logits(folded.applied(model)), logits(model), atol=2e-5, rtol=0)
    assert (logits(narrowed(model, folded.keep)) - logits(model)).abs().max() > 0.1


def test_a_cluster_becomes_the_mean_of_its_rows_and_the_sum_of_its_columns() -> None:
    up, down = torch.arange(12.0).view(4, 3), torch.arange(12.0).view(3, 4)
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0])
    folded = folding.folded(FFN(0, None, up, down, up_bias=bias), torch.tensor([1, 0, 1, 1]), 2)
    assert folded.up.equal(torch.stack([up[1], (up[0] + up[2] + up[3]) / 3]))
    assert folded.down.equal(torch.stack([down[:, 1], down[:, 0] + down[:, 2] + down[:, 3]], dim=1))
    torch.testing.assert_close(folded.up_bias, torch.tensor([2.0, 8 / 3]))
    assert folded.gate is None


@pytest.mark.parametrize("k", [1, 7, 40, 60])
def test_k_means_ends_where_every_point_is_nearest_to_its_own_centre(k) -> None:
    points = torch.randn(60, 5, generator=torch.Generator().manual_seed(k))
    labels = folding.kmeans(points, k, torch.Generator().manual_seed(0))
    assert labels.unique().tolist() == list(range(k))
    centres = torch.stack([points[labels == c].mean(0) for c in range(k)])
    distances = torch.cdist(points, centres)
    own = distances.gather(1, labels[:, None])
    assert (own <= distances.min(1, keepdim=True).values + 1e-5).all()
    assert labels.equal(folding.kmeans(points, k, torch.Generator().manual_seed(0)))


def test_k_means_finds_clusters_that_lie_apart() -> None:
    truth = torch.arange(40) % 8
    points = 10 * torch.eye(8)[truth] + 0.1 * torch.randn(
        40, 8, generator=torch.Generator().manual_seed(0)
    )
    labels = folding.kmeans(points, 8, torch.Generator().manual_seed(0))
    assert (labels[:, None] == labels).equal(truth[:, None] == truth)


def test_k_means_of_copies_leaves_no_cluster_empty() -> None:
    assert folding.kmeans(
        torch.ones(6, 3), 4, torch.Generator().manual_seed(0)
    ).unique().tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="got 7"):
        folding.kmeans(torch.ones(6, 3), 7, torch.Generator())


def test_an_empty_cluster_takes_the_point_farthest_from_its_centre_that_is_not_alone() -> None:
    labels, distances = (
        torch.tensor([0, 0, 0, 2]),
        torch.tensor([1.0, 3.0, 2.0, 9.0], dtype=torch.float64),
    )
    assert folding._filled(labels, distances, 4).tolist() == [0, 1, 3, 2]


def test_sorted_keys_draw_without_replacement_in_proportion_to_the_weights() -> None:
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 40_000
    keys = published.drawing_keys(weights.log().expand(draws, -1), torch.Generator().manual_seed(0))
    order = keys.argsort(dim=-1, descending=True)[:, :2]
    for a, b in itertools.permutations(range(4), 2):
        chance = float(weights[a] * weights[b] / (1 - weights[a]))
        seen = float(((order[:, 0] == a) & (order[:, 1] == b)).float().mean())
        assert seen == pytest.approx(chance, abs=4 * (chance / draws) ** 0.5)


def test_the_published_scorer_is_the_formula_of_the_paper_with_its_gradients() -> None:
    scorer = published.PublishedScorer(6, 10, torch.Generator().manual_seed(0))
    weight = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    parameters = [scorer.a, scorer.b, scorer.v]
    explicit = torch.sigmoid((weight @ scorer.a + scorer.b) @ scorer.v)
    ours = torch.sigmoid(scorer(weight))
    torch.testing.assert_close(ours, explicit)
    left, right = (torch.autograd.grad(alpha.log().sum(), parameters) for alpha in (ours, explicit))
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_log_keep_weights_are_binary_concrete() -> None:
    logit = torch.tensor([-1.0, 0.0, 2.0])
    draws = torch.stack(
        [
            published.log_keep_weights(logit, g)
            for g in [torch.Generator().manual_seed(0)]
            for _ in range(20_000)
        ]
    )
    # P(p > 1/2) = P(logit(eps) > -logit(alpha)) = alpha.
    torch.testing.assert_close(
        (draws.exp() > 0.5).float().mean(0), torch.sigmoid(logit), atol=0.015, rtol=0
    )


def test_published_training_keeps_the_policy_of_its_best_episode_and_moves_from_its_start() -> None:
    evidence = Evidence(tiny_model("llama"), seed=3)
    runs = [published.trained(evidence, evidence.generator(), episodes=n) for n in (6, 6)]
    assert runs[0].rewards == runs[1].rewards
    assert len(runs[0].rewards) == 6
    assert all(reward > 3 for reward in runs[0].rewards), "1 / KS is over 1 in each layer"
    best = runs[0].rewards.index(max(runs[0].rewards)) + 1
    with torch.no_grad():  # as a caller may have it who only wants the masks
        again = published.trained(evidence, evidence.generator(), episodes=best).scorer
    assert all(
        a.equal(b) for a, b in zip(runs[1].scorer.parameters(), again.parameters(), strict=True)
    )
    start = published.started(evidence, evidence.generator())
    assert not start.a.equal(again.a)


def test_the_published_scorer_refuses_layers_of_different_widths() -> None:
    model = pruned_model(Evidence(tiny_model("llama")), "random", 0.3, allocation=[16, 32, 48])
    with pytest.raises(ValueError, match="equal layers"):
        METHODS["prunenet_published"].score(Evidence(model))
    assert [len(row) for row in METHODS["magnitude"].score(Evidence(model))] == [16, 32, D_FF]
