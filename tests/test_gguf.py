"""A GGUF file says what the checkpoint says, and llama.cpp computes the same with it."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from families import D_FF, LAYERS, provenance, random_keep, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
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


PIECES = [
    "▁t",
    "he",
    "▁a",
    "in",
    "▁the",
    "er",
    "nd",
    "▁and",
    "ing",
    "▁▁",
    "▁▁▁▁",
    "re",
    "▁o",
    "▁on",
]
LLAMA_2 = ([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")], None)
METASPACE = ([], pre_tokenizers.Metaspace("▁", "always", split=False))
GEMMA = (
    [normalizers.Replace(" ", "▁")],
    pre_tokenizers.Split(" ", "merged_with_previous"),
)


def sentencepiece(rule=LLAMA_2, without=()) -> PreTrainedTokenizerFast:
    """Bytes, letters and a few pieces, merged as SentencePiece merges; 320 tokens at most.

    Args:
        rule: (normalizers, pre-tokenizer).
        without: merges that are left out.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *PIECES]
    tokens += "▁abcdefghijklmnopqrstuvwxyz.,\n"
    known = {token: i for i, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in PIECES
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    merges = [pair for pair in merges if pair not in without]
    bpe = Tokenizer(models.BPE(known, merges, unk_token="<unk>", byte_fallback=True))
    steps, split = rule
    if steps:
        bpe.normalizer = normalizers.Sequence(steps)
    if split is not None:
        bpe.pre_tokenizer = split
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def saved(tmp_path, model_type="llama", widths=PER_LAYER, heads=None, tokenizer=None, **options):
    """The folder of a cut tiny model with a vocabulary of 320."""
    dense = tiny_model(model_type, **options)
    if model_type in ("mistral", "phi3"):  # llama.cpp has no window there
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
        ("phi3", [32] * LAYERS, "phi3"),
        ("gemma", [32] * LAYERS, "gemma"),
        ("gemma2", [32] * LAYERS, "gemma2"),
        ("gemma3_text", [32] * LAYERS, "gemma3"),
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
        ("llama", PER_LAYER, [[True, False], [False, False], [False, True]], {}),
        ("mistral", PER_LAYER, None, {}),
        ("qwen2", [32] * LAYERS, None, {}),
        ("qwen2", PER_LAYER, [[True, False], [True, True], [False, True]], {"tied": True}),
        ("qwen2", [32] * LAYERS, [[True, False], [True, True], [False, False]], {"tied": True}),
        ("qwen3", [32] * LAYERS, None, {}),
        ("qwen3", PER_LAYER, [[True, False], [True, True], [False, True]], {"tied": True}),
        ("granite", [32] * LAYERS, None, {}),
        ("smollm3", [32] * LAYERS, None, {}),
        ("phi3", [32] * LAYERS, None, {}),
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


def rounded_gelu(x):
    """As llama.cpp computes it: a table of float16."""
    found = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, torch.zeros(()), torch.where(x >= 10, x, found))


@needs_runtime
@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_llama_cpp_computes_a_gemma_but_for_its_table_of_gelu(
    tmp_path, monkeypatch, model_type
) -> None:
    from transformers.activations import GELUTanh

    folder, _ = saved(tmp_path, model_type, [32] * LAYERS)
    made = export_gguf(folder, tmp_path / "out", "f32")
    assert made.proof is not None
    assert made.proof.difference < llama_cpp.ROUGH
    monkeypatch.setattr(GELUTanh, "forward", lambda self, x: rounded_gelu(x))
    rounded = export_gguf(folder, tmp_path / "rounded", "f32")
    assert rounded.proof is not None
    assert rounded.proof.difference < llama_cpp.CLOSE


@needs_runtime
@pytest.mark.parametrize("rule", [LLAMA_2, METASPACE, GEMMA], ids=["llama-2", "metaspace", "gemma"])
def test_llama_cpp_reads_a_hundred_texts_as_the_sentencepiece_tokenizer_does(
    tmp_path, rule
) -> None:
    folder, _ = saved(tmp_path, tokenizer=sentencepiece(rule))
    made = export_gguf(folder, tmp_path / "out", "f32")
    assert made.proof is not None
    assert made.proof.texts >= 100
    said = "puts a blank in front" in (made.path.parent / "README.md").read_text()
    assert said == (rule is METASPACE)


