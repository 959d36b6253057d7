"""Attention without heads: a layer's attention may lose its last group, and then writes nothing."""

import copy
import json

import pytest
import torch
from families import D_MODEL, provenance, random_keep, token_ids
from test_heads import CUTTABLE, FACTS, GROUPS, WHOLE, logits, masks, same_state, saved, tiny
from transformers import AutoModel, AutoModelForCausalLM

import prunenet
from prunenet.checkpoints.exports.gguf_form import form_of, hyperparameters, parts
from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.save import export_padded, load_head_masks, load_provenance, save_pruned
from prunenet.envs.budget import game_of
from prunenet.evaluation.shares import allocated, layers_left
from prunenet.evaluation.shares import masks as masks_of
from prunenet.evaluation.units import units_of
from prunenet.models import modeling
from prunenet.models.depth import without_layers
from prunenet.models.heads import attentions, counting_layers, group_counts
from prunenet.models.layers import count_parameters
from prunenet.models.surgery import masking, narrowed, zero_padded
from prunenet.policies import refine as refining
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.methods import Evidence, cut
from prunenet.policies.options import PruneOptions
from prunenet.recover.full import closed, opened
from prunenet.recover.lora import adapted, merged
from prunenet.runtime.files import CheckpointError
from prunenet.text.calibration import CalibrationSet

COUNTS = [2, 0, 3]
BLOCKS = CalibrationSet(token_ids(10, 24), "self", {"text": "random"})


def counts_of(model) -> list[int]:
    """No heads wherever none is needed."""
    counting = counting_layers(model.config)
    return [2 if layer in counting else 0 for layer in range(3)]


@pytest.fixture(scope="module")
def dense():
    return tiny("llama", bias=False)


@pytest.fixture(scope="module")
def checkpoint(dense, tmp_path_factory):
    """A folder, the narrow model and its masks."""
    folder = tmp_path_factory.mktemp("without") / "out"
    return folder, *saved(folder, dense, COUNTS)


# --- surgery ---


@pytest.mark.parametrize("model_type", CUTTABLE)
def test_attention_without_heads_computes_what_the_masked_dense_model_computes(model_type) -> None:
    model = tiny(model_type)
    counts = counts_of(model)
    groups = masks(counts)
    narrow = narrowed(model, WHOLE, groups)
    assert group_counts(narrow) == counts
    ids, seen = token_ids(), torch.ones_like(token_ids())
    seen[0, :4] = 0  # padded on the left
    settings = {"attention_mask": seen, "max_new_tokens": 3, "do_sample": False}
    with masking(model, WHOLE, groups):
        expected = logits(model)
        texts = [model.generate(ids, num_beams=n, use_cache=False, **settings) for n in (1, 2)]
    torch.testing.assert_close(logits(narrow), expected, atol=3e-5, rtol=0)
    assert (expected - logits(model)).abs().max() > 0.05, "attention must matter"
    for cache in ("dynamic", "static"):
        assert narrow.generate(ids, cache_implementation=cache, **settings).equal(texts[0])
    assert narrow.generate(ids, num_beams=2, **settings).equal(texts[1])
    gone = attentions(model)[-1].group_parameters * GROUPS * counts.count(0)
    gone += attentions(model)[0].group_parameters * sum(GROUPS - n for n in counts if n)
    assert count_parameters(model)[0] - count_parameters(narrow)[0] == gone


