import dataclasses
import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from families import D_FF, LAYERS, random_keep, tiny_model, token_ids
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from prunenet.checkpoints import save as checkpoint
from prunenet.checkpoints import sources
from prunenet.checkpoints.identity import identify
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.save import export_padded, load_masks, load_provenance, save_pruned
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.layers import ffn_widths
from prunenet.models.surgery import narrowed
from prunenet.runtime import files as folders
from prunenet.runtime.files import CheckpointError

PER_LAYER = [16, 40, 8]


def provenance_of(dense, narrow) -> Provenance:
    return Provenance.of(
        dense,
        narrow,
        base_model="tiny/llama",
        revision="0" * 40,
        policy="test",
        policy_sha256=None,
        regime="weights",
        ratio=0.3,
        seed=0,
    )


def save(out: Path, widths: list[int] | None = None, model_type: str = "llama", **options) -> Path:
    dense = tiny_model(model_type)
    keep = random_keep(widths or [32] * LAYERS)
    narrow = narrowed(dense, keep)
    return save_pruned(narrow, out, keep, provenance_of(dense, narrow), **options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoints") / "narrow")


@pytest.fixture
def spoilt(stored, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(stored, tmp_path / "spoilt"))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_saved_model_loads_in_eval_mode_with_its_masks_and_its_story(stored) -> None:
    model = load_model(stored)
    keep = random_keep([32] * LAYERS)
    assert not model.training
    assert all(first.equal(second) for first, second in zip(load_masks(stored), keep, strict=True))
    story = load_provenance(stored)
    assert story == provenance_of(tiny_model("llama"), model)
    assert story.widths == (32,) * LAYERS
    assert story.dense_widths == (D_FF,) * LAYERS
    assert story.parameters_before - story.parameters_after == LAYERS * 16 * 3 * 32
    assert story.non_embedding_before - story.non_embedding_after == LAYERS * 16 * 3 * 32


def test_the_folder_holds_exactly_these_files(stored) -> None:
    assert left_in(stored) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "prunenet.json",
        "prunenet_masks.safetensors",
    ]
    assert left_in(stored.parent) == ["narrow"]
    masks = load_file(stored / "prunenet_masks.safetensors")
    assert {name: (tensor.dtype, len(tensor)) for name, tensor in masks.items()} == {
        f"layers.{index}.keep": (torch.int32, 32) for index in range(LAYERS)
    }
    closed = os.umask(0o022)
    os.umask(closed)
    assert stored.stat().st_mode & 0o777 == 0o777 & ~closed
    assert {path.stat().st_mode & 0o777 for path in stored.iterdir()} == {0o666 & ~closed}


def test_the_model_card_names_the_base_the_method_and_the_numbers(tmp_path) -> None:
    out = save(tmp_path / "narrow", PER_LAYER, card_text="| a | table |")
    card = (out / "README.md").read_text()
    for fact in (
        "tiny/llama",
        "0" * 40,
        "30.0%",
        "`test`",
        "nothing but the checkpoint",
        "8 to 40 in a layer, 64 in all",
        "trust_remote_code=True",
        "| a | table |",
    ):
        assert fact in card, fact
    assert "trust_remote_code" not in (save(tmp_path / "uniform") / "README.md").read_text()


@pytest.mark.parametrize("widths", [None, PER_LAYER], ids=["uniform", "per-layer"])
def test_the_same_save_twice_writes_the_same_bytes(tmp_path, widths) -> None:
    first, second = (
        save(tmp_path / "a" / "narrow", widths),
        save(tmp_path / "b" / "other-name", widths),
    )
    assert left_in(first) == left_in(second)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_kept_and_can_be_asked_for(tmp_path, dtype) -> None:
    dense = tiny_model("llama").to(getattr(torch, dtype))
    keep = random_keep([32] * LAYERS)
    narrow = narrowed(dense, keep)
    out = save_pruned(narrow, tmp_path / "narrow", keep, provenance_of(dense, narrow))
    assert {tensor.dtype for tensor in load_model(out).parameters()} == {getattr(torch, dtype)}
    assert {tensor.dtype for tensor in load_model(out, dtype="float32").parameters()} == {
        torch.float32
    }


