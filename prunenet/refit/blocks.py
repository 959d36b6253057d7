"""Trains each cut FFN as a whole to write what the dense one writes at the same tokens
(docs/methods.md, section 16).

Starts from the closed-form refit, which can change the output matrix alone. What differs from the
section: inputs are those of the dense model, so that every FFN is trained by itself; with these,
the error on the residual stream is the FFN's own error, and a scale of the norm in front is a scale
of the columns of gate and up, so neither has a term or a parameter of its own.

How far an FFN moves from its start is chosen across two kinds of text: it is trained on each and
judged on the other (`prunenet.refit.folds`). Where nothing helps there the refit stays. Experts
keep their refit: a block is one module that every token passes.

Memory holds one FFN, its inputs and its targets. Several processes share the FFNs.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.groups import Group
from prunenet.refit.cut import BlockLoss, Cut
from prunenet.refit.folds import folds_of
from prunenet.refit.moments import LayerWalk, check_activations
from prunenet.refit.ridge import ridge
from prunenet.runtime import parallel
from prunenet.runtime.batches import drawn_order
from prunenet.runtime.choices import check_fields
from prunenet.runtime.files import make_folders, write_atomic
from prunenet.runtime.own_files import ContentError, check_layout, layout_of, packed, unpacked
from prunenet.runtime.placement import check_together

Weights = Literal["tokens", "stream"]
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the way from the refitted weights to the trained ones; 0 is the refit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTraining:
    """How an FFN is trained, by AdamW.

    Attributes:
        passes: over the text, 1 or more.
        learning_rate: at the first step, relative to the root mean square of each tensor; it falls
            to 0 in a line.
        batch: blocks of text of a step.
        weights: errors count alike at every token ("tokens"), or in relation to the residual stream
            behind the layer ("stream"), as the next norm sees them.
        seed: of the order of the batches.

    Raises:
        ValueError: a number out of range.
    """

    passes: int = 2
    learning_rate: float = 5e-3
    batch: int = 4
    weights: Weights = "tokens"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in (("passes", self.passes), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be above 0, got {self.learning_rate}")


def check_blocks(model: PreTrainedModel) -> None:
    """Checks that a model has FFNs that can be trained.

    Raises:
        ValueError: its layers are on several devices, or not in memory.
        UnsupportedArchitecture: all of its channels are those of experts.
    """
    check_together(model, "training blocks")
    if all(group.expert is not None for group in Anatomy.of(model).groups):
        raise UnsupportedArchitecture(
            f"blocks are trained on the text that passes each, and a {type(model).__name__} has"
            " experts alone, which see parts of it; give `refit` layerwise"
        )


@torch.no_grad()
def train_blocks(
    model: PreTrainedModel,
    cut: Cut,
    blocks: Int[Tensor, "n tokens"],
    *,
    kinds: Int[Tensor, " n"] | None = None,
    training: BlockTraining | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Cut:
    """Trains all tensors of every FFN that a cut has narrowed.

    Args:
        model: the dense model; not changed.
        cut: the channels to keep, and the refit to start from.
        blocks, kinds: as for `prunenet.refit.cut.cut_layers`.
        training: how.
        folder: for what is trained already, one file an FFN. A call with the same model, cut, text
            and training goes on there, to the same bytes. None: kept in memory alone.
        progress: called with (groups done, groups in all).

    Returns:
        The cut with the trained tensors, and what each FFN loses before and after.

    Raises:
        ValueError: as `cut_layers`, for too little text or activations that are not finite.
        ValueError, UnsupportedArchitecture: as `check_blocks`.
    """
    check_blocks(model)
    training = training or BlockTraining()
    dense, narrow = Anatomy.of(model), Anatomy.of(cut.model(model))
    walks = [LayerWalk(model, fold, batch=training.batch) for fold in folds_of(blocks, kinds)]
    found: dict[int, list[Tensor]] = {}
    for index, _ in zip(*walks, strict=True):
        if not parallel.is_owner(index):
            continue
        group, found[index] = narrow.groups[index], []
        if group.expert is None and not bool(cut.keep[index].all()):
            path = _block_path(group)
            seen = partial(_batches, model, path, dense.groups[index], training.weights)
            folds = [seen(walk) for walk in walks]
            if all(folds):  # else no text passes it
                block = _Block(narrow.model, path, group, training)
                starts = [_refitted(walk, dense, group, cut) for walk in walks]
                saved = _Saved.of(folder, group, folds, training)
                found[index] = saved.read() or saved.kept(_trained(block, starts, folds))
        if progress is not None:
            progress(index + 1, len(narrow.groups))
    tensors: dict[str, Tensor] = {}
    losses: dict[int, BlockLoss] = {}
    everything = parallel.gather_from_owners(found, len(narrow.groups))
    for group, parts in zip(narrow.groups, everything, strict=True):
        if parts:
            losses[group.number] = BlockLoss(*parts[0].tolist())
            tensors |= dict(zip(_names(group), parts[1:], strict=True))
    return replace(cut, tensors={**cut.tensors, **tensors}, losses=losses)


def forget_blocks(folder: Path) -> None:
    """Removes what `train_blocks` has kept in a folder, and the folder if nothing else is in it."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with suppress(OSError):
        folder.rmdir()


