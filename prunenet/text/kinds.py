"""Kinds of self-written text: ways to begin, so that what a model knows has its share
(docs/methods.md, section 17).

Text from the document start alone is mostly technical prose. A random token behind the start opens
on names, news and code. Openings of several tokens, of which each cluster gives as many, keep kinds
of writing that are rare in both. Nothing external is read: the openings are the model's own,
clustered by its own hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from scipy.cluster.vq import kmeans2  # type: ignore[import-untyped]
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.layers import decoder_layers
from prunenet.runtime.placement import home
from prunenet.text.generate import SamplingOptions, generate_blocks

Kind = Literal["documents", "openings", "clusters"]
"""How a sequence begins: at the document start, hot; behind a random token; behind an opening."""
KINDS: tuple[Kind, ...] = ("documents", "openings")
"""What is written by default."""
OPENING = 8
"""Tokens of an opening that is clustered."""
_SPREAD = 8  # openings drawn for each one that is taken
_EACH = 5  # openings taken of a cluster
_HEAT = 1.5
_BATCH = 64  # openings read at once


def written(
    model: PreTrainedModel,
    start: int,
    known: int,
    sampling: SamplingOptions,
    kinds: tuple[Kind, ...] = KINDS,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "n tokens"]:
    """Writes as many sequences of each kind, in turn: row i is of kind i modulo their number.

    Args:
        model: a causal LM.
        start: id of the document start.
        known: ids of tokens that may open a text are in [0, known).
        sampling: of text from the start; its number of sequences is that of each kind. Behind
            openings text is sampled as the model is: temperature 1, no nucleus.
        kinds: which.
        progress: called with (tokens sampled, tokens in all) of a sequence of each kind.

    Raises:
        ValueError: see `generate_blocks`.
    """
    plain = replace(sampling, hot=1.0, temperature=1.0, top_p=1.0)
    rows = []
    for number, kind in enumerate(kinds):
        asked = replace(plain if kind != "documents" else sampling, seed=sampling.seed + number)
        prefixes = _prefixes(model, start, known, kind, sampling)
        told = None if progress is None else _share_of(progress, number, len(kinds))
        rows.append(generate_blocks(model, start, asked, prefixes=prefixes, progress=told))
    return torch.stack(rows, 1).flatten(0, 1).cpu()


def spread_openings(
    model: PreTrainedModel, start: int, known: int, count: int, seed: int, length: int = OPENING
) -> Int[Tensor, "count length"]:
    """Openings that the model writes hot, as many of each cluster as there are.

    Half of those drawn begin at the document start, half behind a random token. k-means clusters
    their mean hidden states in the middle of the model (centred, of unit length).

    Args:
        model, start, known: as for `written`.
        count: openings, at least 1.
        seed: of the sampling and of k-means.
        length: tokens of each.

    Raises:
        ValueError: see `generate_blocks`.
    """
    generator = torch.Generator().manual_seed(seed)
    each = max(count * _SPREAD // 2, 1)
    hot = SamplingOptions(
        sequences=each,
        batch=each,
        tokens=length + 1,
        seed=seed,
        keep=1.0,
        hot=_HEAT,
        temperature=_HEAT,
        top_p=1.0,
    )
    tokens = torch.randint(known, (each, 1), generator=generator)
    drawn = torch.cat(
        (
            generate_blocks(model, start, hot),
            generate_blocks(model, start, replace(hot, hot=1.0, temperature=1.0), prefixes=tokens),
        )
    )
    labels = _clusters(_places(model, drawn), max(1, round(count / _EACH)), seed)
    # In turn through the clusters: the first of each, the second of each, ...
    order = torch.randperm(len(drawn), generator=generator)
    places = [order[labels[order] == label] for label in range(int(labels.max()) + 1)]
    turns = [
        int(place[turn]) for turn in range(len(drawn)) for place in places if turn < len(place)
    ]
    return drawn[torch.tensor(turns[:count]), 1:].cpu()


def _prefixes(
    model: PreTrainedModel, start: int, known: int, kind: Kind, sampling: SamplingOptions
) -> Int[Tensor, "n k"] | None:
    """What stands behind the start of each sequence."""
    if kind == "documents":
        return None
    if kind == "clusters":
        length = min(OPENING, max(sampling.tokens - 3, 1))
        return spread_openings(model, start, known, sampling.sequences, sampling.seed, length)
    generator = torch.Generator().manual_seed(sampling.seed)
    return torch.randint(known, (sampling.sequences, 1), generator=generator)


@torch.no_grad()
def _places(model: PreTrainedModel, ids: Int[Tensor, "n tokens"]) -> Float[Tensor, "n d_model"]:
    """The mean hidden state of each sequence behind its first token, in the middle of the model."""
    middle = len(decoder_layers(model)) // 2
    means = []
    for part in torch.split(ids.to(home(model)), _BATCH):
        states = model(input_ids=part, output_hidden_states=True, use_cache=False).hidden_states
        means.append(states[middle][:, 1:].mean(1).double().cpu())
    centred = torch.cat(means)
    centred -= centred.mean(0)
    return torch.nn.functional.normalize(centred, dim=-1)


def _clusters(places: Float[Tensor, "n d_model"], count: int, seed: int) -> Int[Tensor, " n"]:
    """The number of each row's cluster."""
    if count < 2:
        return torch.zeros(len(places), dtype=torch.long)
    _, labels = kmeans2(places.numpy(), count, minit="++", seed=seed)
    return torch.from_numpy(labels).long()


def _share_of(
    progress: Callable[[int, int], None], number: int, kinds: int
) -> Callable[[int, int], None]:
    return lambda done, of: progress(number * of + done, kinds * of)
