"""Models that accelerate spreads over devices and disk: what they give is what the model in memory
gives, to the bit.
"""

import gc
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from families import FAMILIES, random_keep, tiny_model, token_ids
from test_cli import facts, refused, run, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from prunenet.checkpoints import offload
from prunenet.checkpoints.identity import weights_sha256
from prunenet.checkpoints.load import load_model
from prunenet.evaluation.divergence import divergences
from prunenet.features.from_activations import channel_features
from prunenet.features.from_weights import layer_context, observe
from prunenet.models.layers import count_parameters, ffn_widths, iter_ffns
from prunenet.models.surgery import masking, narrowed
from prunenet.policies import artifact
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.refit.cut import Refits, cut_layers, refit_kept, refit_sequentially
from prunenet.refit.moments import LayerWalk, ffn_moments, paired_moments
from prunenet.runtime.files import CheckpointError
from prunenet.runtime.placement import is_placed, parse_max_memory, present, where
from prunenet.text import calibration
from prunenet.text.calibration import CalibrationSet
from prunenet.text.generate import SamplingOptions, generate_blocks

pytest.importorskip("accelerate")

LIMITS = ["cpu=100KB", "cpu=10KB"]  # some layers in memory and some on disk; all on disk
BLOCKS = token_ids(6, 12)


