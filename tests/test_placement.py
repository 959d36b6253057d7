"""Models that accelerate spreads over devices and disk: what they give is what the model in memory gives, to the bit."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, random_keep, tiny_model, token_ids

from prunenet.activation_stats import channel_features
from prunenet.calibration import Blocks, weights_sha256
from prunenet.checkpoint import load_model
from prunenet.compensate import Refits, cut_layers, refit_kept, refit_sequentially
from prunenet.divergence import divergences
from prunenet.generate import generate_blocks
from prunenet.layers import count_parameters, ffn_widths, iter_ffns
from prunenet.moments import LayerWalk, ffn_moments, paired_moments
from prunenet.placement import is_placed, present, where
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.stats import layer_context, observe
from prunenet.surgery import masking, narrowed

pytest.importorskip("accelerate")

LIMITS = ["cpu=100KB", "cpu=10KB"]  # some layers in memory and some on disk; all on disk
BLOCKS = token_ids(6, 12)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "cache"))


def stored(folder: Path, family: str = "llama", **options):
    tiny_model(family, **options).save_pretrained(folder)
    return folder


def both(folder: Path, limit: str = LIMITS[0]):
    """The model in memory, and placed."""
    memory, placed = load_model(folder), load_model(folder, device="auto", max_memory=limit)
    assert is_placed(placed)
    assert not is_placed(memory)
    return memory, placed


def devices(model) -> set[str]:
    """Where parameters are at this moment."""
    return {str(parameter.device) for parameter in model.parameters()}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_placed_model_of_every_family_has_the_weights_logits_and_narrow_form_of_the_one_in_memory(tmp_path, family):
    memory, placed = both(stored(tmp_path / "dense", family, bias=True), "cpu=10KB")
    assert devices(placed) == {"meta"}
    assert weights_sha256(placed) == weights_sha256(memory)
    assert count_parameters(placed) == count_parameters(memory)
    for mine, theirs in zip(iter_ffns(placed), iter_ffns(memory), strict=True):
        assert torch.equal(mine.down, theirs.down)
        assert torch.equal(mine.up, theirs.up)
    keep = random_keep([16, 24, 40])
    narrow = [narrowed(model, keep) for model in (memory, placed)]
    assert torch.equal(*map(logits, narrow))
    with masking(memory, keep), masking(placed, keep):
        assert torch.equal(logits(memory), logits(placed))
    assert torch.equal(logits(memory), logits(placed))
    assert devices(placed) == {"meta"}
    assert count_parameters(narrow[0]) == count_parameters(narrow[1])


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("tied", [False, True])
def test_statistics_from_weights_and_activations_are_those_in_memory(tmp_path, limit, tied):
    pair = both(stored(tmp_path / "dense", tied=tied), limit)
    assert where(pair[1]) == ("disk" if limit == "cpu=10KB" else "cpu+disk")
    for mine, theirs in zip(*(observe(model) for model in pair), strict=True):
        assert all(map(torch.equal, mine, theirs))
    assert torch.equal(*map(layer_context, pair))
    assert all(map(torch.equal, *(channel_features(model, BLOCKS) for model in pair)))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text", "falcon"])
def test_moments_with_hidden_states_on_the_cpu_are_those_without(tmp_path, family):
    memory, placed = both(stored(tmp_path / "dense", family), "cpu=60KB")
    walks = [ffn_moments(memory, BLOCKS), ffn_moments(placed, BLOCKS)]
    for index, (mine, theirs) in enumerate(zip(*walks, strict=True)):
        assert torch.equal(mine.second, theirs.second), index
    offloaded = LayerWalk(memory, BLOCKS, offload=True)
    for index, moments in zip(offloaded, ffn_moments(memory, BLOCKS), strict=True):
        assert torch.equal(offloaded.moments(index).second, moments.second)


def test_inside_a_walk_a_layer_is_present_and_afterwards_nothing_stays(tmp_path):
    _, placed = both(stored(tmp_path / "dense"), "cpu=10KB")
    walk = LayerWalk(placed, BLOCKS)
    for index in walk:
        here = [devices(layer) for layer in walk.layers]
        assert here == [{"cpu"} if at == index else {"meta"} for at in range(3)]
    assert devices(placed) == {"meta"}
    with pytest.raises(RuntimeError, match="stop"), present(placed), present(placed):
        assert devices(placed) == {"cpu"}
        raise RuntimeError("stop")
    assert devices(placed) == {"meta"}


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
@pytest.mark.parametrize("limit", LIMITS)
def test_cuts_refits_and_what_they_cost_are_those_in_memory(tmp_path, family, limit):
    memory, placed = both(stored(tmp_path / "dense", family), limit)
    results = []
    for model in (memory, placed):
        (cut,) = cut_layers(model, BLOCKS, [[24] * 3])
        moments = list(ffn_moments(model, BLOCKS))
        again = refit_kept(model, cut.keep, moments, moments)
        sequential = [refit_sequentially(model, cut, BLOCKS, dense_targets=dense) for dense in (True, False)]
        cuts = [cut, again, *sequential]
        costs = divergences(model, [one.down for one in cuts], BLOCKS)
        results.append(([*costs], [d for one in cuts for d in one.downs], [logits(one.model(model)) for one in cuts]))
        assert torch.equal(logits(model), logits(memory))
    for mine, theirs in zip(*results, strict=True):
        assert all(map(torch.equal, mine, theirs))


def test_levels_of_refits_and_paired_walks_are_those_in_memory(tmp_path):
    pair = both(stored(tmp_path / "dense"))
    first, second = (Refits(model, BLOCKS, levels=4) for model in pair)
    assert torch.equal(first.scores, second.scores)
    pairs = [(LayerWalk(model, BLOCKS), LayerWalk(model, BLOCKS)) for model in pair]
    for index, *_ in zip(*(walk for walks in pairs for walk in walks), strict=True):
        (_, mine), (_, theirs) = (paired_moments(*walks, index) for walks in pairs)
        assert torch.equal(mine.cross, theirs.cross)
        assert mine.energy == theirs.energy


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_placed_model_writes_the_same_text(tmp_path, family):
    mine, theirs = (
        generate_blocks(model, 1, sequences=3, tokens=10, batch=3) for model in both(stored(tmp_path / "dense", family))
    )
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("family", "tied", "widths"), [("llama", True, "per-layer"), ("opt", None, "uniform")])
def test_a_placed_model_is_pruned_to_the_same_bytes(tmp_path, family, tied, widths, limit):
    policy = Policy.untrained(PolicyConfig(hidden=(8,)))
    with torch.no_grad():
        policy.scorer.widths.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    folders = []
    for number, model in enumerate(both(stored(tmp_path / "dense", family, tied=tied), limit)):
        pruned = prune(model, policy, ratio=0.4, widths=widths, blocks=Blocks(BLOCKS, "data", {}))
        folders.append(pruned.save_pretrained(tmp_path / str(number)))
        assert len(set(ffn_widths(pruned.model))) == (1 if widths == "uniform" else 3)
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
