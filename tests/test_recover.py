"""Recovery: updates that change nothing at first, never make a model worse, and end in an ordinary
checkpoint.
"""

import dataclasses
import json
import math
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import FAMILIES, LAYERS, random_keep, tiny_model, token_ids
from safetensors.torch import load_file
from test_cli import contents, facts, refused, run, save_tiny
from transformers import AutoModelForCausalLM

from prunenet.checkpoints.identity import identify
from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.save import load_masks, load_provenance, save_pruned
from prunenet.evaluation.losses import next_token_loss
from prunenet.models.surgery import narrowed
from prunenet.policies.artifact import PolicyError
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.papers.slicegpt import sliced
from prunenet.recover.lora import adapted, merged, updates_of
from prunenet.recover.losses import teaching_loss
from prunenet.recover.training import STATE, Tuning, tuned
from prunenet.text.calibration import CalibrationSet

PER_LAYER = [16, 40, 8]
QUICK = Tuning(updates="lora", steps=6, batch=4, micro_batch=4, rank=4, learning_rate=5e-3)


def cut(family: str = "llama", widths: list[int] | None = None):
    """(dense, narrow)"""
    dense = tiny_model(family)
    return dense, narrowed(dense, random_keep(widths or [24] * LAYERS))


def text(count: int = 20, regime: str = "self") -> CalibrationSet:
    return CalibrationSet(token_ids(count, 16), regime, {"text": "random"})


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_that_have_learned_nothing_change_nothing_and_touch_every_linear_of_the_layers(
    family,
):
    _, narrow = cut(family, PER_LAYER)
    before, flags = state(narrow), [p.requires_grad for p in narrow.parameters()]
    student = adapted(narrow, 2, seed=0)
    linears = [
        m
        for m in narrow.modules()
        if isinstance(m, torch.nn.Linear) and m is not narrow.get_output_embeddings()
    ]
    assert len(updates_of(student)) == 2 * len(linears)
    assert torch.equal(student(token_ids()).logits, narrow(token_ids()).logits)
    assert same(state(merged(student)), before)
    assert [p.requires_grad for p in narrow.parameters()] == flags


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_update_computes_what_it_did_beside_the_linear(dtype):
    _, narrow = cut()
    student = adapted(narrow.to(dtype), 3, seed=1)
    generator = torch.Generator().manual_seed(0)
    for update in updates_of(student):
        assert update.dtype == torch.float32
        update.data = 0.1 * torch.randn(update.shape, generator=generator)
    beside = student(token_ids()).logits
    assert (beside - narrow(token_ids()).logits).abs().max() > 0.1
    error = (merged(student)(token_ids()).logits - beside).abs().max() / beside.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)


def test_linears_whose_weights_lie_the_other_way_are_updated_too():
    from test_group_refit import tiny

    model = tiny("gpt2")
    student, before = adapted(model, 2, seed=1), state(model)
    assert len(updates_of(student)) == 2 * 4 * len(model.transformer.h)
    assert torch.equal(student(token_ids()).logits, model(token_ids()).logits)
    for update in updates_of(student):
        update.data = torch.full(update.shape, 0.1)
    beside = student(token_ids()).logits
    assert not torch.allclose(beside, model(token_ids()).logits, atol=1e-3)
    assert torch.allclose(merged(student)(token_ids()).logits, beside, atol=1e-5)
    assert same(state(model), before)
    for layer in model.transformer.h:
        layer.attn = layer.mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="has a linear to update; give `updates` full"):
        adapted(model, 2, seed=1)