def test_a_model_in_training_mode_is_verified_in_eval_mode_and_handed_back_in_training_mode(
    tmp_path,
) -> None:
    dense = tiny_model("opt").train()  # has dropout
    keep = random_keep([32] * LAYERS)
    narrow = narrowed(dense, keep)
    save_pruned(narrow, tmp_path / "narrow", keep, provenance_of(dense, narrow))
    assert narrow.training


def test_an_attention_implementation_of_choice_does_not_fail_the_verification(tmp_path) -> None:
    dense = tiny_model("llama")
    dense.set_attn_implementation("eager")
    keep = random_keep([32] * LAYERS)
    narrow = narrowed(dense, keep)
    save_pruned(narrow, tmp_path / "narrow", keep, provenance_of(dense, narrow))


@pytest.mark.long
def test_the_export_with_zero_channels_is_a_stock_checkpoint_of_the_same_function(tmp_path) -> None:
    source = save(tmp_path / "narrow", PER_LAYER, model_type="phi3")
    out = export_padded(source, tmp_path / "padded")
    narrow, padded = load_model(source), load_model(out)
    assert ffn_widths(padded) == [40] * LAYERS
    assert type(padded).__module__.startswith("transformers.")
    assert "per_layer" not in (out / "config.json").read_text()
    assert not (out / "modeling.py").exists()
    torch.testing.assert_close(
        padded(token_ids()).logits, narrow(token_ids()).logits, atol=2e-5, rtol=0
    )
    assert load_provenance(out).padded_to == 40
    assert load_provenance(out).parameters_after == sum(
        tensor.numel() for tensor in padded.parameters()
    )
    assert all(
        first.equal(second)
        for first, second in zip(load_masks(out), load_masks(source), strict=True)
    )
    for done in (out, save(tmp_path / "uniform")):
        with pytest.raises(CheckpointError, match="one width for all layers already"):
            export_padded(done, tmp_path / "again")


def test_a_sharded_checkpoint_loads_and_a_missing_shard_is_named(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    load_model(tmp_path / "sharded")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_model(tmp_path / "sharded")


def test_the_code_in_a_folder_is_never_run(tmp_path) -> None:
    out = save(tmp_path / "narrow", PER_LAYER)
    (out / "modeling.py").write_text("raise SystemExit('run!')")
    assert ffn_widths(load_model(out)) == PER_LAYER
    tiny_model("llama").save_pretrained(tmp_path / "foreign")
    edit(
        tmp_path / "foreign",
        auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"},
    )
    (tmp_path / "foreign" / "modeling.py").write_text("raise SystemExit('run!')")
    load_model(tmp_path / "foreign")


def test_code_names_of_a_foreign_checkpoint_do_not_travel_without_their_code(tmp_path) -> None:
    dense = tiny_model("phi3")
    dense.config.auto_map = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    keep = random_keep([32] * LAYERS)
    narrow = narrowed(dense, keep)
    out = save_pruned(narrow, tmp_path / "narrow", keep, provenance_of(dense, narrow))
    assert "auto_map" not in (out / "config.json").read_text()


def test_identify_depends_on_the_weights_and_the_configuration_and_not_on_the_place(
    stored, spoilt
) -> None:
    name, revision = identify(spoilt)
    assert name == "spoilt"
    assert revision.startswith("sha256:")
    assert identify(stored)[1] == revision
    edit(spoilt, rms_norm_eps=1e-3)
    assert identify(spoilt)[1] != revision
    shutil.copy(stored / "config.json", spoilt)
    weights = {name: tensor + 1 for name, tensor in load_file(spoilt / "model.safetensors").items()}
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    assert identify(spoilt)[1] != revision


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def forget_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE = {
    "no config": (
        lambda d: (d / "config.json").unlink(),
        "is not a checkpoint: it has no config.json",
    ),
    "half a config": (
        lambda d: (d / "config.json").write_text('{"model_type"'),
        "config.json is damaged",
    ),
    "a config that is a list": (
        lambda d: (d / "config.json").write_text("[]"),
        "does not hold a JSON object",
    ),
    "no model type": (lambda d: (d / "config.json").write_text("{}"), "has no model_type"),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        "has no model.safetensors; only complete safetensors",
    ),
    "pickled weights": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "has no model.safetensors",
    ),
    "truncated weights": (truncate, "model.safetensors is damaged .*fetch it again"),
    "garbage": (
        lambda d: (d / "model.safetensors").write_bytes(b"garbage!" * 999),
        "model.safetensors is damaged",
    ),
    "empty weights": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        "model.safetensors is damaged",
    ),
    "a tensor too few": (
        forget_a_tensor,
        "lacks 1 of the model's tensors, e.g. model.layers.1.mlp.up_proj.weight",
    ),
    "another width": (lambda d: edit(d, intermediate_size=48), "cannot be loaded"),
    "nonsense in the config": (lambda d: edit(d, hidden_size="many"), "cannot be loaded"),
    "quantised": (lambda d: edit(d, quantization_config={"quant_method": "gptq"}), "is quantised"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_one_clear_sentence(spoilt, damage, message) -> None:
    damage(spoilt)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(spoilt)
    assert str(spoilt) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source", ["./nowhere", "/nowhere/at/all", Path("nowhere"), "~/nowhere-at-all"]
)
def test_a_folder_that_does_not_exist_is_named(source) -> None:
    with pytest.raises(CheckpointError, match=r"folder .*nowhere.* does not exist; check the path"):
        load_model(source)


