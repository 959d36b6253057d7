"""Estimates second moments of the residual stream in front of each layer from the weights alone.

The model behind the estimate is described in `prunenet.features.from_weights`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from prunenet.models.layers import FFN, EmbeddingMatrix

_TINY, _ROWS = 1e-30, 8192
# columns of a symmetric product that are computed at once; a narrower matrix is multiplied whole
_BLOCK = 768
_Square = Float32[Tensor, "d_model d_model"]


class ResidualStream:
    """Holds second moments of the residual stream, updated layer by layer.

    Memory holds d_model x d_model matrices only.

    Args:
        table: input embeddings.
        head: output embeddings; None where they are tied.

    Attributes:
        moment: second moment of the embeddings plus the writes of all FFNs read so far.
        mean: mean embedding, scaled to norm 1.
        energy: mean squared norm of the embeddings.
        embedding, unembedding: second moments with trace d_model; the same tensor where tied.
        attention: sum of W_o W_o^T over the layers read so far.

    Raises:
        ValueError: an embedding is NaN or infinite.
    """

    def __init__(self, table: EmbeddingMatrix, head: EmbeddingMatrix | None) -> None:
        self.moment, mean = embedding_moments(table)
        self.energy = float(self.moment.trace())
        self.mean = torch.nn.functional.normalize(mean, dim=0)
        self.embedding = self.unembedding = normalised(self.moment)
        # a head of another width (reformer's reads both streams) is not read
        if head is not None and head.shape[1] == table.shape[1]:
            self.unembedding = normalised(embedding_moments(head)[0])
        self.attention = torch.zeros_like(self.moment)

    def read_attention(self, ffn: FFN) -> None:
        """Moves to the layer's device and adds what its attention writes.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        # Embeddings of another width (opt-350m): the projection to d_model is not read.
        if len(self.moment) != ffn.d_model:
            self.moment = self.embedding = self.unembedding = torch.eye(ffn.d_model)
            self.mean, self.attention = torch.zeros(ffn.d_model), torch.zeros_like(self.moment)
        for name in ("moment", "mean", "embedding", "unembedding", "attention"):
            setattr(self, name, getattr(self, name).to(ffn.up.device))
        if ffn.attention_out is not None:
            rows = ffn.attention_out.float()
            check_weights(f"weights of layer {ffn.index}", rows)
            self.attention = self.attention + self_product(rows.T)

    def read_ffn(self, ffn: FFN, energy: Float32[Tensor, " d_ff"]) -> None:
        """Adds what the FFN writes, given the expected energy E[h^2] of each channel."""
        columns = ffn.down.float() * (energy * ffn.share).sqrt()
        self.moment = self.moment + self_product(columns.T)


def embedding_moments(
    table: EmbeddingMatrix,
) -> tuple[Float32[Tensor, "width width"], Float32[Tensor, " width"]]:
    """Computes the mean outer product and the mean of the rows.

    Reads a slab at a time: a table is never held whole in float32.

    Raises:
        ValueError: an entry is NaN or infinite, or squares overflow float32.
    """
    moment = torch.zeros(table.shape[1], table.shape[1], device=table.device)
    mean = torch.zeros(table.shape[1], device=table.device)
    for start in range(0, len(table), _ROWS):
        rows = table[start : start + _ROWS].float()
        check_weights("the embeddings", rows)
        moment += self_product(rows)
        mean += rows.sum(0)
    if not bool(torch.isfinite(moment.trace())):
        raise ValueError(
            "the embeddings are too large: their squares overflow float32; the checkpoint is"
            " damaged, load another"
        )
    return moment / len(table), mean / len(table)


def check_weights(what: str, *weights: Tensor) -> None:
    """Raises ValueError where a weight is NaN or infinite; `what` begins the sentence."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights):
        raise ValueError(f"{what} are NaN or infinite; the checkpoint is damaged, load another")


def normalised(moment: _Square) -> _Square:
    """Scales a second moment to a trace of d_model; zero stays zero."""
    return moment * (len(moment) / moment.trace().clamp_min(_TINY))


def self_product(rows: Float32[Tensor, "n width"]) -> Float32[Tensor, "width width"]:
    """Returns R^T R, of which the lower triangle is mirrored and not computed.

    Takes 0.6 of a full product's time at a width of 4096.
    """
    width = rows.shape[1]
    if width <= _BLOCK:
        return rows.T @ rows
    result = rows.new_empty(width, width)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        block = rows[:, :stop].T @ rows[:, start:stop]
        result[:stop, start:stop] = block
        result[start:stop, :start] = block[:start].T
    return result


def quadratic(
    rows: Float32[Tensor, "n width"], matrix: Float32[Tensor, "width width"]
) -> Float32[Tensor, " n"]:
    """Returns r^T M r of each row r for a symmetric M.

    Counts the part above the diagonal twice, which takes 0.6 of a full product's time.
    """
    width = rows.shape[1]
    if width <= _BLOCK:
        return ((rows @ matrix) * rows).sum(-1)
    total = rows.new_zeros(len(rows))
    for start in range(0, width, _BLOCK):
        block = slice(start, start + _BLOCK)
        columns = matrix[: block.stop, block].clone()
        columns[:start] *= 2
        total += ((rows[:, : block.stop] @ columns) * rows[:, block]).sum(-1)
    return total
