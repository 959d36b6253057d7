"""Allocations over channels and heads: under the budget, searched on a matrix, and learned."""

import copy
import itertools
import tempfile

import pytest
import torch
from families import tiny_model, token_ids

from prunenet.envs.budget import game_of
from prunenet.evaluation.shares import allocated, capped, damages, masks, settled
from prunenet.evaluation.slots import PLACE, Episodes
from prunenet.features.from_weights import CONTEXT
from prunenet.models.layers import count_parameters, ffn_widths
from prunenet.models.surgery import narrowed
from prunenet.policies.methods.widths import joint
from prunenet.policies.methods.widths.joint import search_shares
from prunenet.policies.scorer import SlotAllocator
from prunenet.policies.training.slots import (
    AllocatorRecipe,
    SlotPolicy,
    mean_log_damage,
    train_allocator,
)

STRUCTURES = [name.removeprefix("is_") for name in PLACE]


def game(seed: int = 0):
    return game_of(tiny_model("llama", seed=seed), token_ids(2, 12, seed=seed), bins=4)


@pytest.fixture(scope="module")
def one():
    return game()


def untrained(seed: int = 0) -> SlotAllocator:
    return SlotAllocator(CONTEXT, STRUCTURES, generator=torch.Generator().manual_seed(seed))


def cost(game, shares):
    return (shares * torch.tensor([slot.costs[-1] for slot in game.slots])).sum(1)


def drawn(game, count: int = 16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, len(game.slots), generator=generator)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5])
def test_allocations_meet_the_budget_and_heads_are_whole(one, ratio):
    found = [allocated(one, drawn(one), ratio)]
    if ratio == 0.2:  # at others the channels cannot make up for the heads of these draws
        found.append(settled(one, (drawn(one) / 4 + 2).sigmoid(), ratio))
    for shares in found:
        budget = torch.full((16,), (1 - ratio) * one.total).double()
        torch.testing.assert_close(cost(one, shares), budget)
        heads = [n for n, slot in enumerate(one.slots) if slot.structure == "heads"]
        counts = shares[:, heads] * 2
        assert torch.allclose(counts, counts.round())


def test_no_head_goes_as_the_budget_grows(one):
    offsets, last = drawn(one), None
    heads = [n for n, slot in enumerate(one.slots) if slot.structure == "heads"]
    for ratio in (0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0):
        shares = allocated(one, offsets, ratio)[:, heads]
        assert last is None or (shares >= last - 1e-9).all()
        last = shares


def test_the_price_of_whole_units_is_that_of_the_environment(one):
    episodes = Episodes(one, 8, 0.4)
    generator = torch.Generator().manual_seed(0)
    while not episodes.done:
        episodes.play(torch.randint(one.levels, (8,), generator=generator))
    shares = torch.stack([episodes.kept[:, list(slot.units)].mean(1) for slot in one.slots], 1)
    torch.testing.assert_close(damages(one, shares.double()), episodes.damage, rtol=1e-4, atol=1e-5)


def test_masks_of_an_allocation_cut_what_it_says(one):
    model = tiny_model("llama")
    scores = [torch.rand(width) for width in ffn_widths(model)]
    shares = allocated(one, drawn(one, 1), 0.4)[0]
    keep, groups = masks(one, shares, scores, round_to=4)
    narrow = narrowed(model, keep, groups)
    removed = count_parameters(model)[0] - count_parameters(narrow)[0]
    assert 0 <= removed - 0.4 * one.total < 4 * 3 * model.config.hidden_size
    assert all(int(mask.sum()) % 4 == 0 for mask in keep)
    for slot, share in zip(one.slots, shares, strict=True):
        if slot.structure == "heads":
            assert int(groups[slot.layer].sum()) == round(float(share) * 2)