def test_linears_beside_fused_experts_are_updated_and_the_experts_stay():
    from test_group_refit import tiny

    model = tiny("deepseek_v3")  # of a type whose names peft takes for those of fused experts
    inside = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    student, before = adapted(model, 2, seed=1), state(model)
    assert len(updates_of(student)) == 2 * len(inside)
    assert torch.equal(student(token_ids()).logits, model(token_ids()).logits)
    for update in updates_of(student):
        update.data = torch.full(update.shape, 0.1)
    after = state(merged(student))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {
        f"model.layers.{name}.weight"
        for name, module in model.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("widths", [None, PER_LAYER])
def test_training_lowers_the_loss_on_text_held_back_and_leaves_both_models_alone(taught, widths):
    dense, narrow = cut("opt", widths)
    blocks = (
        text()
        if taught
        else CalibrationSet(torch.arange(3, 19).repeat(10, 1), "data", {"text": "one line"})
    )
    before = state(dense), state(narrow)
    found = tuned(narrow, blocks, QUICK, teacher=dense if taught else None)
    held = blocks.ids[-round(0.2 * len(blocks.ids)) :]

    def loss(model) -> float:
        with torch.no_grad():
            return float(
                teaching_loss(model, dense, held) if taught else next_token_loss(model, held)
            )

    assert found.best_step > 0
    assert (loss(narrow), loss(found.model)) == pytest.approx((found.before, found.after), rel=1e-5)
    assert found.after < 0.9 * found.before
    assert same(state(dense), before[0])
    assert same(state(narrow), before[1])
    assert found.model.get_input_embeddings().weight is found.model.get_output_embeddings().weight


def test_where_nothing_is_better_the_model_stays_as_it_is():
    dense, _ = cut()
    # nothing is nearer to the teacher than the teacher
    found = tuned(dense, text(), QUICK, teacher=dense)
    assert found.model is dense
    assert (found.best_step, found.after) == (0, found.before)


def test_micro_batches_change_memory_and_not_what_is_learned():
    dense, narrow = cut()
    whole, parts = (
        tuned(narrow, text(), dataclasses.replace(QUICK, micro_batch=size), teacher=dense).after
        for size in (4, 3)
    )
    assert whole == pytest.approx(parts, rel=1e-3)


def test_every_block_is_learned_from_equally_often(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "prunenet.recover.training.next_token_loss",
        lambda model, ids, **how: (
            seen.extend(ids[:, 0].tolist()) or next_token_loss(model, ids, **how)
        ),
    )
    blocks = CalibrationSet(torch.arange(10, 20)[:, None].repeat(1, 4), "data", {})
    tuned(cut()[1], blocks, dataclasses.replace(QUICK, steps=4))
    learned = sorted(token for token in seen if token < 18)  # the last two are held back
    assert learned == sorted([*range(10, 18)] * 2)


@pytest.mark.parametrize("taught", [True, False])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, taught):
    dense, narrow = cut()
    teacher = dense if taught else None

    def kill(done, of, loss):
        if done == 3:
            raise KeyboardInterrupt

    whole = tuned(narrow, text(), QUICK, teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        tuned(narrow, text(), QUICK, teacher=teacher, folder=tmp_path, progress=kill)
    for other in (dataclasses.replace(QUICK, rank=2), dataclasses.replace(QUICK, steps=7)):
        with pytest.raises(PolicyError, match="was started with tuning"):
            tuned(narrow, text(), other, teacher=teacher, folder=tmp_path, resume=True)
    steps = []
    gone_on = tuned(
        narrow,
        text(),
        QUICK,
        teacher=teacher,
        folder=tmp_path,
        resume=True,
        progress=lambda done, *_: steps.append(done),
    )
    assert steps == [4, 5, 6]
    assert same(state(whole.model), state(gone_on.model))
    assert whole.history == gone_on.history
    assert any(path.name.startswith("events.out.tfevents") for path in tmp_path.iterdir())


def test_a_loss_that_explodes_is_one_clear_sentence():
    dense, narrow = cut()
    for steps in (1, 20):  # found by a judgement, or by a step
        asked = dataclasses.replace(QUICK, learning_rate=1e30, steps=steps)
        with pytest.raises(ValueError, match="give a smaller `learning_rate` than 1e"):
            tuned(narrow, text(), asked, teacher=dense)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("micro_batch", 0),
        ("rank", 0),
        ("learning_rate", 0.0),
        ("seed", -1),
    ],
)
def test_a_number_out_of_range_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value}"):
        Tuning(**{field: value})


