"""States a model in the words of llama.cpp: architecture, hyperparameters, tensors.

A model whose layers are alike is one of its own architecture. One whose layers differ is a `deci`
(Nemotron-NAS) or an `openelm`, whose loaders read widths and heads of each layer from arrays; that
of `llama` prints such arrays, and then refuses the tensors.

`deci` and `llama` rotate pairs of rows that lie side by side, transformers rows that lie half a
head apart: there the rows of queries and keys, and their biases, change places.

Source: docs/methods.md, section 20; llama.cpp of October 2026.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.exports import gguf_gemma
from prunenet.checkpoints.exports.llama_cpp import CLOSE, ROUGH
from prunenet.models import modeling
from prunenet.models.anatomy import Anatomy
from prunenet.models.heads import GROUPS, HEAD_DIM, QUERY_HEADS, attentions, group_counts
from prunenet.runtime.files import CheckpointError

Value = bool | int | float | str | list[int] | list[float] | list[str]


@dataclass(frozen=True, slots=True)
class Form:
    """An architecture of llama.cpp.

    Attributes:
        name: as `general.architecture` says it.
        interleaved: whether the rows of a rotated pair lie side by side.
        scaled: whether it reads frequencies scaled by `rope_freqs.weight`.
        fused: whether queries, keys and values are one tensor, which has no bias.
        tied: whether the LM head can only be the embedding.
        raised: whether its norms multiply by what the file says, and the model's by 1 more.
        local: of how many layers all but the last see a window of tokens; 0 where there is none.
        activations: names of what its FFN computes.
        close: how far log-probabilities in float32 may be from the model's.
    """

    name: str
    interleaved: bool = False
    scaled: bool = False
    fused: bool = False
    tied: bool = False
    raised: bool = False
    local: int = 0
    activations: tuple[str, ...] = ("silu", "swish")
    close: float = CLOSE


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A tensor of the file.

    Attributes:
        name: in the words of llama.cpp.
        sources: tensors whose rows follow one another.
        heads: of each source, how many heads' rows change places; 0 where they stay.
        plus: added to every entry.
    """

    name: str
    sources: tuple[Tensor, ...]
    heads: tuple[int, ...]
    plus: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(source.shape[0] for source in self.sources)
        return (rows, *self.sources[0].shape[1:])

    def read(self) -> Tensor:
        """The tensor, in the dtype of the model."""
        turned = [
            _interleaved(source, heads) if heads else source
            for source, heads in zip(self.sources, self.heads, strict=True)
        ]
        return torch.cat(turned) + self.plus


