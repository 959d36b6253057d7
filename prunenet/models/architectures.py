"""Where the feed-forward network (FFN) of each model family lives: one frozen row per
`config.model_type`.

Rows by hand are here; types without one share the row of a type with the same class, or are
discovered (`prunenet.models.discovery`). Dispatch is on the class and `config.model_type` alone:
the name of a folder or of a hub repository never matters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prunenet.models.groups import Part, Pattern, Role

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class UnsupportedArchitecture(ValueError):
    """The channels of a model type cannot be cut; the message says why."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names that locate the FFN of a `*ForCausalLM` model.

    Attributes:
        model_type: `config.model_type`.
        layers: dotted path of the decoder layers' `ModuleList`, from the causal LM.
        up: path in a layer of the linear d_model -> d_ff (of the fused gate and up linear if
            `fused`).
        down: path in a layer of the linear d_ff -> d_model.
        gate: path in a layer of the gate linear; None when the FFN has no gate or `fused` holds it.
        fused: `up` holds the gate's rows first, then the up rows: (2 d_ff, d_model).
        width: config field that holds d_ff.
        norms: candidate paths in a layer of the norm in front of the FFN, first match wins; () when
            the residual stream enters the FFN as it is.
        attention_out: path in a layer of the linear by which attention writes to the residual
            stream.
        norm_offset: what the norm adds to its weight before scaling (1 for Gemma's RMSNorm).
        rotates: whether rotating the residual stream leaves the model's function as it is: RMSNorms
            in front of attention, FFN and LM head and none behind them, attention and FFN one after
            the other, modules named as in Llama.
        attention_in: paths in a layer of the query, key and value linears, where heads can be cut:
            plain linears whose rows are head after head, read by code that asks them and not the
            configuration how many there are, with no norm over all heads together. () where that is
            not so.
        found: patterns of channel groups where `up`, `gate` and `down` do not say it: experts,
            layers without an FFN, several FFNs in a layer; `prunenet.models.discovery` finds them.
        activation: name of the FFN's activation function in transformers; None: see
            `prunenet.models.layers.activation`.
        multiple: `width` holds a multiple of d_ff, so that it cannot state one layer's alone.
    """

    model_type: str
    layers: str = "model.layers"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate: str | None = "mlp.gate_proj"
    fused: bool = False
    width: str = "intermediate_size"
    norms: tuple[str, ...] = ("post_attention_layernorm",)
    attention_out: str = "self_attn.o_proj"
    norm_offset: float = 0.0
    rotates: bool = False
    attention_in: tuple[str, ...] = ()
    found: tuple[Pattern, ...] = ()
    activation: str | None = None
    multiple: bool = False

    @property
    def input_linears(self) -> tuple[str, ...]:
        """Paths of the linears whose output is FFN channels."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def gated(self) -> bool:
        """Whether every FFN has a gate, and none is an expert."""
        return all(
            not pattern.experts
            and any(part.role in ("gate", "gate_up") for part in pattern.parts)
            and not any(".experts." in part.tensor for part in pattern.parts)
            for pattern in self.patterns
        )

    @property
    def per_layer(self) -> bool:
        """Whether each layer may get a width of its own, by `prunenet.models.modeling`."""
        return bool(self.up)

    def spelled(self) -> Architecture:
        """This row with `up`, `gate`, `down` and `fused` where its patterns are one of plain FFNs,
        in each layer one; else itself.
        """
        first, *more = self.found
        roles = {part.role: part for part in first.matrices}
        names = [_path_in(self.layers, part.tensor) for part in first.matrices]
        several = more or first.experts or None in names or len(roles) < len(names)
        nested = "." in self.width.removeprefix("text_config.")
        if several or nested or self.multiple or first.companions or first.unless:
            return self
        paths = dict(zip(roles, map(str, names), strict=True))
        if "gate_up" in roles and roles["gate_up"].layout == "concat":
            return replace(self, up=paths["gate_up"], down=paths["down"], fused=True)
        if "up" not in roles:
            return self
        return replace(self, up=paths["up"], gate=paths.get("gate"), down=paths["down"])

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Where the channel groups are."""
        if self.found:
            return self.found
        role: Role = "gate_up" if self.fused else "up"
        inputs = [(self.up, role)]
        if self.gate is not None:
            inputs = [(self.gate, "gate"), *inputs]
        parts = [
            Part(f"{self.layers}.*.{path}.{name}", role, 0, "concat" if self.fused else "plain")
            for path, role in inputs
            for name in ("weight", "bias")
        ]
        down = Part(f"{self.layers}.*.{self.down}.weight", "down", 1)
        return (Pattern((*parts, down), self.width),)


def _path_in(layers: str, tensor: str) -> str | None:
    """Path in a layer of the linear that a weight is of; None where it is none of each layer."""
    start = f"{layers}.*."
    path = tensor.removeprefix(start).removesuffix(".weight")
    return path if tensor == f"{start}{path}.weight" and "*" not in path else None


_BEFORE_FFN = ("pre_feedforward_layernorm",)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ROWS = (
    Architecture("llama", attention_in=_QKV, rotates=True),
    Architecture("mistral", attention_in=_QKV, rotates=True),
    Architecture("qwen2", attention_in=_QKV, rotates=True),
    Architecture("qwen3", attention_in=_QKV, rotates=True),
    Architecture("granite", attention_in=_QKV, rotates=True),
    Architecture("smollm3", attention_in=_QKV, rotates=True),
    Architecture("stablelm", norms=("post_attention_layernorm", "input_layernorm")),
    Architecture("olmo2", norms=()),
    Architecture("gemma", norm_offset=1.0, attention_in=_QKV, rotates=True),
    Architecture("gemma2", norms=_BEFORE_FFN, norm_offset=1.0, attention_in=_QKV),
    Architecture("gemma3_text", norms=_BEFORE_FFN, norm_offset=1.0, attention_in=_QKV),
    Architecture("phi3", up="mlp.gate_up_proj", gate=None, fused=True, rotates=True),
    Architecture(
        "phi",
        up="mlp.fc1",
        down="mlp.fc2",
        gate=None,
        norms=("input_layernorm",),
        attention_out="self_attn.dense",
    ),
    Architecture(
        "opt",
        layers="model.decoder.layers",
        up="fc1",
        down="fc2",
        gate=None,
        width="ffn_dim",
        norms=("final_layer_norm",),
        attention_out="self_attn.out_proj",
    ),
    Architecture(
        "gpt_neox",
        layers="gpt_neox.layers",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        gate=None,
        attention_out="attention.dense",
    ),
    Architecture(
        "falcon",
        layers="transformer.h",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        gate=None,
        width="ffn_hidden_size",
        norms=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
        attention_out="self_attention.dense",
    ),
)
ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}


def architecture_for(config: PretrainedConfig, kind: type | None = None) -> Architecture:
    """The row for a model's configuration: by hand, of the same class, or discovered.

    Args:
        config: any transformers configuration; `model_type` and `architectures` are read.
        kind: class of the model, where there is one.

    Raises:
        UnsupportedArchitecture: no such type, or why its channels cannot be cut.
    """
    model_type = getattr(config, "model_type", None)
    if isinstance(model_type, str) and (row := ARCHITECTURES.get(model_type)) is not None:
        return row
    # A discovery builds models; rows by hand do without it.
    from prunenet.models.known import class_names, class_of, discovered

    named = getattr(config, "architectures", None)
    stock = getattr(kind, "stock_class", kind)
    found = stock or (class_of(model_type, named) if isinstance(model_type, str) else None)
    if found is None or not isinstance(model_type, str):
        raise UnsupportedArchitecture(
            f"model type {model_type!r} is not supported: transformers has no language model of"
            f" it; rows by hand: {', '.join(sorted(ARCHITECTURES))}; `prunenet models` lists others"
        )
    for row in ARCHITECTURES.values():
        if class_names(row.model_type)[:1] == (found.__name__,):
            return row
    known = discovered(model_type, found)
    if known.architecture is None:
        raise UnsupportedArchitecture(
            f"model type {model_type!r} ({found.__name__}) is not supported: {known.reason}"
        )
    return known.architecture.spelled()


def check_heads(architecture: Architecture) -> None:
    """Raises UnsupportedArchitecture where the attention heads of a family cannot be cut."""
    if not architecture.attention_in:
        known = ", ".join(sorted(row.model_type for row in _ROWS if row.attention_in))
        raise UnsupportedArchitecture(
            f"attention heads of model type {architecture.model_type!r} cannot be cut, only those"
            f" of {known}; cut FFN channels alone"
        )
