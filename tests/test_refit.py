"""Refit is least squares, elimination is refit one channel at a time: both against brute force,
solvers and closed forms.
"""

import pytest
import torch

from prunenet.models.masks import top_channels
from prunenet.refit.eliminate import eliminate, score_order
from prunenet.refit.moments import Moments, Target
from prunenet.refit.ridge import choose_damping, lost, ridge

D_MODEL, D_FF, TOKENS = 7, 20, 300


def draws(seed: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    """Correlated activations of unequal size whose mean is not zero: (tokens, D_FF), float64."""
    mixing = torch.randn(
        D_FF, D_FF, generator=torch.Generator().manual_seed(99), dtype=torch.float64
    )
    noise = torch.randn(
        tokens, D_FF, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return noise @ mixing * torch.linspace(0.1, 2, D_FF) + torch.linspace(-1, 3, D_FF)


def moments_of(h: torch.Tensor) -> Moments:
    return Moments(h.T @ h / len(h), h.mean(0), len(h))


def target_of(t: torch.Tensor, h: torch.Tensor, weight: torch.Tensor) -> Target:
    return Target(t.T @ h / len(h), t.mean(0), float((t @ weight.T).square().sum() / len(h)))


def down(seed: int = 0) -> torch.Tensor:
    return torch.randn(
        D_MODEL, D_FF, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def some_keep(width: int = 12, seed: int = 0) -> torch.Tensor:
    return top_channels(torch.rand(D_FF, generator=torch.Generator().manual_seed(seed)), width)


def brute_lost(weight, h, keep, refitted, t=None) -> float:
    """The share of output energy lost, token by token."""
    wanted = (h if t is None else t) @ weight.T
    return float((wanted - h[:, keep] @ refitted.T).square().sum() / wanted.square().sum())


def test_a_refit_worked_out_by_hand():
    # Channel 1 is half of channel 0 plus noise of variance 3/4: H = [[1, 1/2], [1/2, 1]]. Without
    # it, channel 0 takes over.
    weight, second = torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    keep = torch.tensor([True, False])
    torch.testing.assert_close(ridge(weight, second, keep, damping=0.0), torch.tensor([[4.0]]))
    # 2 + 4 * 0.5 / (1 + 1)
    torch.testing.assert_close(ridge(weight, second, keep, damping=1.0), torch.tensor([[3.0]]))
    # tr(W H W^T) = 4 + 16 + 2 * 8 / 2 = 28; lost 16 * 3/4 = 12 after the refit, 16 * 1 before.
    assert lost(weight, second, keep, torch.tensor([[4.0]])) == pytest.approx(12 / 28)
    assert lost(weight, second, keep) == pytest.approx(16 / 28)
    # Dropping channel 0 instead would lose 4 * 3/4 = 3: greedy begins there.
    path = eliminate(weight, second, damping=0.0)
    assert path.order.tolist() == [0]
    assert path.loss.tolist() == pytest.approx([3 / 28])


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_refit_is_ridge_regression_on_the_tokens_themselves(damping):
    h, weight, keep = draws(), down(), some_keep()
    root = (damping * h[:, keep].square().mean(0)).sqrt()
    # min |W h - W' h_K|^2 / n + sum_j lam_j |W'_j - W_j|^2 as an ordinary least-squares problem
    # with extra rows.
    rows = torch.cat([h[:, keep] / TOKENS**0.5, root.diag()])
    wanted = torch.cat([h @ weight.T / TOKENS**0.5, root[:, None] * weight[:, keep].T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(
        ridge(weight, moments_of(h).second, keep, damping=damping), expected, rtol=1e-8, atol=1e-8
    )


def test_the_gradient_of_the_objective_is_zero_at_the_solution():
    h, weight, keep = draws(), down(), some_keep()
    moments = moments_of(h)
    refitted = ridge(weight, moments.second, keep, damping=0.2).requires_grad_()
    lam = 0.2 * moments.second.diagonal()[keep]
    error = (h @ weight.T - h[:, keep] @ refitted.T).square().sum() / len(h)
    (error + (lam * (refitted - weight[:, keep]).square()).sum()).backward()
    assert float(refitted.grad.abs().max()) < 1e-9


def test_the_energy_lost_is_what_the_tokens_say():
    h, weight, keep = draws(), down(), some_keep()
    moments = moments_of(h)
    refitted = down(3)[:, :12]
    assert lost(weight, moments.second, keep, refitted) == pytest.approx(
        brute_lost(weight, h, keep, refitted)
    )
    assert lost(weight, moments.second, keep) == pytest.approx(
        brute_lost(weight, h, keep, weight[:, keep])
    )
    assert lost(torch.zeros(D_MODEL, D_FF), moments.second, keep) == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_refit_never_loses_more(seed):
    h, weight, keep = draws(seed), down(seed), some_keep(seed=seed)
    moments = moments_of(h)
    bare = lost(weight, moments.second, keep)
    plain = lost(weight, moments.second, keep, ridge(weight, moments.second, keep, damping=0.0))
    assert plain < bare
    for damping in (1e-3, 0.1, 10.0):
        assert (
            plain
            <= lost(
                weight, moments.second, keep, ridge(weight, moments.second, keep, damping=damping)
            )
            <= bare
        )


def test_the_layer_s_own_activations_as_target_change_nothing():
    h, weight, keep = draws(), down(), some_keep()
    moments = moments_of(h)
    assert torch.equal(
        ridge(weight, moments.second, keep, cross=moments.second),
        ridge(weight, moments.second, keep),
    )
    folds, own = [moments, moments_of(draws(1))], [target_of(h, h, weight)] * 2
    own[1] = target_of(draws(1), draws(1), weight)
    assert choose_damping(weight, folds, keep, targets=own) == choose_damping(weight, folds, keep)


def test_a_refit_towards_the_dense_layer_is_least_squares_on_its_output():
    h, weight, keep = draws(), down(), some_keep()
    t = h + 0.3 * draws(1)
    second, target = moments_of(h).second, target_of(t, h, weight)
    refitted = ridge(weight, second, keep, damping=0.0, cross=target.cross)
    torch.testing.assert_close(
        refitted, torch.linalg.lstsq(h[:, keep], t @ weight.T).solution.T, rtol=1e-8, atol=1e-8
    )
    blind = ridge(weight, second, keep, damping=0.0)
    assert brute_lost(weight, h, keep, refitted, t) < brute_lost(weight, h, keep, blind, t)
    whole = torch.ones(D_FF, dtype=torch.bool)
    assert torch.equal(ridge(weight, second, whole), weight)
    assert not torch.allclose(ridge(weight, second, whole, cross=target.cross), weight)


def test_endless_damping_is_no_refit():
    h, weight, keep = draws(), down(), some_keep()
    second = moments_of(h).second
    torch.testing.assert_close(
        ridge(weight, second, keep, damping=1e12), weight[:, keep], rtol=1e-9, atol=1e-9
    )
    # nor is there one without correlations
    uncorrelated = second.diagonal().diag()
    torch.testing.assert_close(ridge(weight, uncorrelated, keep, damping=0.1), weight[:, keep])


def test_the_damping_loses_least_where_each_fold_is_judged_on_the_other():
    weight, keep = down(), some_keep(10)
    texts = draws(5, tokens=16), draws(6, tokens=24)
    folds, candidates = [moments_of(h) for h in texts], (1e-4, 1e-2, 1e-1, 1.0, 100.0)

    def across(refit, targets=(None, None)):
        """The loss, token by token, of what is fitted to one fold on the other, in both
        directions.
        """
        pairs = ((0, 1), (1, 0))
        return sum(brute_lost(weight, texts[b], keep, refit(a), t=targets[b]) for a, b in pairs)

    losses = {
        c: across(lambda a, c=c: ridge(weight, folds[a].second, keep, damping=c))
        for c in candidates
    }
    best = min(candidates, key=losses.__getitem__)
    assert choose_damping(weight, folds, keep, candidates) == best
    assert best not in (1e-4, 100.0)  # or the test could not fail
    assert choose_damping(weight, [folds[0]] * 2, keep, candidates) == 1e-4
    wanted = [3 * h for h in texts]
    targets = [target_of(t, h, weight) for t, h in zip(wanted, texts, strict=True)]
    losses = {
        c: across(
            lambda a, c=c: ridge(weight, folds[a].second, keep, damping=c, cross=targets[a].cross),
            wanted,
        )
        for c in candidates
    }
    assert choose_damping(weight, folds, keep, candidates, targets=targets) == min(
        candidates, key=losses.__getitem__
    )
    with pytest.raises(ValueError, match="no damping to choose from; give at least one candidate"):
        choose_damping(weight, folds, keep, ())
    with pytest.raises(ValueError, match="damping must be 0 or more, got -2"):
        choose_damping(weight, folds, keep, (0.1, -2.0))
    with pytest.raises(ValueError, match="fitted on each and judged on the other; got 1"):
        choose_damping(weight, folds[:1], keep)


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_rescaling_channels_changes_neither_the_refit_nor_the_order(damping):
    h, weight, keep = draws(), down(), some_keep()
    scale = torch.logspace(-2, 2, D_FF, dtype=h.dtype)  # h_j s and W_:j / s: the same layer
    plain, scaled = moments_of(h).second, moments_of(h * scale).second
    refitted = ridge(weight / scale, scaled, keep, damping=damping) * scale[keep]
    torch.testing.assert_close(
        refitted, ridge(weight, plain, keep, damping=damping), rtol=1e-6, atol=1e-9
    )
    one, other = (
        eliminate(*pair, damping=damping) for pair in ((weight, plain), (weight / scale, scaled))
    )
    assert torch.equal(one.order, other.order)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=1e-9)


def test_a_channel_that_is_never_active_keeps_its_column():
    h, weight = draws(), down()
    h[:, 3] = 0
    keep = some_keep()
    keep[3], keep[4] = True, False
    refitted = ridge(weight, moments_of(h).second, keep, damping=0.1)
    torch.testing.assert_close(refitted[:, int(keep[:3].sum())], weight[:, 3])
    assert not torch.allclose(refitted, weight[:, keep])
    assert 3 in eliminate(weight, moments_of(h).second).order[:1]


def test_results_come_in_the_weight_s_dtype():
    moments, weight, keep = moments_of(draws()), down().bfloat16(), some_keep()
    fitted = Moments(moments.second.float(), moments.mean.float(), moments.tokens)
    assert ridge(weight, fitted.second, keep).dtype == torch.bfloat16
    exact = ridge(weight.double(), moments.second, keep)
    torch.testing.assert_close(
        ridge(weight, fitted.second, keep).double(), exact, rtol=1e-2, atol=1e-2
    )
    assert eliminate(weight, fitted.second).loss.dtype == torch.float64


def test_moments_that_cannot_be_solved_are_refused():
    weight, keep = down(), torch.ones(D_FF, dtype=torch.bool)
    flat = moments_of(draws(tokens=5)).second  # rank 5 of 20
    whole = moments_of(draws()).second
    negative = whole - 2 * whole.diagonal().diag()
    for second, said in (
        (flat - 1e-9 * torch.eye(D_FF), "20 channels are not positive definite with damping 0.0"),
        (negative, "20 channels are not positive definite with damping 0.0"),
        (flat * torch.nan, "NaN or infinite: weights are damaged"),
        (flat * 1e308 * 1e308, "NaN or infinite: weights are damaged"),
    ):
        for solve in (
            lambda second=second: ridge(weight, second, keep, damping=0.0),
            lambda second=second: eliminate(weight, second, damping=0.0),
        ):
            with pytest.raises(ValueError, match=f"{said}.*; load the model as float32, or prune"):
                solve()
    assert torch.isfinite(ridge(weight, flat, some_keep(), damping=1e-3)).all()
    with pytest.raises(ValueError, match="damping must be 0 or more, got -1"):
        ridge(weight, flat, keep, damping=-1.0)
    with pytest.raises(ValueError, match="keeps none"):
        ridge(weight, flat, ~keep)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-60])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_a_layer_without_energy_keeps_its_columns_and_the_order_of_its_channels(scale, damping):
    weight, keep, second = down(), some_keep(), scale * moments_of(draws()).second
    dead = Moments(second, torch.zeros(D_FF), 5)
    assert torch.equal(ridge(weight, second, keep, damping=damping), weight[:, keep])
    assert choose_damping(weight, [dead, dead], keep, (0.3, 0.1)) == 0.3
    # one text alone may leave a layer idle
    assert choose_damping(weight, [dead, moments_of(draws())], keep, (0.3, 0.1)) in (0.3, 0.1)
    path = eliminate(weight, second, damping=damping, least=3)
    assert path.order.tolist() == list(range(17))
    assert path.loss.tolist() == [0.0] * 17


def naive(
    weight: torch.Tensor, second: torch.Tensor, damping: float, least: int
) -> tuple[list[int], list[torch.Tensor]]:
    """Optimal Brain Surgeon as it stands in the papers: W and H^-1 updated in full after each
    drop.
    """
    w = weight.clone()
    inverse = torch.linalg.inv(second + damping * second.diagonal().diag())
    order: list[int] = []
    states = []
    for _ in range(D_FF - least):
        cost = w.square().sum(0) / inverse.diagonal().abs().clamp_min(1e-30)
        cost[order] = torch.inf
        j = int(cost.argmin())
        w = w - torch.outer(w[:, j], inverse[j]) / inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        order.append(j)
        states.append(w.clone())
    return order, states


@pytest.mark.parametrize("block", [1, 3, 7, 64])
@pytest.mark.parametrize("damping", [0.0, 1e-2, 0.5])
def test_elimination_is_optimal_brain_surgeon_and_each_step_is_a_ridge_refit(damping, block):
    h, weight = draws(), down()
    second = moments_of(h).second
    order, states = naive(weight, second, damping, least=2)
    path = eliminate(weight, second, damping=damping, least=2, block=block)
    assert path.order.tolist() == order
    for step, (share, state) in enumerate(zip(path.loss.tolist(), states, strict=True)):
        keep = torch.ones(D_FF, dtype=torch.bool)
        keep[order[: step + 1]] = False
        refitted = ridge(weight, second, keep, damping=damping)
        torch.testing.assert_close(state[:, keep], refitted, rtol=1e-8, atol=1e-8)
        assert share == pytest.approx(brute_lost(weight, h, keep, refitted), rel=1e-8)
        assert share == pytest.approx(lost(weight, second, keep, refitted), rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_drop_is_the_best_of_all_single_drops(seed):
    h, weight = draws(seed), down(seed)
    second = moments_of(h).second
    losses = []
    for j in range(D_FF):
        keep = torch.arange(D_FF) != j
        best = torch.linalg.lstsq(h[:, keep], h @ weight.T).solution.T
        losses.append(brute_lost(weight, h, keep, best))
    path = eliminate(weight, second, damping=0.0, least=D_FF - 1)
    assert path.order.tolist() == [losses.index(min(losses))]
    assert path.loss.tolist() == pytest.approx([min(losses)], rel=1e-8)


def test_masks_of_an_elimination_nest_and_follow_its_order():
    weight, second = down(), moments_of(draws()).second
    path = eliminate(weight, second, least=5)
    scores = score_order(path, D_FF)
    wider = torch.ones(D_FF, dtype=torch.bool)
    for width in range(D_FF, 0, -1):
        keep = top_channels(scores, width)
        assert not (keep & ~wider).any()
        if width >= 5:
            assert set((~keep).nonzero().flatten().tolist()) == set(
                path.order[: D_FF - width].tolist()
            )
        wider = keep
    assert (path.loss.diff() > 0).all()


def test_channels_that_do_nothing_go_first_and_cost_nothing():
    h, weight = draws(), down()
    h[:, 4] = 0
    weight[:, 11] = 0
    path = eliminate(weight, moments_of(h).second, damping=1e-6)
    # A channel that is never active loses nothing, but its damped cost is not quite zero; the
    # other's is.
    assert path.order[0] == 11
    assert set(path.order[:2].tolist()) == {4, 11}
    assert path.loss[:2].tolist() == pytest.approx([0, 0], abs=1e-12)
    nothing = eliminate(torch.zeros_like(weight), moments_of(h).second, least=3)
    assert nothing.loss.tolist() == [0.0] * 17
    assert nothing.order.tolist() == list(range(17))  # of equals, the lower number first


def test_elimination_stops_where_it_is_told():
    weight, second = down(), moments_of(draws()).second
    empty = eliminate(weight, second, least=D_FF)
    assert len(empty.order) == len(empty.loss) == 0
    assert score_order(empty, D_FF).tolist() == [0.0] * D_FF
    assert len(eliminate(weight, second).order) == D_FF - 1
    for least, block in ((0, 8), (21, 8), (1, 0)):
        with pytest.raises(ValueError, match=f"got {least}, {block}"):
            eliminate(weight, second, least=least, block=block)
