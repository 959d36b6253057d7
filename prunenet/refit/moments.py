"""Measures second moments of FFN activations, layer by layer, for the refit and the reconstruction
reward (docs/methods.md, section 3).

One pass over the token blocks carries their hidden states from layer to layer. Memory holds the
moments of one layer and the hidden states of all blocks, which may wait on the CPU. A caller may
change a layer between its measurement and its forward pass, so that the next layer is measured
behind the changed one (sequential mode, section 5). `paired_moments` also relates the activations
to those of the dense model's layer.

Each channel group of a layer (`prunenet.models.groups`) has moments of its own, an expert's over
the tokens that are routed to it. All groups of a layer are measured in one pass through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.groups import Group
from prunenet.models.layers import check_tokens
from prunenet.models.observed import observing
from prunenet.refit.calls import LayerCall, Passed, layer_calls
from prunenet.runtime.floats import float64_device
from prunenet.runtime.placement import device_of, home, is_placed, present


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of one group's activations h, the inputs of its down matrix, over its tokens.

    Attributes:
        second: E[h h^T], (d_ff, d_ff), float32.
        mean: E[h], (d_ff,), float32.
        tokens: how many were averaged; skipped ones do not count.
    """

    second: Float[Tensor, "d_ff d_ff"]
    mean: Float[Tensor, " d_ff"]
    tokens: int


@dataclass(frozen=True, slots=True)
class Energies:
    """Moments of each channel alone, for scores that relate no channel to another.

    Attributes:
        energy: E[h_j^2], (d_ff,), float32: the diagonal of `Moments.second`, at 1 / d_ff of its
            work and memory.
        mean: E[h], (d_ff,), float32.
        tokens: how many were averaged; skipped ones do not count.
    """

    energy: Float[Tensor, " d_ff"]
    mean: Float[Tensor, " d_ff"]
    tokens: int


@dataclass(frozen=True, slots=True)
class Target:
    """Relates the dense layer's activations t to the pruned layer's h at the same tokens.

    Attributes:
        cross: E[t h^T], (d_ff, d_ff), float32.
        mean: E[t], (d_ff,), float32.
        energy: E|W t|^2 with W the dense layer's down matrix.
    """

    cross: Float[Tensor, "d_ff d_ff"]
    mean: Float[Tensor, " d_ff"]
    energy: float


class _Sums:
    """Sums over tokens, in float32."""

    def __init__(self, d_ff: int, device: torch.device) -> None:
        self.second = torch.zeros(d_ff, d_ff, device=device)
        self.mean = torch.zeros(d_ff, device=device)
        self.tokens = 0

    def add(self, h: Float[Tensor, "tokens d_ff"]) -> None:
        self.tokens += len(h)
        self.second.addmm_(h.T, h)
        self.mean.add_(h.sum(0))

    def means(self, layer: int, dtype: torch.dtype) -> Moments:
        check_activations(self.second, layer, dtype)
        count = max(self.tokens, 1)
        return Moments(self.second.div_(count), self.mean.div_(count), self.tokens)


class _EnergySums:
    """As `_Sums`, of each channel alone."""

    def __init__(self, d_ff: int, device: torch.device) -> None:
        self.energy, self.mean = torch.zeros(2, d_ff, device=device)
        self.tokens = 0

    def add(self, h: Float[Tensor, "tokens d_ff"]) -> None:
        self.tokens += len(h)
        self.energy += h.square().sum(0)
        self.mean += h.sum(0)

    def means(self, layer: int, dtype: torch.dtype) -> Energies:
        check_activations(self.energy, layer, dtype)
        count = max(self.tokens, 1)
        return Energies(self.energy.div_(count), self.mean.div_(count), self.tokens)


_Kind = TypeVar("_Kind", _Sums, _EnergySums)