def test_the_first_layer_of_each_kind_of_attention_keeps_a_group() -> None:
    model = tiny("gemma2")
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    for layer in (0, 1):
        counts = [0 if layer == number else 2 for number in range(3)]
        with pytest.raises(ValueError, match=f"layer {layer}: .* where caches count tokens"):
            narrowed(model, WHOLE, masks(counts))
    narrow = narrowed(model, WHOLE, masks([2, 2, 0]))
    ids = token_ids(length=16)  # beyond the window of 8
    with torch.no_grad():
        first = narrow(ids[:, :11])
        rest = narrow(ids[:, 11:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, narrow(ids).logits[:, 11:], atol=3e-5, rtol=0)


def test_a_layer_in_front_of_attention_without_heads_does_not_go(dense) -> None:
    narrow = narrowed(dense, WHOLE, masks(COUNTS))
    with pytest.raises(prunenet.UnsupportedArchitecture, match="cannot go"):
        without_layers(narrow, torch.tensor([False, True, True]))
    fewer = without_layers(narrow, torch.tensor([True, True, False]))
    assert group_counts(fewer) == COUNTS[:2]


def test_what_has_lost_its_attention_is_cut_again_and_filled_up_again(dense) -> None:
    once = narrowed(dense, WHOLE, masks(COUNTS))
    first = masks([2, 2, 3])
    final = [mask[outer] for mask, outer in zip(masks(COUNTS), first, strict=True)]
    twice = narrowed(narrowed(dense, WHOLE, first), WHOLE, final)
    assert same_state(once, twice)
    assert once.config.to_dict() == twice.config.to_dict()
    keep = random_keep([16, 40, 1])
    later = narrowed(once, keep)
    assert same_state(later, narrowed(dense, keep, masks(COUNTS)))
    padded = zero_padded(once)
    assert type(padded) is type(dense)
    assert {type(layer.self_attn) for layer in padded.model.layers} == {
        type(dense.model.layers[0].self_attn)
    }
    torch.testing.assert_close(logits(padded), logits(once), atol=3e-5, rtol=0)
    with pytest.raises(ValueError, match=r"every layer has some, and layers \[1\] have none"):
        cut(Evidence(once), "magnitude", 0.3, heads=True)


@pytest.mark.long
def test_a_placed_model_loses_attention_like_one_in_memory(dense, checkpoint, tmp_path) -> None:
    pytest.importorskip("accelerate")
    dense.save_pretrained(tmp_path / "dense")
    placed = load_model(tmp_path / "dense", device="auto", max_memory="cpu=10KB")
    groups = masks(COUNTS)
    narrow = narrowed(placed, WHOLE, groups)
    assert logits(narrow).equal(logits(narrowed(dense, WHOLE, groups)))
    assert logits(placed).equal(logits(dense))
    again = load_model(checkpoint[0], device="auto", max_memory="cpu=10KB")
    assert logits(again).equal(logits(checkpoint[1]))
    filled = logits(zero_padded(again))
    torch.testing.assert_close(filled, logits(checkpoint[1]), atol=3e-5, rtol=0)


# --- checkpoints ---


def test_a_checkpoint_reloads_bit_equal_and_says_where_attention_is_gone(
    checkpoint, tmp_path
) -> None:
    folder, narrow, keep, groups = checkpoint
    again = load_model(folder)
    assert same_state(again, narrow)
    assert logits(copy.deepcopy(again)).equal(logits(narrow))
    assert all(map(torch.equal, load_head_masks(folder), groups))
    assert load_provenance(folder).groups == tuple(COUNTS)
    assert "0 to 3 in a layer, 5 in all. No attention in layers 1." in (
        folder / "README.md"
    ).read_text(encoding="utf-8")
    save_pruned(narrow, tmp_path / "again", keep, load_provenance(folder), groups=groups)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_the_code_beside_it_loads_it_with_and_without_its_head(checkpoint, tmp_path, monkeypatch):
    folder, narrow, _, _ = checkpoint
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    assert logits(model).equal(logits(narrow))
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        states = bare(token_ids()).last_hidden_state
        assert states.equal(narrow.model(token_ids()).last_hidden_state)


def test_groups_of_zeros_stand_for_what_is_gone_in_a_stock_checkpoint(checkpoint, tmp_path) -> None:
    folder, narrow, _, groups = checkpoint
    export_padded(folder, tmp_path / "padded")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "padded").eval()
    torch.testing.assert_close(logits(stock), logits(narrow), atol=3e-5, rtol=0)
    assert all(map(torch.equal, load_head_masks(tmp_path / "padded"), groups))


def test_numbers_of_groups_below_zero_or_beyond_what_is_stored_are_refused(
    checkpoint, tmp_path
) -> None:
    record = json.loads((checkpoint[0] / "prunenet.json").read_text())
    for spoilt, message in (([2, -1, 3], "-1"), ([2, 0, 5], "at most as many as before")):
        with pytest.raises(ValueError, match=message):
            Provenance.from_json(json.dumps(record | {"groups": spoilt}))
    fields = json.loads((checkpoint[0] / "config.json").read_text())
    for number in (-1, 1, 10**9):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in checkpoint[0].iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "config.json").unlink()
        spoilt = copy.deepcopy(fields)
        spoilt["per_layer_config"]["1"]["num_key_value_heads"] = number
        (folder / "config.json").write_text(json.dumps(spoilt))
        with pytest.raises(CheckpointError):
            load_model(folder)


def test_a_first_layer_without_heads_is_refused_by_the_code_beside_a_checkpoint(dense) -> None:
    config = narrowed(dense, WHOLE, masks(COUNTS)).config
    config.per_layer_config = {
        layer: {"num_key_value_heads": count} for layer, count in enumerate([0, 2, 3])
    }
    with pytest.raises(ValueError, match="layer 0 has no heads, and caches count tokens there"):
        modeling.PerLayerLlamaForCausalLM(config)


# --- exports ---


def test_llama_cpp_is_told_of_no_heads_and_given_no_tensors_of_them(dense) -> None:
    narrow = narrowed(dense, WHOLE, masks(COUNTS))
    form = form_of(narrow)
    told = hyperparameters(narrow, form)
    assert told["attention.head_count"] == [4, 0, 6]
    assert told["attention.head_count_kv"] == COUNTS
    names = [part.name for part in parts(narrow, form) if ".1." in part.name]
    assert not [name for name in names if "attn" in name]
    assert len(names) == 4, "a norm, and the three matrices of the FFN"


