"""The Nemotron-NAS form says every width in the words that engines read."""

import json

import pytest
import torch
from families import LAYERS, random_keep, tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig

from prunenet.checkpoints.exports.nemotron import export_nemotron
from prunenet.models.surgery import narrowed
from prunenet.runtime.files import CheckpointError


def saved(folder, model_type="llama", widths=(16, 40, 24), d_ff=48, groups=None):
    dense = tiny_model(model_type)
    if d_ff != 48:
        dense.config.intermediate_size = d_ff
        dense = type(dense)(dense.config)
    narrow = narrowed(dense, random_keep(list(widths), d_ff), groups)
    narrow.save_pretrained(folder)
    return folder, narrow


def test_blocks_state_heads_and_widths_and_the_weights_are_the_same(tmp_path) -> None:
    folder, narrow = saved(tmp_path / "cut")
    assert not export_nemotron(folder, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.architectures == ["DeciLMForCausalLM"]
    assert [block.ffn.intermediate_size for block in config.block_configs] == [16, 40, 24]
    assert {block.attention.n_heads_in_group for block in config.block_configs} == {2}
    assert not any(hasattr(block.ffn, "ffn_mult") for block in config.block_configs)
    assert not config.block_configs[0].attention.no_op
    stored = load_file(tmp_path / "out" / "model.safetensors")
    own = {k: v for k, v in narrow.state_dict().items() if k in stored}
    assert own.keys() == stored.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in own.items())
    assert [path.name for path in (tmp_path / "out").glob("*.py")] == [
        "configuration_nemotron_nas.py"
    ]


def test_widths_of_256_are_stated_so_that_older_readers_compute_them(tmp_path) -> None:
    widths = [256, 768, 512]
    folder, _ = saved(tmp_path / "cut", widths=widths, d_ff=1024)
    assert export_nemotron(folder, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    for width, block in zip(widths, fields["block_configs"], strict=True):
        below = int(2 * block["ffn"]["ffn_mult"] * fields["hidden_size"] / 3)
        assert below + -below % 256 == width


@pytest.mark.long
def test_a_configuration_saved_again_says_the_same(tmp_path) -> None:
    folder, _ = saved(tmp_path / "cut")
    export_nemotron(folder, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    config.save_pretrained(tmp_path / "again")
    blocks = [
        json.loads((tmp_path / name / "config.json").read_text())["block_configs"]
        for name in ("out", "again")
    ]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize(
    ("model_type", "groups", "reason"),
    [
        ("qwen2", None, "only llama and mistral can be stated so"),
        ("llama", [[True, False], [True, True], [True, True]], "as many query heads in every"),
        ("mistral", None, "has no sliding window, and this model one of 8"),
    ],
)
def test_what_the_form_cannot_state_is_refused(tmp_path, model_type, groups, reason) -> None:
    masks = None if groups is None else [torch.tensor(mask) for mask in groups]
    folder, _ = saved(tmp_path / "cut", model_type, [16] * LAYERS, groups=masks)
    with pytest.raises(CheckpointError, match=reason):
        export_nemotron(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
