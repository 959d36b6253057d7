"""Measures how the damages of a model's parts add up: one forward pass a part, and a quadratic form
that prices every combination in microseconds (docs/methods.md, section 12).

A *unit* is a bin of FFN channels of one layer, a key-value group with its query heads, an attention
sublayer or a whole layer. Each unit is ablated once, all else dense. With p the dense model's
probabilities of a token's top 256 successors and of the rest, and dz the change of their logits,
phi_u = sqrt(p) (dz - E_p dz) has |phi_u|^2 / 2, averaged over tokens, as the second-order
KL(dense || without u). Q_uv = mean <phi_u, phi_v> then prices a set of units as half the sum of its
entries.

Source: CoCurve, arXiv 2607.17568. What differs: heads, sublayers and layers beside channels; the
diagonal is the measured KL (`Interaction.quadratic`); a forward pass starts at the ablated layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import weights_sha256
from prunenet.evaluation.choices import STRUCTURES as STRUCTURES
from prunenet.evaluation.choices import Structure as Structure
from prunenet.evaluation.successors import Successors
from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.heads import attentions
from prunenet.models.hooks import calling, zeroing
from prunenet.models.layers import check_tokens, ffn_at
from prunenet.runtime.choices import check_choice
from prunenet.runtime.files import cache_folder, write_atomic
from prunenet.runtime.own_files import ContentError, check_layout, packed, unpacked
from prunenet.runtime.placement import home

_FORMAT = "interaction matrix"


class Unit(NamedTuple):
    """One part that can be ablated.

    Attributes:
        structure: see `Structure`.
        layer: number of the decoder layer.
        number: bin (0 holds the channels that go first) or key-value group; 0 for the others.
        parameters: that go away with it.
    """

    structure: Structure
    layer: int
    number: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Interaction:
    """How much the ablations of a model's units add up on some text.

    Attributes:
        units: rows and columns of the matrix.
        raw: Q, (units, units), mean over tokens of <phi_u, phi_v>; in nats, symmetric.
        kl: KL(dense || without u) of each unit, (units,), in nats per token, over the top
            successors and the rest.
        tokens: how many were averaged.
    """

    units: tuple[Unit, ...]
    raw: Float[Tensor, "units units"]
    kl: Float[Tensor, " units"]
    tokens: int

    @property
    def quadratic(self) -> Float[Tensor, "units units"]:
        """Q rescaled so that half its diagonal is the measured KL of each unit alone."""
        scale = (2 * self.kl.clamp_min(0) / self.raw.diagonal().clamp_min(1e-12)).sqrt()
        return scale[:, None] * self.raw * scale

    @classmethod
    def mean(cls, parts: Sequence[Interaction]) -> Interaction:
        """Averages matrices of the same units by their tokens.

        Raises:
            ValueError: none, or of different units.
        """
        if not parts or any(part.units != parts[0].units for part in parts):
            raise ValueError("a mean takes one interaction matrix or more, all of the same units")
        tokens = sum(part.tokens for part in parts)
        raw = torch.stack([part.raw * part.tokens for part in parts]).sum(0) / tokens
        kl = torch.stack([part.kl * part.tokens for part in parts]).sum(0) / tokens
        return cls(parts[0].units, raw, kl, tokens)


def units_of(
    model: PreTrainedModel, bins: int = 12, structures: Sequence[Structure] = STRUCTURES
) -> tuple[Unit, ...]:
    """Lists a model's units, layer by layer: bins of channels, groups, attention, the layer.

    Families whose heads cannot be cut have bins alone, and layers.

    Args:
        model: a causal LM; shapes alone are read.
        bins: of the channels of a layer, at least 1; the narrowest layer's d_ff at most.
        structures: of which units are listed.

    Raises:
        ValueError: bins out of range, or an unknown structure.
    """
    for structure in structures:
        check_choice("structure", structure, Structure)
    anatomy = Anatomy.of(model)
    if not 1 <= bins <= min(anatomy.widths):
        raise ValueError(f"bins must be in [1, {min(anatomy.widths)}], got {bins}")
    try:
        heads: Sequence[Any] = attentions(model)
    except UnsupportedArchitecture:
        heads = []
    units: list[Unit] = []
    for layer in anatomy.layers:
        cost, width = ffn_at(model, layer.index).channel_parameters, anatomy.widths[layer.index]
        edges = [width * part // bins for part in range(bins + 1)]
        sizes = [high - low for low, high in pairwise(edges)]
        units += [Unit("channels", layer.index, part, cost * n) for part, n in enumerate(sizes)]
        if heads:
            groups, each = heads[layer.index].groups, heads[layer.index].group_parameters
            units += [Unit("heads", layer.index, group, each) for group in range(groups)]
            units.append(Unit("attention", layer.index, 0, groups * each))
        whole = sum(parameter.numel() for parameter in layer.module.parameters())
        units.append(Unit("layers", layer.index, 0, whole))
    return tuple(unit for unit in units if unit.structure in structures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """What is ablated, and on how much text at once.

    Attributes:
        bins: of a layer's channels.
        structures: of which units are ablated.
        unscored: positions at the start of each block that do not count, such as BOS.
        batch: blocks of one matrix.
    """

    bins: int = 12
    structures: Sequence[Structure] = STRUCTURES
    unscored: int = 0
    batch: int = 2


@torch.no_grad()
def measure_interaction(
    model: PreTrainedModel,
    blocks: Int[Tensor, "n tokens"],
    scores: Sequence[Float[Tensor, " _"]],
    ablation: Ablation = Ablation(),
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Interaction]:
    """Measures one interaction matrix for each batch of blocks.

    With a `cache` each is kept on disk: a killed measurement, started again, continues with the
    batch that it was at.

    Memory holds the dense hidden states and phi of one batch: units * tokens * 257 float32.

    Args:
        model: a causal LM in eval mode; read, never changed.
        blocks: token ids without padding.
        scores: of each layer's channels; bin 0 holds the lowest.
        ablation: what is ablated, and on how many blocks at once.
        cache: folder, such as `interaction_folder()`; None keeps nothing.
        progress: called with (units ablated, in all).

    Raises:
        ValueError: blocks or scores that do not fit the model, or logits that are not finite.
    """
    check_tokens(model, blocks)
    units = units_of(model, ablation.bins, ablation.structures)
    order = [row.sort(stable=True).indices for row in scores]
    fits = [len(row) for row in order] == Anatomy.of(model).widths
    if not fits or not 0 <= ablation.unscored < blocks.shape[1]:
        raise ValueError(
            "an interaction matrix needs one score a channel of every layer, and blocks longer than"
            f" their {ablation.unscored} unscored tokens"
        )
    parts = torch.split(blocks, ablation.batch)
    what = f"{[*ablation.structures]} {ablation.bins} {ablation.unscored}"
    found = []
    for number, part in enumerate(parts):
        path = cache and cache / _name(model, part, scores, what)
        known = None if path is None else _read(path, units)
        if known is None:
            tell = progress and _shifted(progress, number, len(parts))
            known = _measured(model, part, units, order, ablation.unscored, tell)
            if path is not None:
                tensors = {"raw": known.raw, "kl": known.kl, "tokens": torch.tensor(known.tokens)}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, packed(tensors, {"format": _FORMAT}))
        found.append(known)
    return found


def _measured(
    model: PreTrainedModel,
    ids: Int[Tensor, "n tokens"],
    units: tuple[Unit, ...],
    order: Sequence[Int[Tensor, " _"]],
    unscored: int,
    progress: Callable[[int, int], None] | None,
) -> Interaction:
    prefixes = _Prefixes(model, ids.to(home(model)))
    reference = Successors.of(prefixes.dense[:, unscored:])
    phi = torch.empty(len(units), reference.probabilities.numel())
    kl = torch.empty(len(units))
    for number, unit in enumerate(units):
        with _ablated(prefixes.anatomy, unit, units, order):
            logits = prefixes.logits(unit.layer, skipped=unit.structure == "layers")
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                f"the logits without {unit.structure} {unit.number} of layer {unit.layer} are not"
                f" finite: damaged weights, or {model.dtype} overflows"
            )
        effect, damage = reference.compared(logits[:, unscored:])
        phi[number], kl[number] = effect.flatten().cpu(), damage.cpu()
        if progress is not None:
            progress(number + 1, len(units))
    tokens = reference.probabilities[..., 0].numel()
    return Interaction(units, phi @ phi.T / tokens, kl, tokens)


class _Prefixes:
    """The dense model's hidden states in front of each layer, from which a forward pass starts."""

    def __init__(self, model: PreTrainedModel, ids: Int[Tensor, "n tokens"]) -> None:
        self.anatomy = Anatomy.of(model)
        self._model, self._ids = model, ids
        self._inputs: list[Tensor] = []
        self._tuples = False
        with ExitStack() as hooks:
            for layer in self.anatomy.layers:
                hook = layer.module.register_forward_pre_hook(self._see, with_kwargs=True)
                hooks.callback(hook.remove)
            hook = self.anatomy.layers[0].module.register_forward_hook(self._kind)
            hooks.callback(hook.remove)
            self.dense = self._run()

    def logits(self, start: int, *, skipped: bool = False) -> Float[Tensor, "n tokens vocabulary"]:
        """Logits of a pass that starts in front of a layer, or behind it where it is skipped."""
        last = start if skipped else start - 1
        hidden = self._inputs[start]

        def passed(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._tuples else hidden

        modules = [layer.module for layer in self.anatomy.layers[: last + 1]]
        with calling(dict.fromkeys(modules, passed)):
            return self._run()

    def _run(self) -> Tensor:
        logits: Tensor = self._model(input_ids=self._ids, use_cache=False).logits
        return logits.float()

    def _see(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs.append((args[0] if args else kwargs["hidden_states"]).clone())

    def _kind(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._tuples = isinstance(output, tuple)


@contextmanager
def _ablated(
    anatomy: Anatomy, unit: Unit, units: Sequence[Unit], order: Sequence[Tensor]
) -> Iterator[None]:
    """Inside, the model computes without the unit; a skipped layer is the caller's."""
    layer = anatomy.layers[unit.layer]
    beside = sum(u.structure == unit.structure and u.layer == unit.layer for u in units)
    match unit.structure:
        case "layers":
            yield
            return
        case "channels":
            linear, width = anatomy.downs[unit.layer], anatomy.widths[unit.layer]
            edges = width * unit.number // beside, width * (unit.number + 1) // beside
            dropped = order[unit.layer][slice(*edges)]
        case "heads":
            linear = layer.linear(anatomy.architecture.attention_out)
            size = linear.in_features // beside
            dropped = torch.arange(size * unit.number, size * (unit.number + 1))
        case "attention":
            linear = layer.linear(anatomy.architecture.attention_out)
            with calling({linear: lambda h: h.new_zeros(*h.shape[:-1], linear.out_features)}):
                yield
            return
    mask = torch.zeros(linear.in_features, dtype=torch.bool)
    mask[dropped.cpu()] = True
    hook = linear.register_forward_pre_hook(zeroing(mask.to(linear.weight.device)))
    try:
        yield
    finally:
        hook.remove()


def interaction_folder() -> Path:
    """Where matrices are kept: beside the text that the models wrote."""
    return cache_folder() / "self-generated"


def _name(model: PreTrainedModel, ids: Tensor, scores: Sequence[Tensor], settings: str) -> str:
    digest = hashlib.sha256(f"{weights_sha256(model)} {settings}".encode())
    for tensor in (ids, *scores):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return f"q-{digest.hexdigest()[:24]}.safetensors"


def _read(path: Path, units: tuple[Unit, ...]) -> Interaction | None:
    """A matrix measured before; None where there is none, or its file is damaged."""
    count = len(units)
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "raw": (torch.float32, (count, count)),
        "kl": (torch.float32, (count,)),
        "tokens": (torch.int64, ()),
    }
    try:
        tensors, facts = unpacked(path, hashed=True)
        check_layout(tensors, expected)
    except (FileNotFoundError, ContentError):
        return None
    if facts.get("format") != _FORMAT:
        return None
    return Interaction(units, tensors["raw"], tensors["kl"], int(tensors["tokens"]))


def _shifted(
    progress: Callable[[int, int], None], number: int, parts: int
) -> Callable[[int, int], None]:
    return lambda done, of: progress(number * of + done, parts * of)
