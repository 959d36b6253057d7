"""Checkpoints read and written layer by layer: what comes out is what the in-memory way gives, byte
for byte.
"""

import json
import os
import shutil
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from prunenet.checkpoints import offload, shards, streaming
from prunenet.checkpoints.identity import weights_sha256
from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.shards import StoredTensor, read_header, write_shard
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.cli.app import app
from prunenet.features.from_weights import channel_statistics, layer_context
from prunenet.models.layers import ffn_widths, iter_ffns
from prunenet.models.surgery import narrowed
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.stream import prune_streamed
from prunenet.policies.training.recipe import PRESETS, recipe_for
from prunenet.policies.training.train import train
from prunenet.runtime import files as folders
from prunenet.runtime.files import CheckpointError
from prunenet.text.calibration import token_blocks

SHARDS = "20KB"
FIELDS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias", "norm_scale", "attention_out")


@pytest.fixture
def policy() -> Policy:
    """Scores and widths that are not the untrained ones."""
    policy = Policy.untrained(PolicyConfig(hidden=(8,), gain=0.2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in (policy.scorer.out, policy.scorer.widths.out):
            linear.weight.normal_(generator=generator)
    return policy


def stored(
    folder: Path,
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard: str = SHARDS,
    **options,
) -> Path:
    tiny_model(model_type, **options).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_and_statistics_of_every_family_are_those_of_the_loaded_model(
    tmp_path, model_type
) -> None:
    folder = stored(tmp_path / "dense", model_type, torch.bfloat16, bias=True)
    model, source = load_model(folder), StreamedCheckpoint.open(folder)
    assert ffn_widths(source) == ffn_widths(model)
    for mine, theirs in zip(iter_ffns(source), iter_ffns(model), strict=True):
        for field in FIELDS:
            first, second = getattr(mine, field), getattr(theirs, field)
            assert (first is None) == (second is None), field
            assert first is None or first.equal(second), field
    assert all(tensor.is_meta for tensor in source.skeleton.parameters()), (
        "a layer's weights stayed behind"
    )
    assert all(map(torch.equal, channel_statistics(source), channel_statistics(model)))
    assert layer_context(source).equal(layer_context(model))
    assert weights_sha256(source) == weights_sha256(model)


@pytest.mark.parametrize(
    ("model_type", "dtype", "shard", "options", "widths"),
    [
        ("llama", torch.bfloat16, SHARDS, {}, "uniform"),
        ("llama", torch.float16, "1GB", {"tied": True}, "per-layer"),
        ("gemma2", torch.float32, SHARDS, {}, "uniform"),
        ("phi3", torch.bfloat16, SHARDS, {}, "per-layer"),
        ("phi", torch.float32, "1GB", {"bias": True}, "uniform"),
        ("opt", torch.float16, SHARDS, {"bias": True}, "per-layer"),
        ("gpt_neox", torch.float32, "1GB", {}, "per-layer"),
    ],
    ids=str,
)
def test_a_streamed_cut_writes_the_bytes_of_the_cut_in_memory(
    tmp_path, policy, model_type, dtype, shard, options, widths
) -> None:
    folder = stored(tmp_path / "dense", model_type, dtype, shard, **options)
    ask = {"ratio": 0.4, "widths": widths, "policy_name": "test"}
    prune(load_model(folder), policy, **ask).save_pretrained(tmp_path / "memory")
    story = prune_streamed(StreamedCheckpoint.open(folder), tmp_path / "stream", policy, **ask)
    assert (len(set(story.widths)) > 1) == (widths == "per-layer")
    assert contents(tmp_path / "stream") == contents(tmp_path / "memory")
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "stream" / "model.safetensors").values()
    } == {dtype}


@pytest.mark.long
def test_what_is_too_large_for_one_file_is_written_as_shards_that_load_and_can_be_streamed_again(
    tmp_path, policy
) -> None:
    source = StreamedCheckpoint.open(stored(tmp_path / "dense"))
    ask = {"ratio": 0.4, "widths": "per-layer"}
    prune_streamed(source, tmp_path / "one", policy, **ask)
    prune_streamed(source, tmp_path / "many", policy, shard=20_000, **ask)
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 22_000 for path in files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    one, many = (
        load_model(tmp_path / "one").state_dict(),
        load_model(tmp_path / "many").state_dict(),
    )
    assert all(tensor.equal(many[name]) for name, tensor in one.items())
    for name in ("one", "many"):
        prune_streamed(
            StreamedCheckpoint.open(tmp_path / name), tmp_path / f"{name} again", policy, ratio=0.2
        )
    again = [contents(tmp_path / f"{name} again") for name in ("one", "many")]
    assert again[0]["model.safetensors"] == again[1]["model.safetensors"]


def test_another_dtype_than_the_stored_one_is_rounded_to_as_when_loaded(tmp_path, policy) -> None:
    folder = stored(tmp_path / "dense")
    prune(load_model(folder, dtype="bfloat16"), policy, ratio=0.4).save_pretrained(
        tmp_path / "memory"
    )
    prune_streamed(
        StreamedCheckpoint.open(folder, dtype="bfloat16"), tmp_path / "stream", policy, ratio=0.4
    )
    assert contents(tmp_path / "stream") == contents(tmp_path / "memory")


