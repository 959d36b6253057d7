"""The command line: every command, its JSON, and one clear sentence for every mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from families import tiny_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from prunenet.cli.app import app
from prunenet.cli.console import one_sentence
from prunenet.policies import artifact
from prunenet.policies.apply import Pruned
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.training.recipe import PRESETS
from prunenet.refit import blocks


def save_tiny(folder: Path, family: str = "llama") -> Path:
    tiny_model(family).save_pretrained(folder)
    words = {f"w{i}": i for i in range(62)} | {"<s>": 62, "[UNK]": 63}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _outside(tmp_path_factory):
    """A cache of our own, and nothing in the zoo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNENET_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(artifact, "ZOO", tmp_path_factory.mktemp("zoo"))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory, model) -> str:
    out = tmp_path_factory.mktemp("policies") / "policy"
    assert (
        run(
            "train",
            model,
            "--out",
            out,
            "--updates",
            2,
            "--masks",
            2,
            "--preset",
            "spectral",
            "--distance",
            "energy",
        ).exit_code
        == 0
    )
    return str(out)


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> str:
    """A policy with scores and widths that are not the untrained ones, as if trained on the model's
    own text.
    """
    policy = Policy.untrained(PolicyConfig(hidden=(8,), regime="self", gain=0.2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in (policy.scorer.out, policy.scorer.widths.out):
            linear.weight.normal_(generator=generator)
    return str(policy.save_pretrained(tmp_path_factory.mktemp("policies") / "learned"))


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i % 61}" for i in range(400)))
    return str(path)


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def facts(*arguments) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments) -> str:
    """The one sentence with which a command refuses."""
    result = run(*arguments)
    assert result.exit_code not in (0, None)
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("moments", ["none", "self"])
def test_prune_makes_a_checkpoint_that_loads_everywhere_and_twice_the_same(
    model, policy, tmp_path, monkeypatch, moments
):
    ask = ("prune", model, "--policy", policy, "--ratio", 0.5, "--moments", moments)
    first = facts(*ask, "--out", tmp_path / "a")
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "another"))  # the text is written anew
    facts(*ask, "--out", tmp_path / "b")
    assert first["width"] == 24
    assert first["parameters"] < first["parameters_before"]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.long