def test_a_file_in_place_of_a_folder_is_an_error(stored) -> None:
    with pytest.raises(CheckpointError, match=r"model.safetensors is a file; give the folder"):
        load_model(stored / "model.safetensors")


@pytest.mark.parametrize(
    "source", ["prunenet-tests/no-such-model", "nonsense", "too/many/slashes", "not a name!"]
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_id_without_a_hub_is_one_clear_sentence(load, source) -> None:
    with pytest.raises(
        CheckpointError, match="neither a folder here nor available from the Hugging Face hub"
    ) as error:
        load(source)
    assert source in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_model_is_refused_by_its_configuration_before_its_weights_are_fetched(
    stored, tmp_path, monkeypatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 8}')
    asked = []
    monkeypatch.setattr(
        sources,
        "snapshot_download",
        lambda _id, allow_patterns, **_: asked.append(allow_patterns) or tmp_path,
    )
    with pytest.raises(UnsupportedArchitecture, match="it has no FFN of a known form"):
        load_model("some/mixture")
    assert asked == [["config.json"]]
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, **__: str(stored))
    assert ffn_widths(load_model("some/model")) == [32] * LAYERS
    assert identify("some/model") == ("some/model", stored.name)


def test_an_unknown_model_type_is_refused_before_its_weights_are_read(spoilt) -> None:
    edit(spoilt, model_type="gpt_next")
    (spoilt / "model.safetensors").unlink()
    with pytest.raises(
        UnsupportedArchitecture, match=r"'gpt_next' is not supported: .* by hand: falcon"
    ):
        load_model(spoilt)


def test_unknown_dtypes_and_devices_are_refused(stored) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float32, .* got 'int3'"):
        load_model(stored, dtype="int3")
    with pytest.raises(CheckpointError, match="device 'abacus'"):
        load_model(stored, device="abacus")
    with pytest.raises(CheckpointError, match="'meta', which holds shapes alone"):
        load_model(stored, device="meta")


def test_a_folder_without_a_tokenizer_says_so(stored) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer that can be read"):
        load_tokenizer(stored)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a checkpoint of prunenet"),
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format_version": 2, "surprise": 1}', "cannot be read"),
    ],
)
def test_a_damaged_story_is_one_clear_sentence(spoilt, text, message) -> None:
    if text is None:
        (spoilt / "prunenet.json").unlink()
    else:
        (spoilt / "prunenet.json").write_text(text)
    for read in (load_provenance, load_masks):
        with pytest.raises(CheckpointError, match=message):
            read(spoilt)


@pytest.mark.parametrize("width", [2**24 + 1, 10**18, 2**63])
def test_a_story_of_absurd_widths_is_refused_before_masks_of_them_are_made(spoilt, width) -> None:
    path = spoilt / "prunenet.json"
    said = json.loads(path.read_text())
    said["dense_widths"][0] = width
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"dense_widths\[0\] is .*, not from 1 to"):
        load_masks(spoilt)


def test_a_newer_format_asks_for_an_update(spoilt) -> None:
    path = spoilt / "prunenet.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(
        CheckpointError, match="format version is 2, this prunenet reads 1; update prunenet"
    ):
        load_provenance(spoilt)


