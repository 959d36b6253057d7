"""All weights of a model's decoder layers, trained in float32 and rounded once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prunenet.models.layers import decoder_layers


def opened(model: PreTrainedModel, embeddings: bool) -> PreTrainedModel:
    """A copy in float32 (or better) whose decoder layers can be trained; it computes the same.

    Weights that stay as they are lie where the given model's lie, if they are in float32.

    Args:
        model: of any dtype.
        embeddings: whether token embeddings and LM head can be trained too; tied ones stay tied.
    """
    modules: list[Any] = [decoder_layers(model)]
    if embeddings:
        tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
        modules += [table for table in tables if table is not None]
    learned = {id(p) for module in modules for p in module.parameters()}
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        own = parameter.detach().to(dtype, copy=id(parameter) in learned)
        copies[id(parameter)] = nn.Parameter(own, requires_grad=id(parameter) in learned)
    return copy.deepcopy(model, copies)


@torch.no_grad()
def closed(student: PreTrainedModel, given: PreTrainedModel) -> PreTrainedModel:
    """The model of `opened`, its weights rounded to the dtypes of the given one; in place."""
    for own, before in zip(student.parameters(), given.parameters(), strict=True):
        own.data = own.to(before.dtype) if own.requires_grad else before.data
    return student.requires_grad_(True)
