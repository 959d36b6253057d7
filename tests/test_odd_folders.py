"""What lies in a folder beside a model, and what its files may say. In memory and streamed it is the
same: the same tensors and logits, or the same sentence.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import D_FF, LAYERS, tiny_model, token_ids
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from prunenet.checkpoints.contents import model_files
from prunenet.checkpoints.identity import (
    base_of,
    identify,
    tokenizer_sha256,
    weights_sha256,
)
from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.evaluation.result import bytes_on_disk
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy
from prunenet.runtime.files import CheckpointError

UP = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "plain"
    tiny_model("llama", tied=True).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(plain, tmp_path / "odd"))


def edit(name: str = "config.json", **fields) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | fields))

    return change


def weigh(**changes) -> Change:
    """Changes tensors; None takes one away."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in changes.items():
            name = name.replace("__", ".")
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor(tensors.get(name)) if callable(tensor) else tensor
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def shard(*names: str, index: dict | None = None) -> Change:
    """Moves the weights into shards of these names, and writes their index."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        parts = [list(tensors)[i :: len(names)] for i in range(len(names))]
        for name, part in zip(names, parts, strict=True):
            save_file({n: tensors[n] for n in part}, folder / name, metadata={"format": "pt"})
        where = {n: name for name, part in zip(names, parts, strict=True) for n in part}
        content = {"metadata": {}, "weight_map": where} if index is None else index
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


def point(to: object) -> Change:
    """Writes an index by which every tensor is in one place, outside or absurd."""

    def change(folder: Path) -> None:
        outside = folder.parent / "secret"
        outside.mkdir(exist_ok=True)
        names = list(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").rename(outside / "s.safetensors")
        place = to.format(outside=outside) if isinstance(to, str) else to
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def adapter(folder: Path) -> None:
    edit("adapter_config.json", peft_type="LORA", r=2, lora_alpha=64, target_modules=["up_proj"])(
        folder
    )
    part = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"
    shapes = {"A": (2, 32), "B": (D_FF, 2)}
    save_file(
        {part.format(i, k): torch.randn(s) for i in range(LAYERS) for k, s in shapes.items()},
        folder / "adapter_model.safetensors",
    )


def classifier(folder: Path, **options) -> None:
    config = tiny_model("llama", **options).config
    shutil.rmtree(folder)
    LlamaForSequenceClassification(config).save_pretrained(folder)


def links(folder: Path) -> None:
    """As in the hub's cache: every file is a link into another folder."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(f"../blobs/{number:064x}")


def other_weights(name: str) -> Change:
    return lambda folder: save_file(
        {UP: torch.full((D_FF, 32), 7.0)}, folder / name, metadata={"format": "pt"}
    )


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def nothing(_folder: Path) -> None:
    """Leaves it plain."""


HARMLESS: dict[str, Change] = {
    "nothing": nothing,
    "attention kernel from the hub": edit(attn_implementation="evil/kernel:fn"),
    "attention kernel, private name": edit(_attn_implementation="evil/kernel"),
    "attention kernel, inner name": edit(_attn_implementation_internal="evil/kernel"),
    "experts kernel": edit(experts_implementation="evil/kernel"),
    "eager attention": edit(attn_implementation="eager"),
    "fusions": edit(fusion_config={"patch_embeddings": True}),
    "distributed": edit(distributed_config={"tp_size": 4}, use_kernels=True),
    "tuples in place of outputs": edit(return_dict=False, output_attentions=True),
    "all hidden states": edit(output_hidden_states=True),
    "another name of its own": edit(_name_or_path="owner/other", _commit_hash="0" * 40),
    "code": all_of(
        edit(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        lambda f: (f / "evil.py").write_text("raise SystemExit('run!')"),
    ),
    "custom generate": all_of(
        lambda f: (f / "custom_generate").mkdir(),
        lambda f: (f / "custom_generate" / "generate.py").write_text("raise SystemExit('run!')"),
    ),
    "adapter weights alone": other_weights("adapter_model.safetensors"),
    "a variant": other_weights("model.fp16.safetensors"),
    "other shards": other_weights("model-00001-of-00001.safetensors"),
    "a distributed checkpoint": other_weights("shard-00001-model-00001-of-00001.safetensors"),
    "consolidated weights": other_weights("consolidated.safetensors"),
    "a pickle beside": lambda f: (f / "pytorch_model.bin").write_bytes(b"pickled"),
    "an index that is not needed": lambda f: (f / "model.safetensors.index.json").write_text("["),
    "shards": shard("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    "shards of other names": shard("weights-1.safetensors", "b c.safetensors"),
    "an index without metadata": all_of(
        shard("weights-1.safetensors"),
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "weights-1.safetensors"}})
        ),
    ),
    "links": links,
    "generation defaults": edit("generation_config.json", temperature=0.1, do_sample=True),
    "no generation defaults": lambda f: (f / "generation_config.json").unlink(),
    "rotary frequencies": weigh(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
    "the tied head as well": weigh(
        lm_head__weight=lambda _: tiny_model("llama", tied=True).lm_head.weight.detach().clone()
    ),
    "a float64 tensor": weigh(model__norm__weight=lambda t: t.double()),
    "no dtype": edit(dtype=None),
    "labels": edit(num_labels=3),
    "an infinite limit": edit(time_step_limit=[0.0, math.inf]),
    "an infinite limit, as version 5 writes it": edit(
        time_step_limit=[0.0, {"__float__": "Infinity"}]
    ),
}