@pytest.fixture(autouse=True)
def _outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of our own, and nothing in the zoo."""
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(artifact, "ZOO", tmp_path / "zoo")
    (tmp_path / "zoo").mkdir()


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
def test_a_placed_model_of_every_family_has_the_weights_logits_and_narrow_form_of_the_one_in_memory(
    tmp_path, family
):
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


def test_weights_stay_until_the_last_of_overlapping_blocks_ends_even_by_an_error(tmp_path):
    _, placed = both(stored(tmp_path / "dense"), "cpu=10KB")
    first, second = present(placed), present(placed)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert devices(placed) == {"cpu"}
    second.__exit__(None, None, None)
    assert devices(placed) == {"meta"}

    def fails() -> None:
        with present(placed):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert devices(placed) == {"meta"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "limit"), [("llama", LIMITS[0]), ("opt", LIMITS[1]), ("phi3", LIMITS[0])]
)
def test_cuts_refits_and_what_they_cost_are_those_in_memory(tmp_path, family, limit):
    memory, placed = both(stored(tmp_path / "dense", family), limit)
    results = []
    for model in (memory, placed):
        (cut,) = cut_layers(model, BLOCKS, [[24] * 3])
        moments = list(ffn_moments(model, BLOCKS))
        again = refit_kept(model, cut.keep, [(one, one) for one in moments])
        sequential = [
            refit_sequentially(model, cut, BLOCKS, dense_targets=dense) for dense in (True, False)
        ]
        cuts = [cut, again, *sequential]
        costs = divergences(model, [one.down for one in cuts], BLOCKS)
        results.append(
            (
                [*costs],
                [d for one in cuts for d in one.downs],
                [logits(one.model(model)) for one in cuts],
            )
        )
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
        generate_blocks(model, 1, SamplingOptions(sequences=3, tokens=10, batch=3))
        for model in both(stored(tmp_path / "dense", family))
    )
    assert torch.equal(mine, theirs)


@pytest.mark.long
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    ("family", "tied", "widths"), [("llama", True, "per-layer"), ("opt", None, "uniform")]
)
def test_a_placed_model_is_pruned_to_the_same_bytes(tmp_path, family, tied, widths, limit):
    policy = Policy.untrained(PolicyConfig(hidden=(8,)))
    with torch.no_grad():
        policy.scorer.widths.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    folders = []
    for number, model in enumerate(both(stored(tmp_path / "dense", family, tied=tied), limit)):
        pruned = prune(
            model, policy, ratio=0.4, widths=widths, blocks=CalibrationSet(BLOCKS, "data", {})
        )
        folders.append(pruned.save_pretrained(tmp_path / str(number)))
        assert len(set(ffn_widths(pruned.model))) == (1 if widths == "uniform" else 3)
    assert contents(folders[0]) == contents(folders[1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder: Path) -> str:
    (folder / "words.txt").write_text(" ".join(f"w{(i * i + i // 7) % 61}" for i in range(4000)))
    return str(folder / "words.txt")


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "moments", "refit"), [("llama", "self", "layerwise"), ("opt", "data", "sequential")]
)
def test_prune_gives_the_same_bytes_whether_weights_are_in_memory_or_on_disk(
    tmp_path, monkeypatch, family, moments, refit
):
    monkeypatch.setattr(calibration, "self_blocks", partial(calibration.self_blocks, sequences=6))
    model = save_tiny(tmp_path / "dense", family)
    text = ("--text", written(tmp_path)) if moments == "data" else ()
    ask = ("prune", model, "--ratio", 0.5, "--moments", moments, *text, "--refit", refit)
    facts(*ask, "--out", tmp_path / "memory")
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "another"))  # the text is written anew
    facts(*ask, "--out", tmp_path / "placed", "--device", "auto", "--max-memory", "cpu=10KB")
    assert contents(tmp_path / "memory") == contents(tmp_path / "placed")
    gc.collect()  # hooks and modules know each other
    assert not any((tmp_path / "another" / "offload").iterdir())


@pytest.mark.parametrize("preset", ["default", "spectral"])
def test_a_policy_trained_on_a_placed_model_is_the_one_trained_in_memory(tmp_path, preset):
    model = save_tiny(tmp_path / "dense")
    ask: tuple[Any, ...] = (
        "train",
        model,
        "--updates",
        1,
        "--masks",
        2,
        "--preset",
        preset,
        "--widths",
        "uniform",
    )
    ask += (
        ("--distance", "energy")
        if preset == "spectral"
        else ("--moments", "data", "--text", written(tmp_path))
    )
    facts(*ask, "--out", tmp_path / "memory")
    facts(*ask, "--out", tmp_path / "placed", "--device", "auto", "--max-memory", "cpu=60KB")
    mine, theirs = (tmp_path / name / "model.safetensors" for name in ("memory", "placed"))
    assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.long
def test_eval_gives_the_same_perplexity_and_says_where_the_weights_were(tmp_path):
    models = [save_tiny(tmp_path / "one"), save_tiny(tmp_path / "two", "opt")]
    ask = (
        "eval",
        *models,
        "--text",
        written(tmp_path),
        "--window",
        32,
        "--no-speed",
        "--max-windows",
        4,
    )
    memory, placed = facts(*ask), facts(*ask, "--device", "auto", "--max-memory", "cpu=10KB")
    for mine, theirs in zip(memory["models"], placed["models"], strict=True):
        assert mine["device"] == "cpu"
        assert theirs.pop("device") == "disk"
        assert {name: value for name, value in mine.items() if name != "device"} == theirs


@pytest.mark.long
def test_compare_scores_the_same_and_says_what_cannot_be_done_on_a_placed_model(tmp_path):
    model = save_tiny(tmp_path / "dense")
    (tmp_path / "scored.txt").write_text(" ".join(f"w{i * 7 % 61}" for i in range(100)))
    methods = (
        "flap:owl@words",
        "elimination@words+sequential",
        "folding",
        "llm_pruner_element1:uniform@words",
    )
    ask = (
        "compare",
        model,
        *methods,
        "--calibration",
        f"words={written(tmp_path)}",
        "--ratios",
        0.5,
    )
    ask += ("--text", tmp_path / "scored.txt", "--window", 32, "--max-windows", 2)
    ask += ("--calibration-tokens", 256, "--calibration-window", 32, "--json")
    lines = []
    for place in ((), ("--device", "auto", "--max-memory", "cpu=60KB")):
        run(*ask, *place, "--out", tmp_path / f"{len(place)}.jsonl")
        lines.append(
            [
                json.loads(line)
                for line in (tmp_path / f"{len(place)}.jsonl").read_text().splitlines()
            ]
        )
    refusals = 0
    for mine, theirs in zip(*lines, strict=True):
        assert mine["error"] is None
        if theirs["error"] is None:
            assert mine["perplexity"] == theirs["perplexity"], mine["method"]
            assert mine["parameters"] == theirs["parameters"]
        else:
            refusals += 1
            assert theirs["error"].endswith(
                "needs all weights on one device, and `device` auto has placed them on several"
            )
    assert refusals == 2


def test_a_reload_that_differs_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    _, placed = both(stored(tmp_path / "dense"))
    pruned = prune(placed, ratio=0.5, blocks=CalibrationSet(BLOCKS, "data", {}))
    real = offload.write_shard

    def bent(path, tensors, rows):
        return real(path, tensors, lambda name: [rows_of + 1 for rows_of in rows(name)])

    monkeypatch.setattr(offload, "write_shard", bent)
    with pytest.raises(
        CheckpointError, match=r"was not saved: tensor model\.\S+ differs after a reload"
    ):
        pruned.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "cpu",
            "--max-memory 'cpu' is not a device and a size: give it as in cuda:0=20GiB,cpu=60GiB",
        ),
        ("cpu=much", "--max-memory 'cpu=much' is not a device and a size"),
        ("cpu=1GB;disk=2GB", "is not a device and a size"),
        ("cpu=1GB,cpu=2GB", "--max-memory names cpu twice"),
        ("cuda:77=1GB", "--max-memory names accelerator 77, and here are only"),
    ],
)
def test_a_wrong_max_memory_is_one_sentence(tmp_path, given, message):
    model = save_tiny(tmp_path / "dense")
    for command in (
        ("prune", model, "--ratio", 0.5, "--out", tmp_path / "out"),
        ("eval", model, "--text", written(tmp_path)),
    ):
        assert message in refused(*command, "--device", "auto", "--max-memory", given)


def test_limits_are_bytes_by_accelerate_s_names_of_devices():
    assert parse_max_memory("cuda:1=1.5GiB, cpu=60GB") == {1: 3 * 2**29, "cpu": 60 * 10**9}
    assert parse_max_memory("cpu=250MB,cuda:0=10") == {"cpu": 250 * 10**6, 0: 10}


def test_limits_without_auto_and_auto_where_nothing_is_placed_are_one_sentence(tmp_path):
    model = save_tiny(tmp_path / "dense")
    ask = ("prune", model, "--ratio", 0.5, "--out", tmp_path / "out")
    assert "--max-memory says how --device auto places weights, and the device is cpu" in refused(
        *ask, "--max-memory", "cpu=1GB"
    )
    stream = (*ask, "--stream", "--moments", "none", "--device", "auto")
    assert "--stream leaves all weights on disk, so there is nothing to place" in refused(*stream)


def test_auto_without_accelerate_is_one_sentence_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate.utils", None)
    model = save_tiny(tmp_path / "dense")
    said = refused("prune", model, "--ratio", 0.5, "--out", tmp_path / "out", "--device", "auto")
    assert "--device auto places weights with accelerate: pip install 'prunenet[large]'" in said


def test_a_model_that_fits_one_device_is_an_ordinary_one(tmp_path):
    model = load_model(stored(tmp_path / "dense"), device="auto", max_memory="cpu=1GB")
    assert not is_placed(model)
    assert where(model) == "cpu"


@pytest.mark.gpu
def test_a_model_larger_than_its_limit_is_pruned_within_one_layer_and_one_batch_of_it(tmp_path):
    layers, d_ff = 32, 2816
    config = AutoConfig.for_model(
        "llama", hidden_size=1024, intermediate_size=d_ff, num_hidden_layers=layers, vocab_size=2048
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    weights = sum(path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors"))
    limit, blocks = (
        weights // 4,
        torch.randint(2048, (16, 256), generator=torch.Generator().manual_seed(0)),
    )
    torch.cuda.reset_peak_memory_stats()
    placed = load_model(tmp_path / "dense", device="auto", max_memory=f"cuda:0={limit},cpu=8GB")
    assert "cuda:0" in where(placed)
    pruned = prune(placed, ratio=0.5, blocks=CalibrationSet(blocks, "data", {}))
    pruned.save_pretrained(tmp_path / "out")
    # the elimination and the refit hold some float64 d_ff x d_ff
    allowed = limit + 3 * (weights // layers) + 8 * (8 * d_ff**2)
    assert torch.cuda.max_memory_allocated() < allowed < weights
