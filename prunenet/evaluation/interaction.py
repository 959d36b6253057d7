"""Measures how the damages of a model's parts add up: one forward pass a part, and a quadratic form
that prices every combination in microseconds (docs/methods.md, section 12).

A *unit* is a bin of FFN channels of one layer, a key-value group with its query heads, an attention
sublayer or a whole layer. Each unit is ablated once, all else dense. With p the dense model's
probabilities of a token's top 256 successors and of the rest, and dz the change of their logits,
phi_u = sqrt(p) (dz - E_p dz) has |phi_u|^2 / 2, averaged over tokens, as the second-order
KL(dense || without u). Q_uv = mean <phi_u, phi_v> then prices a set of units as half the sum of its
entries.

Far from the dense model the form breaks, so it can be measured around a cut one
(`Ablation.behind`). With q the cut model's probabilities, the same second-order expansion of
KL(dense || .) there has phi_u = sqrt(q) (dz - E_q dz), a first-order term mean <q - p, dz>, and the
cut model's own KL. Units that are gone come back one at a time: the form prices both directions.

Source: CoCurve, arXiv 2607.17568. What differs: heads, sublayers and layers beside channels; the
diagonal is the measured KL (`Interaction.quadratic`); a forward pass starts at the ablated layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import weights_sha256
from prunenet.evaluation.prefixes import Prefixes
from prunenet.evaluation.successors import Successors
from prunenet.evaluation.units import STRUCTURES, Ablations, Cut, Structure, Unit, units_of
from prunenet.models.anatomy import Anatomy
from prunenet.models.layers import check_tokens
from prunenet.models.surgery import check_masks
from prunenet.runtime.files import cache_folder, write_atomic
from prunenet.runtime.own_files import ContentError, check_layout, packed, unpacked
from prunenet.runtime.placement import home
from prunenet.runtime.products import with_fast_products

_FORMAT = "interaction matrix"


@dataclass(frozen=True, slots=True, eq=False)
class Around:
    """The cut model around which damages are expanded, on one text or on several.

    Attributes:
        gone: share of each unit that it lacks, in [0, 1].
        pull: slope of KL(dense || .) there, in nats per token and unit that goes.
        kl: KL(dense || it), in nats per token.
    """

    gone: Float[Tensor, " units"]
    pull: Float[Tensor, "*texts units"]
    kl: Float[Tensor, "*texts"]

    @classmethod
    def of(cls, parts: Sequence[Interaction]) -> Around | None:
        """The same cut on one text after the other; None where it is the dense model.

        Raises:
            ValueError: the parts were measured behind different cuts.
        """
        found = [part.around for part in parts if part.around is not None]
        if not found:
            return None
        if len(found) < len(parts) or any(
            not torch.equal(one.gone, found[0].gone) for one in found
        ):
            raise ValueError(
                "interaction matrices measured behind different cuts have no common one: measure"
                " them behind the same"
            )
        pull, kl = torch.stack([one.pull for one in found]), torch.stack([one.kl for one in found])
        return cls(found[0].gone, pull, kl)


@dataclass(frozen=True, slots=True)
class Interaction:
    """How much the ablations of a model's units add up on some text.

    Attributes:
        units: rows and columns of the matrix.
        raw: Q, (units, units), mean over tokens of <phi_u, phi_v>; in nats, symmetric.
        kl: KL(base || without u) of each unit, (units,), in nats per token, over the top
            successors and the rest; the base is the dense model unless `around` says another.
        tokens: how many were averaged.
        around: the cut model that is the base; None where it is the dense one.
    """

    units: tuple[Unit, ...]
    raw: Float[Tensor, "units units"]
    kl: Float[Tensor, " units"]
    tokens: int
    around: Around | None = None

    @property
    def quadratic(self) -> Float[Tensor, "units units"]:
        """Q rescaled so that half its diagonal is the measured KL of each unit alone."""
        scale = (2 * self.kl.clamp_min(0) / self.raw.diagonal().clamp_min(1e-12)).sqrt()
        return scale[:, None] * self.raw * scale

    @classmethod
    def mean(cls, parts: Sequence[Interaction]) -> Interaction:
        """Averages matrices of the same units by their tokens.

        Raises:
            ValueError: none, of different units, or behind different cuts.
        """
        if not parts or any(part.units != parts[0].units for part in parts):
            raise ValueError("a mean takes one interaction matrix or more, all of the same units")
        around, tokens = Around.of(parts), sum(part.tokens for part in parts)
        raw = torch.stack([part.raw * part.tokens for part in parts]).sum(0) / tokens
        kl = torch.stack([part.kl * part.tokens for part in parts]).sum(0) / tokens
        if around is not None:
            weights = torch.tensor([part.tokens / tokens for part in parts])
            around = Around(around.gone, weights @ around.pull, weights @ around.kl)
        return cls(parts[0].units, raw, kl, tokens, around)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ablation:
    """What is ablated, from what, and on how much text at once.

    Attributes:
        bins: of a layer's channels.
        structures: of which units are ablated.
        unscored: positions at the start of each block that do not count, such as BOS.
        batch: blocks of one matrix.
        behind: masks, of channels and of groups of heads or None, of what is gone already; None
            ablates from the dense model. A bin partly gone loses its rest or comes back, whichever
            is more, and counts in proportion. Channels and heads alone.
    """

    bins: int = 12
    structures: Sequence[Structure] = STRUCTURES
    unscored: int = 0
    batch: int = 2
    behind: Cut | None = None


@with_fast_products
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
        ValueError: blocks, scores or masks that do not fit the model, or logits that are not
            finite.
    """
    check_tokens(model, blocks)
    _check_behind(model, ablation)
    units = units_of(model, ablation.bins, ablation.structures)
    order = [row.sort(stable=True).indices for row in scores]
    fits = [len(row) for row in order] == Anatomy.of(model).widths
    if not fits or not 0 <= ablation.unscored < blocks.shape[1]:
        raise ValueError(
            "an interaction matrix needs one score a channel of every layer, and blocks longer than"
            f" their {ablation.unscored} unscored tokens"
        )
    parts = torch.split(blocks, ablation.batch)
    found = []
    for number, part in enumerate(parts):
        path = cache and cache / _name(model, part, scores, ablation)
        known = None if path is None else _read(path, units, behind=ablation.behind is not None)
        if known is None:
            tell = progress and _shifted(progress, number, len(parts))
            known = _measured(model, part, units, order, ablation, tell)
            if path is not None:
                _write(path, known)
        found.append(known)
    return found