def test_prune_by_itself_eliminates_and_refits_on_the_model_s_own_text(model, tmp_path):
    before = contents(model)
    done = facts("prune", model, "--ratio", 0.5, "--out", tmp_path / "out")
    assert contents(model) == before
    assert {
        name: done[name] for name in ("regime", "policy", "widths", "channels", "refit", "width")
    } == {
        "regime": "self",
        "policy": "elimination",
        "widths": "uniform",
        "channels": "elimination",
        "refit": "layerwise",
        "width": 24,
    }
    story = json.loads((tmp_path / "out" / "prunenet.json").read_text())
    assert story["how"]["text"]["text"] == "self-generated"
    assert story["how"]["predicted_gain"] is None
    assert (
        "How: widths uniform, channels elimination, refit layerwise"
        in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("moments", "widths", "channels", "refit"),
    [
        ("none", "auto", None, None),
        ("none", "uniform", "policy", "off"),
        ("none", "per-layer", None, "off"),
        ("self", "uniform", "policy", "off"),
        ("self", "uniform", "elimination", "sequential"),
        ("self", "per-layer", "policy", "layerwise"),
        ("self", "per-layer", "elimination", "off"),
        ("self", "auto", "policy", "sequential"),
        ("self", "auto", None, None),
        ("self", "uniform", "blend", "off"),
        ("data", "per-layer", "elimination", "sequential"),
        ("data", "auto", "policy", None),
    ],
)
def test_every_choice_of_prune_is_done_and_said(
    model, learned, tmp_path, moments, widths, channels, refit
):
    (tmp_path / "words.txt").write_text(" ".join(f"w{(i * i + i // 7) % 61}" for i in range(4000)))
    given = [
        ("--text", tmp_path / "words.txt" if moments == "data" else None),
        ("--channels", channels),
        ("--refit", refit),
    ]
    options = [word for name, value in given if value is not None for word in (name, value)]
    ask = (
        "prune",
        model,
        "--policy",
        learned,
        "--ratio",
        0.5,
        "--moments",
        moments,
        "--widths",
        widths,
        *options,
    )
    done = facts(*ask, "--out", tmp_path / "out")
    story = json.loads((tmp_path / "out" / "prunenet.json").read_text())
    how = story["how"]
    assert how["channels"] == (channels or ("policy" if moments == "none" else "blend"))
    assert how["refit"] == (refit or ("off" if moments == "none" else "layerwise"))
    if widths == "auto":
        assert how["widths"] == ("per-layer" if how["predicted_gain"] > 0.05 else "uniform")
    else:
        assert (how["widths"], how["predicted_gain"]) == (widths, None)
    assert done["regime"] == story["regime"] == ("data" if moments == "data" else "self")
    assert (
        how.get("text", {}).get("text")
        == {"none": None, "self": "self-generated", "data": "words.txt"}[moments]
    )
    assert sum(story["widths"]) == 3 * 24
    assert (len(set(story["widths"])) > 1) == (how["widths"] == "per-layer")
    narrow = load_file(tmp_path / "out" / "model.safetensors")
    dense, masks = (
        load_file(Path(model) / "model.safetensors"),
        load_file(tmp_path / "out" / "prunenet_masks.safetensors"),
    )
    for layer in range(3):
        name, keep = (
            f"model.layers.{layer}.mlp.{{}}_proj.weight",
            masks[f"layers.{layer}.keep"].long(),
        )
        assert torch.equal(narrow[name.format("up")], dense[name.format("up")][keep])
        as_it_was = torch.equal(narrow[name.format("down")], dense[name.format("down")][:, keep])
        assert as_it_was == (how["refit"] == "off")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=how["widths"] == "per-layer"
    )
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.long
def test_prune_trains_blocks_and_goes_on_after_a_kill_from_a_folder_that_it_removes(
    model, learned, tmp_path, monkeypatch
):
    ask = ("prune", model, "--policy", learned, "--ratio", 0.5, "--refit", "blocks")
    save, out = Pruned.save_pretrained, tmp_path / "out"

    def killed(self, where, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pruned, "save_pretrained", killed)
    assert run(*ask, "--out", out).exit_code != 0
    assert [path.name for path in sorted(tmp_path.joinpath("out.blocks").iterdir())] == [
        f"{layer:04d}.safetensors" for layer in range(3)
    ]
    monkeypatch.setattr(Pruned, "save_pretrained", save)
    monkeypatch.setattr(blocks, "_trained", killed)  # all are trained already
    facts(*ask, "--out", out)
    assert not (tmp_path / "out.blocks").exists()
    how = json.loads((out / "prunenet.json").read_text())["how"]
    assert list(how["blocks"]) == ["0", "1", "2"]
    assert "Each FFN was trained by itself after the cut" in (out / "README.md").read_text()


