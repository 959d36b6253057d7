"""One budget over channels, heads and whole layers in `prune`: met, said, saved, reloaded."""

import dataclasses
import json
from dataclasses import replace
from functools import partial

import families
import pytest
import torch
from families import D_MODEL, provenance, random_keep, tiny_model, token_ids
from test_cli import refused, save_tiny

import prunenet
from prunenet.checkpoints.identity import identify
from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.model_card import card_of
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.records import (
    load_head_masks,
    load_layer_mask,
    load_masks,
    load_provenance,
)
from prunenet.checkpoints.save import export_padded, save_pruned
from prunenet.envs.budget import game_of
from prunenet.evaluation import latency
from prunenet.evaluation.costs import unit_costs
from prunenet.evaluation.interaction import units_of
from prunenet.evaluation.latency import LatencyTable, latency_table, measure_latency
from prunenet.evaluation.page import _of_all
from prunenet.evaluation.shares import allocated, cost, damages, layers_left
from prunenet.evaluation.slots import Episodes
from prunenet.models.depth import without_layers
from prunenet.models.layers import count_parameters
from prunenet.models.surgery import masking, narrowed
from prunenet.policies import refine as refining
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.options import PruneOptions
from prunenet.policies.refine import Refining, check_refined, refine
from prunenet.recover.options import RecoverText, Tuning
from prunenet.runtime.files import CheckpointError
from prunenet.text.calibration import CalibrationSet

LAYERS = 5
CHANNEL = 3 * D_MODEL
BLOCKS = CalibrationSet(token_ids(10, 24), "self", {"text": "random"})
PLAIN = {"widths": "refined", "round_to": 4, "refit": "off", "channels": "policy"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(refining, "PREDICTED", (3, 4))
    monkeypatch.setattr(refining, "MEASURED", (1, 4))


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families._FIELDS, "num_hidden_layers", LAYERS)
        made = tiny_model("llama")
    with torch.no_grad():  # a layer that hardly matters
        made.model.layers[2].self_attn.o_proj.weight.mul_(0.01)
        made.model.layers[2].mlp.down_proj.weight.mul_(0.01)
    return made


@pytest.fixture(scope="module")
def policy():
    return Policy.untrained(PolicyConfig(hidden=(8,)))


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.long
def test_a_layer_that_hardly_matters_goes_and_the_parameters_are_met(model, policy, tmp_path):
    made = prunenet.prune(
        model, policy, blocks=BLOCKS, ratio=0.4, structures="layers,heads,channels", **PLAIN
    )
    story = made.provenance
    assert story.layers == (0, 1, 3, 4)
    assert story.dense_layers == LAYERS
    ffn = CHANNEL * 48 * LAYERS
    removed = count_parameters(model)[0] - count_parameters(made.model)[0]
    assert removed == story.parameters_before - story.parameters_after
    assert 0 <= removed - 0.4 * ffn < 4 * CHANNEL
    assert story.how["reached"] == pytest.approx(removed / ffn)
    assert story.how["structures"] == "channels,heads,layers"
    # masks over the dense model, in which the layer is skipped
    whole = torch.ones(48, dtype=torch.bool)
    keep = [*made.keep[:2], whole, *made.keep[2:]]
    heads = torch.ones(2, dtype=torch.bool)
    groups = [*made.groups[:2], heads, *made.groups[2:]]
    with masking(model, keep, groups, torch.arange(LAYERS) != 2):
        torch.testing.assert_close(logits(made.model), logits(model), atol=3e-5, rtol=0)

    made.save_pretrained(tmp_path / "out")  # verifies the reload, logits included
    again = load_model(tmp_path / "out")
    assert again.config.num_hidden_layers == LAYERS - 1
    assert load_layer_mask(tmp_path / "out").tolist() == [True, True, False, True, True]
    assert all(map(torch.equal, load_masks(tmp_path / "out"), made.keep))
    assert all(map(torch.equal, load_head_masks(tmp_path / "out") or made.groups, made.groups))
    assert load_provenance(tmp_path / "out") == story
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Decoder layers left: 4 of 5; gone: 2." in card
    assert "--ratio 0.4 --widths refined --structures channels,heads,layers --budget params" in card
    shared = {k: v for k, v in story.how.items() if k not in ("structures", "budget", "reached")}
    heads = {"dense_groups": (2,) * 4, "groups": (1, 2, 2, 2), "group_heads": 2}
    exact = card_of(replace(story, how=shared, layers=None, dense_layers=None, **heads))
    assert "--ratio 0.4 --widths refined --structures channels,heads --channels" in exact
    of_all = card_of(replace(story, how={**story.how, "budget": "flops", "of_all": True}))
    assert "--params 0.4 --widths refined --structures channels,heads,layers --budget" in of_all