@pytest.mark.long
def test_searches_meet_the_budget_and_order_as_they_should(one):
    found = {
        name: search_shares(one, 0.4, name, evaluations=200)
        for name in ("uniform", "random", "greedy", "dynamic", "evolution", "predictor", "smooth")
    }
    price = {name: float(damages(one, shares[None])) for name, shares in found.items()}
    for shares in found.values():
        torch.testing.assert_close(
            cost(one, shares[None]), torch.tensor([0.6 * one.total]).double()
        )
    assert price["random"] <= price["uniform"]
    for searched in ("evolution", "predictor", "smooth"):
        assert price[searched] < price["uniform"]
    assert price["greedy"] < price["uniform"]


@pytest.mark.parametrize(("ratio", "cap"), [(0.2, 1.5), (0.3, 1.2), (0.35, 1.1)])
def test_under_a_cap_no_slot_gives_more_than_its_share_and_the_budget_is_met(one, ratio, cap):
    few = capped(one, ratio, cap)
    episodes = Episodes(few, 16, ratio)
    generator = torch.Generator().manual_seed(0)
    while not episodes.done:
        episodes.play(torch.randint(few.levels, (16,), generator=generator))
    played = torch.stack([episodes.kept[:, list(slot.units)].mean(1) for slot in one.slots], 1)
    every = [played.double(), allocated(few, 2 * drawn(few), ratio)]
    every += [
        search_shares(few, ratio, search, evaluations=40)[None].double()
        for search in ("uniform", "random", "greedy", "dynamic", "evolution")
    ]
    channels = [slot.costs[-1] for slot in one.slots if slot.structure == "channels"]
    most = cap * ratio * one.total / sum(channels)
    for shares in every:
        assert float((1 - shares).max()) <= most + 1e-5
        budget = torch.full((len(shares),), (1 - ratio) * one.total).double()
        torch.testing.assert_close(cost(one, shares), budget, rtol=1e-5, atol=1)
    free = allocated(one, 2 * drawn(one), ratio)
    assert float((1 - free).max()) > most + 0.05, "without a cap a slot gives more"


def test_guarded_layers_stay_whole(one):
    found = search_shares(capped(one, 0.1, None, guarded=1), 0.1, "greedy")
    for slot, share in zip(one.slots, found.tolist(), strict=True):
        assert share == pytest.approx(1) or slot.layer == 1
    assert capped(one, 0.3, None) is one


@pytest.mark.parametrize("search", ["random", "evolution", "predictor", "smooth"])
def test_a_search_prices_no_more_allocations_than_it_may_and_begins_with_the_start(
    one, search, monkeypatch
):
    priced = []

    def counted(game, shares):
        priced.extend(shares)
        return damages(game, shares)

    monkeypatch.setattr(joint, "damages", counted)
    start = drawn(one, 1)[0]
    first = allocated(one, start, 0.3)[0]
    for evaluations in (1, 4, 30):
        priced.clear()
        found = search_shares(one, 0.3, search, evaluations=evaluations, start=start)
        assert 0.7 * evaluations <= len(priced) <= evaluations
        assert torch.equal(priced[0], first)
        least = min(float(damages(one, row[None])) for row in priced)
        assert float(damages(one, found[None])) == pytest.approx(least, rel=1e-5)


def test_owl_and_influence_keep_more_of_the_layers_that_they_name(one):
    for search in ("owl", "influence"):
        found = search_shares(one, 0.3, search, layers=[0.1, 0.4, 0.2])
        torch.testing.assert_close(cost(one, found[None]), torch.tensor([0.7 * one.total]).double())
        kept = [float(x) for x, s in zip(found, one.slots, strict=True) if s.structure != "heads"]
        assert kept[1] > kept[2] > kept[0]
        with pytest.raises(ValueError, match=f"{search} needs one figure for each of 3 layers"):
            search_shares(one, 0.3, search, layers=[0.1])