@pytest.mark.parametrize(("window", "blocks"), [(32, 8), (63, 4), (64, 4), (256, 1), (1024, 1)])
def test_a_step_reads_about_256_tokens_whatever_the_blocks_are(window, blocks):
    assert Tuning().settled(64, window, 1000).batch == blocks
    assert Tuning(batch=3).settled(64, window, 1000).batch == 3


def test_a_step_reads_no_block_twice_where_there_are_few():
    assert Tuning().settled(2, 64, 1000).batch == 2


def test_text_and_teacher_must_suit_the_model():
    dense, narrow = cut()
    with pytest.raises(ValueError, match="2 blocks or more"):
        tuned(narrow, text(1), QUICK, teacher=dense)
    with pytest.raises(ValueError, match="beyond the model's 64 embeddings"):
        tuned(narrow, CalibrationSet(torch.full((4, 4), 64), "data", {}), QUICK)
    other = tiny_model("llama")
    other.resize_token_embeddings(70)
    with pytest.raises(ValueError, match="vocabulary of 70 tokens and the pruned model one of 64"):
        tuned(narrow, text(), QUICK, teacher=other)


# The command.


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNENET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def save_cut(dense: Path, out: Path, widths: list[int], **fields) -> Path:
    model, keep = load_model(dense), random_keep(widths)
    narrow, (name, revision) = narrowed(model, keep), identify(dense)
    facts = {
        "base_model": name,
        "revision": revision,
        "policy": "test",
        "policy_sha256": None,
        "regime": "weights",
    }
    story = Provenance.of(model, narrow, ratio=0.5, seed=0, **facts | fields)
    return save_pruned(narrow, out, keep, story)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, dense) -> Path:
    return save_cut(dense, tmp_path_factory.mktemp("pruned") / "narrow", [24] * LAYERS)


@pytest.fixture
def words(tmp_path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i % 7}" for i in range(2600)))
    return path


SMALL = (
    "--updates",
    "lora",
    "--steps",
    4,
    "--batch",
    4,
    "--rank",
    4,
    "--tokens",
    2048,
    "--learning-rate",
    0.005,
)


@pytest.mark.long
@pytest.mark.parametrize("widths", [[24] * LAYERS, PER_LAYER])
def test_the_command_writes_an_ordinary_pruned_checkpoint_and_twice_the_same(
    dense, tmp_path, widths
):
    pruned = save_cut(dense, tmp_path / "narrow", widths)
    inputs = contents(dense), contents(pruned)
    said = facts("recover", pruned, "--teacher", dense, "--out", tmp_path / "a", *SMALL)
    facts("recover", pruned, "--teacher", dense, "--out", tmp_path / "b", *SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (contents(dense), contents(pruned)) == inputs
    assert said["loss_after"] < said["loss_before"]
    assert said["regime"] == "self"
    assert not (tmp_path / "a.recovery" / STATE).exists()

    story = load_provenance(tmp_path / "a")
    before = load_provenance(pruned)
    assert dataclasses.replace(story, recovered=(), regime="weights") == before
    (step,) = story.recovered
    assert {name: step[name] for name in ("steps", "rank", "loss", "regime")} == {
        "steps": 4,
        "rank": 4,
        "loss": "KL(dense || pruned)",
        "regime": "self",
    }
    assert (step["loss_before"], step["loss_after"]) == (said["loss_before"], said["loss_after"])
    assert step["text"]["text"] == "self-generated"
    assert "Recovered by low-rank training" in (tmp_path / "a" / "README.md").read_text()
    assert all(map(torch.equal, load_masks(tmp_path / "a"), load_masks(pruned)))
    if widths != PER_LAYER:
        stock, stored = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "a"),
            load_file(tmp_path / "a" / "model.safetensors"),
        )
        assert type(stock).__name__ == "LlamaForCausalLM"
        assert all(torch.equal(tensor, stored[name]) for name, tensor in stock.state_dict().items())
        assert torch.equal(
            stock(token_ids()).logits, load_model(tmp_path / "a")(token_ids()).logits
        )