@pytest.mark.long
def test_a_record_whose_masks_name_other_layers_is_refused(model, policy, tmp_path):
    made = prunenet.prune(
        model, policy, blocks=BLOCKS, ratio=0.4, structures="channels,layers", **PLAIN
    )
    made.save_pretrained(tmp_path / "out")
    record = tmp_path / "out" / "prunenet.json"
    fields = json.loads(record.read_text())
    record.write_text(json.dumps(fields | {"layers": [0, 1, 2, 4]}))
    with pytest.raises(CheckpointError, match=r"prunenet_masks.safetensors is missing or damaged"):
        load_layer_mask(tmp_path / "out")
    for spoilt in ([0, 1, 1, 4], [0, 1, 3, 9], [0, 1]):
        with pytest.raises(ValueError, match="layers left are numbers that rise"):
            dataclasses.replace(made.provenance, layers=tuple(spoilt))
    assert Provenance.from_json(made.provenance.to_json()) == made.provenance


@pytest.mark.slow
def test_a_refit_behind_the_layers_that_go_repairs_and_repeats(model, policy):
    asked = PLAIN | {"refit": "layerwise", "structures": "channels,layers", "ratio": 0.4}
    first, second = (prunenet.prune(model, policy, blocks=BLOCKS, **asked) for _ in range(2))
    assert first.provenance.layers == (0, 1, 3, 4)
    assert logits(first.model).equal(logits(second.model))
    plain = prunenet.prune(model, policy, blocks=BLOCKS, **asked | {"refit": "off"})
    dense = logits(model)
    errors = [(logits(made.model) - dense).square().mean() for made in (first, plain)]
    assert errors[0] < errors[1]


@pytest.mark.long
def test_layers_alone_go_until_the_budget_is_met_from_below(model, policy):
    made = prunenet.prune(model, policy, blocks=BLOCKS, ratio=0.3, structures="layers", **PLAIN)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    ffn = CHANNEL * 48 * LAYERS
    gone = -(-0.3 * ffn // layer)
    assert made.provenance.parameters_before - made.provenance.parameters_after == gone * layer
    assert made.provenance.how["reached"] == pytest.approx(gone * layer / ffn)
    assert set(made.provenance.widths) == {48}


@pytest.mark.long
def test_the_revision_is_that_of_the_model_with_all_its_layers(model, policy, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    whole = load_model(tmp_path / "dense")
    made = prunenet.prune(whole, policy, blocks=BLOCKS, ratio=0.3, structures="layers", **PLAIN)
    assert made.provenance.layers is not None
    assert (made.provenance.base_model, made.provenance.revision) == identify(tmp_path / "dense")


@pytest.mark.long
@pytest.mark.parametrize(
    ("budget", "structures"),
    [
        pytest.param("flops", "channels,heads", marks=pytest.mark.slow),
        ("kv-bytes", "channels,heads"),
        pytest.param("kv-bytes", "heads,layers", marks=pytest.mark.slow),
    ],
)
def test_other_budgets_reach_their_ratio(model, policy, budget, structures):
    made = prunenet.prune(
        model, policy, blocks=BLOCKS, ratio=0.4, structures=structures, budget=budget, **PLAIN
    )
    reached = made.provenance.how["reached"]
    if budget == "flops":
        assert 0.4 <= reached < 0.4 + 4 / (48 * LAYERS)
    else:  # 10 groups in all
        assert reached == pytest.approx(0.4)
        left = made.groups or [torch.ones(2)] * len(made.keep)
        assert sum(int(mask.sum()) for mask in left) == 6
        assert all(bool(mask.all()) for mask in made.keep), "channels hold no cache"


@pytest.mark.slow
def test_a_share_of_all_that_layers_cost_is_asked_by_params(model, policy):
    asked = {"structures": "channels,heads", "budget": "flops", **PLAIN}
    made = prunenet.prune(model, policy, blocks=BLOCKS, params=0.3, **asked)
    assert 0.3 <= made.provenance.how["reached"] < 0.3 + 4 / (48 * LAYERS)
    assert made.provenance.ratio == 0.3
    assert made.provenance.how["of_all"]
    with pytest.raises(ValueError, match="`active` is a share of parameters"):
        PruneOptions(active=0.3, **asked)


def test_what_structures_cannot_give_is_one_sentence(model, policy):
    with pytest.raises(ValueError, match=r"at most 50.0% of the budget 'kv-bytes' can go"):
        refine(
            model,
            BLOCKS,
            policy.scores(model),
            [0.0] * LAYERS,
            0.7,
            Refining(structures=("channels", "heads"), budget="kv-bytes"),
        )
    with pytest.raises(ValueError, match=r"at most 0.0% of the budget 'kv-bytes' can go"):
        refine(
            model,
            BLOCKS,
            policy.scores(model),
            [0.0] * LAYERS,
            0.3,
            Refining(budget="kv-bytes"),
        )


@pytest.mark.parametrize(
    ("family", "ratio", "structures", "message"),
    [
        ("llama", 0.95, ("channels",), r"at most 83.3% of the budget 'params' can go"),
        ("llama", 0.95, ("heads",), r"at most 33.3% of the budget 'params' can go"),
        ("phi3", 0.3, ("channels", "heads"), "heads of model type 'phi3' cannot be cut"),
        ("one layer", 0.3, ("layers",), "and this one has no other: leave layers out"),
    ],
)
def test_what_shapes_rule_out_is_said_before_any_text_is_read(family, ratio, structures, message):
    model = tiny_model(family.replace("one layer", "llama"))
    if family == "one layer":
        model = without_layers(model, torch.tensor([True, False, False]))
    size = PruneOptions(ratio=ratio, widths="refined", structures=",".join(structures))
    with pytest.raises(ValueError, match=message):
        check_refined(model, size, ratio)
    with pytest.raises(ValueError, match=message):
        refine(model, BLOCKS, [], [], ratio, Refining(structures=structures))


def test_the_command_writes_no_text_for_a_cut_that_cannot_be(tmp_path):
    base = save_tiny(tmp_path / "dense")
    asked = ("--ratio", 0.95, "--widths", "refined", "--structures", "heads")
    said = refused("prune", base, "--policy", "llama", *asked, "--out", tmp_path / "out")
    assert "at most 33.3% of the budget 'params'" in said
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"structures": "channels,joists"}, "unknown structures 'joists'; it is one of channels"),
        (
            {"structures": "channels,attention", "widths": "auto"},
            "only refined widths cut channels,a",
        ),
        ({"structures": "layers", "widths": "auto"}, "only refined widths cut layers; say"),
        ({"budget": "flops", "widths": "uniform"}, "only refined widths cut by flops; say"),
        ({"budget": "kv-bytes"}, "channels hold nothing of the KV cache; say heads too"),
        (
            {"budget": "joules"},
            "`budget` must be one of params, active, flops, kv-bytes, latency, got 'joules'",
        ),
    ],
)
def test_choices_that_do_not_go_together_are_one_sentence(choices, message):
    with pytest.raises(ValueError, match=message):
        PruneOptions(**{"ratio": 0.3, "widths": "refined"} | choices)