@pytest.mark.long
def test_prune_measures_on_as_much_text_as_asked_for(model, learned, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{(i * i + i // 7) % 61}" for i in range(4000)))
    ask = (
        "prune",
        model,
        "--policy",
        learned,
        "--ratio",
        0.5,
        "--moments",
        "data",
        "--text",
        words,
    )
    facts(*ask, "--tokens", 2048, "--out", tmp_path / "out")
    text = json.loads((tmp_path / "out" / "prunenet.json").read_text())["how"]["text"]
    assert text["count"] * text["window"] == 2048
    said = refused(*ask, "--tokens", 100, "--out", tmp_path / "none")
    assert "--tokens must be at least" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--widths", "wide"), "'wide' is not one of 'auto', 'uniform', 'per-layer'"),
        (
            ("--channels", "best"),
            "'best' is not one of 'policy', 'blend', 'elimination'",
        ),
        (("--refit", "on"), "'on' is not one of 'off', 'layerwise', 'sequential', 'blocks'"),
        (("--moments", "none", "--refit", "layerwise"), "give text (--moments self or data)"),
        (("--moments", "none", "--channels", "elimination"), "give text (--moments self or data)"),
        (("--moments", "maybe"), "'maybe'"),
        (("--policy", "none", "--channels", "policy"), "no policy to choose the channels"),
        (("--policy", "none", "--widths", "per-layer"), "no policy to allocate widths"),
        (("--policy", "none", "--moments", "none"), "no policy to choose the channels"),
        (("--policy", "alpaca"), "policy 'alpaca' does not exist"),
        (("--text", "words.txt"), "--text is read with --moments data only"),
        (("--text", ""), "--text is read with --moments data only"),
        (("--text-column", "x"), "--text-column is read with --moments data only"),
        (("--moments", "data", "--text", ""), "--text is empty (an unset variable?)"),
        (
            ("--moments", "none", "--tokens", "4096"),
            "--moments none reads no text: leave --tokens 4096 out",
        ),
        (
            ("--moments", "none", "--bos", "no"),
            "--moments none reads no text: leave --bos no out",
        ),
        (("--params", "0.99"), "the FFN channels hold"),
        (("--round", "0"), "got 0"),
        (("--round", "64"), "has no multiple of 64"),
    ],
)
def test_prune_refuses_what_it_cannot_do_before_any_text_is_written(
    model, tmp_path, monkeypatch, options, message
):
    def too_early(*_, **__):
        raise AssertionError("text was written before the refusal")

    monkeypatch.setattr("prunenet.text.calibration.calibration_for", too_early)
    amount = () if "--params" in options else ("--ratio", 0.5)
    result = run("prune", model, "--out", tmp_path / "out", *amount, *options)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_an_unknown_policy_lists_the_zoo_and_a_known_one_is_found_by_name_or_family(
    model, learned, tmp_path, monkeypatch
):
    shutil.copytree(learned, tmp_path / "zoo" / "llama")
    monkeypatch.setattr(artifact, "ZOO", tmp_path / "zoo")
    ask = ("prune", model, "--ratio", 0.5, "--moments", "none")
    assert "take one that ships: llama" in refused(
        *ask, "--policy", "alpaca", "--out", tmp_path / "x"
    )
    assert not (tmp_path / "x").exists()
    by_family, by_name = (
        facts(*ask, "--out", tmp_path / "a"),
        facts(*ask, "--policy", "llama", "--out", tmp_path / "b"),
    )
    assert by_family["policy"] == by_name["policy"] == "llama"
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_prune_by_share_of_all_parameters(model, policy, tmp_path):
    ask = ("--policy", policy, "--moments", "none", "--params", 0.2, "--round", 1)
    given = facts("prune", model, *ask, "--out", tmp_path / "out")
    assert given["removed"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.long
def test_eval_compares_side_by_side_and_report_draws_it(model, policy, text, tmp_path):
    facts(
        "prune",
        model,
        "--policy",
        policy,
        "--moments",
        "none",
        "--ratio",
        0.5,
        "--out",
        tmp_path / "narrow",
    )
    result = run(
        "eval", model, tmp_path / "narrow", "--text", text, "--window", 20, "--no-speed", "--json"
    )
    rows = json.loads(result.stdout)["models"]
    assert [row["window"] for row in rows] == [20, 20]
    assert rows[1]["parameters"] < rows[0]["parameters"]
    (tmp_path / "results.json").write_text(result.stdout)
    facts("report", tmp_path / "results.json", "--out", tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_tables_are_shown_without_json(model, text):
    shown = run("eval", model, "--text", text, "--window", 20, "--no-speed").stdout
    assert "perplexity" in shown
    assert "tiny" in shown


def test_a_checkpoint_without_a_tokenizer_is_cut_from_its_weights_alone(policy, tmp_path):
    tiny_model("opt").save_pretrained(tmp_path / "bare")
    ask = (
        "prune",
        tmp_path / "bare",
        "--policy",
        policy,
        "--ratio",
        0.5,
        "--out",
        tmp_path / "out",
    )
    assert "has no tokenizer" in refused(*ask)
    assert not (tmp_path / "out").exists()
    result = run(*ask, "--moments", "none")
    assert result.exit_code == 0
    assert "has no tokenizer" in result.stderr


def test_the_folder_s_name_does_not_matter(policy, tmp_path):
    folder = save_tiny(tmp_path / "dolphin-phi-llama3", "opt")
    ask = ("--policy", policy, "--moments", "none", "--ratio", 0.5)
    assert facts("prune", folder, *ask, "--out", tmp_path / "out")["width"] == 24


def test_options_that_would_be_ignored_are_refused(model):
    said = refused("eval", model, "--no-speed", "--repeats", 7)
    assert "--no-speed measures no speed: leave it out" in said
    ask = ("prune", model, "--ratio", 0.3, "--moments", "none", "--experts-by", "random")
    assert "--experts-by random says which whole experts go" in refused(*ask, "--out", "out")
    assert "--markdown is of the list of known types" in refused("models", model, "--markdown")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "1.0"), "ratio must be in [0, 1), got 1.0"),
        (("--ratio", "-0.1"), "ratio must be in [0, 1), got -0.1"),
        (("--ratio", "nan"), "ratio must be in [0, 1), got nan"),
        (("--ratio", "abc"), "'abc' is not a number; give a share such as 0.3"),
        (("--ratio", "0.2", "--params", "0.2"), "got both"),
        ((), "got neither"),
        (("--params", "0.99"), "the FFN channels hold"),
        (("--ratio", "0.2", "--round", "0"), "got 0"),
        (("--ratio", "0.2", "--dtype", "int4"), "dtype must be one of"),
        (("--ratio", "0.2", "--device", "abacus"), "cannot be put on device 'abacus'"),
    ],
)
def test_prune_refuses_bad_amounts_in_one_sentence(model, policy, tmp_path, options, message):
    assert message in refused(
        "prune", model, "--policy", policy, "--moments", "none", "--out", tmp_path / "out", *options
    )
    assert list(tmp_path.iterdir()) == []