def _refitted(walk: LayerWalk, dense: Anatomy, group: Group, cut: Cut) -> list[Tensor]:
    """A narrow FFN's tensors with a refit on the text of one walk alone: a start that has not seen
    the text on which the training is judged.
    """
    tensors = [where.tensor for where in group.slices]
    if cut.dampings:
        second, number = walk.moments(group.number).second, group.number
        weight, keep = dense.ffn(number).down, cut.keep[number]
        down = ridge(weight, second, keep, damping=cut.dampings[number])
        tensors[group.slices.index(group.down)] = group.down.laid(down)
    return [tensor.float() for tensor in tensors]


def _trained(
    block: _Block, starts: Sequence[Sequence[Tensor]], folds: Sequence[Sequence[_Batch]]
) -> list[Tensor]:
    """(before, after, strength), then the block's tensors in the model's dtype.

    Args:
        block: holds the refit on all of the text.
        starts: its tensors with the refit on either fold.
        folds: of the text.
    """
    losses = torch.zeros(len(STRENGTHS), dtype=torch.float64)
    for start, fitted, judged in zip(starts, folds, folds[::-1], strict=True):
        end = block.fitted(start, fitted)
        for place, strength in enumerate(STRENGTHS):
            losses[place] += block.loss(_between(start, end, strength), judged) / 2
    best = int(losses.argmin())
    facts = torch.stack([losses[0], losses[best], torch.tensor(STRENGTHS[best]).double()])
    found = block.start
    if best:
        end = block.fitted(block.start, [batch for fold in folds for batch in fold])
        found = _between(block.start, end, STRENGTHS[best])
    return [facts, *(tensor.to(block.dtype) for tensor in found)]