# --- the rules ---


@pytest.fixture(scope="module")
def game(model):
    return game_of(model, token_ids(2, 12), structures=("channels", "heads", "layers"), bins=4)


def test_layers_pay_in_full_and_only_come_back_as_the_budget_grows(game):
    last = None
    offsets = torch.randn(1, len(game.slots), generator=torch.Generator().manual_seed(0))
    for ratio in (0.7, 0.5, 0.3, 0.1, 0.0):
        shares = allocated(game, offsets, ratio)
        left = layers_left(game, shares[0])
        assert last is None or bool((left | ~last).all())
        last = left
        assert float(cost(game, shares)) <= (1 - ratio) * game.total * (1 + 1e-9)
        for number, slot in enumerate(game.slots):
            assert bool(left[slot.layer]) or float(shares[0, number]) == 0
    assert bool(last.all())


def test_a_gone_layer_is_priced_by_its_own_unit(game):
    episodes = Episodes(game, 1, 0.3)
    for slot in game.slots:
        gone = slot.structure == "layers" and slot.layer == 2
        episodes.play(torch.tensor([0 if gone else len(slot.units)]))
    shares = torch.stack([episodes.kept[:, list(slot.units)].mean(1) for slot in game.slots], 1)
    shares = shares.double()
    torch.testing.assert_close(damages(game, shares), episodes.damage)
    shares[:, [slot.layer == 2 for slot in game.slots]] = 0  # as `settled` has them
    torch.testing.assert_close(damages(game, shares), episodes.damage)
    assert float(episodes.left) == pytest.approx(0, abs=1e-6)


# --- latency ---


def test_a_table_is_measured_once_and_costs_are_time_that_goes_away(model, monkeypatch):
    first = latency_table(model)
    monkeypatch.setattr(latency, "measure_latency", None)
    assert latency_table(model) == first
    assert first.widths == (6, 12, 18, 24, 30, 36, 42, 48)
    assert first.groups == (0, 1, 2)
    assert first.heads[-1] == first.channels[-1] == first.whole > 0


@pytest.mark.slow
def test_a_damaged_table_is_measured_again(model):
    first = latency_table(model)
    path = latency.table_path(model)
    path.write_text("{}")
    assert latency_table(model).widths == first.widths
    assert json.loads(path.read_text())["widths"] == list(first.widths)