def test_what_llama_cpp_cannot_say_without_attention_is_refused() -> None:
    biased = narrowed(tiny("llama", bias=True), WHOLE, masks(COUNTS))
    with pytest.raises(CheckpointError, match="layer 1 has no heads and still writes its bias"):
        parts(biased, form_of(biased))
    fused = tiny("qwen3", bias=False)
    fused.config.tie_word_embeddings = True
    with pytest.raises(CheckpointError, match=r"openelm .* attention in every layer"):
        form_of(narrowed(fused, WHOLE, masks(COUNTS)))


# --- recovery ---


def test_updates_leave_out_what_is_empty_and_training_of_all_weights_takes_it(dense) -> None:
    narrow = narrowed(dense, WHOLE, masks(COUNTS))
    student = adapted(narrow, 4, 0)
    assert not any("layers.1.self_attn" in n for n, _ in student.named_parameters() if "lora" in n)
    assert same_state(merged(student), narrow)
    learner = opened(narrow, embeddings=False)
    learned = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    loss = learner(input_ids=token_ids()).logits.logsumexp(-1).mean()
    torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
    assert same_state(closed(learner, narrow), narrow)


# --- allocation ---


def test_units_of_a_model_without_some_attention_have_none_there(dense) -> None:
    narrow = narrowed(dense, WHOLE, masks(COUNTS))
    found = [(unit.structure, unit.layer) for unit in units_of(narrow, 2)]
    assert [found.count(("heads", layer)) for layer in range(3)] == COUNTS
    assert [found.count(("attention", layer)) for layer in range(3)] == [1, 0, 1]
    game = game_of(narrow, token_ids(2, 12), structures=("channels", "heads", "attention"), bins=2)
    _, groups = masks_of(game, torch.ones(len(game.slots)), [torch.ones(48)] * 3)
    assert [len(mask) for mask in groups] == COUNTS


def test_layers_in_which_tokens_are_counted_keep_a_group_and_stay(dense) -> None:
    names = ("channels", "heads", "attention", "layers")
    game = game_of(dense, token_ids(2, 12), structures=names, bins=2, cost="kv-bytes")
    wanted = torch.full((len(game.slots),), -50.0)
    scores = [torch.ones(48)] * 3
    for row in (
        wanted,
        wanted.masked_fill(torch.tensor([s.structure == "layers" for s in game.slots]), 50),
    ):
        shares = allocated(game, row, 0.75)[0]
        assert layers_left(game, shares)[0]
        _, groups = masks_of(game, shares, scores)
        assert int(groups[0].sum()) >= 1
    for refused in (
        lambda: game_of(dense, token_ids(2, 12), structures=("channels", "attention"), bins=2),
        lambda: refining.Refining(structures=("channels", "attention")),
    ):
        with pytest.raises(ValueError, match="name heads among the structures too"):
            refused()


@pytest.mark.long
@pytest.mark.parametrize("budget", ["params", pytest.param("kv-bytes", marks=pytest.mark.slow)])
def test_attention_that_hardly_matters_goes_in_prune(budget, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(refining, "PREDICTED", (3, 4))
    monkeypatch.setattr(refining, "MEASURED", (1, 4))
    model = tiny("llama", bias=False)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(0.001)
    policy = Policy.untrained(PolicyConfig(hidden=(8,)))
    asked = PruneOptions(
        ratio=0.34 if budget == "kv-bytes" else 0.5,  # its attention is 0.44 of all channels
        widths="refined",
        structures="channels, attention",
        budget=budget,
        round_to=4,
        channels="policy",
    )
    assert asked.parts == ("channels", "heads", "attention")
    made = prunenet.prune(model, policy, asked, blocks=BLOCKS)
    story = made.provenance
    assert story.groups[1] == 0
    assert not made.groups[1].any()
    assert story.how["structures"] == "channels,heads,attention"
    group = attentions(model)[0]
    removed = count_parameters(model)[0] - count_parameters(made.model)[0]
    if budget == "params":
        assert 0 <= removed - 0.5 * 3 * 48 * 3 * D_MODEL < 4 * 3 * D_MODEL
    else:
        assert story.how["reached"] == pytest.approx(1 - sum(story.groups) / (3 * GROUPS))
        assert removed == group.group_parameters * (3 * GROUPS - sum(story.groups))
    made.save_pretrained(tmp_path / "out")  # verifies the reload, logits included
    again = load_model(tmp_path / "out")
    assert isinstance(again.model.layers[1].self_attn, modeling.NoHeads)
    command = (tmp_path / "out" / "README.md").read_text()
    assert f"--structures channels,heads,attention --budget {budget}" in command


def test_a_record_of_what_lost_its_attention_before_counts_from_there(dense) -> None:
    once = narrowed(dense, WHOLE, masks(COUNTS))
    later = narrowed(once, random_keep([24] * 3))
    assert provenance(once, later).groups is None
    assert Provenance.of(dense, later, seed=None, **FACTS).groups == tuple(COUNTS)
