"""A pruned checkpoint differs from its source in widths alone: what travels beside the weights, what
another tool may do with it, and what a loader needs.
"""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from families import D_FF, LAYERS, tiny_model, token_ids
from safetensors.torch import load_file, save_file
from test_cli import facts, refused, save_tiny
from test_odd_folders import Cache
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.provenance import UNRECORDED
from prunenet.checkpoints.records import (
    find_masks,
    load_masks,
    load_provenance,
    recorded_ratio,
)
from prunenet.checkpoints.save import export_padded
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.compare.results import Results
from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.report import draw_report
from prunenet.evaluation.side_by_side import evaluate
from prunenet.models.layers import ffn_widths
from prunenet.models.modeling import is_per_layer
from prunenet.policies.apply import prune, ratio_of
from prunenet.policies.artifact import Policy, policy_for
from prunenet.policies.methods.widths.evaluations import Evaluations
from prunenet.policies.options import PruneOptions
from prunenet.policies.stream import prune_streamed
from prunenet.runtime.files import CheckpointError
from prunenet.text.calibration import self_blocks
from prunenet.text.corpora import TestText

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "transformers_version": "4.57.3",
    "a_note_of_its_own": {"kept": [1, 2.5, None]},
}
_LOCAL = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
IN_WORDS_OF_4 = {
    "llama, scaled and untied": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3,
        "tie_word_embeddings": False,
    },
    "llama, linear": {
        "model_type": "llama",
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "tie_word_embeddings": True,
        "mlp_bias": True,
    },
    "qwen2, yarn and windows": {
        "model_type": "qwen2",
        "rope_theta": 1e6,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "mistral": {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": 8},
    "gemma2": {"model_type": "gemma2", **_LOCAL, "final_logit_softcapping": 20.0},
    "gemma3": {
        "model_type": "gemma3_text",
        **_LOCAL,
        "rope_theta": 700000.0,
        "rope_local_base_freq": 20000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3, longrope": {
        "model_type": "phi3",
        "rope_theta": 30000.0,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.0, 3.0, 4.0],
        },
    },
}
COPIED = {
    "special_tokens_map.json": b'{"unk_token":   "[UNK]"}',
    "chat_template.jinja": b"{{ messages }}\r\n",
    "tokenizer.model": b"\x0a\x00spm",
    "added_tokens.json": b"{}",
    "qwen.tiktoken": b"IQ== 0\n",
    "sentencepiece.bpe.model": b"\x0a\x01spm",
    "tekken.json": b"{}",
}


def written(folder: Path, fields: dict) -> Path:
    """A checkpoint whose config.json says just that."""
    config = AutoConfig.for_model(**json.loads(json.dumps(fields)))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    named = {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(fields | named))
    return folder


def zoo():
    return policy_for(None, "llama")[0]


def by_weights(model: PreTrainedModel, out: Path, widths: str = "uniform") -> Path:
    return prune(model, zoo(), ratio=0.3, widths=widths).save_pretrained(out)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNENET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny")
    for name, content in COPIED.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def pruned(dense) -> Path:
    """With per-layer widths."""
    return by_weights(load_model(dense), dense.with_name("pruned"), "per-layer")


@pytest.mark.parametrize("fields", IN_WORDS_OF_4.values(), ids=IN_WORDS_OF_4.keys())
def test_a_configuration_keeps_all_that_its_source_said_but_widths(tmp_path, fields) -> None:
    source = written(tmp_path / "dense", BASE | fields)
    said = json.loads((source / "config.json").read_text())
    by_weights(load_model(source), tmp_path / "cut")
    prune_streamed(
        StreamedCheckpoint.open(source), tmp_path / "streamed", zoo(), ratio=0.3, widths="uniform"
    )
    for name in ("cut", "streamed"):
        kept = json.loads((tmp_path / name / "config.json").read_text())
        assert kept == said | {"intermediate_size": 32}
    again = AutoConfig.from_pretrained(tmp_path / "cut")
    assert again.to_dict() | {"intermediate_size": D_FF, "_name_or_path": ""} == (
        AutoConfig.from_pretrained(source).to_dict() | {"_name_or_path": ""}
    )


def test_a_model_that_never_was_on_a_disk_is_stated_in_the_words_of_both_versions(tmp_path) -> None:
    fields = json.loads(
        (by_weights(tiny_model("llama"), tmp_path / "a") / "config.json").read_text()
    )
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"]