def test_time_is_a_median_of_rounds_and_a_wider_layer_is_never_faster(model):
    ticks = iter(range(10**6))
    table = measure_latency(model, rounds=2, clock=lambda: float(next(ticks)))
    assert set(table.channels) == set(table.heads) == {1e6}
    assert latency._rising([3.0, 1.0, 2.0, 5.0, 4.0]) == (2.0, 2.0, 2.0, 4.5, 4.5)


TABLE = LatencyTable((12, 24, 36, 48), (40.0, 40.0, 70.0, 100.0), (1, 2), (60.0, 100.0))


def test_costs_by_latency_bend_where_the_table_does(model):
    units = units_of(model, 4)
    prices = dict(zip(units, unit_costs(units, model.config, "latency", table=TABLE), strict=True))
    first = [price for unit, price in prices.items() if unit.layer == 0]
    assert first == [30, 30, 0, 0, 40, 40, 80, 100]
    with pytest.raises(ValueError, match="costs by latency are measured"):
        unit_costs(units, model.config, "latency")


@pytest.mark.long
def test_where_only_a_layer_can_meet_the_budget_one_goes_and_heads_stay(model, policy, monkeypatch):
    slow = LatencyTable((24, 48), (98.0, 100.0), (1, 2), (99.0, 100.0))
    monkeypatch.setattr(refining, "latency_table", lambda model: slow)
    asked = Refining(structures=("channels", "heads", "layers"), budget="latency", of_all=True)
    found = refine(model, BLOCKS, policy.scores(model), [0.0] * LAYERS, 0.1, asked)
    assert found.layers.tolist().count(False) == 1
    assert found.reached == pytest.approx(1 / LAYERS)
    left = found.behind_layers()
    assert all(bool(mask.all()) for mask in (*left.keep, *left.groups))


@pytest.mark.slow
def test_a_cut_by_latency_reaches_the_time_that_the_table_predicts(model, policy, monkeypatch):
    monkeypatch.setattr(refining, "latency_table", lambda model: TABLE)
    asked = {"structures": "channels,heads,layers", "budget": "latency", "ratio": 0.4}
    made = prunenet.prune(model, policy, blocks=BLOCKS, **asked, **PLAIN)
    counts = made.provenance.groups or [2] * len(made.keep)
    time = sum(TABLE.at(*size) for size in zip(made.provenance.widths, counts, strict=True))
    saved = LAYERS * TABLE.whole - time
    assert made.provenance.how["reached"] == pytest.approx(saved / (LAYERS * 60), rel=1e-6)
    # 4 channels of the steepest part are 10 of the 300 microseconds that channels cost
    assert 0.4 <= made.provenance.how["reached"] + 1e-9 < 0.4 + 10 / 300 + 1e-6


# --- what comes behind a cut ---


@pytest.mark.slow
def test_a_model_without_a_layer_is_recovered_and_padded_with_its_masks(tmp_path):
    base = save_tiny(tmp_path / "dense")
    dense, keep = load_model(base), random_keep([16, 40])
    fewer = without_layers(dense, torch.tensor([True, False, True]))
    narrow = narrowed(fewer, keep)
    name, revision = identify(str(base))
    story = dataclasses.replace(
        provenance(fewer, narrow, base_model=name, revision=revision),
        parameters_before=count_parameters(dense)[0],
        dense_layers=3,
        layers=(0, 2),
    )
    save_pruned(narrow, tmp_path / "pruned", keep, story)
    (tmp_path / "text.txt").write_text(" ".join(f"w{n * n % 61}" for n in range(3000)))
    text = RecoverText(moments="data", text=str(tmp_path / "text.txt"), tokens=1024)
    recover = partial(prunenet.recover, tmp_path / "pruned", teacher=base, text=text)
    found = recover(tmp_path / "out", Tuning(updates="full", batch=2, micro_batch=2, steps=4))
    assert found.after <= found.before
    export_padded(tmp_path / "pruned", tmp_path / "padded")
    for out in (tmp_path / "out", tmp_path / "padded"):
        assert load_layer_mask(out).tolist() == [True, False, True]
        assert all(map(torch.equal, load_masks(out), keep))
        assert load_provenance(out).layers == (0, 2)
    with pytest.raises(ValueError, match="of the same width and depth"):
        recover(tmp_path / "other", Tuning(updates="full", hidden=0.1, steps=4))


def test_figures_show_a_layer_that_went_as_one_of_no_channels(model, policy):
    narrow = without_layers(model, torch.arange(LAYERS) != 2)
    story = dataclasses.replace(
        provenance(narrow, narrow), dense_layers=LAYERS, layers=(0, 1, 3, 4)
    )
    assert _of_all(story, story.widths, 0) == (48, 48, 0, 48, 48)