@pytest.mark.long
def test_text_from_outside_needs_no_teacher_and_the_story_says_so(dense, pruned, words, tmp_path):
    from prunenet.checkpoints.load import load_tokenizer

    model = load_model(pruned)
    named = save_pruned(
        model,
        tmp_path / "p",
        load_masks(pruned),
        load_provenance(pruned),
        tokenizer=load_tokenizer(dense),
    )
    ask = ("--moments", "data", "--text", words, *SMALL)
    said = facts("recover", named, "--out", tmp_path / "once", *ask)
    assert said["regime"] == "data"
    facts("recover", tmp_path / "once", "--out", tmp_path / "twice", *SMALL, "--teacher", dense)
    twice = load_provenance(tmp_path / "twice")
    assert [(step["loss"], step["regime"]) for step in twice.recovered] == [
        ("next token", "data"),
        ("KL(dense || pruned)", "self"),
    ]
    assert twice.regime == "data"
    assert (tmp_path / "twice" / "tokenizer.json").exists()


@pytest.mark.long
def test_where_nothing_is_better_the_checkpoint_has_the_pruned_model_s_own_weights_and_says_so(
    dense, pruned, tmp_path
):
    ask = ("--teacher", dense, *SMALL, "--learning-rate", 1e-30)
    assert (
        "weights are those of the pruned model"
        in run("recover", pruned, "--out", tmp_path / "out", *ask).stderr
    )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        pruned / "model.safetensors"
    ).read_bytes()
    assert "nothing was better" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.long