_GELU = ("gelu_pytorch_tanh",)
_LLAMA = Form("llama", interleaved=True, scaled=True)
_OWN = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Form("qwen2"),
    "qwen3": Form("qwen3"),
    "granite": Form("granite", interleaved=True, scaled=True),
    "smollm3": Form("smollm3", interleaved=True, scaled=True),
    "phi3": Form("phi3"),
    "gemma": Form("gemma", tied=True, raised=True, activations=_GELU, close=ROUGH),
    "gemma2": Form("gemma2", tied=True, raised=True, local=2, activations=_GELU, close=ROUGH),
    "gemma3_text": Form("gemma3", raised=True, local=6, activations=_GELU, close=ROUGH),
}
_DECI = Form("deci", interleaved=True, scaled=True)
_UNEVEN = {
    "llama": _DECI,
    "mistral": _DECI,
    "qwen2": _DECI,
    "qwen3": Form("openelm", fused=True, tied=True),
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUT = "self_attn.o_proj"
_AROUND = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Norms of layers that have one behind attention and one behind the FFN."""
_GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_STATIC = ("default", "linear", "llama3")
"""Kinds of rotary embeddings whose frequencies are the same for texts of every length."""


def form_of(model: PreTrainedModel) -> Form:
    """Returns the architecture of llama.cpp that computes what a model computes.

    Raises:
        CheckpointError: there is none, with the reason.
    """
    config: Any = model.config
    if hasattr(config, "residual_widths"):
        raise CheckpointError(
            "a sliced residual stream cannot be stated in GGUF: no architecture of llama.cpp has"
            " shortcuts with weights"
        )
    uneven = modeling.is_per_layer(model)
    table = _UNEVEN if uneven else _OWN
    if config.model_type not in table:
        raise CheckpointError(_no_form(config.model_type, uneven))
    form = table[config.model_type]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in form.activations:
        raise CheckpointError(
            f"{form.name} of llama.cpp computes {form.activations[0]}, and this model's activation"
            f" is {activation!r}; GGUF cannot state it"
        )
    if form.raised:
        gguf_gemma.check_layers(config, form.local)
    if form.tied and not config.tie_word_embeddings:
        raise CheckpointError(
            f"{form.name}, the one architecture of llama.cpp for a {config.model_type} whose layers"
            " differ, has no LM head of its own, and this model has one; cut with --widths uniform"
        )
    if form.fused and hasattr(config, modeling.HEADS) and 0 in group_counts(model):
        raise CheckpointError(
            f"{form.name} of llama.cpp has attention in every layer, and this model has not; fill"
            " it up (--pad)"
        )
    if form.fused and getattr(config, "attention_bias", False):
        raise CheckpointError(
            f"{form.name} of llama.cpp has no biases in attention, and this model has; cut with"
            " --widths uniform"
        )
    rotated = getattr(config, "no_rope_layers", None) or []
    if any(bool(flag) != bool((layer + 1) % 4) for layer, flag in enumerate(rotated)):
        raise CheckpointError(
            "llama.cpp rotates all but every fourth layer of a smollm3, and this model others:"
            f" {[layer for layer, flag in enumerate(rotated) if flag]}"
        )
    _check_rotation(config, form)
    return form


def hyperparameters(model: PreTrainedModel, form: Form) -> dict[str, Value]:
    """Returns what the file says of a model, by keys without the architecture's name."""
    config: Any = model.config
    widths, head_dim = Anatomy.of(model).widths, _head_dim(config)
    queries, groups = _heads(model, head_dim)
    stated: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": _context(config, form),
        "embedding_length": config.hidden_size,
        "block_count": len(widths),
        "feed_forward_length": _count(widths),
        "attention.head_count": _count(queries),
        "attention.head_count_kv": _count(groups),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(_rotation(config)["rope_theta"]),
    }
    if form.local:
        stated |= gguf_gemma.hyperparameters(config)
    if form.name == "granite":
        stated |= {key: float(getattr(config, field)) for field, key in _GRANITE.items()}
    return stated


def parts(model: PreTrainedModel, form: Form) -> list[Part]:
    """Returns the tensors of the file.

    Raises:
        CheckpointError: the model has a tensor that the architecture has not.
    """
    config: Any = model.config
    left = {name: p.detach() for name, p in model.named_parameters()}
    made = [
        Part(name, (left.pop(own),), (0,), _plus(name, form))
        for own, name in _WHOLE.items()
        if own in left
    ]
    head_dim = _head_dim(config)
    for layer in Anatomy.of(model).layers:
        own = {
            name.removeprefix(f"{layer.path}."): left.pop(name)
            for name in list(left)
            if name.startswith(f"{layer.path}.")
        }
        made += _layer_parts(layer.index, own, form, head_dim)
        left |= {f"{layer.path}.{name}": tensor for name, tensor in own.items()}
    if left:
        raise CheckpointError(
            f"{form.name} of llama.cpp has no place for {min(left)}; GGUF cannot state this model"
        )
    if form.scaled and (factors := _frequency_factors(model, head_dim)) is not None:
        made.append(Part("rope_freqs.weight", (factors,), (0,)))
    return made


