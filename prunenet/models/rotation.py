"""Rotating the residual stream of a language model, and slicing off what it hardly uses. Pure
linear algebra on weights.

Source: Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
ICLR 2024, arXiv 2401.15024, sections 3.1 to 3.3; docs/methods.md, section 6. An RMSNorm without
scale commutes with a rotation Q of its input, norm(x Q) = norm(x) Q. So once the scales are folded
into the next matrices, the stream may have another orthonormal basis at each of its 2 L + 1 points
(behind the embedding, then behind attention and behind the FFN of each layer): what reads it
becomes W Q, what writes to it Q^T W, and a residual connection from one point to the next
Q_before^T Q_behind. Keeping only the first columns of each Q slices the model.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from prunenet.models import modeling, sliced_modeling
from prunenet.models.architectures import ARCHITECTURES, UnsupportedArchitecture, architecture_for
from prunenet.models.layers import check_whole, decoder_layers
from prunenet.runtime.floats import in_float64

DAMPING = 0.01
"""Of the mean diagonal, added to a covariance's diagonal. It moves eigenvalues and no
eigenvector.
"""

# Attention and FFN of a layer: the module, the linear by which it writes, the norm in front, its
# shortcut in the sliced model.
_BLOCKS = (
    ("self_attn", "o_proj", "input_layernorm", "attention_shortcut"),
    ("mlp", "down_proj", "post_attention_layernorm", "ffn_shortcut"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Attention or the FFN of one layer: it reads the residual stream at one point and writes to it
    at the next.

    Attributes:
        linears: (dense, sliced) pairs of the linears that read the stream.
        output: the pair that writes to it.
        scale: (d_model,) of the dense model's norm in front.
        shortcut: what the sliced model's residual connection passes through.
        multiplier: of what is written, folded into the output (Granite's; 1 elsewhere).
    """

    linears: tuple[tuple[nn.Linear, nn.Linear], ...]
    output: tuple[nn.Linear, nn.Linear]
    scale: Float[Tensor, " d_model"]
    shortcut: nn.Linear
    multiplier: float = 1.0

    def read(self, basis: Float64[Tensor, "d_model width"]) -> None:
        """Sets the linears that read: W diag(scale) Q."""
        for dense, sliced in self.linears:
            sliced.weight = _like((_exact(dense.weight) * _exact(self.scale)) @ basis, dense.weight)
            sliced.in_features = basis.shape[1]

    def write(
        self,
        before: Float64[Tensor, "d_model width"],
        behind: Float64[Tensor, "d_model new"] | None,
    ) -> None:
        """Sets the output, Q^T W and Q^T b, and the shortcut, x -> x Q_before^T Q.

        Args:
            before: the basis in which the stream is read.
            behind: the basis in which it is written; None: that of the dense model, all of it.
        """
        dense, sliced = self.output
        weight, shortcut = self.multiplier * _exact(dense.weight), before
        bias = None if dense.bias is None else self.multiplier * _exact(dense.bias)
        if behind is not None:
            weight, shortcut = behind.T @ weight, behind.T @ before
            bias = None if bias is None else behind.T @ bias
        sliced.weight, self.shortcut.weight = (
            _like(weight, dense.weight),
            _like(shortcut, dense.weight),
        )
        sliced.bias = None if bias is None else _like(bias, dense.weight)
        sliced.out_features, self.shortcut.out_features = len(weight), len(shortcut)


def check_rotatable(model: PreTrainedModel) -> None:
    """Raises UnsupportedArchitecture unless the residual stream of this model can be rotated
    (`Architecture.rotates`).
    """
    check_whole(model)
    architecture = architecture_for(model.config)
    if not architecture.rotates:
        able = ", ".join(sorted(row.model_type for row in ARCHITECTURES.values() if row.rotates))
        raise UnsupportedArchitecture(
            f"model type {architecture.model_type!r} cannot be sliced: rotating its residual stream"
            " needs RMSNorms in front of attention, FFN and LM head, none behind them, and no"
            f" parallel layers; types that have them: {able}"
        )
    if hasattr(model.config, modeling.FFN) or hasattr(model.config, modeling.HEADS):
        raise UnsupportedArchitecture(
            f"a {type(model).__name__} has layers of different shapes and cannot be sliced; give a"
            " model whose layers are alike"
        )


def covariance(parts: Iterable[Float[Tensor, "... d_model"]]) -> Float64[Tensor, "d_model d_model"]:
    """X^T X + 0.01 mean(diag(X^T X)) I in float64, X all rows of all parts (paper section 3.3; the
    damping is the code's).
    """
    total: Tensor | None = None
    for part in parts:
        rows = _exact(part).flatten(0, -2)
        total = rows.T @ rows if total is None else total.addmm_(rows.T, rows)
    assert total is not None
    total.diagonal().add_(DAMPING * total.diagonal().mean())
    return total


def eigenbasis(second: Float64[Tensor, "d_model d_model"]) -> Float64[Tensor, "d_model d_model"]:
    """The eigenvectors of a symmetric matrix as columns, by falling eigenvalue.

    Raises:
        ValueError: the matrix holds numbers that are not finite.
    """
    if not bool(torch.isfinite(second).all()):
        raise ValueError(
            "hidden states are not finite; the model's weights are damaged, or its dtype overflows:"
            " load float32"
        )
    ascending: Tensor = torch.linalg.eigh(second).eigenvectors
    return ascending.flip(1)


def residual_widths(
    layers: int, d_model: int, width: int, *, slice_head: bool = False
) -> list[int]:
    """`width` at each of the 2 `layers` + 1 points; the last, in front of the LM head, stays whole
    unless `slice_head`.
    """
    return [width] * (2 * layers) + [width if slice_head else d_model]


