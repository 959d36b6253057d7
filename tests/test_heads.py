"""Attention heads as a second structure: surgery, masking, checkpoints, the methods' scores, one
budget with FFN channels.
"""

import copy
import json

import families
import pytest
import torch
from families import D_FF, D_MODEL, FAMILIES, LAYERS, random_keep, tiny_model, token_ids
from transformers import AutoModelForCausalLM

from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.save import (
    export_padded,
    load_head_masks,
    load_masks,
    load_provenance,
    save_pruned,
)
from prunenet.models import modeling
from prunenet.models.architectures import ARCHITECTURES, UnsupportedArchitecture
from prunenet.models.heads import attentions, group_counts, out_linears
from prunenet.models.layers import count_parameters, decoder_layers
from prunenet.models.surgery import masking, narrowed
from prunenet.policies.methods import METHODS, WITH_HEADS, Budget, Evidence, cut, pruned_model
from prunenet.policies.methods.evidence import gradients, structures
from prunenet.policies.methods.papers import flap, saap
from prunenet.runtime.files import CheckpointError
from prunenet.text.calibration import CalibrationSet

CUTTABLE = [name for name in FAMILIES if ARCHITECTURES[name].attention_in]
METHODS_WITH_HEADS = [name for name, row in METHODS.items() if row.with_heads is not None]
# of 2 query heads each; Llama's configuration refuses 3 groups: 6 heads do not divide hidden_size
# 32
GROUPS, HEAD_DIM = 4, 8
WHOLE = [torch.ones(D_FF, dtype=torch.bool)] * LAYERS
COUNTS = {"uniform": [2] * LAYERS, "per-layer": [1, 4, 3], "refused": [3] * LAYERS}
FACTS = {
    "base_model": "tiny",
    "revision": "0",
    "policy": "ours",
    "policy_sha256": None,
    "regime": "weights",
    "ratio": 0.3,
}
BLOCKS = CalibrationSet(token_ids(6, 20), "data", {})

each_counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
each_family = pytest.mark.parametrize("model_type", CUTTABLE)


def tiny(model_type: str = "llama", *, bias: bool = True, layers: int = LAYERS):
    """A tiny model with 4 groups of 2 query heads."""
    fields = {
        "num_attention_heads": 2 * GROUPS,
        "num_key_value_heads": GROUPS,
        "num_hidden_layers": layers,
    }
    with pytest.MonkeyPatch.context() as patch:
        for field, number in fields.items():
            patch.setitem(families._FIELDS, field, number)
        return tiny_model(model_type, bias=bias)


def masks(counts: list[int]) -> list[torch.Tensor]:
    return random_keep(counts, GROUPS)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def same_state(first, second) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def saved(folder, dense, counts, widths=(16, 40, 8)):
    keep, groups = random_keep(list(widths)), masks(counts)
    narrow = narrowed(dense, keep, groups)
    save_pruned(
        narrow, folder, keep, Provenance.of(dense, narrow, seed=None, **FACTS), groups=groups
    )
    return narrow, keep, groups


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence(tiny(), BLOCKS)


@pytest.fixture(scope="module")
def nine_layers() -> Evidence:
    """For methods that leave layers whole."""
    return Evidence(tiny(layers=9), BLOCKS)


# --- surgery ---


@each_family
@each_counts
def test_a_model_without_heads_computes_what_the_masked_dense_model_computes(
    model_type, counts
) -> None:
    dense, keep, groups = tiny(model_type), random_keep([16, 40, 1]), masks(counts)
    before = copy.deepcopy(dense)
    narrow = narrowed(dense, keep, groups)
    with masking(dense, keep, groups):
        masked = logits(dense)
    torch.testing.assert_close(logits(narrow), masked, atol=3e-5, rtol=0)
    with masking(dense, keep):
        assert (masked - logits(dense)).abs().max() > 0.05, (
            "the heads must matter, or the comparison says nothing"
        )
    assert group_counts(narrow) == counts
    assert same_state(dense, before)
    assert dense.config.to_dict() == before.config.to_dict()
    removed = [
        a.group_parameters * (GROUPS - n) for a, n in zip(attentions(dense), counts, strict=True)
    ]
    assert count_parameters(narrowed(dense, keep))[0] - count_parameters(narrow)[0] == sum(removed)


