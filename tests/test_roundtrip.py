"""From a dense model to a folder that a process without prunenet loads to the same logits, bit for
bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import D_FF, FAMILIES, LAYERS, provenance, random_keep, tiny_model, token_ids
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.older_loaders import ROPE_FIELDS
from prunenet.checkpoints.save import export_padded, save_pruned
from prunenet.models.architectures import ARCHITECTURES
from prunenet.models.layers import ffn_widths
from prunenet.models.masks import width_at
from prunenet.models.surgery import narrowed

UNIFORM = [width_at(D_FF, 0.3)] * LAYERS
PER_LAYER = [16, 40, 24]
KINDS = {"uniform": UNIFORM, "per-layer": PER_LAYER, "whole": [D_FF] * LAYERS}

# What a user without prunenet does. Reads the folders and the token ids from standard input.
STRANGER = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

job = json.load(sys.stdin)
torch.set_num_threads(job["threads"])
logits = {}
for name, folder in job["folders"].items():
    options = {"trust_remote_code": True} if "per-layer" in name else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        logits[name] = model(torch.tensor(job["ids"])).logits.contiguous()
save_file(logits, job["out"])
assert not [name for name in sys.modules if name.split(".")[0] == "prunenet"], "prunenet was imported"
"""


def save(dense, widths, out: Path) -> tuple[Path, torch.Tensor]:
    """Cuts and saves; returns the folder and the logits of the model in memory."""
    keep = random_keep(widths)
    narrow = narrowed(dense, keep)
    story = provenance(dense, narrow)
    save_pruned(narrow, out, keep, story)
    with torch.no_grad():
        return out, narrow(token_ids()).logits


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[dict[str, Path], dict[str, torch.Tensor], Path]:
    """Every family, cut in every way, plus one padded export: folders and logits in memory by
    name.
    """
    home = tmp_path_factory.mktemp("roundtrip")
    made, answers = {}, {}
    for model_type in FAMILIES:
        dense = tiny_model(model_type, bias=True)
        for kind, widths in KINDS.items():
            name = f"{model_type} {kind}"
            made[name], answers[name] = save(dense, widths, home / kind / model_type)
    made["llama padded"] = export_padded(made["llama per-layer"], home / "padded")
    with torch.no_grad():
        answers["llama padded"] = load_model(made["llama padded"])(token_ids()).logits
    return made, answers, home