def test_a_killed_command_goes_on_with_resume_to_the_same_bytes(
    dense, pruned, tmp_path, monkeypatch
):
    from prunenet.recover import training

    monkeypatch.setattr("prunenet.recover.state._PATIENCE", 0)  # every state is written
    ask = ("recover", pruned, "--teacher", dense, *SMALL)
    facts(*ask, "--out", tmp_path / "whole")
    step = training._Run._step

    def killed(self, number):
        if number == 2:
            raise ValueError("killed")
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_step", killed)
        assert "killed" in refused(*ask, "--out", tmp_path / "out")
    assert "holds an unfinished run; say --resume" in refused(*ask, "--out", tmp_path / "out")
    other = refused(*ask, "--out", tmp_path / "out", "--resume", "--learning-rate", 0.004)
    assert "was started with tuning: learning_rate 0.005, not 0.004" in other
    best = tmp_path / "out.recovery" / "best.safetensors"
    seen = best.read_bytes()
    best.write_bytes(seen[:-1])
    assert "best.safetensors is damaged (it has" in refused(
        *ask, "--out", tmp_path / "out", "--resume"
    )
    best.unlink()
    assert "best.safetensors is damaged (it is missing" in refused(
        *ask, "--out", tmp_path / "out", "--resume"
    )
    best.write_bytes(seen)
    facts(*ask, "--out", tmp_path / "out", "--resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.long
def test_a_state_that_a_kill_left_beside_its_result_is_removed_and_no_other_is(
    dense, pruned, tmp_path, monkeypatch
):
    ask = ("recover", pruned, "--teacher", dense, *SMALL)
    state, out = tmp_path / "out.recovery" / STATE, tmp_path / "out"

    def killed(*given, **named):
        save_pruned(*given, **named)
        raise ValueError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("prunenet.recover.record.save_pruned", killed)
        assert "killed" in refused(*ask, "--out", out)
    assert state.exists()
    assert load_provenance(out).recovered
    unfinished = state.read_bytes()
    assert "exists already" in refused(*ask, "--out", out)
    assert not state.exists()
    state.write_bytes(unfinished)
    shutil.rmtree(out)
    shutil.copytree(pruned, out)
    assert "exists already" in refused(*ask, "--out", out)
    assert state.exists(), "of another run: the result beside it is not its own"


def test_mistakes_are_one_sentence_and_leave_nothing(dense, pruned, words, tmp_path, monkeypatch):
    out = tmp_path / "out"
    other = save_tiny(tmp_path / "other")
    tiny_model("llama", seed=1).save_pretrained(other)
    narrow = tiny_model("qwen2")
    narrow.save_pretrained(save_tiny(tmp_path / "qwen2", "qwen2"))
    unknown = save_cut(dense, tmp_path / "unknown", [24] * LAYERS, revision="unknown")
    taught = ("--teacher", dense, "--out", out, *SMALL)
    cases = [
        ((pruned, "--out", out), "learns nothing from text of its own: give the dense model"),
        ((pruned, "--out", out, "--text", words), "--text is read with --moments data only"),
        ((pruned, "--teacher", other, "--out", out), "is not the model that was pruned, tiny ("),
        (
            (unknown, "--teacher", tmp_path / "qwen2", "--out", out),
            "has other sizes than the model that was pruned",
        ),
        ((dense, "--teacher", dense, "--out", out), "is the dense model that is to teach"),
        (
            (dense, "--out", out, "--moments", "data", "--text", words),
            "is not a checkpoint of prunenet: it has no prunenet.json",
        ),
        ((pruned, *taught, "--text-column", "x"), "--text-column is read with --moments data only"),
        ((pruned, *taught, "--moments", "data", "--text", ""), "the path is empty"),
        (
            ("none", *taught, "--moments", "data", "--text", "none.txt"),  # before any model
            "text file 'none.txt' does not exist",
        ),
        (
            (pruned, "--out", out, "--moments", "data", "--text", words, "--loss", "top256"),
            "--loss top256 is of a teacher's predictions",
        ),
        ((pruned, *taught, "--out", out.with_name("x" * 250)), "its name is too long"),
        ((pruned, *taught, "--rank", 100000), "--rank must be at most"),
        ((pruned, *taught, "--rank", 0), "--rank must be at least 1, got 0"),
        ((pruned, *taught, "--steps", 0), "--steps must be at least 1, got 0"),
        (
            (pruned, *taught, "--tokens", 100),
            "--tokens must be at least 128, 2 blocks of 64, got 100",
        ),
        (
            (pruned, *taught, "--moments", "data", "--text", words, "--tokens", 4096),
            "give more text",
        ),
        ((pruned, *taught, "--window", 3), "--window must be at least 4, got 3"),
        (
            (pruned, *taught, "--window", 65),
            "--window must be at most 64, what the model has positions for, got 65",
        ),
        ((pruned, *taught, "--resume"), "nothing to resume in"),
        ((pruned, *taught, "--device", "auto"), "one device"),
        ((pruned, "--teacher", dense, "--out", words), "exists already"),
    ]
    for arguments, message in cases:
        assert message in refused("recover", *arguments), arguments
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'prunenet[recover]'" in refused("recover", pruned, *taught)
    assert not out.exists()
    assert not out.with_name("out.recovery").exists()


@pytest.mark.long
def test_cut_heads_and_sliced_residual_streams_are_kept(dense, tmp_path):
    model, keep, groups = (
        load_model(dense),
        random_keep([24] * LAYERS),
        [torch.tensor([True, False])] * LAYERS,
    )
    narrow, (name, revision) = narrowed(model, keep, groups), identify(dense)
    facts_of = {
        "base_model": name,
        "revision": revision,
        "policy": "test",
        "policy_sha256": None,
        "regime": "data",
    }
    story = Provenance.of(model, narrow, ratio=0.5, seed=0, **facts_of)
    save_pruned(narrow, tmp_path / "heads", keep, story, groups=groups)
    sliced(Evidence(model, text(8)), slicing=0.25).save_pretrained(tmp_path / "sliced")
    for kind in ("heads", "sliced"):
        out = tmp_path / f"{kind} recovered"
        said = facts("recover", tmp_path / kind, "--teacher", dense, "--out", out, *SMALL)
        assert said["loss_after"] < said["loss_before"]
        before, after = load_provenance(tmp_path / kind), load_provenance(out)
        assert dataclasses.replace(after, recovered=(), regime=before.regime) == before
        assert same_shapes(load_model(out), load_model(tmp_path / kind))


def same_shapes(one, other) -> bool:
    return [(name, p.shape) for name, p in one.named_parameters()] == [
        (n, p.shape) for n, p in other.named_parameters()
    ]


def test_what_is_filled_up_with_zeros_is_refused(dense, tmp_path):
    narrow = save_cut(dense, tmp_path / "narrow", PER_LAYER)
    assert facts("export", narrow, "--pad", "--out", tmp_path / "padded")["padded_to"] == max(
        PER_LAYER
    )
    assert "filled up with zeros" in refused(
        "recover", tmp_path / "padded", "--teacher", dense, "--out", tmp_path / "out"
    )


def test_a_checkpoint_without_recovery_says_nothing_of_it(pruned):
    assert "recovered" not in json.loads((pruned / "prunenet.json").read_text())
    assert "Recovered" not in (pruned / "README.md").read_text()


# What is trained, and how.


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_full_training_changes_all_weights_of_the_layers_and_embeddings_where_asked_and_no_tie(
    family, embeddings
):
    dense, narrow = cut(family, PER_LAYER)
    before = state(narrow)
    tuning = dataclasses.replace(QUICK, updates="full", embeddings=embeddings, steps=3)
    found = tuned(narrow, text(), tuning, teacher=dense)
    assert found.after < found.before
    assert same(state(narrow), before)
    changed = {n for n, t in found.model.named_parameters() if not torch.equal(t, before[n])}
    inside = {n for n, _ in narrow.named_parameters() if "layers." in n}
    tables = {n for n, _ in narrow.named_parameters() if "embed_tokens" in n or "lm_head" in n}
    # a bias of keys moves no probability: what has no gradient stays
    assert changed <= inside | (tables if embeddings else set())
    assert {n for n in inside if not n.endswith("k_proj.bias")} <= changed
    assert bool(tables & changed) == embeddings
    tied = narrow.get_input_embeddings().weight is narrow.get_output_embeddings().weight
    rows = [m.weight for m in (found.model.get_input_embeddings(),)]
    assert (rows[0] is found.model.get_output_embeddings().weight) == tied


def test_full_training_of_low_precision_moves_by_less_than_its_rounding_and_ends_in_it():
    dense, narrow = cut()
    dense, narrow = dense.to(torch.bfloat16), narrow.to(torch.bfloat16)
    tuning = dataclasses.replace(QUICK, updates="full", steps=8, learning_rate=2e-3)
    found = tuned(narrow, text(), tuning, teacher=dense)
    assert found.after < found.before
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}