def parameters_at(model: PreTrainedModel, widths: Sequence[int]) -> int:
    """Parameters that the sliced model has: sum of numel, shortcuts and the LM head included, which
    is never tied.
    """
    d_model, source = model.config.hidden_size, cast(Any, model)
    total = (
        len(source.model.embed_tokens.weight) * widths[0] + len(source.lm_head.weight) * widths[-1]
    )
    for layer, *points in zip(
        decoder_layers(model), widths[:-1:2], widths[1::2], widths[2::2], strict=True
    ):
        # norms lose their scales
        total += sum(parameter.numel() for parameter in layer.parameters()) - 2 * d_model
        for (name, output, *_), before, behind in zip(_BLOCKS, points, points[1:], strict=False):
            total += before * behind
            for child, linear in _linears(layer.get_submodule(name)).items():
                if child == output:
                    total -= (d_model - behind) * (linear.in_features + (linear.bias is not None))
                else:
                    total -= (d_model - before) * linear.out_features
    return int(total)


def width_for(
    model: PreTrainedModel, parameters: int, *, round_to: int = 8, slice_head: bool = False
) -> int:
    """The widest slice, a multiple of `round_to`, with no more parameters than that.

    Raises:
        ValueError: even the narrowest has more.
    """
    d_model, layers = model.config.hidden_size, len(decoder_layers(model))

    def parameters_of(width: int) -> int:
        return parameters_at(model, residual_widths(layers, d_model, width, slice_head=slice_head))

    choices = range(round_to, d_model + 1, round_to)
    place = bisect_right(choices, parameters, key=parameters_of)
    if place == 0:
        least = (
            f"{parameters_of(choices[0]):,} at width {round_to}"
            if choices
            else f"more than one multiple of {round_to}"
        )
        raise ValueError(
            f"no slice of a residual stream of {d_model} fits {parameters:,} parameters: the"
            f" smallest takes {least}, with an LM head of its own and shortcuts; remove less"
        )
    return choices[place - 1]


def unrotated(model: PreTrainedModel, widths: Sequence[int]) -> PreTrainedModel:
    """A model of the sliced class and of these widths, its weights still to be set; the given model
    stays as it is.

    Args:
        model: one that passes `check_rotatable`.
        widths: of the residual stream at each point, each in [1, d_model].

    Raises:
        ValueError: not one width for each point, or one out of range.
    """
    d_model, points = model.config.hidden_size, 2 * len(decoder_layers(model)) + 1
    if len(widths) != points or not all(1 <= width <= d_model for width in widths):
        raise ValueError(
            f"a residual stream has {points} widths in [1, {d_model}] here, got {list(widths)}"
        )
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    # every module of the copy refers to this one
    memo[id(model.config)] = config = _config(model, widths)
    sliced: Any = copy.deepcopy(model, memo)
    assert sliced.config is config
    sliced_modeling.slice_modules(sliced)
    sliced.__class__ = _sliced_class(model)
    sliced.all_tied_weights_keys = sliced.get_expanded_tied_weights_keys(all_submodels=True)
    found: PreTrainedModel = sliced
    return found


def blocks_of(model: PreTrainedModel, sliced: PreTrainedModel) -> Iterator[tuple[Block, Block]]:
    """(attention, FFN) of each layer of a dense model and of its `unrotated` copy."""
    for dense, copied in zip(decoder_layers(model), decoder_layers(sliced), strict=True):
        attention, ffn = (_block(model, dense, copied, *names) for names in _BLOCKS)
        yield attention, ffn


def rotate_ends(
    model: PreTrainedModel,
    sliced: PreTrainedModel,
    first: Float64[Tensor, "d_model width"] | None = None,
    last: Float64[Tensor, "d_model width"] | None = None,
) -> None:
    """Sets the embedding, E Q, and the LM head, W diag(scale) Q, of an `unrotated` copy; None
    leaves one as it is.
    """
    source: Any = model
    target: Any = sliced
    if first is not None:
        table = source.model.embed_tokens.weight
        target.model.embed_tokens.weight = _like(_exact(table) @ first, table)
    if last is not None:
        table = source.lm_head.weight
        scale = source.model.norm.weight.detach() + architecture_for(model.config).norm_offset
        target.lm_head.weight = _like((_exact(table) * _exact(scale)) @ last, table)


def _block(
    model: PreTrainedModel,
    dense: nn.Module,
    copied: nn.Module,
    name: str,
    output: str,
    norm: str,
    shortcut: str,
) -> Block:
    source, target = dense.get_submodule(name), copied.get_submodule(name)
    pairs: dict[str, Any] = {
        child: (linear, target.get_submodule(child)) for child, linear in _linears(source).items()
    }
    scale = (
        dense.get_submodule(norm).get_parameter("weight").detach()
        + architecture_for(model.config).norm_offset
    )
    link: Any = copied.get_submodule(shortcut)
    wrote = pairs.pop(output)
    return Block(
        tuple(pairs.values()),
        wrote,
        scale,
        link,
        float(getattr(model.config, "residual_multiplier", 1.0)),
    )


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module for name, module in block.named_children() if isinstance(module, nn.Linear)
    }


def _sliced_class(model: PreTrainedModel) -> Any:
    return getattr(sliced_modeling, sliced_modeling.PREFIX + type(model).__name__)


def _config(model: PreTrainedModel, widths: Sequence[int]) -> PreTrainedConfig:
    config: Any = copy.deepcopy(model.config)
    config.residual_widths = list(widths)
    config.tie_word_embeddings = False  # the LM head holds the last norm's scale and another basis
    return config  # type: ignore[no-any-return]


def _exact(tensor: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return in_float64(tensor.detach())[0]


def _like(values: Tensor, parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(parameter), requires_grad=parameter.requires_grad)
