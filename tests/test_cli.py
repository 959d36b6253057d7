"""The command line: every command, its JSON, and one clear sentence for every mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from prunenet.cli import app


def save_tiny(folder: Path, family: str = "llama") -> Path:
    tiny_model(family).save_pretrained(folder)
    words = {f"w{i}": i for i in range(62)} | {"<s>": 62, "[UNK]": 63}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory, model) -> str:
    out = tmp_path_factory.mktemp("policies") / "policy"
    assert (
        run(
            "train", model, "--out", out, "--updates", 2, "--masks", 2, "--preset", "spectral", "--distance", "energy"
        ).exit_code
        == 0
    )
    return str(out)


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


def test_prune_makes_a_checkpoint_that_loads_everywhere_and_twice_the_same(model, policy, tmp_path):
    first = facts("prune", model, "--policy", policy, "--ratio", 0.5, "--out", tmp_path / "a")
    facts("prune", model, "--policy", policy, "--ratio", 0.5, "--out", tmp_path / "b")
    assert first["width"] == 24
    assert first["parameters"] < first["parameters_before"]
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert same[0] == same[1]


def test_prune_by_share_of_all_parameters(model, policy, tmp_path):
    given = facts("prune", model, "--policy", policy, "--params", 0.2, "--round", 1, "--out", tmp_path / "out")
    assert given["removed"] == pytest.approx(0.2, abs=0.01)


def test_eval_compares_side_by_side_and_report_draws_it(model, policy, text, tmp_path):
    facts("prune", model, "--policy", policy, "--ratio", 0.5, "--out", tmp_path / "narrow")
    result = run("eval", model, tmp_path / "narrow", "--text", text, "--window", 20, "--no-speed", "--json")
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


def test_a_checkpoint_without_a_tokenizer_is_cut_all_the_same(policy, tmp_path):
    tiny_model("opt").save_pretrained(tmp_path / "bare")
    result = run("prune", tmp_path / "bare", "--policy", policy, "--ratio", 0.5, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "has no tokenizer" in result.stderr


def test_the_folder_s_name_does_not_matter(policy, tmp_path):
    folder = save_tiny(tmp_path / "dolphin-phi-llama3", "opt")
    assert facts("prune", folder, "--policy", policy, "--ratio", 0.5, "--out", tmp_path / "out")["width"] == 24


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
    assert message in refused("prune", model, "--policy", policy, "--out", tmp_path / "out", *options)
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
    assert "damaged" in refused("prune", broken, *ask) or "corrupt" in refused("prune", broken, *ask)
    assert not (tmp_path / "out").exists()
    assert "does not exist" in refused("eval", model, "--text", tmp_path / "nothing.txt")


def test_an_unsupported_model_type_lists_what_is_supported(model, policy, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mamba"}))
    message = refused("prune", tmp_path / "other", "--policy", policy, "--ratio", 0.3, "--out", tmp_path / "out")
    assert "'mamba' is not supported; supported types: falcon" in message


def test_an_output_folder_that_exists_is_refused_and_left_alone(model, policy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert "exists already" in refused("prune", model, "--policy", policy, "--ratio", 0.3, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert "holds a policy" in refused("train", model, "--out", policy)


def test_a_policy_for_another_set_of_statistics_is_refused(model, policy, tmp_path):
    shutil.copytree(policy, tmp_path / "old")
    config = tmp_path / "old" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"statistics": ["colour"]}))
    message = refused("prune", model, "--policy", tmp_path / "old", "--ratio", 0.3, "--out", tmp_path / "out")
    assert "train the policy again" in message


def test_train_refuses_unknown_presets_and_ratios_before_it_makes_a_folder(model, tmp_path):
    assert "unknown preset 'best'" in refused("train", model, "--out", tmp_path / "p", "--preset", "best")
    assert "got 1.5" in refused("train", model, "--out", tmp_path / "p", "--ratio", 0.1, 1.5)
    assert "nothing to resume" in refused("train", model, "--out", tmp_path / "p", "--resume")
    assert not (tmp_path / "p").exists()
    assert "nowhere" in refused("train", tmp_path / "nowhere", "--out", tmp_path / "q")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "x.txt"), "--text is read with --moments data only"),
        (("--preset", "spectral", "--moments", "data"), "leave --moments and --text out"),
        (("--distance", "ks"), "--distance belongs to the spectral reward"),
        (("--seed", "-1"), "seed must be in [0, 2^32), got -1"),
    ],
)
def test_train_refuses_options_that_it_would_not_read(model, tmp_path, options, message):
    assert message in refused("train", model, "--out", tmp_path / "p", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ['{"models": [1]}', '{"models": 5}', '{"models": [{"ratio": "a"}]}', "[]", "{"])
def test_results_that_are_not_results_are_one_sentence(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    assert refused("report", tmp_path / "results.json", "--out", tmp_path / "x.png").startswith("error: ")
    assert not (tmp_path / "x.png").exists()


def test_a_model_given_twice_is_refused(model, text):
    assert "got one twice" in refused("eval", model, model, "--text", text)


def test_export_pads_per_layer_widths_and_says_what_it_cannot_do(model, policy, tmp_path):
    facts("prune", model, "--policy", policy, "--ratio", 0.5, "--out", tmp_path / "narrow")
    assert "one width for all layers already" in refused("export", tmp_path / "narrow", "--pad", "--out", tmp_path / "x")
    assert "say --pad" in refused("export", tmp_path / "narrow", "--out", tmp_path / "x")


def test_python_m_prunenet_is_the_command():
    shown = subprocess.run([sys.executable, "-m", "prunenet", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(command in shown for command in ("train", "prune", "eval", "export", "report", "demo"))


def test_the_pruned_file_holds_only_kept_channels(model, policy, tmp_path):
    facts("prune", model, "--policy", policy, "--ratio", 0.5, "--out", tmp_path / "out")
    dense = load_file(Path(model) / "model.safetensors")
    narrow = load_file(tmp_path / "out" / "model.safetensors")
    keep = load_file(tmp_path / "out" / "prunenet_masks.safetensors")["layers.1.keep"].long()
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(narrow[name], dense[name][:, keep])
