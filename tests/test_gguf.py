"""A GGUF file says what the checkpoint says, and llama.cpp computes the same with it."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from families import D_FF, LAYERS, provenance, random_keep, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from prunenet.checkpoints.exports import llama_cpp
from prunenet.checkpoints.exports.gguf import export_gguf
from prunenet.checkpoints.exports.gguf_form import form_of, hyperparameters, parts
from prunenet.checkpoints.exports.gguf_tokenizer import vocabulary
from prunenet.checkpoints.save import save_pruned
from prunenet.cli.app import app
from prunenet.models.surgery import narrowed
from prunenet.runtime.files import CheckpointError

library = pytest.importorskip("gguf")
needs_runtime = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"
)
SIZE = 320
PER_LAYER = [16, 40, 32]
DIGITS = [pre_tokenizers.Digits(individual_digits=True)]


def byte_level(front=DIGITS, use_regex: bool = True) -> PreTrainedTokenizerFast:
    """All 256 bytes, two merges, two special tokens and one that is not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "th", "the"]
    bpe = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [("t", "h"), ("th", "e")])
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [*front, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<s>", "</s>"])
    bpe.add_tokens(["<tool>"])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{{ messages[0]['content'] }}"
    return made


def saved(tmp_path, model_type="llama", widths=PER_LAYER, heads=None, tokenizer=None, **options):
    """The folder of a cut tiny model with a vocabulary of 320."""
    dense = tiny_model(model_type, **options)
    if getattr(dense.config, "sliding_window", None):
        dense.config.sliding_window = 64
    dense.resize_token_embeddings(SIZE, mean_resizing=False)
    keep = random_keep(widths)
    groups = None if heads is None else [torch.tensor(mask) for mask in heads]
    narrow = narrowed(dense, keep, groups)
    story = provenance(dense, narrow)
    tokenizer = tokenizer or byte_level()
    return save_pruned(
        narrow, tmp_path / "cut", keep, story, groups=groups, tokenizer=tokenizer
    ), narrow


def read(path):
    """(fields, tensors) of a file; tensors as they were before they were stored."""
    reader = library.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: library.quants.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1])
        for t in reader.tensors
    }
    return fields, tensors


@pytest.fixture
def unproved(monkeypatch):
    """As where llama.cpp is not installed."""
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)