def test_damaged_masks_are_one_clear_sentence(spoilt) -> None:
    (spoilt / "prunenet_masks.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"prunenet_masks\.safetensors is missing or damaged"):
        load_masks(spoilt)


def test_an_unknown_regime_is_refused(stored) -> None:
    with pytest.raises(ValueError, match="regime must be one of weights, self, data, got 'magic'"):
        dataclasses.replace(load_provenance(stored), regime="magic")


def test_masks_model_and_story_must_agree(tmp_path) -> None:
    dense = tiny_model("llama")
    keep = random_keep([32] * LAYERS)
    narrow = narrowed(dense, keep)
    story = provenance_of(dense, narrow)
    for model, masks, told in (
        (dense, keep, story),
        (narrow, random_keep([31] * LAYERS), story),
        (narrow, keep, dataclasses.replace(story, widths=(31,) * LAYERS)),
        (narrow, keep, dataclasses.replace(story, dense_widths=(64,) * LAYERS)),
    ):
        with pytest.raises(ValueError, match="masks"):
            save_pruned(model, tmp_path / "narrow", masks, told)
    assert left_in(tmp_path) == []


def test_an_existing_folder_or_file_is_never_touched(tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("data")
    (tmp_path / "file").write_text("data")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match=f"{name} exists already; give another folder"):
            save(tmp_path / name)
    assert left_in(tmp_path) == ["file", "full"]
    assert left_in(tmp_path / "full") == ["precious"]


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep" / "narrow"):
        load_model(save(out))
    assert left_in(tmp_path) == ["empty", "new"]


def wrapped_by_safetensors(*_args, **_options):
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


def full_disk(*_args, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failure", [wrapped_by_safetensors, full_disk])
@pytest.mark.parametrize("step", ["model", "masks", "card"])
def test_a_disk_that_fills_up_half_way_leaves_nothing_and_says_how_much_is_needed(
    tmp_path, monkeypatch, step, failure
) -> None:
    owner, name = {
        "model": (PreTrainedModel, "save_pretrained"),
        "masks": (checkpoint, "packed"),
        "card": (checkpoint, "card_of"),
    }[step]
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises(
        CheckpointError,
        match=r"no room for .*narrow: it takes at least 0\.1 MB .* MB free; make room",
    ):
        save(tmp_path / "new" / "narrow")
    assert left_in(tmp_path) == []


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(
        folders.shutil, "disk_usage", lambda _path: namedtuple("Usage", "free")(50_000)
    )
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *_: pytest.fail("wrote"))
    with pytest.raises(
        CheckpointError, match=r"takes at least 0\.1 MB and its disk has 0\.[01] MB free"
    ):
        save(tmp_path / "narrow")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, PermissionError])
def test_a_save_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch, failure) -> None:
    def interrupted(*_args, **_options):
        raise failure

    monkeypatch.setattr(checkpoint, "_verify", interrupted)
    with pytest.raises(CheckpointError if failure is PermissionError else failure):
        save(tmp_path / "new" / "narrow")
    assert left_in(tmp_path) == []


def test_a_parent_that_is_a_file_is_one_clear_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("data")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "file" / "narrow")


def test_weights_that_changed_on_their_way_to_the_disk_are_an_error_and_leave_nothing(
    tmp_path, monkeypatch
) -> None:
    stock = PreTrainedModel.save_pretrained

    def bend(self, folder, **options):
        stock(self, folder, **options)
        tensors = load_file(Path(folder) / "model.safetensors")
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", bend)
    with pytest.raises(
        CheckpointError,
        match=r"tensor model\.layers\.0\.mlp\.down_proj\.weight differs after a reload",
    ):
        save(tmp_path / "narrow")
    assert left_in(tmp_path) == []


def test_a_configuration_that_changed_on_its_way_is_seen_in_the_logits(
    tmp_path, monkeypatch
) -> None:
    stock = PreTrainedModel.save_pretrained

    def bend(self, folder, **options):
        stock(self, folder, **options)
        edit(Path(folder), rms_norm_eps=0.5)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", bend)
    with pytest.raises(CheckpointError, match=r"its logits differ by up to .*, not 0"):
        save(tmp_path / "narrow")
    assert left_in(tmp_path) == []