def test_missing_and_damaged_files_are_one_sentence(model, policy, tmp_path):
    ask = ("--policy", policy, "--ratio", 0.3, "--out", tmp_path / "out")
    assert "nowhere" in refused("prune", tmp_path / "nowhere", *ask)
    assert "does not exist" in refused(
        "prune", model, "--policy", tmp_path / "nowhere", "--ratio", 0.3, "--out", tmp_path / "out"
    )
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    assert "damaged" in refused("prune", broken, *ask) or "corrupt" in refused(
        "prune", broken, *ask
    )
    assert not (tmp_path / "out").exists()
    assert "does not exist" in refused("eval", model, "--text", tmp_path / "nothing.txt")


def test_an_unsupported_model_type_is_refused_with_the_reason(model, policy, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mamba"}))
    message = refused(
        "prune", tmp_path / "other", "--policy", policy, "--ratio", 0.3, "--out", tmp_path / "out"
    )
    assert "'mamba' (MambaForCausalLM) is not supported: no matrix takes" in message


def test_an_output_folder_that_exists_is_refused_and_left_alone(model, policy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert "exists already" in refused(
        "prune", model, "--policy", policy, "--ratio", 0.3, "--out", tmp_path / "out"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert "holds a policy" in refused("train", model, "--out", policy)


def test_a_policy_for_another_set_of_statistics_is_refused(model, policy, tmp_path):
    shutil.copytree(policy, tmp_path / "old")
    config = tmp_path / "old" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"statistics": ["colour"]}))
    message = refused(
        "prune", model, "--policy", tmp_path / "old", "--ratio", 0.3, "--out", tmp_path / "out"
    )
    assert "train the policy again" in message


def test_train_refuses_unknown_presets_and_ratios_before_it_makes_a_folder(model, tmp_path):
    assert "unknown preset 'best'" in refused(
        "train", model, "--out", tmp_path / "p", "--preset", "best"
    )
    assert "got 1.5" in refused("train", model, "--out", tmp_path / "p", "--ratio", 0.1, 1.5)
    assert "nothing to resume" in refused("train", model, "--out", tmp_path / "p", "--resume")
    assert not (tmp_path / "p").exists()
    assert "nowhere" in refused("train", tmp_path / "nowhere", "--out", tmp_path / "q")
    assert not (tmp_path / "q").exists()