@each_counts
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_is_generation_without(counts, attention, cache) -> None:
    dense = tiny("qwen3")
    dense.set_attn_implementation(attention)
    ids, settings = (
        token_ids(batch=1),
        {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False},
    )
    settings["attention_mask"] = torch.ones_like(ids)
    with masking(dense, WHOLE, masks(counts)):
        wanted = dense.generate(ids, use_cache=False, **settings)
    made = narrowed(dense, WHOLE, masks(counts)).generate(
        ids, cache_implementation=cache, **settings
    )
    assert made.equal(wanted)


@pytest.mark.parametrize(
    ("model_type", "counts", "stock"),
    [
        ("llama", [2] * 3, True),
        ("llama", [3] * 3, False),
        ("qwen2", [3] * 3, True),
        ("qwen2", [3, 2, 3], False),
    ],
)
def test_what_stock_fields_can_say_is_said_there(model_type, counts, stock) -> None:
    dense = tiny(model_type)
    narrow = narrowed(dense, WHOLE, masks(counts))
    assert (type(narrow) is type(dense)) == stock
    assert isinstance(narrow, modeling.PerLayerWidths) != stock
    assert [layer.num_key_value_heads for layer in narrow.config.per_layer_config] == counts
    assert narrow.config.head_dim == len(attentions(dense)[0].key) // GROUPS
    if stock:
        assert narrow.config.num_attention_heads == 2 * counts[0]
    for layer in decoder_layers(narrow):
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                assert (module.out_features, module.in_features) == module.weight.shape


@each_counts
def test_cutting_heads_twice_is_cutting_once_and_channels_may_follow(counts) -> None:
    dense, final = tiny(), masks(counts)
    first = [mask | other for mask, other in zip(final, masks([1, 2, 3]), strict=True)]
    twice = narrowed(
        narrowed(dense, WHOLE, first),
        WHOLE,
        [mask[outer] for mask, outer in zip(final, first, strict=True)],
    )
    once = narrowed(dense, WHOLE, final)
    assert same_state(twice, once)
    assert (type(twice), twice.config.to_dict()) == (type(once), once.config.to_dict())
    keep = random_keep([16, 40, 1])
    later, together = narrowed(once, keep), narrowed(dense, keep, final)
    assert same_state(later, together)
    assert (type(later), later.config.to_dict()) == (type(together), together.config.to_dict())


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_keeping_every_group_is_the_identity(model_type) -> None:
    dense = tiny(model_type)
    narrow = narrowed(dense, WHOLE, masks([GROUPS] * LAYERS))
    assert same_state(narrow, dense)
    assert narrow.config.to_dict() == dense.config.to_dict()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda groups: groups[:-1], "3 layers .* mask of heads .* got 2 masks"),
        (
            lambda groups: [*groups[:2], torch.ones(8, dtype=torch.bool)],
            r"layer 2: .* 4 booleans .*; got \(8,\)",
        ),
        (
            lambda groups: [torch.zeros(4, dtype=torch.bool), *groups[1:]],
            "layer 0: .* at least one group in the first layer of each kind of attention",
        ),
    ],
)
@pytest.mark.parametrize(
    "use", [narrowed, lambda *args: masking(*args).__enter__()], ids=["narrowed", "masking"]
)
def test_masks_of_heads_that_do_not_fit_are_refused(use, spoil, message) -> None:
    dense = tiny()
    with pytest.raises(ValueError, match=message):
        use(dense, WHOLE, spoil(masks([2, 2, 2])))
    assert not any(linear._forward_pre_hooks for linear in out_linears(dense))


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in CUTTABLE])
def test_a_family_whose_heads_cannot_be_cut_is_one_sentence(model_type) -> None:
    model = tiny_model(model_type)
    for ask in (
        lambda: narrowed(model, WHOLE, masks([2] * 3)),
        lambda: cut(Evidence(model), "random", 0.3, heads=True),
    ):
        with pytest.raises(
            UnsupportedArchitecture,
            match=f"attention heads of model type '{model_type}' .* llama.*; cut FFN",
        ):
            ask()


# --- checkpoints ---


@each_counts
@pytest.mark.parametrize(
    "widths", [(16, 40, 8), (24, 24, 24)], ids=["widths per layer", "one width"]
)
def test_a_checkpoint_without_heads_reloads_bit_equal_and_says_what_was_cut(
    counts, widths, tmp_path
) -> None:
    dense = tiny()
    narrow, keep, groups = saved(tmp_path / "out", dense, counts, widths)
    again = load_model(tmp_path / "out")
    assert same_state(again, narrow)
    assert logits(again).equal(logits(narrow))
    assert all(a.equal(b) for a, b in zip(load_masks(tmp_path / "out"), keep, strict=True))
    assert all(a.equal(b) for a, b in zip(load_head_masks(tmp_path / "out"), groups, strict=True))
    told = load_provenance(tmp_path / "out")
    assert (told.dense_groups, told.groups, told.group_heads) == (
        (GROUPS,) * LAYERS,
        tuple(counts),
        2,
    )
    stock = len({*widths}) == 1 and counts == COUNTS["uniform"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "channels and heads chosen by" in card
    assert "with 2 query heads each: " in card
    assert ("trust_remote_code" in card) == (not stock)
    assert (tmp_path / "out" / "modeling.py").exists() == (not stock)
    if stock:
        assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()).equal(
            logits(narrow)
        )


