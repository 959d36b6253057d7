"""Weights in packed forms: dequantised where transformers can, refused where it cannot."""

import json

import pytest
import torch
from families import provenance, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.save import save_pruned
from prunenet.checkpoints.sources import stored_as
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