def check_activations(values: Tensor, layer: int, dtype: torch.dtype) -> None:
    """Checks numbers that were computed from a layer's activations.

    Args:
        values: such as second moments.
        layer: number of the layer.
        dtype: of the model.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"the activations of layer {layer} are not finite: the weights are damaged, or"
            f" {str(dtype).removeprefix('torch.')} overflows"
        )


class LayerWalk:
    """Carries token blocks through a model, one decoder layer at a time.

    Iterating yields the numbers of channel groups, first to last: one a layer in most models, one
    an expert in a mixture. In the loop body the caller may measure that group (`moments`,
    `energies`) and, with `changing`, change it. Its weights are then on the device where it
    computes. All groups of a layer are measured as it is when the first of them is.

    Args:
        model: a causal LM in eval mode; the walk itself does not change it.
        blocks: (n, tokens) token ids, without padding.
        batch: blocks per forward pass.
        changing: whether the caller changes layers. The hidden states then pass the layer as it is
            after the loop body; otherwise the measurement's outputs serve, at half the cost.
        skip: positions at the start of each block left out of all moments, in [0, tokens). The
            first token is often an attention sink, with activations so large that it alone shapes
            H; later tokens still attend to it.
        groups: what is measured, numbered from 0 in the order of the layers; default the model's
            channel groups. `prunenet.models.heads.head_outputs` are others.
        offload: whether hidden states wait on the CPU, one batch at a time on the layer's device.
            Always so for a model that accelerate has placed (`prunenet.runtime.placement`).

    Raises:
        ValueError: blocks that the model cannot read, or `skip` out of range.
        UnsupportedArchitecture: a group lies outside of the decoder layers; or `skip` with experts,
            whose tokens are not in the order of the text.

    Attributes:
        reached: tokens that reach each group of the layer measured last, by number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Int[Tensor, "n tokens"],
        *,
        batch: int = 4,
        changing: bool = False,
        skip: int = 0,
        groups: Sequence[Group] | None = None,
        offload: bool = False,
    ) -> None:
        check_tokens(model, blocks)
        if not 0 <= skip < blocks.shape[1]:
            raise ValueError(
                f"blocks of {blocks.shape[1]} tokens cannot skip their first {skip}; give 0 to"
                f" {blocks.shape[1] - 1}"
            )
        anatomy = Anatomy.of(model)
        self.layers = [layer.module for layer in anatomy.layers]
        self._all = anatomy.groups if groups is None else groups
        self._groups = _by_layer(anatomy, self._all, skip)
        self._offload = offload or is_placed(model)
        self._calls: list[list[LayerCall]] = []
        self._hidden: list[Tensor] = []
        for part in torch.split(blocks.to(home(model)), batch):
            calls = layer_calls(model, part)
            (hidden,) = (call.hidden for call in calls if call.hidden is not None)
            self._hidden.append(self._put_by(hidden))
            self._calls.append([call._replace(hidden=None) for call in calls])
        self._passed: list[dict[Passed, Any]] = [{} for _ in self._calls]
        self._outputs: list[Tensor] = []
        self._found: dict[tuple[type[Any], int], Any] = {}
        self.reached: dict[int, int] = {}
        self._changing = changing
        self._skip, self._batch = skip, batch
        self.blocks = blocks
        self.tokens = blocks.numel()

    def __iter__(self) -> Iterator[int]:
        for layer, groups in enumerate(self._groups):
            self._outputs, self._found = [], {}
            with present(self.layers[layer]):
                for group in groups:
                    yield group.number
                if self._changing or not self._outputs:
                    self.pass_through(layer)
            self._hidden = self._outputs

    def device(self, index: int) -> torch.device:
        """Returns the device on which a group computes, and on which its moments are."""
        return device_of(self._all[index].down.module)

    @torch.no_grad()
    def moments(self, index: int) -> Moments:
        """Measures the second moments of a group of the current layer: zeros without a token.

        Raises:
            ValueError: the activations are not finite.
        """
        group = self._all[index]
        return self._sums(group, _Sums).means(group.layer, group.down.tensor.dtype)

    @torch.no_grad()
    def energies(self, index: int) -> Energies:
        """Measures the energies of a group of the current layer: zeros without a token.

        Raises:
            ValueError: the activations are not finite.
        """
        group = self._all[index]
        return self._sums(group, _EnergySums).means(group.layer, group.down.tensor.dtype)

    @torch.no_grad()
    def all_moments(self, groups: Sequence[Group]) -> dict[int, Moments]:
        """Measures groups of the current layer anew, by number, in one pass of their own.

        For callers that change for a while what passes through them.

        Raises:
            ValueError: the activations are not finite.
        """
        sums, _ = self._summed(groups, _Sums)
        return {
            group.number: sums[group.number].means(group.layer, group.down.tensor.dtype)
            for group in groups
        }

    def pass_through(self, layer: int) -> list[Tensor]:
        """Passes all batches through the current layer, for callers that hook into its modules.

        Returns:
            The hidden states behind the layer, (blocks, tokens, d_model) of each batch.
        """
        self._outputs = [self._through(layer, part) for part in range(len(self._calls))]
        return self._outputs

    def groups(self, layer: int) -> Sequence[Group]:
        """Returns the groups of a decoder layer."""
        return self._groups[layer]

    def _sums(self, group: Group, kind: type[_Kind]) -> _Kind:
        """Hands out what one pass through the layer has summed up for all of its groups."""
        if (kind, group.number) not in self._found:
            sums, self._outputs = self._summed(self._groups[group.layer], kind)
            self.reached = {number: summed.tokens for number, summed in sums.items()}
            self._found |= {(kind, number): summed for number, summed in sums.items()}
        return cast(_Kind, self._found.pop((kind, group.number)))

    def _summed(
        self, groups: Sequence[Group], kind: type[_Kind]
    ) -> tuple[dict[int, _Kind], list[Tensor]]:
        """Passes all batches through a layer: sums of some of its groups, and its outputs."""
        sums = {group.number: kind(group.width, self.device(group.number)) for group in groups}
        outputs = []
        for part in range(len(self._calls)):
            output, seen = self._measured(groups[0].layer, part)
            outputs.append(output)
            for number, (h, _) in seen.items():
                if number in sums:
                    sums[number].add(h)
        return sums, outputs

    def _measured(self, layer: int, part: int) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Passes one batch through a layer.

        Returns:
            Hidden states behind the layer; then of each group that tokens pass through, in float32
            and without the skipped tokens, h and |W h|^2 of each token.
        """
        seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        groups = self._groups[layer]

        def see(place: int, h: Tensor, written: Tensor) -> None:
            # Summed up at once: Falcon adds its attention's output to this tensor in place.
            energies = written.float().square().sum(-1).flatten()
            seen.setdefault(groups[place].number, []).append((h.flatten(0, -2), energies))

        with observing([group.down for group in groups], see):
            output = self._through(layer, part)
        return output, {
            number: (self._counted(part, [h for h, _ in found]), self._counted(part, energies))
            for number, found in seen.items()
            if (energies := [energies for _, energies in found])
        }

    def _counted(self, part: int, pieces: list[Tensor]) -> Tensor:
        """Joins the tokens of a batch, in float32, without the skipped ones."""
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self._skip:
            blocks = len(self._hidden[part])
            rows = rows.reshape(blocks, -1, *rows.shape[1:])[:, self._skip :].flatten(0, 1)
        return rows.float()

    @torch.no_grad()
    def _through(self, layer: int, part: int) -> Tensor:
        call = self._calls[part][layer].filled(self._passed[part])
        if not call.called:
            return self._hidden[part]
        hidden = self._hidden[part].to(device_of(self.layers[layer]))
        out = self.layers[layer](hidden, *call.args, **call.kwargs)
        result, *more = out if isinstance(out, tuple) else (out,)
        self._passed[part] |= {Passed(layer, place): one for place, one in enumerate(more)}
        assert isinstance(result, Tensor)
        return self._put_by(result)

    def _put_by(self, hidden: Tensor) -> Tensor:
        return hidden.cpu() if self._offload else hidden


def _by_layer(anatomy: Anatomy, groups: Sequence[Group], skip: int) -> list[list[Group]]:
    """The groups of each decoder layer. Raises as `LayerWalk`."""
    places = {layer.module: layer.index for layer in anatomy.layers}
    found: list[list[Group]] = [[] for _ in places]
    for group in groups:
        if group.module not in places:
            raise UnsupportedArchitecture(
                f"activations of a {type(anatomy.model).__name__} are not measured, for"
                f" {group.path} lies outside of the decoder layers; choose channels from the"
                " weights alone (`moments` none)"
            )
        if skip and group.expert is not None:
            raise UnsupportedArchitecture(
                "tokens reach experts in another order than the text's, so none can be skipped;"
                " give `skip` 0"
            )
        found[places[group.module]].append(group)
    return found


def ffn_moments(
    model: PreTrainedModel,
    blocks: Int[Tensor, "n tokens"],
    *,
    batch: int = 4,
    skip: int = 0,
) -> Iterator[Moments]:
    """Yields the moments of each group of an unchanged model, first to last.

    Arguments and errors are those of `LayerWalk`.
    """
    walk = LayerWalk(model, blocks, batch=batch, skip=skip)
    for index in walk:
        yield walk.moments(index)


@torch.no_grad()
def paired_moments(dense: LayerWalk, pruned: LayerWalk, index: int) -> tuple[Moments, Target]:
    """Measures a group of two walks' layer: the pruned model's moments, and the dense target.

    Serves the sequential refit (docs/methods.md, section 5): iterate over both walks at once, the
    pruned one with `changing=True`, and narrow the pruned model's layer after this call. Holds two
    d_ff x d_ff matrices.

    Args:
        dense: over the dense model.
        pruned: over the model being pruned, with the same blocks, batch and `skip`; this layer
            still has all its channels.
        index: number of the group.

    Raises:
        ValueError: blocks, batch, skip or width differ, or activations are not finite.
        UnsupportedArchitecture: the group is an expert's, to which the two models route other
            tokens, or no text passes it.
    """
    if (dense._batch, dense._skip) != (pruned._batch, pruned._skip) or not torch.equal(
        dense.blocks.cpu(), pruned.blocks.cpu()
    ):
        raise ValueError(
            "activations are paired token by token: give both walks the same blocks, batch and skip"
        )
    group, device = pruned._all[index], pruned.device(index)
    d_ff, before = group.width, dense._all[index].width
    if before != d_ff:
        raise ValueError(
            f"layer {group.layer} has {before} channels in the dense model and {d_ff} in the pruned"
            " one; measure it before it is cut"
        )
    if group.expert is not None or not pruned._calls[0][group.layer].called:
        raise UnsupportedArchitecture(
            f"the tokens that reach {group.path} in the dense and in the pruned model cannot be"
            " paired; refit without dense targets (`dense_targets` False)"
        )
    sums, cross, mean = (
        _Sums(d_ff, device),
        torch.zeros(d_ff, d_ff, device=device),
        torch.zeros(d_ff, device=device),
    )
    energy = torch.zeros((), dtype=torch.float64, device=float64_device(device))
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part in range(len(pruned._calls)):
        dense_output, dense_seen = dense._measured(group.layer, part)
        pruned_output, pruned_seen = pruned._measured(group.layer, part)
        (t, written), (h, _) = dense_seen[index], pruned_seen[index]
        t = t.to(device)
        sums.add(h)
        cross.addmm_(t.T, h)
        mean.add_(t.sum(0))
        energy += written.to(energy).sum()
        outputs[0].append(dense_output)
        outputs[1].append(pruned_output)
    dense._outputs, pruned._outputs = outputs
    return sums.means(group.layer, group.down.tensor.dtype), Target(
        cross.div_(sums.tokens), mean.div_(sums.tokens), float(energy) / sums.tokens
    )