def test_the_rate_rises_and_falls_as_asked():
    rates = {
        kind: [
            Tuning(schedule=kind, warmup=0.2, learning_rate=1.0).rate_at(step, 10)
            for step in range(10)
        ]
        for kind in ("linear", "cosine", "stable")
    }
    for found in rates.values():
        assert found[:3] == [0.5, 1.0, 1.0]
        assert found[2:] == sorted(found[2:], reverse=True)
        assert 0 < found[-1] < 0.7
    assert rates["stable"][:8] == [0.5, *[1.0] * 7]
    assert rates["cosine"][6] == pytest.approx(0.5) == rates["linear"][6]
    steady = Tuning(warmup=0)
    assert steady.rate_at(25, 100) == pytest.approx(0.75 * steady.rate)


def test_a_light_cut_is_trained_at_a_rate_in_proportion_to_what_it_has_lost():
    chosen = Tuning().chosen(1000)
    assert (chosen.updates, chosen.gentle_below, chosen.rate) == ("full", 0.4, 2e-4)
    whole = chosen.rate_at(50, 100)
    assert [chosen.rate_at(50, 100, kl) for kl in (0.4, 9.0)] == [whole, whole]
    assert chosen.rate_at(50, 100, 0.1) == pytest.approx(whole / 4)
    assert chosen.rate_at(50, 100, -1e-9) == 0.0
    for given in (Tuning(learning_rate=2e-4), Tuning(updates="lora"), Tuning(gentle_below=0.0)):
        steady = given.chosen(1000)
        assert steady.gentle_below == 0.0
        assert steady.rate_at(50, 100, 0.0) == steady.rate_at(50, 100)
    assert Tuning(learning_rate=1e-3, gentle_below=1.0).chosen(1000).gentle_below == 1.0
    assert chosen.chosen(1000) == chosen