@pytest.mark.long
def test_train_learns_where_to_cut_too_unless_widths_are_to_be_uniform(model, tmp_path):
    ask = ("train", model, "--updates", 1, "--masks", 2)
    whole = facts(*ask, "--out", tmp_path / "whole")
    assert (whole["regime"], whole["width_updates"]) == ("self", PRESETS["widths"].updates)
    assert whole["predicted_gain_of_widths"] >= 0
    assert (
        Policy.from_pretrained(tmp_path / "whole").config.recipe["where"]["reward"] == "divergence"
    )
    uniform = facts(*ask, "--widths", "uniform", "--out", tmp_path / "uniform")
    assert "width_updates" not in uniform
    config = Policy.from_pretrained(tmp_path / "uniform").config
    assert (config.recipe["where"], config.gain) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "x.txt"), "--text is read with --moments data only"),
        (("--text-column", "x"), "--text-column is read with --moments data only"),
        (("--preset", "spectral", "--moments", "data"), "leave --moments and --text out"),
        (("--distance", "ks"), "--distance belongs to the spectral reward"),
        (("--spectrum", "exact"), "--spectrum belongs to the spectral reward"),
        (("--seed", "-1"), "seed must be in [0, 2^32), got -1"),
    ],
)
def test_train_refuses_options_that_it_would_not_read(model, tmp_path, options, message):
    assert message in refused("train", model, "--out", tmp_path / "p", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", ['{"models": [1]}', '{"models": 5}', '{"models": [{"ratio": "a"}]}', "[]", "{"]
)
def test_results_that_are_not_results_are_one_sentence(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    assert refused("report", tmp_path / "results.json", "--out", tmp_path / "x.png").startswith(
        "error: "
    )
    assert not (tmp_path / "x.png").exists()


def test_eval_refuses_what_it_cannot_measure_before_it_scores(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "prunenet.evaluation.side_by_side.perplexity",
        lambda *_, **__: pytest.fail("scored before the refusal"),
    )
    ask = ("eval", model, "--text", text, "--window", 20)
    assert "batch must be 1 or more, got 0" in refused(*ask, "--batch", 0)
    tiny_model("opt").save_pretrained(tmp_path / "bare")
    assert "has no tokenizer" in refused(*ask, tmp_path / "bare", "--no-speed")


@pytest.mark.parametrize("inside", ["", "deep/inside"])
def test_a_folder_cannot_be_where_a_file_is_and_that_is_said_before_any_work(
    model, tmp_path, monkeypatch, inside
):
    def too_early(*_, **__):
        raise AssertionError("work before the refusal")

    monkeypatch.setattr("prunenet.text.calibration.calibration_for", too_early)
    monkeypatch.setattr("prunenet.cli.demo_steps.fetch_demo_model", too_early)
    (tmp_path / "notes").write_text("mine")
    out = tmp_path / "notes" / inside
    for command in (("prune", model, "--ratio", 0.5), ("train", model), ("demo",)):
        said = refused(*command, "--out", out)
        assert "is a file; give another folder" in said or "exists already" in said
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_model_given_twice_is_refused(model, text):
    assert "got one twice" in refused("eval", model, model, "--text", text)


def test_export_pads_per_layer_widths_and_says_what_it_cannot_do(model, policy, tmp_path):
    facts(
        "prune",
        model,
        "--policy",
        policy,
        "--moments",
        "none",
        "--ratio",
        0.5,
        "--out",
        tmp_path / "narrow",
    )
    assert "one width for all layers already" in refused(
        "export", tmp_path / "narrow", "--pad", "--out", tmp_path / "x"
    )
    assert "say --pad" in refused("export", tmp_path / "narrow", "--out", tmp_path / "x")
    assert "--type q8_0 belongs to --gguf" in refused(
        "export", tmp_path / "narrow", "--pad", "--type", "q8_0", "--out", tmp_path / "x"
    )


@pytest.mark.parametrize(
    "command", [("eval", "m"), ("export", "m", "--pad", "--out", "x"), ("report", "r"), ("demo",)]
)
def test_a_command_that_shares_no_work_refuses_to_run_as_several_processes(
    command, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    out = () if "--out" in command or command[0] == "eval" else ("--out", "x")
    assert "this command does not: run it alone" in refused(*command, *out)
    assert list(tmp_path.iterdir()) == []


def test_python_m_prunenet_is_the_command():
    shown = subprocess.run(
        [sys.executable, "-m", "prunenet", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(
        command in shown for command in ("train", "prune", "eval", "export", "report", "demo")
    )


def test_the_pruned_file_holds_only_kept_channels(model, policy, tmp_path):
    facts(
        "prune",
        model,
        "--policy",
        policy,
        "--moments",
        "none",
        "--ratio",
        0.5,
        "--out",
        tmp_path / "out",
    )
    dense = load_file(Path(model) / "model.safetensors")
    narrow = load_file(tmp_path / "out" / "model.safetensors")
    keep = load_file(tmp_path / "out" / "prunenet_masks.safetensors")["layers.1.keep"].long()
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(narrow[name], dense[name][:, keep])


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")]
)
def test_too_little_memory_is_one_sentence_that_says_what_takes_less(error, capsys):
    with pytest.raises(typer.Exit) as ended, one_sentence():
        raise error
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.exit_code == 1
    assert "out of memory: take --dtype bfloat16" in said