def test_the_file_says_widths_heads_tokens_and_template(tmp_path, unproved) -> None:
    folder, _ = saved(tmp_path)
    made = export_gguf(folder, tmp_path / "out", "f32")
    assert (made.architecture, made.proof, made.path.name) == ("deci", None, "cut-F32.gguf")
    card = (made.path.parent / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "Nobody has compared this file" in card
    fields, tensors = read(made.path)
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == PER_LAYER
    assert (fields["deci.attention.head_count"], fields["deci.attention.head_count_kv"]) == (4, 2)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == SIZE
    assert tokens[:2] == ["<s>", "</s>"]
    assert [kinds[tokens.index(name)] for name in ("<s>", "the", "<tool>")] == [3, 1, 4]
    assert kinds[-1] == 5
    assert fields["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    assert tensors["blk.1.ffn_down.weight"].shape == (32, 40)


def test_the_command_says_what_was_written_and_whether_it_was_checked(tmp_path, unproved) -> None:
    folder, _ = saved(tmp_path)
    asked = ["export", str(folder), "--gguf", "--type", "q8_0", "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(app, [*asked, "--json"])
    facts = json.loads(said.stdout)
    assert (facts["architecture"], facts["type"]) == ("deci", "q8_0")
    assert facts["bytes"] == (tmp_path / "out" / "cut-Q8_0.gguf").stat().st_size
    assert facts["kept_in_f16"].startswith("2 matrices")
    assert "prunenet[gguf]" in facts["checked"]
    both = CliRunner().invoke(app, ["export", str(folder), "--pad", "--gguf", "--out", "x"])
    assert both.exit_code == 1


def test_rows_of_queries_and_their_biases_lie_in_rotated_pairs(tmp_path) -> None:
    _, model = saved(tmp_path, "qwen2", bias=True)
    made = {part.name: part.read() for part in parts(model, form_of(model))}
    for kind in ("weight", "bias"):
        own = getattr(model.model.layers[0].self_attn.q_proj, kind).detach()
        theirs = made[f"blk.0.attn_q.{kind}"]
        for head in range(4):
            first, second = own[8 * head : 8 * head + 4], own[8 * head + 4 : 8 * head + 8]
            assert theirs[8 * head : 8 * head + 8 : 2].equal(first)
            assert theirs[8 * head + 1 : 8 * head + 8 : 2].equal(second)
    own = model.model.layers[0].self_attn.v_proj.weight.detach()
    assert made["blk.0.attn_v.weight"].equal(own)


@pytest.mark.parametrize(
    ("model_type", "widths", "name"),
    [
        ("llama", [32] * LAYERS, "llama"),
        ("mistral", [32] * LAYERS, "llama"),
        ("mistral", PER_LAYER, "deci"),
        ("qwen2", [32] * LAYERS, "qwen2"),
        ("qwen2", PER_LAYER, "deci"),
        ("qwen3", [32] * LAYERS, "qwen3"),
        ("granite", [32] * LAYERS, "granite"),
        ("smollm3", [32] * LAYERS, "smollm3"),
    ],
)
def test_alike_layers_keep_their_architecture_and_others_take_one_with_arrays(
    model_type, widths, name
) -> None:
    model = narrowed(tiny_model(model_type), random_keep(widths))
    form = form_of(model)
    assert form.name == name
    assert hyperparameters(model, form)["feed_forward_length"] == (
        widths if len(set(widths)) > 1 else widths[0]
    )


def test_heads_of_each_layer_are_stated(tmp_path) -> None:
    heads = [[True, False], [True, True], [False, True]]
    _, model = saved(tmp_path, widths=[D_FF] * LAYERS, heads=heads)
    stated = hyperparameters(model, form_of(model))
    assert stated["attention.head_count"] == [2, 4, 2]
    assert stated["attention.head_count_kv"] == [1, 2, 1]


def test_scaled_frequencies_are_factors() -> None:
    model = tiny_model("llama")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model.config.rope_parameters = rope
    model = type(model)(model.config)
    factors = {part.name: part for part in parts(model, form_of(model))}["rope_freqs.weight"].read()
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors.max() == pytest.approx(8.0)


@pytest.mark.parametrize(("kind", "bits"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 2e-2)])
def test_smaller_types_hold_the_matrices_nearly_and_vectors_exactly(
    tmp_path, unproved, kind, bits
) -> None:
    folder, model = saved(tmp_path)
    made = export_gguf(folder, tmp_path / "out", kind)
    _, tensors = read(made.path)
    own = model.model.layers[2].mlp.down_proj.weight.detach().numpy()
    assert np.abs(tensors["blk.2.ffn_down.weight"] - own).max() < bits
    norm = model.model.norm.weight.detach().numpy()
    assert np.array_equal(tensors["output_norm.weight"], norm)
    assert made.unquantised == (2 if kind == "q8_0" else 0)  # widths 16 and 40


@pytest.mark.parametrize(
    ("model_type", "widths", "reason"),
    [
        (
            "gemma2",
            PER_LAYER,
            r"no architecture of llama.cpp computes a 'gemma2' whose layers diff",
        ),
        ("opt", [32] * LAYERS, r"llama.cpp's own converter \(convert_hf_to_gguf.py\) reads"),
        ("qwen3", PER_LAYER, "has no LM head of its own, and this model has one"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_reason(model_type, widths, reason) -> None:
    with pytest.raises(CheckpointError, match=reason):
        form_of(narrowed(tiny_model(model_type, tied=model_type != "qwen3"), random_keep(widths)))


def test_rotary_embeddings_that_depend_on_the_length_are_refused() -> None:
    model = tiny_model("llama")
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(CheckpointError, match="kind 'yarn' are not written"):
        form_of(model)


def test_numbers_too_large_for_f16_are_named(tmp_path, unproved) -> None:
    folder, _ = saved(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"ffn_up.weight holds .* say --type bf16"):
        export_gguf(folder, tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("front", "use_regex", "name"), [(DIGITS, True, "smollm"), ([], True, "gpt-2")]
)
def test_the_rule_that_splits_texts_is_recognised(front, use_regex, name) -> None:
    assert vocabulary(byte_level(front, use_regex), SIZE)["ggml.pre"] == name


def test_another_rule_and_a_token_outside_the_embedding_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"splits texts by gpt-2, smollm, .*another rule"):
        vocabulary(byte_level([pre_tokenizers.Whitespace()]), SIZE)
    with pytest.raises(CheckpointError, match=r"has a token 100, .* embedding 100 rows"):
        vocabulary(byte_level(), 100)


@needs_runtime
@pytest.mark.parametrize(
    ("model_type", "widths", "heads", "options"),
    [
        ("llama", [32] * LAYERS, None, {"tied": True}),
        ("llama", PER_LAYER, [[True, False], [True, True], [False, True]], {"bias": True}),
        ("mistral", PER_LAYER, None, {}),
        ("qwen2", [32] * LAYERS, None, {}),
        ("qwen2", PER_LAYER, [[True, False], [True, True], [False, True]], {"tied": True}),
        ("qwen3", [32] * LAYERS, None, {}),
        ("qwen3", PER_LAYER, [[True, False], [True, True], [False, True]], {"tied": True}),
        ("granite", [32] * LAYERS, None, {}),
        ("smollm3", [32] * LAYERS, None, {}),
    ],
)
def test_llama_cpp_computes_what_transformers_computes(
    tmp_path, model_type, widths, heads, options
) -> None:
    folder, _ = saved(tmp_path, model_type, widths, heads, **options)
    made = export_gguf(folder, tmp_path / "out", "f32")
    assert made.proof is not None
    assert made.proof.difference < llama_cpp.CLOSE
    assert made.proof.same_text


@needs_runtime
def test_a_file_that_computes_something_else_does_not_appear(tmp_path, monkeypatch) -> None:
    from prunenet.checkpoints.exports import gguf_form

    folder, _ = saved(tmp_path)
    monkeypatch.setattr(gguf_form, "_interleaved", lambda rows, heads: rows)
    with pytest.raises(CheckpointError, match=r"log-probabilities of llama\.cpp differ by up to"):
        export_gguf(folder, tmp_path / "out", "f32")
    assert not (tmp_path / "out").exists()