def _layer_parts(index: int, own: dict[str, Tensor], form: Form, head_dim: int) -> Iterable[Part]:
    """The tensors of a layer, taken out of `own`."""
    made = []
    if not own[f"{_OUT}.weight"].numel():
        _drop_attention(index, own)
    elif form.fused:
        three = [own.pop(f"self_attn.{name}_proj.weight") for name in "qkv"]
        made.append(Part(f"blk.{index}.attn_qkv.weight", tuple(three), (0, 0, 0)))
    for name, theirs in (_LAYER | _AROUND if form.local else _LAYER).items():
        turned = form.interleaved and theirs in ("attn_q", "attn_k")
        for kind in ("weight", "bias"):
            if (tensor := own.pop(f"{name}.{kind}", None)) is not None:
                heads = tensor.shape[0] // head_dim if turned else 0
                full = f"blk.{index}.{theirs}.{kind}"
                made.append(Part(full, (tensor,), (heads,), _plus(full, form)))
    return made


def _drop_attention(index: int, own: dict[str, Tensor]) -> None:
    """Takes the tensors of attention without heads out of `own`: llama.cpp skips it."""
    bias = own.get(f"{_OUT}.bias")
    if bias is not None and bool(bias.any()):
        raise CheckpointError(
            f"attention of layer {index} has no heads and still writes its bias, which llama.cpp"
            " skips with it; fill it up (--pad)"
        )
    for name in [name for name in own if name.startswith(("input_layernorm.", "self_attn."))]:
        del own[name]


def _plus(name: str, form: Form) -> float:
    return 1.0 if form.raised and name.endswith("norm.weight") else 0.0


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Moves the rows of rotated pairs side by side, in each head.

    Args:
        rows: (heads * head_dim, ...).
        heads: how many.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _frequency_factors(model: Any, head_dim: int) -> Tensor | None:
    """(head_dim / 2,), by what llama.cpp divides the unscaled frequencies; None where by 1."""
    theta = model.config.rope_parameters["rope_theta"]
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    factors = theta**-steps / model.model.rotary_emb.inv_freq.double().cpu()
    return None if torch.allclose(factors, torch.ones(1, dtype=torch.float64)) else factors.float()


def _check_rotation(config: Any, form: Form) -> None:
    rope = _rotation(config)
    kind = rope.get("rope_type", "default")
    allowed = _STATIC if form.scaled else _STATIC[:2] if form.name == "gemma3" else _STATIC[:1]
    if kind not in allowed:
        raise CheckpointError(
            f"rotary embeddings of kind {kind!r} are not written to GGUF, only"
            f" {' and '.join(allowed)} for {form.name}; take llama.cpp's own converter"
            " (convert_hf_to_gguf.py) for a checkpoint cut with --widths uniform"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{form.name} of llama.cpp rotates whole heads, and this model parts")


def _no_form(model_type: str, uneven: bool) -> str:
    known = ", ".join(sorted(_UNEVEN if uneven else _OWN))
    if not uneven:
        return (
            f"models of type {model_type!r} are not written to GGUF, only {known}; every layer is"
            " alike, so llama.cpp's own converter (convert_hf_to_gguf.py) reads the folder"
        )
    return (
        f"no architecture of llama.cpp computes a {model_type!r} whose layers differ, only {known};"
        " fill it up (--pad) or cut with --widths uniform"
    )


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, HEAD_DIM, None) or config.hidden_size // getattr(config, QUERY_HEADS)
    )


def _heads(model: PreTrainedModel, head_dim: int) -> tuple[list[int], list[int]]:
    """Query heads and key-value heads of each layer."""
    anatomy = Anatomy.of(model)
    if not anatomy.architecture.attention_in:  # heads of the family are never cut
        config, layers = model.config, len(anatomy.layers)
        return [getattr(config, QUERY_HEADS)] * layers, [getattr(config, GROUPS)] * layers
    found = attentions(model)
    return [layer.query.shape[0] // head_dim for layer in found], [layer.groups for layer in found]


def _rotation(config: Any) -> Mapping[str, Any]:
    """How layers that see the whole text rotate."""
    rope: Mapping[str, Any] = config.rope_parameters
    whole: Mapping[str, Any] = rope.get("full_attention", rope)
    return whole


def _context(config: Any, form: Form) -> int:
    """Tokens for which attention is right: where llama.cpp has no window, those that one holds."""
    window = None if form.local else getattr(config, "sliding_window", None)
    length = int(config.max_position_embeddings)
    return length if window is None else min(length, int(window))


def _count(numbers: Sequence[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)