REFUSED: dict[str, tuple[Change, str]] = {
    "adapter": (adapter, "holds an adapter .* merge it first"),
    "adapter alone": (
        all_of(adapter, lambda f: (f / "config.json").unlink()),
        "holds an adapter and not a model.*merge it",
    ),
    "weights elsewhere": (edit(transformers_weights="x.safetensors"), "from other files"),
    "configuration elsewhere": (edit(configuration_files=["config.4.0.0.json"]), "other files"),
    "quantised": (edit(quantization_config={"quant_method": "gptq"}), "is quantised"),
    "compressed": (edit(compression_config={"format": "x"}), "is quantised"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"has no model\.safetensors.*pytorch_model\.bin is a pickle.*save it anew",
    ),
    "GGUF": (lambda f: (f / "model.safetensors").rename(f / "m.gguf"), "no GGUF files"),
    "GGUF alone": (
        lambda f: [(f / "config.json").unlink(), (f / "m.gguf").write_bytes(b"GGUF")],
        r"m\.gguf cannot be read as GGUF",
    ),
    "outside, relative": (point("../secret/s.safetensors"), "no .safetensors file of its folder"),
    "outside, absolute": (point("{outside}/s.safetensors"), "no .safetensors file of its folder"),
    "outside, another file": (point("../../../../etc/passwd"), "no .safetensors file of its"),
    "outside, Windows": (point("..\\secret\\s.safetensors"), "no .safetensors file of its"),
    "a pickle in the index": (point("s.bin"), "no .safetensors file of its folder"),
    "a hidden file": (point(".s.safetensors"), "no .safetensors file of its folder"),
    "an empty name": (point(""), "no .safetensors file of its folder"),
    "no such file": (point("s.safetensors"), r"has no s\.safetensors"),
    "a number for a name": (point(1), r"index\.json is damaged: weight_map\.\S* is 1, not a text"),
    "a list for the map": (
        shard("a.safetensors", index={"weight_map": ["a.safetensors"]}),
        "weight_map is .*, not an object",
    ),
    "no map": (shard("a.safetensors", index={}), "lacks weight_map"),
    "an empty map": (shard("a.safetensors", index={"weight_map": {}}), "names no file"),
    "an index that is a list": (shard("a.safetensors", index=[]), "does not hold a JSON object"),
    "a tensor twice": (
        all_of(
            shard("a.safetensors"),
            lambda f: shutil.copy(f / "a.safetensors", f / "b.safetensors"),
            edit(
                "model.safetensors.index.json",
                weight_map={"a": "a.safetensors", "b": "b.safetensors"},
            ),
        ),
        r"holds tensor .* twice, in a\.safetensors and in b\.safetensors",
    ),
    "a head of another kind": (classifier, "does not have, e.g. score.weight .*SequenceClass"),
    "a head of another kind, tied": (
        lambda f: classifier(f, tied=True),
        r"does not have, e\.g\. score\.weight \(config\.json names LlamaForSequenceClassification",
    ),
    "a value head": (weigh(v_head__weight=torch.ones(1, 32)), r"e\.g\. v_head\.weight"),
    "a layer too many": (
        weigh(**{UP.replace("1", "3").replace(".", "__"): torch.ones(D_FF, 32)}),
        r"e\.g\. model\.layers\.3",
    ),
    "a bias that is not announced": (
        weigh(model__layers__0__mlp__up_proj__bias=torch.ones(D_FF)),
        r"e\.g\. model\.layers\.0\.mlp\.up_proj\.bias",
    ),
    "a tensor too few": (weigh(**{UP.replace(".", "__"): None}), "lacks 1 of the model's tensors"),
    "a tied head that differs": (
        weigh(lm_head__weight=torch.ones(64, 32)),
        "different numbers, though config.json ties them",
    ),
    "another width": (edit(intermediate_size=40), r"cannot be loaded: .* config\.json says"),
    "another vocabulary": (edit(vocab_size=10**12), "config.json says"),
    "too many layers": (edit(num_hidden_layers=10**9), "says 1,000,000,000, the files hold 3"),
    "no layers": (edit(num_hidden_layers=0), "num_hidden_layers is 0, not 1 or more"),
    "layers that are a text": (edit(num_hidden_layers="3"), "num_hidden_layers is '3', not a"),
    "too many labels": (edit(num_labels=10**9), "num_labels is 1000000000, not from 0"),
    "a dtype that is a function": (edit(dtype="load"), "dtype is 'load', not one of"),
    "a field that is a method": (edit(to_dict="x"), "'to_dict' is no field of a configuration"),
    "an unknown activation": (edit(hidden_act="magic"), "cannot be loaded"),
    "no heads": (edit(num_attention_heads=0), "cannot be loaded"),
    "a type that is a list": (edit(model_type=["llama"]), "model_type is .*, not a text"),
    "an unknown type": (edit(model_type="z" * 99), "is not supported"),
    "a name that is endless": (edit(model_type="z" * 9999), "model_type is 9999 long"),
    "generation defaults that are a list": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        r"generation_config\.json is damaged",
    ),
    "deep nesting": (
        lambda f: (f / "config.json").write_text('{"a": ' + "[" * 99_999 + "]" * 99_999 + "}"),
        r"config\.json is damaged: nested",
    ),
    "no number": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "rms_norm_eps": NaN}'),
        "NaN, which is no finite number",
    ),
    "a number that overflows": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "rms_norm_eps": 1e999}'),
        "1e999', which is no finite number",
    ),
    "layers without end": (
        lambda f: (f / "config.json").write_text(
            '{"model_type": "llama", "num_hidden_layers": Infinity}'
        ),
        "num_hidden_layers is inf, not a whole number",
    ),
    "a name twice": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "model_type": "phi"}'),
        "has 'model_type' twice",
    ),
    "a pipe for weights": (pipe("model.safetensors"), r"has no model\.safetensors"),
    "a pipe for a configuration": (pipe("config.json"), "not a regular file"),
    "NaN": (weigh(**{UP.replace(".", "__"): lambda t: t.fill_(torch.nan)}), "not finite"),
    "Inf": (weigh(model__norm__weight=lambda t: t.fill_(torch.inf)), "model.norm.weight .*finite"),
    "beyond the dtype": (
        all_of(weigh(model__norm__weight=lambda t: t.fill_(1e30)), edit(dtype="float16")),
        "not finite in float16; fetch it again, or load it in float32",
    ),
}