def _check_behind(model: PreTrainedModel, ablation: Ablation) -> None:
    if ablation.behind is None:
        return
    keep, groups = ablation.behind
    wanted = {"channels"} if groups is None else {"channels", "heads"}
    if not wanted <= {*ablation.structures} <= {"channels", "heads"}:
        raise ValueError(
            "behind a cut, channels and heads are ablated, each where masks cut it, got"
            f" `structures` {[*ablation.structures]}"
        )
    check_masks(Anatomy.of(model), keep, groups)


def _measured(
    model: PreTrainedModel,
    ids: Int[Tensor, "n tokens"],
    units: tuple[Unit, ...],
    order: Sequence[Int[Tensor, " _"]],
    ablation: Ablation,
    progress: Callable[[int, int], None] | None,
) -> Interaction:
    ids, front, dense = ids.to(home(model)), ablation.unscored, None
    if ablation.behind is not None:
        dense = Successors.of(model(input_ids=ids, use_cache=False).logits[:, front:])
    phi, kl, pull = None, torch.empty(len(units)), torch.zeros(len(units))
    with Ablations(Anatomy.of(model), units, order, ablation.behind) as ablations:
        prefixes = Prefixes(model, ids)
        first = prefixes.whole[:, front:]
        base = Successors.of(first) if dense is None else dense.under(first)
        start = 0.0 if dense is None else float(dense.lost(first, "kl"))
        for number, unit in enumerate(units):
            with ablations.turned(unit) as step:
                logits = prefixes.logits(unit.layer, skipped=unit.structure == "layers")[:, front:]
            _check_finite(model, unit, logits)
            effect, damage = base.compared(logits)
            if phi is None:
                phi = torch.empty(len(units), effect.numel())
            phi[number], kl[number] = effect.flatten().cpu() / step, damage.cpu() / step**2
            if dense is not None:
                # KL(dense || .) less its value and its slope at the base is KL(base || .)
                pull[number] = (float(dense.lost(logits, "kl")) - start - float(damage)) / step
            if progress is not None:
                progress(number + 1, len(units))
        gone = torch.tensor([ablations.share(unit) for unit in units])
    assert phi is not None, "a model has units"
    tokens = base.top[..., 0].numel()
    around = None if dense is None else Around(gone, pull, torch.tensor(start))
    return Interaction(units, phi @ phi.T / tokens, kl, tokens, around)


def _check_finite(model: PreTrainedModel, unit: Unit, logits: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"the logits without {unit.structure} {unit.number} of layer {unit.layer} are not"
            f" finite: damaged weights, or {model.dtype} overflows"
        )


def interaction_folder() -> Path:
    """Where matrices are kept: beside the text that the models wrote."""
    return cache_folder() / "self-generated"


def _name(model: PreTrainedModel, ids: Tensor, scores: Sequence[Tensor], ablation: Ablation) -> str:
    what, masks = f"{[*ablation.structures]} {ablation.bins} {ablation.unscored}", []
    if ablation.behind is not None:
        what, masks = what + " behind", [*ablation.behind[0], *(ablation.behind[1] or ())]
    digest = hashlib.sha256(f"{weights_sha256(model)} {what}".encode())
    for tensor in (ids, *scores, *masks):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return f"q-{digest.hexdigest()[:24]}.safetensors"


def _write(path: Path, found: Interaction) -> None:
    tensors = {"raw": found.raw, "kl": found.kl, "tokens": torch.tensor(found.tokens)}
    if found.around is not None:
        around = found.around
        tensors |= {"gone": around.gone, "pull": around.pull, "base_kl": around.kl}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, packed(tensors, {"format": _FORMAT, "of": path.stem}))


def _read(path: Path, units: tuple[Unit, ...], *, behind: bool) -> Interaction | None:
    """A matrix measured before; None where there is none, or its file is damaged or another's."""
    count = len(units)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "raw": (torch.float32, (count, count)),
        "kl": (torch.float32, (count,)),
        "tokens": (torch.int64, ()),
    }
    if behind:
        row = (torch.float32, (count,))
        expected |= {"gone": row, "pull": row, "base_kl": (torch.float32, ())}
    try:
        tensors, facts = unpacked(path, hashed=True)
        check_layout(tensors, expected)
    except (FileNotFoundError, ContentError):
        return None
    # older files do not say whose they are
    if facts.get("format") != _FORMAT or facts.get("of", path.stem) != path.stem:
        return None
    around = Around(tensors["gone"], tensors["pull"], tensors["base_kl"]) if behind else None
    return Interaction(units, tensors["raw"], tensors["kl"], int(tensors["tokens"]), around)


def _shifted(
    progress: Callable[[int, int], None], number: int, parts: int
) -> Callable[[int, int], None]:
    return lambda done, of: progress(number * of + done, parts * of)