def test_a_checkpoint_with_heads_per_layer_loads_by_the_code_beside_it(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    narrow, _, _ = saved(tmp_path / "out", tiny(), [1, 4, 3])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(again).__module__.startswith("transformers_modules")
    assert logits(again).equal(logits(narrow))


@pytest.mark.parametrize("counts", [[1, 2, 2], [1, 3, 3], [3, 3, 3]], ids=str)
def test_groups_are_filled_with_zeros_to_a_number_that_stock_loaders_take(counts, tmp_path) -> None:
    narrow, _, groups = saved(tmp_path / "out", tiny(), counts, (24, 24, 24))
    export_padded(tmp_path / "out", tmp_path / "padded")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "padded").eval()
    assert group_counts(stock) == [2 if max(counts) == 2 else 4] * LAYERS
    torch.testing.assert_close(logits(stock), logits(narrow), atol=3e-5, rtol=0)
    assert load_provenance(tmp_path / "padded").padded_groups == group_counts(stock)[0]
    assert all(
        a.equal(b) for a, b in zip(load_head_masks(tmp_path / "padded"), groups, strict=True)
    )
    with pytest.raises(CheckpointError, match="one width for all layers already"):
        export_padded(tmp_path / "padded", tmp_path / "again")


def test_a_checkpoint_with_whole_heads_says_nothing_of_heads(tmp_path) -> None:
    dense, keep = tiny(), random_keep([16, 40, 8])
    narrow = narrowed(dense, keep)
    provenance = Provenance.of(dense, narrow, seed=None, **FACTS)
    save_pruned(narrow, tmp_path / "out", keep, provenance)
    assert not [
        name
        for name in json.loads((tmp_path / "out" / "prunenet.json").read_text())
        if "group" in name
    ]
    assert load_head_masks(tmp_path / "out") is None
    with pytest.raises(ValueError, match="provenance says None"):
        save_pruned(narrow, tmp_path / "no", keep, provenance, groups=masks([GROUPS] * LAYERS))


def test_channels_of_a_model_that_lost_heads_before_are_cut_and_saved_as_any_other_s(
    tmp_path,
) -> None:
    dense = narrowed(tiny(), WHOLE, masks([1, 4, 3]))
    keep = random_keep([24] * LAYERS)
    narrow = narrowed(dense, keep)
    provenance = Provenance.of(dense, narrow, seed=None, **FACTS)
    assert provenance.groups is None
    save_pruned(narrow, tmp_path / "out", keep, provenance)
    assert logits(load_model(tmp_path / "out")).equal(logits(narrow))
    export_padded(tmp_path / "out", tmp_path / "padded")
    assert group_counts(AutoModelForCausalLM.from_pretrained(tmp_path / "padded")) == [4] * LAYERS


# --- scores ---


def head_outputs(model) -> list[torch.Tensor]:
    """(tokens, d_attention) of each layer, in float64."""
    found = []
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0].flatten(0, -2).double())
        )
        for linear in out_linears(model)
    ]
    with torch.no_grad():
        model(BLOCKS.ids)
    for hook in hooks:
        hook.remove()
    return found


def test_flap_scores_heads_as_its_authors_code_does(evidence) -> None:
    found = flap.with_heads(evidence)
    for layer, x in enumerate(head_outputs(evidence.model)):
        weight = out_linears(evidence.model)[layer].weight.detach().double()
        values = torch.stack(
            [
                (x[:, j].var(correction=0) * weight[:, j].square().sum()) ** 2
                for j in range(16 * GROUPS)
            ]
        )
        z = (values - values.mean()) / values.std()
        expected = torch.stack(
            [z[16 * group : 16 * (group + 1)].mean() for group in range(GROUPS)]
        ).float()
        torch.testing.assert_close(found.groups[layer], expected, rtol=1e-4, atol=1e-5)
    assert all(a.equal(b) for a, b in zip(found.channels, flap.scores(evidence), strict=True))