def read_all(source: StreamedCheckpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.whole() for name, tensor in source.stored.items()}


def sentence(read: Callable[[], object]) -> str:
    with pytest.raises((CheckpointError, UnsupportedArchitecture)) as error:
        read()
    return str(error.value)


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_lies_beside_a_model_or_says_how_to_run_it_changes_nothing(
    plain, folder, change
) -> None:
    change(folder)
    model, source = load_model(folder), StreamedCheckpoint.open(folder)
    expected = load_model(plain)
    streamed = read_all(source)
    for name, tensor in expected.state_dict().items():
        assert model.state_dict()[name].equal(tensor), name
        assert streamed[name].equal(tensor), name
    assert model(token_ids()).logits.equal(expected(token_ids()).logits)
    assert model.config.to_dict() == source.skeleton.config.to_dict()
    assert model.generation_config.to_dict() == source.skeleton.generation_config.to_dict()
    assert weights_sha256(model) == weights_sha256(source)
    assert model.config._name_or_path == source.skeleton.config._name_or_path == str(folder)
    assert model.config._attn_implementation == expected.config._attn_implementation


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_understood_is_the_same_sentence_in_memory_and_streamed(
    folder, change, message
) -> None:
    change(folder)
    first = sentence(lambda: load_model(folder))
    second = sentence(lambda: read_all(StreamedCheckpoint.open(folder)))
    # the stream knows the file that a tensor lies in
    assert first == second.replace("/model.safetensors holds", " holds")
    with pytest.raises(AssertionError if message is None else Exception, match=message):
        load_model(folder)
    assert "\n" not in first
    assert len(first) < 400 + 2 * len(str(folder))


