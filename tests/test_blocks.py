"""FFNs trained as a whole behind the refit."""

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from families import tiny_model
from test_group_refit import tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.policies.apply import prune
from prunenet.refit import blocks as module
from prunenet.refit.blocks import BlockTraining, check_blocks, forget_blocks, train_blocks
from prunenet.refit.cut import cut_layers
from prunenet.refit.moments import ffn_moments
from prunenet.refit.ridge import ridge
from prunenet.text.calibration import CalibrationSet
from prunenet.text.corpora import CalibrationText, load_text

QUICK = BlockTraining(passes=4, learning_rate=0.01)
WILD = BlockTraining(passes=4, learning_rate=1.0)
GENTLE = BlockTraining(passes=4, learning_rate=3e-4)  # where the refit leaves 1 % of the error
KINDS = torch.arange(40) % 2
FAMILIES = {  # of each way in which an FFN can lie in its layer
    "gated": "llama",
    "ungated, without a module of its own": "opt",
    "beside attention, which is added in place": "falcon",
    "fused": "phi3",
    "Conv1D": "gpt2",
}
LATER = ("falcon", "phi3")


def text(count: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (count, 16), generator=torch.Generator().manual_seed(seed))


def model_of(family: str):
    return tiny(family) if family in ("gpt2", "deepseek_v3", "qwen3_moe") else tiny_model(family)


@cache
def prepared(family: str):
    """A model, its refitted cut to 0.6, and the cut trained; not to be changed."""
    model = model_of(family)
    widths = Anatomy.of(model).uniform_widths(0.4, 8)
    (cut,) = cut_layers(model, text(), [widths], kinds=KINDS)
    training = GENTLE if family in ("opt", "gpt2") else QUICK
    return model, cut, train_blocks(model, cut, text(), kinds=KINDS, training=training)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def same(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.long
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, id=kind, marks=[pytest.mark.slow] if name in LATER else [])
        for kind, name in FAMILIES.items()
    ],
)
def test_trained_ffns_write_what_the_dense_ones_write_more_nearly_on_other_text(family):
    model, cut, trained = prepared(family)
    assert same(model, model_of(family))
    assert sorted(trained.losses) == list(range(len(cut.keep)))
    for loss in trained.losses.values():
        assert loss.after < loss.before < 1
        assert loss.strength > 0
    held = text(12, seed=1)
    dense = logits(model, held)
    before, after = ((logits(c.model(model), held) - dense).norm() for c in (cut, trained))
    assert after < before


@pytest.mark.parametrize("weights", ["tokens", "stream"])
def test_the_loss_recorded_is_that_of_a_refit_on_one_kind_for_the_ffn_on_the_other(weights):
    model, cut, trained = prepared("llama")
    if weights == "stream":
        training = BlockTraining(passes=1, weights="stream")
        trained = train_blocks(model, cut, text(), kinds=KINDS, training=training)
    seen, stream = {}, {}
    for layer in Anatomy.of(model).layers:
        layer.module.mlp.register_forward_hook(
            lambda _, args, out, layer=layer.index: seen.__setitem__(layer, (args[0], out))
        )
        layer.module.register_forward_hook(
            lambda _, __, out, layer=layer.index: stream.__setitem__(
                layer, out if isinstance(out, torch.Tensor) else out[0]
            )
        )
    narrow, shares = Anatomy.of(cut.model(model)), torch.zeros(len(cut.keep))
    for kind in (0, 1):
        fitted = {i: m.second for i, m in enumerate(ffn_moments(model, text()[kind != KINDS]))}
        logits(model, text()[kind == KINDS])
        for layer, (x, y) in seen.items():
            down = Anatomy.of(model).ffn(layer).down
            mlp = narrow.layers[layer].module.mlp
            size = stream[layer].square().sum(-1) if weights == "stream" else 1
            with torch.no_grad():
                h = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
                w = ridge(down, fitted[layer], cut.keep[layer], damping=cut.dampings[layer])
                error, whole = (v.square().sum(-1) / size for v in (h @ w.T - y, y))
                shares[layer] += error.sum() / whole.sum() / 2
    for layer, loss in trained.losses.items():
        assert loss.before == pytest.approx(float(shares[layer]), rel=1e-3)


def test_layers_that_were_not_cut_and_everything_outside_the_ffns_stay_as_they_are():
    model = tiny_model("llama")
    widths = Anatomy.of(model).widths
    widths[1] //= 2
    (cut,) = cut_layers(model, text(), [widths])
    trained = train_blocks(model, cut, text(), training=QUICK)
    assert list(trained.losses) == [1]
    pairs = zip(
        cut.model(model).named_parameters(), trained.model(model).named_parameters(), strict=True
    )
    changed = {name for (name, before), (_, now) in pairs if not torch.equal(before, now)}
    assert changed == {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}


def test_an_ffn_that_training_does_not_help_on_the_other_kind_keeps_its_refit():
    model, cut, _ = prepared("llama")
    trained = train_blocks(model, cut, text(), kinds=KINDS, training=WILD)
    assert {loss.strength for loss in trained.losses.values()} == {0}
    assert all(loss.after == loss.before for loss in trained.losses.values())
    assert same(trained.model(model), cut.model(model))