def test_the_mean_bias_restores_what_the_first_attention_writes_on_average(evidence) -> None:
    made = cut(evidence, "flap", 0.5, allocation="uniform", heads=True, round_to=1)
    assert not made.groups[0].all()
    narrow = made.applied(evidence.model)
    written = [
        out_linears(model)[0](head_outputs(model)[0].float()).mean(0)
        for model in (evidence.model, narrow)
    ]
    torch.testing.assert_close(written[1], written[0], rtol=1e-4, atol=1e-5)


def test_magnitude_multiplies_the_norms_of_the_slices_of_a_group(evidence) -> None:
    layer = decoder_layers(evidence.model)[1].self_attn
    wide, narrow = slice(2 * 16, 3 * 16), slice(2 * HEAD_DIM, 3 * HEAD_DIM)
    rows = [layer.q_proj.weight[wide], layer.k_proj.weight[narrow], layer.v_proj.weight[narrow]]
    expected = (
        torch.stack([part.norm() for part in (*rows, layer.o_proj.weight[:, wide])]).prod().detach()
    )
    torch.testing.assert_close(METHODS["magnitude"].with_heads(evidence).groups[1][2], expected)


@pytest.mark.long
def test_taylor_sums_of_groups_are_those_of_finite_differences() -> None:
    model = tiny().double()
    windows, layer, group, step = token_ids(2, 6), decoder_layers(model)[1].self_attn, 2, 2e-2
    sums = gradients.group_taylor_sums(model, windows)[1]
    assert sums.vector.shape == (2 * 16 + 2 * HEAD_DIM, GROUPS)

    def slopes(entry: torch.Tensor) -> torch.Tensor:
        weight, losses = float(entry), []
        for shift in (step, -step, 2 * step, -2 * step):
            entry.fill_(weight + shift)
            logs = model(windows).logits[:, :-1].log_softmax(-1)
            losses.append(-logs.gather(2, windows[:, 1:, None]).mean((1, 2)))
        entry.fill_(weight)
        return (8 * (losses[0] - losses[1]) - (losses[2] - losses[3])) / (12 * step)

    # The second value row and the fifth output column of the group: number of the slice, its
    # entries.
    value = HEAD_DIM * group + 1
    slices = {
        16 + HEAD_DIM + 1: [*layer.v_proj.weight[value], layer.v_proj.bias[value]],
        16 + 2 * HEAD_DIM + 4: [*layer.o_proj.weight[:, 16 * group + 4]],
    }
    for number, entries in slices.items():
        with torch.no_grad():
            found = [(float(entry), slopes(entry)) for entry in entries]
        first = torch.stack([weight * slope.mean() for weight, slope in found])
        second = torch.stack([weight**2 * slope.square().mean() for weight, slope in found])
        expected = torch.stack(
            [first.sum(), first.abs().sum(), second.sum(), (first - second / 2).abs().sum()]
        )
        measured = [
            getattr(sums, name)[number, group] for name in ("vector", "element1", "element2", "mix")
        ]
        torch.testing.assert_close(
            torch.stack(measured), expected, rtol=5e-3, atol=5e-3 * float(first.abs().sum())
        )


def test_llm_pruner_adds_up_the_slices_of_a_group_per_parameter(evidence) -> None:
    found = METHODS["llm_pruner_vector"].with_heads(evidence)
    size = 2 * 16 * D_MODEL + 2 * HEAD_DIM * D_MODEL + 16 + 2 * HEAD_DIM
    torch.testing.assert_close(found.groups[0], evidence.group_taylor[0].vector.abs().sum(0) / size)
    alone = METHODS["llm_pruner_vector"].score(evidence)
    assert all(a.argsort().equal(b.argsort()) for a, b in zip(found.channels, alone, strict=True))


def test_saap_standardises_channels_and_groups_together(evidence) -> None:
    found, moved = saap.with_heads(evidence, beta=0.0), saap.with_heads(evidence)
    rows, shifted = [*found.channels, *found.groups], [*moved.channels, *moved.groups]
    z = torch.cat(rows)
    torch.testing.assert_close(
        torch.stack([z.mean(), z.std()]), z.new_tensor([0, 1]), atol=1e-6, rtol=1e-6
    )
    # the stability term is standardised within a layer and a kind
    for plain, row in zip(rows, shifted, strict=True):
        torch.testing.assert_close((row - plain).mean(), plain.new_zeros(()))
        assert not row.equal(plain)