def test_a_stream_maps_no_file_into_memory(folder) -> None:
    source = StreamedCheckpoint.open(folder)
    read_all(source)
    assert str(folder / "model.safetensors") not in Path("/proc/self/maps").read_text()


# --- identity ---


@pytest.mark.parametrize(
    "change",
    [
        shard("weights-1.safetensors", "weights-2.safetensors"),
        shard("model-00001-of-00001.safetensors"),
        nothing,
    ],
    ids=["shards of other names", "a shard", "one file"],
)
def test_a_model_is_another_one_when_a_byte_that_is_read_changes_and_the_same_otherwise(
    folder, change
) -> None:
    change(folder)
    before = identify(folder)[1]
    assert bytes_on_disk(folder) == sum(path.stat().st_size for path in model_files(folder).weights)
    for beside in ("adapter_model.safetensors", "model.fp16.safetensors", "modeling.py"):
        (folder / beside).write_bytes(b"beside")
    assert identify(folder)[1] == before
    seen = {before}
    for path in model_files(folder).paths:
        content = path.read_bytes()
        changed = bytearray(content)
        changed[-3] ^= 1
        path.write_bytes(changed if path.suffix == ".safetensors" else content + b" ")
        seen.add(identify(folder)[1])
        path.write_bytes(content)
    assert len(seen) == 1 + len(model_files(folder).paths)
    assert identify(folder)[1] == before