def test_files_of_the_tokenizer_travel_byte_for_byte_and_code_does_not(dense, tmp_path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    for name in ("evil.py", "tokenizer_evil.py", "tokenizer.pkl", "vocab.bin"):
        (source / name).write_text("raise SystemExit")
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.model").symlink_to("/etc/passwd")
    by_weights(load_model(source), tmp_path / "a")
    prune_streamed(
        StreamedCheckpoint.open(source), tmp_path / "b", zoo(), ratio=0.3, widths="uniform"
    )
    for out in (tmp_path / "a", tmp_path / "b"):
        carried = {"tokenizer.json", "tokenizer_config.json", *COPIED} - {"tokenizer.model"}
        assert all((out / name).read_bytes() == (source / name).read_bytes() for name in carried)
        known = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
        ours = {"prunenet.json", "prunenet_masks.safetensors"}
        assert {path.name for path in out.iterdir()} == carried | known | ours


def test_a_tokenizer_in_sentencepiece_s_form_alone_travels_unread(dense, tmp_path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    out = tmp_path / "out"
    facts("prune", source, "--moments", "none", "--ratio", 0.3, "--out", out)
    assert (out / "tokenizer.model").read_bytes() == COPIED["tokenizer.model"]
    with pytest.raises(CheckpointError, match="sentencepiece"):
        load_tokenizer(out)


# --- what a loader needs ---


@pytest.mark.long
def test_each_command_ends_with_how_its_result_is_loaded(dense, pruned, tmp_path) -> None:
    ask = ("prune", dense, "--moments", "none", "--ratio", 0.3)
    said = {
        widths: facts(*ask, "--widths", widths, "--out", tmp_path / widths)["load"]
        for widths in ("uniform", "per-layer")
    }
    assert said["uniform"] == "Any loader of this model family reads it."
    assert said["per-layer"] == (
        "Load it with trust_remote_code=True, for its layers differ in their widths; or make a"
        " stock checkpoint of it by `prunenet export --pad`, or cut with --widths uniform."
    )
    padded = facts("export", pruned, "--pad", "--out", tmp_path / "padded")
    assert padded["load"] == said["uniform"]
    short = ("--teacher", dense, "--steps", 1, "--tokens", 512)
    recovered = facts("recover", pruned, *short, "--out", tmp_path / "recovered")
    assert recovered["load"] == said["per-layer"]


# --- what another tool has saved ---


def by_transformers(pruned: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(out)


def by_peft(pruned: Path, out: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True)
    config = peft.LoraConfig(
        r=2, target_modules=["up_proj", "down_proj", "q_proj"], init_lora_weights=False
    )
    peft.get_peft_model(model, config).merge_and_unload().save_pretrained(out)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize(
    "tuned_by", [pytest.param(by_transformers, marks=pytest.mark.slow), by_peft]
)
def test_a_pruned_model_that_another_tool_has_tuned_is_padded_recovered_scored_and_cut_again(
    dense, pruned, tmp_path, tuned_by
) -> None:
    tuned = tmp_path / "tuned"
    tuned_by(pruned, tuned)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, tuned)
    model = load_model(tuned)
    assert ffn_widths(model) == ffn_widths(load_model(pruned)) != [ffn_widths(model)[0]] * LAYERS
    expected = model(token_ids()).logits
    padded = load_model(export_padded(tuned, tmp_path / "padded"))
    assert not is_per_layer(padded)
    torch.testing.assert_close(padded(token_ids()).logits, expected, atol=2e-5, rtol=0)
    short = ("--teacher", dense, "--steps", 1, "--tokens", 512)
    facts("recover", tuned, *short, "--out", tmp_path / "recovered")
    made = load_provenance(tmp_path / "recovered")
    assert (made.policy, made.regime, len(made.recovered)) == (UNRECORDED, "data", 1)
    assert find_masks(tmp_path / "recovered") == (None, None)
    text = TestText("words", " ".join(f"w{i * 7 % 60}" for i in range(300)))
    (row,) = evaluate([str(tuned)], text, EvaluationOptions(window=16), speed=None)
    assert row.ratio is None
    cut = load_model(by_weights(load_model(tuned), tmp_path / "cut"))
    assert len(set(ffn_widths(cut))) == 1


# --- by its name on the hub ---


@pytest.mark.long
def test_a_pruned_model_is_known_by_its_name_on_the_hub(
    dense, pruned, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Cache(tmp_path / "hub", pruned, ["results.json"])
    assert load_provenance("owner/name") == load_provenance(pruned)
    assert recorded_ratio("owner/name") == 0.3
    assert all(map(torch.equal, load_masks("owner/name"), load_masks(pruned)))
    text = TestText("words", " ".join(f"w{i * 7 % 60}" for i in range(300)))
    (row,) = evaluate(["owner/name"], text, EvaluationOptions(window=16), speed=None)
    assert row.ratio == 0.3
    facts("export", "owner/name", "--pad", "--out", tmp_path / "padded")
    short = ("--teacher", dense, "--steps", 1, "--tokens", 512)
    facts("recover", "owner/name", *short, "--out", tmp_path / "recovered")
    assert load_provenance(tmp_path / "recovered").widths == load_provenance(pruned).widths
    assert (tmp_path / "padded" / "tokenizer.json").read_bytes() == (
        dense / "tokenizer.json"
    ).read_bytes()


# --- padded, and in another dtype ---


@pytest.mark.long
def test_a_padded_model_is_not_cut_for_its_zeros_are_no_channels(pruned, tmp_path) -> None:
    padded = export_padded(pruned, tmp_path / "padded")
    for model in (load_model(padded), StreamedCheckpoint.open(padded)):
        with pytest.raises(ValueError, match="filled up with zeros, which would count as channels"):
            ratio_of(model, PruneOptions(ratio=0.3))
    for ask in (("--moments", "none"), ("--moments", "none", "--stream")):
        said = refused("prune", padded, "--ratio", 0.3, *ask, "--out", tmp_path / "out")
        assert "prune the checkpoint that it was exported from" in said
    said = refused("compare", padded, "random", "--out", tmp_path / "out")
    assert "compare on the checkpoint that it was exported from" in said
    for reward in (("--preset", "spectral"), ()):
        said = refused("train", padded, *reward, "--out", tmp_path / "out")
        assert "train on the checkpoint that it was exported from" in said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_keeps_the_dtype_of_its_weights_whatever_its_configuration_says(
    dense, tmp_path
) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    by_weights(load_model(source), tmp_path / "a")
    prune_streamed(
        StreamedCheckpoint.open(source), tmp_path / "b", zoo(), ratio=0.3, widths="uniform"
    )
    for out in (tmp_path / "a", tmp_path / "b"):
        kept = load_file(out / "model.safetensors").values()
        assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
        assert load_model(out).dtype == torch.bfloat16


# --- names with ~, from Python as from the command line ---


@pytest.mark.long
def test_home_is_expanded_in_every_path_that_python_gives(dense, pruned, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path(shutil.copytree(dense, tmp_path / "home" / "dense"))
    prune(load_model("~/dense"), zoo(), ratio=0.3).save_pretrained("~/cut")
    streamed = StreamedCheckpoint.open("~/dense")
    prune_streamed(streamed, "~/streamed", zoo(), ratio=0.3)
    assert (
        load_provenance("~/cut").base_model == load_provenance("~/streamed").base_model == "dense"
    )
    export_padded(pruned, "~/padded")
    zoo().save_pretrained("~/policy")
    assert Policy.from_pretrained("~/policy").sha256 == zoo().sha256
    speeds = dict.fromkeys(("prefill_tokens_per_second", "decode_tokens_per_second"))
    row = {"name": "a", "parameters": 1, "perplexity": 2.0, "ratio": 0, **speeds}
    draw_report([row], "~/a/report.png")
    Results("~/lines.jsonl").prepare()
    Evaluations(lambda _: 1.0, "~/pairs.jsonl")([(8, 8)])
    assert not (tmp_path / "~").exists()
    made = {path.name for path in (tmp_path / "home").iterdir()} - {"dense"}
    assert made == {"cut", "streamed", "padded", "policy", "a", "lines.jsonl", "pairs.jsonl"}


# --- a second cut ---


def test_uniform_widths_of_a_model_with_per_layer_widths_are_one_width(pruned, tmp_path) -> None:
    model = load_model(pruned)
    widths = ffn_widths(model)
    assert len(set(widths)) > 1
    enough = 1 - min(widths) / (sum(widths) / LAYERS)
    cut = prune(model, zoo(), ratio=enough + 0.01, round_to=1, widths="uniform")
    assert cut.provenance.how["widths"] == "uniform"
    assert len(set(ffn_widths(cut.model))) == 1
    assert not is_per_layer(load_model(cut.save_pretrained(tmp_path / "cut")))
    assert sum(ffn_widths(cut.model)) == pytest.approx(
        (1 - enough - 0.01) * sum(widths), abs=LAYERS
    )
    asks = (
        PruneOptions(ratio=0.05, round_to=1, widths="uniform"),
        PruneOptions(ratio=0.0, widths="uniform"),
    )
    for ask in asks:
        with pytest.raises(ValueError, match="cannot be left in all of them: give a `ratio` of 0"):
            ratio_of(model, ask)
    auto = prune(model, zoo(), ratio=0.05, round_to=1)
    assert auto.provenance.how["widths"] == "per-layer"


def test_a_model_with_per_layer_widths_is_refused_for_training_before_any_text_is_written(
    pruned, tmp_path, monkeypatch
) -> None:
    def works(*_given, **_named):
        raise AssertionError("work has begun")

    monkeypatch.setattr("prunenet.text.calibration.self_blocks", works)
    said = refused("train", pruned, "--out", tmp_path / "out")
    assert "different widths" in said
    assert "train on the dense model that it was cut from" in said


# --- room, before any work ---


def test_a_disk_without_room_is_said_before_any_text_is_written(
    dense, pruned, tmp_path, monkeypatch
):
    def works(*_given, **_named):
        raise AssertionError("work has begun")

    monkeypatch.setattr("prunenet.text.calibration.self_blocks", works)
    usage = namedtuple("Usage", "free")(5_000)
    monkeypatch.setattr("prunenet.runtime.paths.shutil.disk_usage", lambda _path: usage)
    asks = (
        ("prune", dense, "--ratio", 0.3),
        ("prune", dense, "--ratio", 0.3, "--moments", "none", "--stream"),
        ("recover", pruned, "--teacher", dense),
        ("export", pruned, "--pad"),
    )
    for ask in asks:
        said = refused(*ask, "--out", tmp_path / "out")
        assert "no room for" in said, ask
        assert "make room or give a folder on another disk" in said
    assert not (tmp_path / "out").exists()


# --- files of our own, altered ---


TAMPERED = {
    "negative": lambda t: -t - 1,
    "of another dtype": lambda t: t.long(),
    "floats": lambda t: t.float(),
    "fewer": lambda t: t[1:].clone(),
    "repeated": lambda t: t * 0,
    "too large": lambda t: t + 1000,
    "falling": lambda t: t.flip(0),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED.keys())
def test_masks_that_are_not_those_of_the_model_are_refused(pruned, tmp_path, change) -> None:
    copy = Path(shutil.copytree(pruned, tmp_path / "copy"))
    masks = load_file(copy / "prunenet_masks.safetensors")
    # without the hash, as versions before wrote them
    save_file(
        {name: change(mask) for name, mask in masks.items()}, copy / "prunenet_masks.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"prunenet_masks\.safetensors is missing or damaged"):
        load_masks(copy)


def test_masks_are_read_before_a_recovery_begins(dense, pruned, tmp_path) -> None:
    copy = Path(shutil.copytree(pruned, tmp_path / "copy"))
    (copy / "prunenet_masks.safetensors").write_bytes(b"no")
    said = refused("recover", copy, "--teacher", dense, "--out", tmp_path / "out")
    assert "is missing or damaged" in said
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_masks_with_another_number_are_noticed_by_their_hash(pruned, tmp_path) -> None:
    copy = Path(shutil.copytree(pruned, tmp_path / "copy"))
    path = copy / "prunenet_masks.safetensors"
    content = bytearray(path.read_bytes())
    number = content.rindex(load_file(path)["layers.2.keep"][-1:].numpy().tobytes())
    content[number] += 1 if content[number] + 1 < D_FF else -1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was written, by its sha256"):
        load_masks(copy)


ALTERED = {
    "one token": lambda ids: ids.index_put((torch.tensor([0]), torch.tensor([3])), torch.tensor(5)),
    "all": lambda ids: ids * 0 + 5,
    "half the rows": lambda ids: ids[::2].clone(),
    "shorter": lambda ids: ids[:, :4].clone(),
    "negative": lambda ids: -ids,
    "floats": lambda ids: ids.float(),
    "one row": lambda ids: ids[0].clone(),
    "no row": lambda ids: ids[:0].clone(),
    "a number": lambda ids: ids[0, 0].clone(),
    "true and false": lambda ids: ids > 3,
}


@pytest.mark.long
def test_cached_text_that_somebody_altered_is_written_anew(dense, tmp_path, caplog) -> None:
    model, tokenizer = load_model(dense), load_tokenizer(dense)

    def written() -> torch.Tensor:
        return self_blocks(model, tokenizer, sequences=6, tokens=10, cache=tmp_path).ids

    first = written()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for name, change in ALTERED.items():
        save_file({"ids": change(first)}, path)
        caplog.clear()
        assert torch.equal(written(), first), name
        assert "is written anew" in caplog.text, name
        assert path.read_bytes() == content, name
    flipped = bytearray(content)
    flipped[-8] ^= 1  # a token of the vocabulary in the place of another
    path.write_bytes(flipped)
    assert torch.equal(written(), first)
    assert path.read_bytes() == content
