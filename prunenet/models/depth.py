"""Whole decoder layers: skipping them in a model, and cutting them from it.

A layer can go where the residual stream passes it and nothing else depends on it or on its number.
That is not assumed: the class is built from the new configuration, and its tensors and what its
layers know of themselves must be those of the layers that stay; then both models' logits are
compared. Shared keys and values, tables of all layers and schedules by number fail there.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models import modeling
from prunenet.models.anatomy import Anatomy, decoder_layers
from prunenet.models.architectures import Architecture, UnsupportedArchitecture
from prunenet.models.hooks import skipping
from prunenet.models.layers import probe_tokens
from prunenet.models.rebuilt import forget_quantisation
from prunenet.models.surgery import check_built, restate_modules
from prunenet.runtime.placement import check_together, home, shared_copy

COUNT = "num_hidden_layers"
_PLAIN = (bool, int, float, str, type(None))
_TOLERANCE = 0.02
"""Of the largest logit: how far apart two ways to compute may be, bfloat16 included."""


@torch.no_grad()
def without_layers(model: PreTrainedModel, keep: Bool[Tensor, " layers"]) -> PreTrainedModel:
    """A model without the decoder layers that a mask drops: an ordinary one of the same class.

    The given one stays as it was; parameters are the same tensors in both models.

    Args:
        model: a causal LM on one device.
        keep: mask of its decoder layers; one at least stays.

    Raises:
        UnsupportedArchitecture: no row for the model's type, or its layers depend on one another.
        ValueError: a mask of another length, or one that keeps nothing; or the model is placed.
    """
    check_together(model, "removing layers")
    anatomy = Anatomy.of(model)
    anatomy.check_whole()
    count = len(anatomy.layers)
    if keep.shape != (count,) or not bool(keep.any()):
        raise ValueError(
            f"a mask of layers has {count} booleans here and keeps one layer at least, got"
            f" {tuple(keep.shape)} that keep {int(keep.sum())}"
        )
    numbers = keep.nonzero().flatten().tolist()
    narrow = shared_copy(model)
    _restate(narrow.config, len(keep), numbers)
    layers = decoder_layers(narrow, anatomy.architecture)
    parent, _, own = anatomy.architecture.layers.rpartition(".")
    stay = nn.ModuleList(layers[number] for number in numbers)
    setattr(narrow.get_submodule(parent), own, stay)
    narrow.__dict__.pop("_weight_conversions", None)
    forget_quantisation(narrow)
    try:
        made = check_built(narrow)
    except Exception as error:  # each class has its own checks
        raise _dependent(model, str(error)) from None
    _check_alike(narrow, made, anatomy.architecture, numbers)
    restate_modules(narrow, made)
    _check_function(model, narrow, keep)
    return narrow


def _restate(config: Any, count: int, numbers: list[int]) -> None:
    """Makes a configuration state some of its layers: their number, and lists with an entry each.

    Args:
        config: changed in place.
        count: layers so far.
        numbers: of those that stay, rising.
    """
    text = config.get_text_config()
    own = modeling.overrides(text) if getattr(text, "per_layer_config", None) else {}
    if own:
        text.per_layer_config = None
    for name, value in list(vars(text).items()):
        # ids of tokens may be as many by chance
        if isinstance(value, list | tuple) and len(value) == count and "token" not in name:
            setattr(text, name, type(value)(value[number] for number in numbers))
    setattr(text, COUNT, len(numbers))
    if own:
        placed = {new: own[old] for new, old in enumerate(numbers) if old in own}
        text.per_layer_config = placed or None


def _check_alike(
    narrow: PreTrainedModel, made: PreTrainedModel, row: Architecture, numbers: list[int]
) -> None:
    """Raises UnsupportedArchitecture where a layer newly built at its new place knows other things
    of itself than the layer that is going to stand there, but for its number.
    """
    fresh = dict(made.named_modules(remove_duplicate=False))
    for after, (before, layer) in enumerate(zip(numbers, decoder_layers(narrow, row), strict=True)):
        for name, module in layer.named_modules(remove_duplicate=False):
            path = f"{row.layers}.{after}.{name}".rstrip(".")
            new = vars(fresh[path])
            for field, value in vars(module).items():
                known = new.get(field, value)
                hidden = field.startswith("_") or field == "training"
                if type(value) not in _PLAIN or hidden or known == value:
                    continue
                if (type(value), value, known) != (int, before, after):
                    raise _dependent(
                        narrow,
                        f"layer {before} has the {field} {value} and in place {after} {known}",
                    )


def _check_function(
    model: PreTrainedModel, narrow: PreTrainedModel, keep: Bool[Tensor, " layers"]
) -> None:
    """Raises UnsupportedArchitecture unless both models compute the same, and the narrow one with a
    cache what it computes without.
    """
    ids = probe_tokens(model, home(model))
    training = model.training, narrow.training
    try:
        model.train(False), narrow.train(False)
        with skipping(list(decoder_layers(model)), keep):
            wanted = _logits(model, ids)
        whole = _logits(narrow, ids)
        split = ids.shape[1] // 2
        first = narrow(input_ids=ids[:, :split], use_cache=True)
        rest = narrow(input_ids=ids[:, split:], past_key_values=first.past_key_values)
    finally:
        model.train(training[0]), narrow.train(training[1])
    cached = torch.cat((first.logits, rest.logits), 1).float()
    for found, what in ((whole, "without"), (cached, "with")):
        if float((found - wanted).abs().max()) > _TOLERANCE * float(wanted.abs().max()):
            raise _dependent(
                model, f"the logits {what} a cache are not those of the skipped layers"
            )


def _logits(model: PreTrainedModel, ids: Tensor) -> Float[Tensor, "n tokens vocabulary"]:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _dependent(model: PreTrainedModel, why: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"whole layers of a {type(model).__name__} cannot go, for its layers depend on one another:"
        f" {why}; cut channels or heads"
    )