@needs_runtime
def test_a_file_whose_tokens_are_others_does_not_appear(tmp_path, monkeypatch) -> None:
    from prunenet.checkpoints.exports import gguf_sentencepiece

    folder, _ = saved(tmp_path, tokenizer=sentencepiece())
    monkeypatch.setattr(gguf_sentencepiece, "scores", lambda said, tokens: [0.0] * len(tokens))
    with pytest.raises(CheckpointError, match=r"llama.cpp reads .* as tokens"):
        export_gguf(folder, tmp_path / "out", "f32")
    assert not (tmp_path / "out").exists()


def test_pieces_have_the_scores_by_which_they_merge_and_bytes_a_kind_of_their_own() -> None:
    stated = vocabulary(sentencepiece(), SIZE)
    tokens, kinds = stated["ggml.tokens"], stated["ggml.token_type"]
    by_score = sorted(PIECES, key=lambda piece: -stated["ggml.scores"][tokens.index(piece)])
    assert by_score == PIECES
    assert stated["ggml.model"] == "llama"
    assert stated["ggml.add_space_prefix"] is True
    assert [kinds[tokens.index(t)] for t in ("<unk>", "</s>", "<0x0A>", "▁the")] == [2, 3, 6, 1]
    assert vocabulary(sentencepiece(GEMMA), SIZE)["ggml.add_space_prefix"] is False


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (sentencepiece(without=[("▁t", "he")]), r"merges '▁t' and 'he' to the token '▁the', and"),
        (sentencepiece(([normalizers.NFKC()], None)), "changes nothing else, and this one does"),
        (sentencepiece(([], pre_tokenizers.Metaspace())), "changes nothing else, and this one"),
    ],
)
def test_a_sentencepiece_tokenizer_that_llama_cpp_has_not_is_refused(tokenizer, reason) -> None:
    with pytest.raises(CheckpointError, match=reason):
        vocabulary(tokenizer, SIZE)


def test_a_phi_3_is_named_so_where_its_tokens_are(tmp_path, unproved) -> None:
    names = []
    for more in ([], ["<unk>", "<|endoftext|>"]):
        tokenizer = byte_level()
        tokenizer.add_special_tokens({"additional_special_tokens": more})
        place = tmp_path / str(len(more))
        folder, _ = saved(place, "phi3", [32] * LAYERS, tokenizer=tokenizer)
        fields, _ = read(export_gguf(folder, place / "out", "f32").path)
        names.append(fields["general.name"])
    assert names == ["cut", "cut (phi-3)"]


def test_chat_templates_are_carried_by_name() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "one", "tool_use": "two"}
    stated = vocabulary(tokenizer, SIZE)
    assert (stated["chat_template"], stated["chat_template.tool_use"]) == ("one", "two")
    assert stated["chat_templates"] == ["tool_use"]


@pytest.mark.parametrize(
    ("model_type", "field", "value", "reason"),
    [
        ("gemma2", "layer_types", ["full_attention"] * LAYERS, r"every 2th layer .* \[0, 1, 2\]"),
        ("gemma3_text", "query_pre_attn_scalar", 9, "by the root of 8, and this model by that of"),
        ("gemma", "attention_bias", True, "without biases"),
    ],
)
def test_a_gemma_that_llama_cpp_computes_otherwise_is_refused(
    model_type, field, value, reason
) -> None:
    model = narrowed(tiny_model(model_type), random_keep([32] * LAYERS))
    setattr(model.config, field, value)
    with pytest.raises(CheckpointError, match=reason):
        form_of(model)


@needs_runtime
def test_eval_serves_a_model_by_llama_cpp(tmp_path) -> None:
    folder, _ = saved(tmp_path)
    asked = ["eval", str(folder), "--text", "builtin", "--window", "16", "--max-windows", "1"]
    asked += ["--prompt", "8", "--new-tokens", "4", "--repeats", "2", "--serve", "f32"]
    (row,) = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)["models"]
    assert row["served_type"] == "f32"
    assert row["served_bytes"] > row["bytes"]
    assert row["served_prefill_tokens_per_second"] > 0
    assert row["served_decode_tokens_per_second"] > 0
    shown = CliRunner(env={"COLUMNS": "140"}).invoke(app, asked).stdout
    assert "llama.cpp decode" in shown
    assert "KV cache/token" in shown
    assert "memory: parameters, and the most" in shown


@needs_runtime
def test_a_file_that_computes_something_else_does_not_appear(tmp_path, monkeypatch) -> None:
    from prunenet.checkpoints.exports import gguf_form

    folder, _ = saved(tmp_path)
    monkeypatch.setattr(gguf_form, "_interleaved", lambda rows, heads: rows)
    with pytest.raises(CheckpointError, match=r"log-probabilities of llama\.cpp differ by up to"):
        export_gguf(folder, tmp_path / "out", "f32")
    assert not (tmp_path / "out").exists()