def test_the_hub_s_cache_of_links_is_read_and_what_is_written_holds_no_link(
    tmp_path, policy
) -> None:
    plain = stored(tmp_path / "dense")
    cache = tmp_path / "models--tiny--llama"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        shutil.copy(path, cache / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    for name, folder in (("plain out", plain), ("linked out", snapshot)):
        prune_streamed(StreamedCheckpoint.open(folder), tmp_path / name, policy, ratio=0.4)
    assert not [path for path in (tmp_path / "linked out").iterdir() if path.is_symlink()]
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("plain out", "linked out")
    ]
    assert weights[0] == weights[1]


def test_tensors_that_the_model_does_not_have_are_left_out_and_a_bare_base_model_s_names_are_understood(
    tmp_path,
) -> None:
    folder = stored(tmp_path / "dense", shard="1GB", tied=True)
    expected = load_model(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()} | {
        "rotary.inv_freq": torch.ones(4)
    }
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    source = StreamedCheckpoint.open(folder)
    assert set(source.stored) == set(expected)
    assert all(source.stored[name].whole().equal(tensor) for name, tensor in expected.items())


def truncate(folder: Path) -> None:
    os.truncate(sorted(folder.glob("*.safetensors"))[1], 2000)


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def lose_a_tensor(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path, metadata={"format": "pt"})


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model-00002-of-.* is damaged .*; fetch it again"),
        (lose_a_shard, "has no model-00002-of-"),
        (lose_a_tensor, r"lacks 1 of the model's tensors, e\.g\. .*; fetch it again"),
        (widen, r"cannot be loaded: .* is \[.*\], config.json says \[.*\]"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence_before_any_weight_is_read(
    tmp_path, damage, message
) -> None:
    folder = stored(tmp_path / "dense")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        StreamedCheckpoint.open(folder)
    assert "\n" not in str(error.value)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_leaves_nothing(
    tmp_path, policy
) -> None:
    source = StreamedCheckpoint.open(stored(tmp_path / "dense"))
    truncate(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="it ends inside tensor"):
        prune_streamed(source, tmp_path / "out", policy, ratio=0.4)
    assert left_in(tmp_path) == ["dense"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("moment", ["between two shards", "before the verification"])
def test_a_streamed_cut_that_is_interrupted_leaves_nothing(
    tmp_path, policy, monkeypatch, failure, moment
) -> None:
    source = StreamedCheckpoint.open(stored(tmp_path / "dense"))
    written = []

    def interrupted(path, *arguments):
        if moment == "before the verification" or written:
            raise failure
        written.append(path)
        return write_shard(path, *arguments)

    place = (offload, "write_shard") if moment == "between two shards" else (streaming, "_verify")
    monkeypatch.setattr(*place, interrupted)
    with pytest.raises(
        KeyboardInterrupt if failure is KeyboardInterrupt else CheckpointError,
        match=r"^$|no room for .*out",
    ):
        prune_streamed(source, tmp_path / "new" / "out", policy, ratio=0.4, shard=20_000)
    assert bool(written) == (moment == "between two shards")
    assert left_in(tmp_path) == ["dense"]


def test_a_file_that_does_not_read_back_as_it_was_written_is_an_error_and_leaves_nothing(
    tmp_path, policy, monkeypatch
) -> None:
    def bent(path, *arguments):
        digest = write_shard(path, *arguments)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x07")
        return digest

    monkeypatch.setattr(offload, "write_shard", bent)
    source = StreamedCheckpoint.open(stored(tmp_path / "dense"))
    with pytest.raises(
        CheckpointError,
        match=r"out was not saved: model.safetensors does not read back as it was written",
    ):
        prune_streamed(source, tmp_path / "out", policy, ratio=0.4)
    assert left_in(tmp_path) == ["dense"]


def test_a_disk_that_is_too_small_is_noticed_before_any_weight_is_read(
    tmp_path, policy, monkeypatch
) -> None:
    source = StreamedCheckpoint.open(stored(tmp_path / "dense"))
    monkeypatch.setattr(
        folders.shutil, "disk_usage", lambda _path: namedtuple("Usage", "free")(50_000)
    )
    monkeypatch.setattr(StoredTensor, "__getitem__", lambda *_: pytest.fail("read"))
    with pytest.raises(
        CheckpointError, match=r"takes at least 0\.1 MB and its disk has 0\.[01] MB free"
    ):
        prune_streamed(source, tmp_path / "new" / "out", policy, ratio=0.1)
    assert left_in(tmp_path) == ["dense"]


STORY = {
    "base_model": "t",
    "revision": "0",
    "policy": "t",
    "policy_sha256": None,
    "regime": "weights",
    "ratio": 0.3,
    "seed": 0,
}


class Ledger:
    """Bytes of stored tensors that are held in memory, now and at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = self.total = 0
        read = StoredTensor.__getitem__

        def counted(stored: StoredTensor, rows: slice) -> torch.Tensor:
            tensor = read(stored, rows)
            storage = tensor.untyped_storage()
            self.now += storage.nbytes()
            self.total += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, storage.nbytes())
            return tensor

        monkeypatch.setattr(StoredTensor, "__getitem__", counted)

    def _freed(self, count: int) -> None:
        self.now -= count


def deep(folder: Path, layers: int) -> Path:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_scoring_holds_one_layer_in_memory_whatever_the_depth(
    tmp_path, policy, monkeypatch
) -> None:
    ledger, most = Ledger(monkeypatch), {}
    for layers in (2, 7):
        source = StreamedCheckpoint.open(deep(tmp_path / str(layers), layers))
        ledger.most = ledger.total = 0
        policy.read(source)
        assert ledger.now == 0, "weights stay behind"
        most[layers] = ledger.most
    matrices = 3 * 48 * 32 + 32 * 32
    assert ledger.total > 7 * matrices * 4, "the ledger does not see the weights"
    assert most[2] == most[7]
    assert matrices * 4 <= most[7] <= (matrices + 2 * 32) * 4, (
        "beside a layer's matrices only its norms"
    )


def test_writing_holds_one_slab_in_memory(tmp_path, policy, monkeypatch) -> None:
    source = StreamedCheckpoint.open(deep(tmp_path / "dense", 7))
    monkeypatch.setattr(shards, "SLAB", 1024)
    ledger, keep = Ledger(monkeypatch), [torch.arange(48) < 32] * 7
    made = Provenance.of(source.skeleton, narrowed(source.skeleton, keep), **STORY)
    streaming.save_streamed(source, tmp_path / "out", keep, lambda _: made)
    assert ledger.total > 7 * (3 * 48 * 32 + 4 * 32 * 32) * 4, "the ledger does not see the weights"
    assert 1024 <= ledger.most <= 2 * 1024, "the slab that is written and the one that is read"


@pytest.mark.long
def test_training_on_a_streamed_checkpoint_gives_the_policy_of_training_in_memory_and_keeps_no_weights(
    tmp_path,
) -> None:
    folder = stored(tmp_path / "dense")
    recipe = recipe_for("spectral", {"updates": 2, "masks": 2, "evaluate_every": 1})
    source = StreamedCheckpoint.open(folder)
    streamed, loaded = train(source, recipe), train(load_model(folder), recipe)
    assert streamed.history == loaded.history
    assert streamed.policy.sha256 == loaded.policy.sha256
    with pytest.raises(ValueError, match="activations need the model in memory"):
        train(
            source, PRESETS["default"], blocks=token_blocks(load_model(folder), count=4, window=8)
        )


def test_a_shard_s_bytes_are_those_that_safetensors_writes(tmp_path) -> None:
    tensors = {
        "b.half": torch.randn(5, 3).half(),
        "a.float": torch.randn(7, 2, 2),
        'é "quoted"': torch.randn(3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "whole": torch.arange(6),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_shard(tmp_path / "ours", tensors, lambda name: [tensors[name]])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    back = read_header(tmp_path / "ours")
    assert {name: (t.shape, t.stored) for name, t in back.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in tensors.items()
    }
    assert all(back[name].whole().equal(tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="its pieces gave"):
        write_shard(
            tmp_path / "short",
            tensors,
            lambda name: [tensors[name][:1]] if name == "b.half" else [tensors[name]],
        )


@pytest.mark.long
def test_the_command_streams_to_the_same_bytes_and_refuses_what_needs_activations(
    tmp_path, policy
) -> None:
    folder, learned = stored(tmp_path / "dense"), policy.save_pretrained(tmp_path / "policy")

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, " ".join(result.output.split())

    ask = ("prune", folder, "--policy", learned, "--ratio", 0.4, "--widths", "per-layer")
    for name, options in (("memory", ()), ("stream", ("--stream",))):
        code, output = run(*ask, "--moments", "none", *options, "--out", tmp_path / name)
        assert code == 0, output
    assert contents(tmp_path / "stream") == contents(tmp_path / "memory")
    refusals = [
        ((*ask, "--stream"), "nothing can be measured on text: say --moments none as well"),
        (
            (*ask, "--stream", "--moments", "none", "--refit", "layerwise"),
            "blend, elimination and refit measure activations",
        ),
        (
            ("train", folder, "--stream"),
            "nothing can be measured on text: say --preset spectral, without --features",
        ),
    ]
    for arguments, message in refusals:
        code, output = run(*arguments, "--out", tmp_path / "refused")
        assert code == 1
        assert message in output
    code, output = run(
        "train",
        folder,
        "--stream",
        "--preset",
        "spectral",
        "--updates",
        1,
        "--masks",
        2,
        "--out",
        tmp_path / "trained",
    )
    assert code == 0, output
    assert Policy.from_pretrained(tmp_path / "trained").config.regime == "weights"