def _between(start: Sequence[Tensor], end: Sequence[Tensor], share: float) -> list[Tensor]:
    return [a + share * (b - a) for a, b in zip(start, end, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """One call of a block in the dense model.

    Attributes:
        args, kwargs: of the call.
        target: what its output matrix wrote.
        weight: of each token, 1 or 1 / |r|^2 with r the residual stream behind the layer.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Float[Tensor, "*tokens d_model"]
    weight: Float[Tensor, "*tokens"]

    def weighed(self, values: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, ""]:
        """Weighted sum of squares."""
        return (values.square().sum(-1) * self.weight).sum()


class _Block:
    """A narrow FFN, as a float32 copy, in training.

    Attributes:
        start: its tensors.
        dtype: of the model.
    """

    def __init__(
        self, model: PreTrainedModel, path: str, group: Group, training: BlockTraining
    ) -> None:
        self._module = copy.deepcopy(model.get_submodule(path)).float().requires_grad_(False)
        inside = [name.removeprefix(f"{path}.") for name in _names(group)]
        self._learned = [self._module.get_parameter(name).requires_grad_() for name in inside]
        down = group.down.name.removeprefix(f"{path}.").rpartition(".")[0]
        self._down = self._module.get_submodule(down)
        self.start = [tensor.detach().clone() for tensor in self._learned]
        self.dtype = group.down.tensor.dtype
        self._training, self._number = training, group.number

    def fitted(self, start: Sequence[Tensor], batches: Sequence[_Batch]) -> list[Tensor]:
        """Trains from a start; returns the tensors at the end."""
        self._set(start)
        rate, steps = self._training.learning_rate, self._training.passes * len(batches)
        sizes = [float(tensor.square().mean().sqrt()) for tensor in start]
        optimizer = torch.optim.AdamW(
            [{"params": [tensor]} for tensor in self._learned], betas=(0.9, 0.95), weight_decay=0.0
        )
        energy = max(_energy(batches) / len(batches), torch.finfo(torch.float32).tiny)
        seeds = self._training.seed, self._number
        turns = [drawn_order(len(batches), *seeds, turn) for turn in range(self._training.passes)]
        for step, place in enumerate(torch.cat(turns).tolist()):
            for settings, size in zip(optimizer.param_groups, sizes, strict=True):
                settings["lr"] = rate * size * (1 - step / steps)
            with torch.enable_grad():
                loss = self._error(batches[place]) / energy
                gradients = torch.autograd.grad(loss, self._learned)
            for tensor, gradient in zip(self._learned, gradients, strict=True):
                tensor.grad = gradient
            optimizer.step()
        return [tensor.detach().clone() for tensor in self._learned]

    def loss(self, tensors: Sequence[Tensor], batches: Sequence[_Batch]) -> float:
        """Error over energy of the dense output, with some tensors; infinite where it overflows."""
        self._set(tensors)
        error = sum(float(self._error(batch)) for batch in batches)
        lost = error / max(_energy(batches), torch.finfo(torch.float32).tiny)
        return lost if math.isfinite(lost) else math.inf

    def _set(self, tensors: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for learned, tensor in zip(self._learned, tensors, strict=True):
                learned.copy_(tensor)

    def _error(self, batch: _Batch) -> Float[Tensor, ""]:
        """What the output matrix writes too much."""
        written: list[Tensor] = []
        with self._down.register_forward_hook(lambda _, __, out: written.append(out)):
            self._module(*batch.args, **batch.kwargs)
        return batch.weighed(written[0] - batch.target)


def _energy(batches: Sequence[_Batch]) -> float:
    return sum(float(batch.weighed(batch.target)) for batch in batches)


def _batches(
    model: PreTrainedModel, path: str, group: Group, weights: Weights, walk: LayerWalk
) -> list[_Batch]:
    """What passes a dense block in the current layer."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    written: list[Tensor] = []

    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(tree_map(_float32, (args, kwargs)))

    def wrote(_: nn.Module, __: Any, out: Tensor) -> None:
        # A copy: Falcon adds its attention's output to this tensor in place.
        written.append(out.to(torch.float32, copy=True))
        check_activations(written[-1], group.layer, out.dtype)

    with ExitStack() as hooks:
        block = model.get_submodule(path)
        hooks.enter_context(block.register_forward_pre_hook(called, with_kwargs=True))
        hooks.enter_context(group.down.module.register_forward_hook(wrote))
        streams = walk.pass_through(group.layer)
    if not len(calls) == len(written) == len(streams):  # no text passes it, or piece by piece
        return []
    batches = []
    for call, target, stream in zip(calls, written, streams, strict=True):
        weight = torch.ones_like(target[..., 0])
        if weights == "stream":
            energy = stream.to(target).square().sum(-1).reshape(weight.shape)
            weight = 1 / energy.clamp_min(torch.finfo(energy.dtype).tiny)
        batches.append(_Batch(*call, target, weight))
    return batches


def _float32(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if floating else value


def _names(group: Group) -> list[str]:
    """Of a group's tensors."""
    return [where.name for where in group.slices]


def _block_path(group: Group) -> str:
    """The smallest module that holds all tensors of a group."""
    owners = [name.split(".")[:-1] for name in _names(group)]
    common = []
    for parts in zip(*owners, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


@dataclass(frozen=True, slots=True)
class _Saved:
    """The file of one trained FFN, if there is a folder."""

    path: Path | None
    run: str
    like: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        folder: Path | None,
        group: Group,
        folds: Sequence[Sequence[_Batch]],
        training: BlockTraining,
    ) -> _Saved:
        if folder is None:
            return cls(None, "", {})
        like = {where.name: where.tensor for where in group.slices}
        digest = hashlib.sha256(json.dumps(asdict(training), sort_keys=True).encode())
        seen, _ = tree_flatten([(b.args, b.kwargs, b.target) for fold in folds for b in fold])
        for tensor in (t for t in (*like.values(), *seen) if isinstance(t, Tensor)):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return cls(folder / f"{group.number:04d}.safetensors", digest.hexdigest(), like)

    def read(self) -> list[Tensor]:
        """What `kept` was given; nothing where that was another run, or the file is damaged."""
        if self.path is None or not self.path.exists():
            return []
        try:
            tensors, notes = unpacked(self.path, hashed=True)
            losses = {"losses": (torch.float64, (3,))}
            check_layout(tensors, {**losses, **layout_of(self.like)})
        except ContentError:
            return []
        if notes.get("run") != self.run:
            return []
        own = [tensors[name].to(where) for name, where in self.like.items()]
        return [tensors["losses"], *own]

    def kept(self, found: list[Tensor]) -> list[Tensor]:
        """The same, written to the file."""
        if self.path is not None and found:
            make_folders(self.path.parent)
            tensors = dict(zip(("losses", *self.like), found, strict=True))
            write_atomic(self.path, packed(tensors, {"run": self.run}))
        return found
