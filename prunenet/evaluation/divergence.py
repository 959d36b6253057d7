"""KL(dense || pruned) of next-token distributions: what a cut costs, measured against the model
itself (docs/methods.md, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.groups import Group, laid_out
from prunenet.models.hooks import calling
from prunenet.models.layers import check_tokens
from prunenet.models.surgery import masking
from prunenet.runtime.placement import home, present
from prunenet.runtime.products import with_fast_products

Downs = Callable[[int, Tensor], Tensor]
"""(number of a group, its dense down matrix (d_model, d_ff)) -> that of the cut group, with zeros
in the columns of dropped channels.
"""

Masks = Sequence[Bool[Tensor, " _"]]
"""One mask a layer, True where a unit stays."""
Cuts = Sequence[tuple[Masks, Masks | None] | tuple[Masks, Masks | None, Tensor | None]]
"""Each the masks of channels, of groups of heads or None, and of layers."""
Context = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Inside, the model that it yields is the cut one."""
_BLOCKS = 4  # per forward pass


def divergence(
    model: PreTrainedModel, downs: Downs, blocks: Int[Tensor, "n tokens"], *, unscored: int = 0
) -> float:
    """Measures the KL(dense || cut) of one way to cut a model, in nats per token; arguments and
    errors as for `divergences`.
    """
    return float(divergences(model, [downs], blocks, unscored=unscored)[0])


@torch.no_grad()
def divergences(
    model: PreTrainedModel,
    ways: Sequence[Downs],
    blocks: Int[Tensor, "n tokens"],
    *,
    unscored: int = 0,
) -> Float[Tensor, " ways"]:
    """Measures the KL(dense || cut), in nats per token, of several ways to cut a model. The model
    is never changed.

    A channel is gone once its column of the down matrix is zero, so a cut is stated by down
    matrices alone.

    Args:
        model: the dense model.
        ways: each gives the down matrices of a cut model.
        blocks: token ids, without padding.
        unscored: positions at the start of each block whose predictions do not count: 1 where
            blocks begin with BOS (`CalibrationSet.bos`).

    Raises:
        ValueError: blocks that the model cannot read, no position left to score, or logits that are
            not finite.
    """
    return _compared(model, [with_downs(model, way) for way in ways], blocks, unscored).kl


def with_downs(model: PreTrainedModel, way: Downs) -> Context:
    """A context in which a model computes with the down matrices of a cut; no weight changes."""
    places = Anatomy.of(model).down_places()

    @contextmanager
    def context() -> Iterator[PreTrainedModel]:
        with calling({place[0]: _cut(place, groups, way) for place, groups in places.items()}):
            yield model

    return context


@torch.no_grad()
def model_divergences(
    model: PreTrainedModel,
    cuts: Sequence[Context],
    blocks: Int[Tensor, "n tokens"],
    *,
    unscored: int = 0,
) -> Float[Tensor, " cuts"]:
    """Measures the KL(dense || cut), in nats per token, of any models that contexts yield; other
    arguments and errors as for `divergences`.
    """
    return _compared(model, cuts, blocks, unscored).kl


class Distances(NamedTuple):
    """How far next-token distributions of cut models are from the dense model's, each (cuts,).

    Attributes:
        kl: KL(dense || cut), in nats per token.
        tv: total variation, half the summed differences of probabilities, in [0, 1].
        flips: share of the tokens whose likeliest successor changes, in [0, 1].
    """

    kl: Float[Tensor, " cuts"]
    tv: Float[Tensor, " cuts"]
    flips: Float[Tensor, " cuts"]


@torch.no_grad()
def mask_distances(
    model: PreTrainedModel,
    cuts: Cuts,
    blocks: Int[Tensor, "n tokens"],
    *,
    unscored: int = 0,
) -> Distances:
    """Measures all three distances of masks; arguments and errors as for `mask_divergences`."""
    return _compared(model, [partial(masking, model, *cut) for cut in cuts], blocks, unscored)


def mask_divergences(
    model: PreTrainedModel,
    cuts: Cuts,
    blocks: Int[Tensor, "n tokens"],
    *,
    unscored: int = 0,
) -> Float[Tensor, " cuts"]:
    """Measures the KL(dense || cut) of masks, in nats per token; other arguments and errors as for
    `divergences` and `prunenet.models.surgery.masking`.
    """
    return mask_distances(model, cuts, blocks, unscored=unscored).kl


@with_fast_products
def _compared(
    model: PreTrainedModel, contexts: Sequence[Context], blocks: Tensor, unscored: int
) -> Distances:
    check_tokens(model, blocks)
    if not 0 <= unscored < blocks.shape[1]:
        raise ValueError(
            f"`unscored` must be in [0, {blocks.shape[1]}) for blocks of {blocks.shape[1]} tokens,"
            f" got {unscored}"
        )
    total = torch.zeros(3, len(contexts), device=home(model))
    for part in torch.split(blocks.to(total.device), _BLOCKS):
        expected = _log_probabilities(model, part, unscored)
        if not bool(torch.isfinite(expected).all()):
            raise ValueError(
                f"the model's logits are not finite: damaged weights, or {model.dtype} overflows"
            )
        for number, context in enumerate(contexts):
            with context() as cut:
                found = _log_probabilities(cut, part, unscored)
            total[0, number] += (expected.exp() * (expected - found)).sum()
            total[1, number] += (expected.exp() - found.exp()).abs().sum() / 2
            total[2, number] += (expected.argmax(-1) != found.argmax(-1)).sum()
    return Distances(*(total / (len(blocks) * (blocks.shape[1] - unscored))))


def _log_probabilities(
    model: PreTrainedModel, ids: Int[Tensor, "n tokens"], unscored: int
) -> Float[Tensor, "n scored vocabulary"]:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, unscored:]
    return logits.float().log_softmax(-1)


def _cut(
    place: tuple[nn.Module, str], groups: Sequence[Group], way: Downs
) -> Callable[..., object]:
    """The forward pass of a module with the cut output matrices of its groups."""
    module, name = place

    def forward(*args: Any, **kwargs: Any) -> object:
        with present(module):
            own, downs = getattr(module, name), [group.down for group in groups]
            cut = laid_out(downs, [way(group.number, group.read().down) for group in groups])
            if isinstance(module, nn.Linear):
                return F.linear(args[0], cut, module.bias)
            setattr(module, name, nn.Parameter(cut, requires_grad=False))
            try:
                return type(module).forward(module, *args, **kwargs)
            finally:
                setattr(module, name, own)

    return forward