@pytest.mark.long
def test_training_that_was_killed_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    model, cut, whole = prepared("llama")
    train, done = module._trained, []

    def killed(block, starts, folds):
        done.append(block)
        if len(done) == 2:
            raise KeyboardInterrupt
        return train(block, starts, folds)

    monkeypatch.setattr(module, "_trained", killed)
    options = {"kinds": KINDS, "training": QUICK, "folder": tmp_path / "out.blocks"}
    with pytest.raises(KeyboardInterrupt):
        train_blocks(model, cut, text(), **options)
    resumed = train_blocks(model, cut, text(), **options)
    layers = len(cut.keep)
    assert len(done) == 1 + layers  # the first was not trained again
    assert resumed.losses == whole.losses
    assert same(resumed.model(model), whole.model(model))
    (tmp_path / "out.blocks" / "0000.safetensors").write_bytes(b"damaged")
    again = train_blocks(model, cut, text(), **options)
    assert len(done) == 2 + layers
    assert same(again.model(model), whole.model(model))
    train_blocks(model, cut, text(seed=2), **options)  # other text is another training
    assert len(done) == 2 + 2 * layers
    forget_blocks(tmp_path / "out.blocks")
    assert not any(tmp_path.iterdir())


@pytest.mark.long
def test_experts_keep_their_refit_and_models_without_other_ffns_are_refused():
    model, cut, trained = prepared("deepseek_v3")
    groups = Anatomy.of(model).groups
    assert sorted(trained.losses) == [group.number for group in groups if group.expert is None]
    experts = {s.name for group in groups if group.expert is not None for s in group.slices}
    before, now = (dict(c.model(model).named_parameters()) for c in (cut, trained))
    assert experts
    assert all(torch.equal(before[name], now[name]) for name in experts)
    with pytest.raises(UnsupportedArchitecture, match=r"experts alone, .* give `refit`"):
        check_blocks(model_of("qwen3_moe"))


def test_a_placed_model_is_refused_before_the_work():
    model = tiny_model("llama")
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match="training blocks needs all weights on one device"):
        prune(model, ratio=0.4, refit="blocks", blocks=CalibrationSet(text(), "self", {}))


@pytest.mark.long
def test_prune_records_what_each_ffn_loses_and_repeats_itself():
    blocks = CalibrationSet(text(), "self", {"from": "a test"}, kinds=KINDS)
    model = tiny_model("llama")
    first, second = (prune(model, ratio=0.4, refit="blocks", blocks=blocks) for _ in range(2))
    assert first.provenance.how["refit"] == "blocks"
    steps = first.provenance.how["blocks"]
    assert list(steps) == [str(number) for number in range(len(first.keep))]
    assert all(step["after"] <= step["before"] for step in steps.values())
    assert type(first.provenance).from_json(first.provenance.to_json()) == first.provenance
    assert first.provenance == second.provenance
    assert same(first.model, second.model)


@pytest.mark.long
def test_training_behind_removed_experts_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    model, folder = model_of("deepseek_v3"), tmp_path / "out.blocks"
    blocks = CalibrationSet(text(), "self", {}, kinds=KINDS)
    cut = partial(prune, model, ratio=0.4, experts=4, refit="blocks", blocks=blocks)
    whole, train, done = cut(), module._trained, []

    def killed(*asked):
        done.append(asked)
        if len(done) == 2:
            raise KeyboardInterrupt
        return train(*asked)

    monkeypatch.setattr(module, "_trained", killed)
    with pytest.raises(KeyboardInterrupt):
        cut(folder=folder)
    assert len(list(folder.iterdir())) == 1
    resumed = cut(folder=folder)
    assert len(done) == 1 + len(resumed.provenance.how["blocks"])
    assert same(resumed.model, whole.model)


@pytest.mark.parametrize(
    "wrong", [{"passes": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"weights": "x"}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BlockTraining(**wrong)


@pytest.mark.slow
def test_an_ffn_of_the_real_model_trained_on_prose_and_code_loses_less_on_a_third_text(smollm2):
    config = AutoConfig.from_pretrained(smollm2)
    config.num_hidden_layers = 3  # what is in front of a layer is the real model's
    model = AutoModelForCausalLM.from_pretrained(smollm2, config=config, dtype=torch.float32).eval()
    tokenizer, root = AutoTokenizer.from_pretrained(smollm2), Path(__file__).parents[1]
    code = "".join(path.read_text() for path in sorted((root / "prunenet" / "models").glob("*.py")))
    prose = load_text("builtin", CalibrationText).content
    third = (root / "docs" / "methods.md").read_text()

    def rows(words: str, count: int) -> torch.Tensor:
        return torch.tensor(tokenizer(words[:60_000])["input_ids"][: count * 256]).view(count, 256)

    ids, kinds = torch.cat((rows(prose, 16), rows(code, 16))), torch.arange(32) // 16
    (cut,) = cut_layers(model, ids, [[1536, 1536, 1072]], kinds=kinds)
    trained, inputs = train_blocks(model, cut, ids, kinds=kinds), []
    with model.model.layers[2].mlp.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    ):
        logits(model, rows(third, 8))
    made = [m.model.layers[2].mlp for m in (model, cut.model(model), trained.model(model))]
    with torch.no_grad():
        dense, refitted, fitted = (ffn(inputs[0]) for ffn in made)
    before, after = (
        (out - dense).square().sum() / dense.square().sum() for out in (refitted, fitted)
    )
    assert after < before