def test_the_rate_follows_the_divergence_before_the_training_where_there_is_a_teacher(monkeypatch):
    seen = []
    rate_at = Tuning.rate_at

    def told(self, step, steps, before):
        seen.append(before)
        return rate_at(self, step, steps, before)

    monkeypatch.setattr(Tuning, "rate_at", told)
    dense, narrow = cut()
    found = tuned(narrow, text(), QUICK, teacher=dense)
    assert set(seen) == {found.before}
    seen.clear()
    tuned(narrow, text(), QUICK)
    assert set(seen) == {math.inf}


def test_the_likeliest_tokens_and_a_bin_for_the_rest_bound_the_divergence_from_below(monkeypatch):
    from prunenet.evaluation import successors

    dense, narrow = cut()
    narrow, ids = narrow.requires_grad_(False), token_ids()
    whole = teaching_loss(narrow, dense, ids)
    assert teaching_loss(narrow, dense, ids, kind="top256") == pytest.approx(float(whole), rel=1e-4)
    monkeypatch.setattr(successors, "TOP", 8)
    fewer = teaching_loss(narrow, dense, ids, kind="top256")
    assert 0 < float(fewer) < float(whole)
    with torch.no_grad():
        logs = [model(ids).logits.log_softmax(-1) for model in (dense, narrow)]
    top = logs[0].topk(8).indices
    p, q = (log.exp().gather(-1, top) for log in logs)
    p, q = (torch.cat((t, 1 - t.sum(-1, keepdim=True)), -1) for t in (p, q))
    assert float(fewer) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)