@pytest.fixture(scope="module")
def strange_logits(checkpoints) -> dict[str, torch.Tensor]:
    """The logits of every checkpoint in one fresh process that never imports prunenet."""
    made, _, home = checkpoints
    job = {
        "folders": {name: str(folder) for name, folder in made.items()},
        "ids": token_ids().tolist(),
        "threads": torch.get_num_threads(),
        "out": str(home / "logits.safetensors"),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STRANGER],
        input=json.dumps(job),
        env={**os.environ, "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(home / "logits.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_process_without_prunenet_computes_the_same_logits_bit_for_bit(
    checkpoints, strange_logits, model_type, kind
) -> None:
    name = f"{model_type} {kind}"
    answer = checkpoints[1][name]
    assert answer.dtype == torch.float32
    assert float((strange_logits[name] - answer).abs().max()) == 0


def test_a_process_without_prunenet_loads_the_padded_export_without_foreign_code(
    checkpoints, strange_logits
) -> None:
    _, answers, _ = checkpoints
    assert strange_logits["llama padded"].equal(answers["llama padded"])
    torch.testing.assert_close(
        answers["llama padded"], answers["llama per-layer"], atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_we_load_what_we_saved_bit_for_bit(checkpoints, model_type) -> None:
    made, answers, _ = checkpoints
    for kind, widths in KINDS.items():
        model = load_model(made[f"{model_type} {kind}"])
        assert ffn_widths(model) == widths
        assert model(token_ids()).logits.equal(answers[f"{model_type} {kind}"])
        assert [
            getattr(layer, ARCHITECTURES[model_type].width)
            for layer in model.config.per_layer_config
        ] == widths
        assert (
            model.config._attn_implementation == tiny_model(model_type).config._attn_implementation
        )


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_a_per_layer_decoder_is_loaded_without_its_head_or_with_another(checkpoints, auto) -> None:
    folder = checkpoints[0]["qwen2 per-layer"]
    model = auto.from_pretrained(folder, trust_remote_code=True)
    decoder = model if auto is AutoModel else model.model
    with torch.no_grad():
        hidden = decoder(token_ids()).last_hidden_state
        expected = load_model(folder).model(token_ids()).last_hidden_state
    assert [layer.mlp.up_proj.out_features for layer in decoder.layers] == PER_LAYER
    assert hidden.equal(expected)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_who_does_not_trust_the_code_is_told_so(checkpoints, auto) -> None:
    with pytest.raises(ValueError, match="needs its own code: load it with trust_remote_code=True"):
        auto.from_pretrained(checkpoints[0]["gpt_neox per-layer"])


def test_an_attention_that_the_user_names_is_taken_by_per_layer_code(checkpoints) -> None:
    folder = checkpoints[0]["llama per-layer"]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_a_loaded_per_layer_model_saves_itself_again_with_its_code(checkpoints, tmp_path) -> None:
    made, answers, _ = checkpoints
    load_model(made["qwen2 per-layer"]).save_pretrained(tmp_path)
    assert (tmp_path / "modeling.py").exists()
    assert load_model(tmp_path)(token_ids()).logits.equal(answers["qwen2 per-layer"])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_ratio_0_stores_the_dense_model(checkpoints, tmp_path, model_type) -> None:
    tiny_model(model_type, bias=True).save_pretrained(tmp_path)
    folder = checkpoints[0][f"{model_type} whole"]
    for name in ("model.safetensors", "generation_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    ours, dense = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    assert ours == dense | {name: ours[name] for name in ours.keys() - dense.keys()}
    assert ours.keys() - dense.keys() <= {"torch_dtype", *ROPE_FIELDS}  # what transformers 4 reads


@pytest.mark.parametrize("model_type", FAMILIES)
def test_cutting_and_saving_again_writes_the_same_weights(
    checkpoints, tmp_path, model_type
) -> None:
    again, _ = save(tiny_model(model_type, bias=True), UNIFORM, tmp_path / "again")
    first = checkpoints[0][f"{model_type} uniform"]
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_only_per_layer_checkpoints_carry_code(checkpoints) -> None:
    for name, folder in checkpoints[0].items():
        assert (folder / "modeling.py").exists() == ("per-layer" in name)
        assert ("auto_map" in json.loads((folder / "config.json").read_text())) == (
            "per-layer" in name
        )


def test_the_name_of_a_folder_says_nothing_about_its_family(tmp_path) -> None:
    misleading = tmp_path / "dolphin-phi-llama3"
    tiny_model("opt", bias=True).save_pretrained(misleading)
    dense = load_model(misleading)
    assert dense.config.model_type == "opt"
    out, answer = save(dense, UNIFORM, tmp_path / "dolphin-phi-llama3-cut")
    model = load_model(out)
    assert model.config.ffn_dim == UNIFORM[0]
    assert model(token_ids()).logits.equal(answer)


@pytest.mark.slow
def test_the_real_model_makes_the_round_trip(smollm2, tmp_path) -> None:
    dense, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    widths = [1080, 1536, *[1024] * 28]
    keep = random_keep(widths, d_ff=1536)
    narrow = narrowed(dense, keep)
    story = provenance(dense, narrow)
    out = save_pruned(narrow, tmp_path / "narrow", keep, story, tokenizer=tokenizer)
    text = "A model that was cut still reads."
    assert load_tokenizer(out)(text)["input_ids"] == tokenizer(text)["input_ids"]
    again = save_pruned(narrow, tmp_path / "again", keep, story, tokenizer=tokenizer)
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