def test_a_folder_is_the_same_under_each_of_its_names(folder, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    expected = identify(folder)
    assert expected[0] == "odd"
    assert identify("~/odd") == identify(Path("~/odd")) == expected
    for model in (load_model("~/odd"), StreamedCheckpoint.open("~/odd").skeleton):
        assert model.config._name_or_path == str(folder)
    (folder.parent / "link").symlink_to("odd")
    assert identify(folder.parent / "link") == expected


def nudged(model) -> None:
    model.get_parameter(UP).data[0, 0] += 1


def rounded(model) -> None:
    model.bfloat16()


@pytest.mark.parametrize("source", ["folder", "hub"])
@pytest.mark.parametrize(
    ("change", "known"),
    [(nothing, True), (rounded, True), (nudged, False)],
    ids=["as stored", "rounded", "changed"],
)
def test_a_model_that_was_changed_in_memory_is_recorded_without_a_revision(
    folder, offline, caplog, change, known, source
) -> None:
    cache = Cache(offline, folder, ["params.json"])
    name = str(folder) if source == "folder" else "owner/name"
    revision = identify(folder)[1] if source == "folder" else cache.snapshot.name
    model = load_model(name)
    change(model)
    made = prune(model, Policy.from_pretrained("llama"), ratio=0.5, widths="uniform").provenance
    assert made.base_model == ("odd" if source == "folder" else name)
    assert made.revision == (revision if known else "unknown")
    assert ("are not those stored in" in caplog.text) == (not known)


def test_a_model_whose_files_cannot_be_read_any_more_is_recorded_without_a_revision(folder) -> None:
    model = load_model(folder)
    weigh(**{UP: lambda tensor: tensor * math.nan})(folder)
    assert base_of(model)["revision"] == "unknown"


def test_a_model_that_only_has_the_configuration_of_a_folder_is_recorded_without_a_revision(
    folder,
) -> None:
    random = type(load_model(folder))(load_model(folder).config)
    assert base_of(random) == {"base_model": "odd", "revision": "unknown"}


def test_a_tokenizer_is_another_one_when_its_files_change(folder) -> None:
    assert tokenizer_sha256(folder) is None
    (folder / "tokenizer.json").write_text("{}")
    first = tokenizer_sha256(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    second = tokenizer_sha256(folder)
    (folder / "README.md").write_text("words")
    assert tokenizer_sha256(folder) == second
    assert len({None, first, second}) == 3


@pytest.mark.parametrize("name", ["vocab_file", "tokenizer_file", "merges_file"])
@pytest.mark.parametrize("place", ["../secret/vocab.json", "/etc/passwd", 3])
def test_a_tokenizer_s_configuration_names_no_file_elsewhere(folder, name, place) -> None:
    (folder / "tokenizer.json").write_text("{}")
    edit("tokenizer_config.json", **{name: place})(folder)
    with pytest.raises(CheckpointError, match=f"{name} is .*, which is no file of its folder"):
        load_tokenizer(folder)


@pytest.mark.parametrize("value", ["long", {"a": 1}, [3], None])
def test_a_tokenizer_whose_values_fail_only_in_its_use_is_refused_as_it_is_loaded(
    folder, value
) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    assert load_tokenizer(folder)("a b")["input_ids"] == [0, 1]
    edit("tokenizer_config.json", model_max_length=value)(folder)
    if value is None:
        assert load_tokenizer(folder)("a b")["input_ids"] == [0, 1], "as if it were not there"
        return
    with pytest.raises(CheckpointError, match="has no tokenizer that can be read"):
        load_tokenizer(folder)


def test_a_tokenizer_s_file_that_nobody_fills_is_not_read(folder) -> None:
    (folder / "tokenizer.json").touch()
    os.truncate(folder / "tokenizer.json", 2**40)  # sparse
    with pytest.raises(CheckpointError, match=r"it has 1,099,\S* bytes, more than 268,435,456"):
        load_tokenizer(folder)


# --- the hub's cache, offline ---


class Cache:
    """A hub cache of one repository, with the listing of all its files."""

    def __init__(self, home: Path, present: Path, listed: list[str]) -> None:
        from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

        sha = "0" * 40
        self.repo = home / "models--owner--name"
        self.snapshot = self.repo / "snapshots" / sha
        shutil.copytree(present, self.snapshot)
        (self.repo / "refs").mkdir()
        (self.repo / "refs" / "main").write_text(sha)
        names = [*(path.name for path in present.iterdir()), *listed]
        entry = TreeCacheEntry(
            size=1, blob_id="b" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None
        )
        write_tree_cache(str(self.repo), sha, dict.fromkeys(names, entry))


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    "change",
    [nothing, shard("model-00001-of-00001.safetensors"), shard("weights-1.safetensors")],
    ids=["one file", "a shard", "a shard of another name"],
)
def test_a_cache_that_holds_the_model_is_enough_whatever_else_the_repository_has(
    plain, folder, offline, change
) -> None:
    change(folder)
    cache = Cache(offline, folder, ["params.json", "consolidated.safetensors", "results.json"])
    expected = load_model(plain)
    model, source = load_model("owner/name"), StreamedCheckpoint.open("owner/name")
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    assert weights_sha256(source) == weights_sha256(model)
    for config in (model.config, source.skeleton.config):
        assert (config._name_or_path, config._commit_hash) == ("owner/name", cache.snapshot.name)
    assert identify("owner/name") == ("owner/name", cache.snapshot.name)


def test_a_cache_that_lacks_a_shard_says_which(folder, offline) -> None:
    shard("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    Cache(offline, folder, ["model-00002-of-00002.safetensors"])
    with pytest.raises(CheckpointError, match=r"has no model-00002-of-00002\.safetensors"):
        load_model("owner/name")


def test_what_is_asked_of_the_hub_is_what_is_read(folder, monkeypatch) -> None:
    shard("weights-[1].safetensors")(folder)
    asked = []

    def snapshot(_name: str, allow_patterns: list[str], **_options) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("prunenet.checkpoints.sources.snapshot_download", snapshot)
    load_model("owner/name")
    assert asked[0] == ["config.json"]
    assert "adapter_config.json" in asked[1]
    assert not {"*.json", "*.safetensors", "*"} & set(asked[1])
    assert asked[2] == ["weights-[[]1].safetensors"]