def test_hidden_states_are_compared_behind_each_layer_relative_to_their_energy():
    dense, narrow = cut()
    narrow, ids = narrow.requires_grad_(False), token_ids()
    added = teaching_loss(narrow, dense, ids, hidden=2.0) - teaching_loss(narrow, dense, ids)
    seen = []
    for model in (narrow, dense):
        states = []
        hooks = [
            layer.register_forward_hook(lambda _m, _g, out, s=states: s.append(out))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(ids)
        seen.append([out[0] if isinstance(out, tuple) else out for out in states])
        for hook in hooks:
            hook.remove()
    errors = [
        ((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(*seen, strict=True)
    ]
    assert float(added.detach()) == pytest.approx(float(2 * sum(errors) / len(errors)), rel=1e-3)
    nothing = teaching_loss(dense, dense, ids, hidden=1.0)
    assert float(nothing.detach()) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="`hidden` compares hidden states"):
        tuned(narrow, text(), dataclasses.replace(QUICK, hidden=0.1))


@pytest.mark.parametrize("updates", ["lora", "full"])
def test_a_run_of_every_option_goes_on_to_the_same_weights(tmp_path, updates):
    dense, narrow = cut("opt")
    options = {"warmup": 0.2, "schedule": "stable", "loss": "top256", "hidden": 0.1}
    tuning = dataclasses.replace(QUICK, updates=updates, average=0.5, **options)

    def kill(done, of, loss):
        if done == 3:
            raise KeyboardInterrupt

    ask = {"teacher": dense, "folder": tmp_path}
    whole = tuned(narrow, text(), tuning, teacher=dense)
    with pytest.raises(KeyboardInterrupt):
        tuned(narrow, text(), tuning, progress=kill, **ask)
    gone_on = tuned(narrow, text(), tuning, resume=True, **ask)
    assert same(state(whole.model), state(gone_on.model))
    assert (whole.history, whole.best_step) == (gone_on.history, gone_on.best_step)


def test_a_best_state_of_later_than_the_last_save_is_the_one_that_is_found_again(tmp_path):
    """A kill by SIGKILL between two saves: the steps behind the last are taken again."""
    from prunenet.recover.state import BEST, STATE

    dense, narrow = cut("opt")
    ask = {"teacher": dense, "folder": tmp_path}
    kept = {}

    def keep(done, of, loss):
        if done == 2:
            kept[STATE] = (tmp_path / STATE).read_bytes()

    whole = tuned(narrow, text(), QUICK, progress=keep, **ask)
    assert whole.best_step > 2
    assert (tmp_path / BEST).exists()
    (tmp_path / STATE).write_bytes(kept[STATE])
    gone_on = tuned(narrow, text(), QUICK, resume=True, **ask)
    assert same(state(whole.model), state(gone_on.model))
    assert whole.history == gone_on.history


def test_large_states_are_written_a_twentieth_of_the_time(tmp_path, monkeypatch):
    from prunenet.recover import state as module

    clock, saved = [0.0], []

    def slow(path, content):
        clock[0] += 3.0
        saved.append(clock[0])

    monkeypatch.setattr(module, "write_atomic", slow)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    weight = torch.nn.Parameter(torch.zeros(2))
    files = module.Files(tmp_path, {})
    run_of = module.State([weight], [], torch.optim.AdamW([weight]))
    for _ in range(200):
        clock[0] += 1.0
        files.save(run_of)
    gaps = [b - a for a, b in pairwise(saved)]
    assert gaps
    assert min(gaps) >= 60
    files.save(run_of, now=True)
    assert clock[0] - saved[-1] == 0


@pytest.mark.long
def test_text_is_read_once_and_longer_text_begins_with_shorter(dense, tmp_path, monkeypatch):
    from prunenet.checkpoints.load import load_tokenizer
    from prunenet.recover import text as module
    from prunenet.recover.options import RecoverText
    from prunenet.text.calibration import CalibrationOptions, calibration_for

    monkeypatch.setattr(module, "_PART", 512)
    monkeypatch.setattr(module, "MOST_HELD", 128)
    model, tokenizer = load_model(dense), load_tokenizer(dense)
    block, tuning = 64, Tuning(batch=4)
    short, long = (
        module.learning_text(model, tokenizer, RecoverText(tokens=count * block), tuning)
        for count in (12, 16)
    )
    assert (len(short.ids), len(long.ids)) == (14, 18)
    assert torch.equal(long.ids[:8], short.ids[:8])
    assert len(long.ids.unique(dim=0)) == 18
    first = calibration_for(
        model, tokenizer, "self", "builtin", CalibrationOptions(tokens=10 * block)
    )
    assert torch.equal(long.ids[:8], first.ids[:8])
    assert tuning.settled(24, block, 1000).steps == 6
    halves = RecoverText(tokens=12 * block, window=32)
    learned = module.learning_text(model, tokenizer, halves, tuning)
    assert learned.ids.shape == (24 + 4, 32), "as many tokens are learned from, and held back"
    by_steps = module.learning_text(model, tokenizer, RecoverText(), Tuning(batch=4, steps=3))
    assert torch.equal(by_steps.ids, short.ids)
    assert torch.equal(long.ids[-2:], short.ids[-2:]), "held back is the same text"
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{(n * n + n // 61) % 61}" for n in range(3000)))
    read = {"moments": "data", "text": str(words)}
    external = (RecoverText(**read, tokens=count * block) for count in (12, 16))
    short, long = (module.learning_text(model, tokenizer, text, tuning).ids for text in external)
    assert (len(short), len(long), len(long.unique(dim=0))) == (14, 18, 18)
    assert torch.equal(long[:12], short[:12])
    assert torch.equal(long[-2:], short[-2:]), "no longer text learns from what a shorter held back"
    measured = calibration_for(
        model, tokenizer, "data", str(words), CalibrationOptions(tokens=32 * block)
    ).ids
    assert len(torch.cat((measured, long[-2:])).unique(dim=0)) == 34, (
        "a cut's text is not held back"
    )
