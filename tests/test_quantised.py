"""Weights in packed forms: dequantised where transformers can, refused where it cannot."""

import json

import pytest
import torch
from families import LAYERS, provenance, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from prunenet.checkpoints.exports import llama_cpp
from prunenet.checkpoints.exports.gguf import export_gguf
from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.save import save_pruned
from prunenet.checkpoints.sources import stored_as
from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.layers import ffn_widths
from prunenet.models.surgery import narrowed

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def mxfp4(tmp_path):
    """A tiny gpt-oss in the published form: blocks of 32 four-bit numbers and their scales."""
    config = GptOssConfig(**SIZES, intermediate_size=64, num_local_experts=4, dtype="bfloat16")
    torch.manual_seed(0)
    GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    path, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, outside = tensors.pop(name).shape
        shape = (experts, outside, inside // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    edit(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    return tmp_path


@pytest.fixture
def fp8(tmp_path):
    """A tiny Qwen3-MoE whose experts are eight-bit numbers with one scale a block."""
    config = Qwen3MoeConfig(
        **SIZES, intermediate_size=64, moe_intermediate_size=32, num_experts=4, dtype="bfloat16"
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    path, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    packed = [n for n in tensors if n.endswith("proj.weight")]
    for name in packed:
        weight = tensors[name].float()
        blocks = [-(-size // 32) for size in weight.shape]
        tensors[name] = (weight / 0.01).clamp(-400, 400).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full(blocks, 0.01)
    save_file(tensors, path, {"format": "pt"})
    edit(
        tmp_path,
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [32, 32],
        },
    )
    return tmp_path


@pytest.mark.parametrize("form", ["mxfp4", "fp8"])
def test_a_packed_model_is_dequantised_cut_saved_and_reloaded_equal(
    form, request, tmp_path_factory
):
    source = request.getfixturevalue(form)
    assert stored_as(source) == form
    dense = load_model(source)
    widths = ffn_widths(dense)
    keep = [torch.arange(width) % 4 != 1 for width in widths]
    narrow = narrowed(dense, keep)
    made = provenance(dense, narrow)
    out = tmp_path_factory.mktemp("out") / "narrow"
    save_pruned(narrow, out, keep, made)
    again = load_model(out)
    assert stored_as(out) is None
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


class Packed(nn.Parameter):
    """As bitsandbytes has them: a Parameter by inheritance, whose numbers are bytes."""


def test_a_model_of_packed_parameters_in_memory_is_refused() -> None:
    model = tiny_model("llama")
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = Packed(linear.weight.detach(), requires_grad=False)
    with pytest.raises(UnsupportedArchitecture, match="load the model unquantised"):
        narrowed(model, [torch.ones(48, dtype=torch.bool)] * 3)


def test_a_model_of_integers_in_memory_is_refused() -> None:
    model = tiny_model("llama")
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedArchitecture, match="load the model unquantised"):
        narrowed(model, [torch.ones(48, dtype=torch.bool)] * 3)


class QuantLinear(nn.Module):
    """As GPTQ and AWQ have them: no weight at all, but packed integers in a buffer."""

    def __init__(self, linear):
        super().__init__()
        shape = linear.in_features // 8, linear.out_features
        self.register_buffer("qweight", torch.zeros(shape, dtype=torch.int32))


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_a_model_of_packed_buffers_in_memory_is_refused(name, layers) -> None:
    model = tiny_model("llama")
    for layer in layers:
        mlp = model.model.layers[layer].mlp
        setattr(mlp, name, QuantLinear(getattr(mlp, name)))
    with pytest.raises(
        UnsupportedArchitecture, match="QuantLinear, not a plain linear layer; load"
    ):
        Anatomy.of(model)


FORMS = {
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, 8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_packed_forms_on_disk_are_refused_before_weights_are_read(form, tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    edit(tmp_path, quantization_config=form)
    with pytest.raises(ValueError, match=r"is quantised, .*; give the original model"):
        load_model(tmp_path)


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A GGUF file of a tiny model, and the model that was written into it."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)  # nothing is compared there
    from test_gguf import saved  # which is skipped without that package

    folder, model = saved(tmp_path, widths=[32] * LAYERS)
    return export_gguf(folder, tmp_path / "gguf", "f32").path, model


@pytest.mark.parametrize("given", ["file", "folder", "transformers"])
def test_a_gguf_is_cut_saved_and_reloaded_equal(given, gguf, tmp_path) -> None:
    path, model = gguf
    if given == "transformers":  # as a user of Python has it in memory
        dense = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    else:
        source = path if given == "file" else path.parent
        assert stored_as(source) == "GGUF"
        dense = load_model(source)
    own = dense.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(own[name], tensor.to(own[name].dtype)), name
    keep = [torch.arange(width) % 4 != 1 for width in ffn_widths(dense)]
    narrow = narrowed(dense, keep)
    out = save_pruned(narrow, tmp_path / "out", keep, provenance(dense, narrow))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    again = load_model(out).state_dict()
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(again[name], tensor), name
