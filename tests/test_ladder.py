"""Recovery as one command with the cut, and what it is said to take."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from families import LAYERS, random_keep, tiny_model, token_ids
from test_bos import counting, with_bos, words
from test_cli import contents, facts, refused, run, save_tiny
from test_kinds import masks, tiny

from prunenet.checkpoints.save import load_provenance
from prunenet.cli import recovering
from prunenet.evaluation.options import EvaluationOptions
from prunenet.models.surgery import narrowed
from prunenet.policies.apply import Pruned
from prunenet.recover import estimate, record, training
from prunenet.recover.options import RecoverText, Tuning
from prunenet.recover.record import Watch
from prunenet.recover.training import estimated, tuned
from prunenet.text.calibration import CalibrationSet

QUICK = Tuning(updates="lora", batch=4, micro_batch=4, rank=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def _small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNENET_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(recovering, "FAST", 1280)
        patch.setattr(recovering, "Tuning", partial(replace, QUICK))
        yield


@pytest.mark.long
def test_one_command_cuts_and_recovers_and_a_killed_one_goes_on_to_the_same_bytes(
    dense, tmp_path, monkeypatch
):
    ask = (
        "prune",
        dense,
        "--policy",
        "none",
        "--ratio",
        0.5,
        "--tokens",
        1024,
        "--recover",
        "fast",
    )
    whole, out = tmp_path / "whole", tmp_path / "out"
    said = facts(*ask, "--out", whole)
    assert said["loss_after"] < said["loss_before"]
    made = load_provenance(whole)
    assert (made.regime, made.how["refit"], len(made.recovered)) == ("self", "layerwise", 1)
    assert made.recovered[0]["tokens"] == 5 * 4 * 64
    step = training._Run._step

    def killed(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_step", killed)
        assert run(*ask, "--out", out).exit_code == 130
    assert not out.exists()
    assert "holds an unfinished run; say --resume" in refused(*ask, "--out", out)
    other = ["--resume", "--out", out, *ask[1:]]
    other[other.index(0.5)] = 0.4
    assert "was started with ratio 0.5, not 0.4" in refused("prune", *other)
    with monkeypatch.context() as patch:
        patch.setattr(Pruned, "save_pretrained", None)  # the cut is there
        facts(*ask, "--out", out, "--resume")
    assert contents(out) == contents(whole)
    left = {path.name for path in out.with_name("out.recovery").iterdir()}
    assert not [name for name in left if not name.startswith("events")]


@pytest.mark.long
def test_what_a_kill_behind_the_last_step_leaves_goes_with_the_next_command_and_nothing_else(
    dense, tmp_path, monkeypatch
):
    ask = ["prune", dense, "--policy", "none", "--ratio", 0.5, "--tokens", 1024]
    ask += ["--recover", "fast", "--out", tmp_path / "out"]
    left = tmp_path / "out.recovery" / "pruned"

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recovering.Unfinished, "remove", killed)
        assert run(*ask).exit_code == 130
    assert left.is_dir()
    record = left / "prunenet.json"
    was = record.read_bytes()
    record.write_bytes(was.replace(b'"ratio": 0.5', b'"ratio": 0.4'))
    assert record.read_bytes() != was
    assert "out exists" in refused(*ask)
    assert left.is_dir(), "the cut of another run"
    record.write_bytes(was)
    assert "out exists" in refused(*ask)
    assert not left.exists()


@pytest.mark.long
def test_a_cut_made_on_external_text_learns_as_many_tokens_from_that_text(dense, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    words = token_ids(1, 2400).flatten().remainder(62).tolist()
    text.write_text(" ".join(f"w{word}" for word in words))
    read = ("--moments", "data", "--text", text, "--tokens", 1024)
    ask = ("prune", dense, "--policy", "none", "--ratio", 0.5, *read)
    said = facts(*ask, "--recover", "fast", "--out", out)
    assert said["loss_after"] < said["loss_before"]
    made = load_provenance(out)
    (step,) = made.recovered
    assert (made.regime, step["regime"], step["tokens"]) == ("data", "data", 5 * 4 * 64)


def test_a_training_that_could_not_be_done_is_refused_before_the_cut(dense, tmp_path, monkeypatch):
    ask = ("prune", dense, "--ratio", 0.5, "--out", tmp_path / "out")
    stream = ("--recover", "fast", "--stream", "--moments", "none")
    assert "leave --stream and --device auto out" in refused(*ask, *stream)
    assert "say --recover fast too" in refused(*ask, "--resume")
    assert "nothing to resume" in refused(*ask, "--recover", "fast", "--resume")
    assert [path.name for path in tmp_path.iterdir()] == []
    alone = ("--recover", "fast", "--moments", "none", "--policy", "none", "--refit", "off")
    assert "no BOS token" in refused(*ask, *alone, "--bos", "yes")
    with monkeypatch.context() as patch:
        patch.setattr("prunenet.recover.options.FULL", 0)
        patch.setattr(recovering, "Tuning", Tuning)
        patch.setitem(sys.modules, "peft", None)
        assert "pip install 'prunenet[recover]'" in refused(*ask, *alone)
    bare = shutil.copytree(dense, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert "has no tokenizer that can be read" in refused(ask[0], bare, *ask[2:], *alone)
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


@pytest.mark.long
def test_time_and_memory_are_said_before_the_text_is_written(dense, tmp_path, monkeypatch):
    from prunenet.recover.record import recover

    facts("prune", dense, "--policy", "none", "--ratio", 0.5, "--out", tmp_path / "cut")
    said = []

    def stop(*_):
        raise RuntimeError("text")

    monkeypatch.setattr(record, "learning_text", stop)
    watch = Watch(estimate=said.append)
    with pytest.raises(RuntimeError, match="text"):
        recover(tmp_path / "cut", tmp_path / "out", QUICK, teacher=dense, watch=watch)
    (found,) = said
    assert found.tokens == 98304
    assert found.text_seconds > 0
    monkeypatch.undo()
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number % 60}" for number in range(500)))
    external = RecoverText(moments="data", text=str(text))
    recover(tmp_path / "cut", tmp_path / "out", QUICK, text=external, watch=watch)
    assert said[1].tokens == 4 * 64, "one step: the text has no more"
    assert "98,304 tokens at about" in str(found)
    assert "GB of memory" in str(found)


def test_an_estimate_grows_with_steps_and_with_what_is_trained():
    model = tiny_model("llama")
    narrow = narrowed(model, random_keep([24] * LAYERS))
    blocks = CalibrationSet(token_ids(20, 16), "self", {"text": "random"})
    few, many = (
        estimated(narrow, blocks, replace(QUICK, steps=steps), teacher=model) for steps in (1, 1000)
    )
    assert (few.tokens, many.tokens) == (64, 64000)
    assert many.seconds > 50 * few.seconds
    full = estimated(narrow, blocks, replace(QUICK, updates="full"), teacher=model)
    averaged = estimated(narrow, blocks, replace(QUICK, updates="full", average=0.9))
    held = 4 * sum(p.numel() for p in narrow.model.layers.parameters())
    assert full.bytes - few.bytes > 3 * held
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert averaged.bytes > full.bytes - weights


def test_the_time_of_writing_is_estimated_for_blocks_longer_than_a_part(monkeypatch):
    asked = []
    monkeypatch.setattr(estimate, "generate_blocks", lambda *given: asked.append(given[2]))
    assert estimate.writing(tiny_model("llama"), words(), 3, 100_000, "auto") > 0
    assert asked[0].sequences == 1


@pytest.mark.long
def test_repeated_text_is_told_from_text_that_does_not_repeat(dense, tmp_path):
    from prunenet.evaluation.repetition import counted
    from prunenet.evaluation.side_by_side import evaluate

    fresh = torch.arange(256).view(2, 128)
    assert counted(fresh).distinct_4 == 1
    assert counted(fresh).repetition_rate == 0
    twice = counted(torch.cat((fresh[:1], fresh[:1])))
    assert (twice.distinct_4, twice.repetition_rate) == (0.5, 0), "another text is no repetition"
    stuck = counted(torch.full((2, 128), 7))
    assert stuck.distinct_4 == 1 / 250
    assert stuck.repetition_rate == pytest.approx(124 / 125)
    (row,) = evaluate(
        dense, speed=None, options=EvaluationOptions(window=16, max_windows=2), repetition=True
    )
    shown = row.as_dict()
    assert 0 < shown["distinct_4"] <= 1 - shown["repetition_rate"] <= 1


@pytest.mark.slow
def test_each_rung_is_a_checkpoint_and_those_that_are_there_are_not_done_again(
    dense, tmp_path, monkeypatch
):
    facts("prune", dense, "--policy", "none", "--ratio", 0.5, "--out", tmp_path / "cut")
    ask = ("recover", tmp_path / "cut", "--teacher", dense, "--out", tmp_path / "out")
    small = ("--batch", 4, "--rank", 2, "--learning-rate", 0.005)
    assert "leave --steps and --tokens out" in refused(*ask, "--rungs", 1280, "--tokens", 1280)
    assert "a thousand apart or more, got" in refused(*ask, "--rungs", "1280,1300")
    (first,) = facts(*ask, *small, "--rungs", 1280)["rungs"]
    assert "exists already" in refused(*ask, *small, "--rungs", "1280,2560")
    before = contents(tmp_path / "out-1k")
    found = facts(*ask, *small, "--rungs", "2560,1280", "--resume")["rungs"]
    assert [Path(rung["folder"]).name for rung in found] == ["out-1k", "out-2k"]
    assert found[0] == first
    assert contents(tmp_path / "out-1k") == before
    assert [load_provenance(rung["folder"]).recovered[0]["tokens"] for rung in found] == [
        1280,
        2560,
    ]


@pytest.mark.long
def test_rungs_that_external_text_is_too_short_for_are_refused_before_any_is_run(dense, tmp_path):
    facts("prune", dense, "--policy", "none", "--ratio", 0.5, "--out", tmp_path / "cut")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number % 60}" for number in range(2000)))
    ask = ("recover", tmp_path / "cut", "--teacher", dense, "--out", tmp_path / "out")
    ask += ("--rungs", "1280,12800", "--moments", "data", "--text", text)
    said = "--tokens 12800 need 16000 with those held back, and text"
    assert said in refused(*ask)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "text.txt"]


@pytest.mark.long
def test_rungs_count_the_text_alone_and_what_a_kill_behind_one_leaves_goes(tmp_path, monkeypatch):
    dense = save_tiny(tmp_path / "tiny")
    with_bos(words()).save_pretrained(dense)
    facts("prune", dense, "--ratio", 0.5, "--moments", "none", "--out", tmp_path / "cut")
    text = tmp_path / "text.txt"
    text.write_text(counting(0, 3000))
    ask = ("recover", tmp_path / "cut", "--teacher", dense, "--out", tmp_path / "out")
    ask += ("--moments", "data", "--text", text, "--rungs", 1000, "--batch", 64)

    def killed(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record, "remove_state", killed)
        assert run(*ask).exit_code == 130
    assert (tmp_path / "out-1k.recovery" / "state.safetensors").exists()
    (found,) = facts(*ask, "--resume")["rungs"]
    assert found["tokens"] == 1000
    (step,) = load_provenance(found["folder"]).recovered
    assert (step["window"], step["learned"]) == (63, 15 * 63), "BOS is no text"
    assert step["tokens"] == 64 * 63, "a batch that is asked for is read, again and again"
    assert not list((tmp_path / "out-1k.recovery").glob("*.safetensors"))


@pytest.mark.long
def test_the_card_s_commands_cut_and_recover_to_the_same_bytes(dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense, "tiny")
    rows = ({"other": " ".join(f"w{n * n % 61}" for n in range(2600)), "text": "w1"},)
    Path("words.jsonl").write_text("".join(json.dumps(row) for row in rows))
    own = ("--tokens", 1280, "--seed", 3, "--round", 4, "--dtype", "bfloat16")
    facts("prune", "tiny", "--policy", "none", "--ratio", 0.55, *own, "--out", "smaller")
    first = (
        "--embeddings",
        "--updates",
        "full",
        "--tokens",
        1000,
        "--window",
        32,
        "--bos",
        "no",
        "--loss",
        "top256",
        "--seed",
        1,
    )
    facts("recover", "smaller", "--teacher", "tiny", "--out", "once", *first)
    read = (
        "--moments",
        "data",
        "--text",
        "words.jsonl",
        "--text-column",
        "other",
        "--steps",
        3,
        "--batch",
        2,
        "--betas",
        0.8,
    )
    facts(
        "recover",
        "once",
        "--out",
        "twice",
        *read,
        0.9,
        "--updates",
        "lora",
        "--rank",
        3,
        "--dtype",
        "float32",
    )
    lines = Path("twice/README.md").read_text().splitlines()
    cut, *trainings = [line for line in lines if line.startswith("prunenet ")]
    assert cut.endswith("--dtype bfloat16 --policy none --out smaller")
    assert [re.findall("--dtype ([a-z0-9]+)", said) for said in trainings] == [
        ["auto"],
        ["float32"],
    ]
    Path("smaller").rename("first")
    for command in (cut, *trainings):
        facts(*shlex.split(command)[1:])
    assert contents(Path("smaller")) == contents(Path("first"))
    assert contents(Path("recovered")) == contents(Path("once"))
    assert contents(Path("recovered-2")) == contents(Path("twice"))


@pytest.mark.long
def test_a_mixture_that_lost_whole_experts_learns_from_the_whole_one(dense, tmp_path):
    model, _ = tiny("experts, concat")
    model.save_pretrained(tmp_path / "mixture")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, tmp_path / "mixture")
    facts(
        "prune",
        tmp_path / "mixture",
        "--experts",
        2,
        "--moments",
        "none",
        "--out",
        tmp_path / "cut",
    )
    ask = ("recover", tmp_path / "cut", "--teacher", tmp_path / "mixture", "--steps", 2)
    found = facts(*ask, "--moments", "data", "--updates", "full", "--out", tmp_path / "out")
    assert found["loss_after"] <= found["loss_before"]
    assert load_provenance(tmp_path / "out").how["experts"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["experts, concat", "wrapper"])
@pytest.mark.parametrize("updates", ["lora", "full"])
def test_mixtures_and_wrappers_are_recovered_by_either_kind_of_update(kind, updates):
    model, ids = tiny(kind)
    narrow = narrowed(model, masks(kind, 0.5))
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    known, generator = ids.flatten(), torch.Generator().manual_seed(0)
    drawn = torch.randint(len(known), (12, 8), generator=generator)
    blocks = CalibrationSet(known[drawn], "self", {"text": "random"})
    rate = 5e-3 if updates == "lora" else 3e-4
    tuning = replace(QUICK, updates=updates, steps=6, learning_rate=rate)
    found = tuned(narrow, blocks, tuning, teacher=model)
    assert found.after < found.before
    after = found.model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not [name for name in changed if "embed" in name or "vision" in name]
    # experts that are one tensor have no linears: only full training reaches them
    inside = [name for name in changed if "experts" in name or "mlp.down" in name]
    assert bool(inside) == (updates == "full" or kind == "wrapper")