def test_dynamic_programming_is_exact_where_damages_add_up(one):
    apart = copy.deepcopy(one)
    apart.matrices.copy_(torch.diag_embed(apart.matrices.diagonal(dim1=1, dim2=2)))
    levels = [range(slot.least, len(slot.units) + 1) for slot in apart.slots]
    limit = 0.6 * apart.total
    every = torch.tensor([*itertools.product(*levels)]).double()
    shares = every / torch.tensor([len(slot.units) for slot in apart.slots])
    met = cost(apart, shares) <= limit
    best = float(damages(apart, shares[met]).min())
    found = search_shares(apart, 0.4, "dynamic")
    # the search rounds costs to a four-hundredth of the budget, and settles what is left
    assert float(damages(apart, found[None])) <= best * 1.05


@pytest.mark.long
def test_an_untrained_allocator_cuts_all_slots_alike_and_a_trained_one_serves_other_models():
    games, others = [game(seed) for seed in (0, 1)], [game(seed) for seed in (5, 6, 7)]
    start = untrained()
    assert start(games[0].features).abs().max() == 0
    recipe = AllocatorRecipe(updates=30, episodes=48, learning_rate=3e-2, evaluate_at=(0.3, 0.5))
    trained = train_allocator(games, start, recipe)
    assert trained.history[0][0] == 0
    assert trained.history[-1][0] == 30
    assert start(games[0].features).abs().max() == 0, "the start is copied"
    best = min(value for _, value in trained.history)
    assert mean_log_damage(trained.allocator, games, (0.3, 0.5)) == pytest.approx(best, rel=1e-5)
    assert best < trained.history[0][1] - 0.2
    before, after = (
        mean_log_damage(policy, others, (0.3, 0.5)) for policy in (start, trained.allocator)
    )
    assert after < before - 0.1


@pytest.mark.long
@pytest.mark.parametrize("cap", [None, 1.5])
def test_the_same_seed_trains_the_same_allocator(one, cap, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    recipe = AllocatorRecipe(updates=2, episodes=8, evaluate_every=1, cap=cap)
    first, second = (train_allocator([one], untrained(), recipe).history for _ in range(2))
    assert first == second
    assert not list(tmp_path.iterdir()), "training leaves nothing in the temporary folder"


def test_log_probabilities_are_of_legal_numbers_alone(one):
    from prunenet.envs.budget import BudgetPruningVectorEnv

    env = BudgetPruningVectorEnv(None, 6, games=one, ratio=0.5)
    seen, _ = env.reset(seed=0)
    policy = SlotPolicy(
        env.single_observation_space,
        env.single_action_space,
        lambda _: 1e-3,
        games=[one],
        start=untrained(),
        spread=0.1,
    )
    for _ in range(one.length):
        row = {key: torch.as_tensor(value) for key, value in seen.items()}
        actions, _, log_prob = policy(row)
        legal = row["action_mask"].bool()
        assert legal[torch.arange(6), actions].all()
        each = policy.get_distribution(row).probs
        torch.testing.assert_close((each * legal).sum(1), torch.ones(6).double())
        torch.testing.assert_close(each[torch.arange(6), actions].log(), log_prob)
        seen = env.step(actions.numpy())[0]


def test_an_allocator_s_log_odds_stay_within_its_bound(one):
    allocator = untrained()
    for head in allocator.heads.values():
        torch.nn.init.constant_(head.out.weight, 100.0)
    assert float(allocator(one.features).detach().abs().max()) <= SlotAllocator.BOUND


def test_numbers_out_of_range_are_refused(one, unchecked):
    with pytest.raises(ValueError, match="2 or more episodes"):
        AllocatorRecipe(episodes=1)
    with pytest.raises(ValueError, match="prices 1 allocation or more, got 0"):
        search_shares(one, 0.3, "random", evaluations=0)
    with pytest.raises(ValueError, match=r"times the ratio, at least 1, or None, got 0\.5"):
        AllocatorRecipe(cap=0.5)
    with pytest.raises(ValueError, match="`guarded` counts layers"):
        capped(one, 0.3, guarded=-1)
    with pytest.raises(ValueError, match=r"leave too little to remove: 0\.\d+ of the cost"):
        capped(one, 0.5, 1.5, guarded=1)
    with pytest.raises(ValueError, match="annealing"):
        search_shares(one, 0.3, "annealing")