def test_random_draws_the_same_channels_with_and_without_heads() -> None:
    evidence = Evidence(tiny(), seed=3)
    found, alone = METHODS["random"].with_heads(evidence), METHODS["random"].score(evidence)
    assert all(a.equal(b) for a, b in zip(found.channels, alone, strict=True))
    assert len({float(value) for row in found.groups for value in row}) == GROUPS * LAYERS


# --- budget ---


@pytest.mark.parametrize("name", METHODS_WITH_HEADS)
@pytest.mark.parametrize("allocation", WITH_HEADS)
def test_heads_and_channels_share_the_budget_of_channels_alone(
    name, allocation, nine_layers
) -> None:
    model, row = nine_layers.model, METHODS[name]
    made = cut(nine_layers, name, 0.5, allocation=allocation, round_to=1, heads=True, refit="off")
    narrow, cost = made.applied(model), Budget.of(model, 0.5).costs[0]
    left = count_parameters(model)[0] - cost * 9 * D_FF // 2 - count_parameters(narrow)[0]
    assert 0 <= left < cost
    counts = [int(mask.sum()) for mask in made.groups]
    assert group_counts(narrow) == counts
    assert min(counts) >= 1
    assert sum(counts) < 9 * GROUPS, "no head was cut, and the test says nothing"
    first, last = row.protects if allocation in ("protected", row.allocation) else (0, 0)
    assert all(
        counts[i] == GROUPS and made.widths[i] == D_FF for i in [*range(first), *range(9 - last, 9)]
    )
    assert allocation == "global" or len(set(counts[first : 9 - last])) == 1


def test_layers_lose_the_same_share_of_heads_and_of_channels() -> None:
    ffn = Budget((1000,) * 4, (10,) * 4, 40_000 - 15_000, 1)
    pool = structures.StructurePool(ffn, (100,) * 4, (50,) * 4)
    counts = structures.shared(pool, first=1, last=1)
    # 15,000 of the 30,000 parameters of the two layers in between
    assert counts == [100, 50, 50, 100]
    assert pool.rest(counts).parameters == 2 * 10_000 + 2 * 5_000
    coarse = structures.StructurePool(
        Budget((1000,) * 4, (10,) * 4, 24_000, 1), (2,) * 4, (2_500,) * 4
    )
    # 1.47 rounded; channels get what that took too much
    assert structures.shared(coarse) == [1, 1, 1, 1]
    assert coarse.rest([1, 1, 1, 1]).parameters == 24_000 + 10_000


def test_whole_groups_are_kept_where_one_more_would_be_more_than_the_cut() -> None:
    pool = structures.StructurePool(Budget((100,) * 2, (10,) * 2, 1_900, 1), (2,) * 2, (5_000,) * 2)
    assert structures.shared(pool) == [2, 2]


def test_the_best_of_one_ranking_stay_as_long_as_they_fit() -> None:
    ffn = Budget((3, 3), (1, 1), 3, 1)
    pool = structures.StructurePool(ffn, (2, 2), (2, 2))
    scores = structures.Scores(
        [torch.tensor([9.0, 5.0, 1.0]), torch.tensor([8.0, 7.0, 0.0])],
        [torch.tensor([6.0, 4.0]), torch.tensor([2.0, 3.0])],
    )
    # 11 parameters: the best of each row (6 in all), then 7, 5, 4 (of 2 parameters): 10; 3 is there
    # already, 2 would be 12.
    assert structures.ranked(pool, scores) == [2, 1]
    assert structures.ranked(pool, scores, last=1) == [1, 2]
    with pytest.raises(ValueError, match="remove less"):
        structures.ranked(pool, scores, first=1, last=1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wanda_sp", {}, "wanda_sp scores no attention heads; .* flap"),
        ("flap", {"allocation": "owl"}, "by allocation uniform, protected, global, got 'owl'"),
        ("flap", {"allocation": [48, 16, 32]}, "by allocation uniform"),
        ("flap", {"blocks": None}, "blocks=None"),
    ],
)
def test_heads_that_cannot_be_chosen_are_one_sentence(name, options, message) -> None:
    blocks = options.pop("blocks", BLOCKS)
    with pytest.raises(ValueError, match=message):
        cut(Evidence(tiny(), blocks), name, 0.3, heads=True, **options)


def test_a_seed_reproduces_a_cut_of_heads() -> None:
    model = tiny()
    made = [
        pruned_model(Evidence(model, seed=seed), "random", 0.3, heads=True) for seed in (0, 0, 1)
    ]
    assert same_state(made[0], made[1])
    assert not logits(made[0]).equal(logits(made[2]))
