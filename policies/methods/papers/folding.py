"""Model folding: merges channels instead of removing them. Needs the weights alone.

Source: Wang, Sikic, Thiele and Saukh, "Forget the Data and Fine-Tuning! Just Fold the Network to
Compress", ICLR 2025, arXiv 2502.10216; docs/methods.md, section 6. Channels are clustered by their
weights (gate row, up row, down column, concatenated); input rows of a cluster are replaced by their
mean, output columns by their sum.

What differs:
- k-means (k-means++ start, one run), every layer to its given width; the authors' language-model
  code clusters agglomeratively, and folds layers and ratios picked by hand;
- no repair of variances: the FFN of a language model has no normalisation behind its channels;
- biases of channels are averaged, and count in the distance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from prunenet.models.layers import FFN
from prunenet.policies.methods.evidence.measurements import Evidence


def merge(evidence: Evidence, widths: Sequence[int]) -> list[FFN]:
    """Merges the FFN of each layer to its width.

    Args:
        evidence: its weights are read; its seed starts k-means. Distances of a layer take d_ff^2
            float64.
        widths: clusters of each layer, in [1, d_ff]; at d_ff the layer is the dense one with its
            channels in another order.

    Raises:
        ValueError: not one width a layer, one out of range, or weights that are not finite.
    """
    generator = evidence.generator()
    return [
        folded(ffn, kmeans(points(ffn), k, generator), k)
        for ffn, k in zip(evidence.ffns, widths, strict=True)
    ]


def points(ffn: FFN) -> Float[Tensor, "d_ff features"]:
    """Concatenates each channel's rows, down column and biases."""
    rows = [t.float() for t in (ffn.gate, ffn.up, ffn.down.T) if t is not None]
    biases = [t.float().unsqueeze(1) for t in (ffn.gate_bias, ffn.up_bias) if t is not None]
    return torch.cat(rows + biases, dim=1)


def folded(ffn: FFN, labels: Int[Tensor, " d_ff"], width: int) -> FFN:
    """Makes an FFN with one channel a cluster.

    It has the mean of the cluster's input rows and biases, and the sum of its output columns.

    Args:
        ffn: the dense one.
        labels: cluster of each channel, in [0, width); none may be empty.
        width: how many clusters.
    """
    labels = labels.to(ffn.up.device)
    sizes = torch.bincount(labels, minlength=width)

    def mean(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        sums = rows.new_zeros(width, *rows.shape[1:], dtype=torch.float64).index_add_(
            0, labels, rows.double()
        )
        return (sums / sizes.view(-1, *[1] * (rows.dim() - 1))).to(rows.dtype)

    up = mean(ffn.up)
    assert up is not None
    sums = ffn.down.new_zeros(len(ffn.down), width, dtype=torch.float64)
    return FFN(
        index=ffn.index,
        gate=mean(ffn.gate),
        up=up,
        down=sums.index_add_(1, labels, ffn.down.double()).to(ffn.down.dtype),
        gate_bias=mean(ffn.gate_bias),
        up_bias=mean(ffn.up_bias),
        down_bias=ffn.down_bias,
    )


def kmeans(
    points: Float[Tensor, "n features"],
    k: int,
    generator: torch.Generator,
    *,
    iterations: int = 100,
) -> Int[Tensor, " n"]:
    """Clusters points by k-means.

    Works on inner products, so that a step costs n^2 whatever the number of features.

    Args:
        points: one a row, finite.
        k: clusters, in [1, n].
        generator: on the CPU; draws the k-means++ start.
        iterations: most steps of Lloyd's algorithm.

    Returns:
        The cluster of each point, in [0, k); none is empty.

    Raises:
        ValueError: k out of range, or points that are not finite.
    """
    n = len(points)
    if not 1 <= k <= n:
        raise ValueError(f"{n} channels can be folded into 1 to {n}, got {k}")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("k-means needs finite points: weights or hidden states are damaged")
    gram = points.double() @ points.double().T
    centres = _plus_plus(gram.cpu(), k, generator).to(gram.device)
    squares = gram.diagonal()
    labels = _filled(
        (squares[centres] - 2 * gram[:, centres]).argmin(1),
        -squares + 2 * gram[:, centres].amax(1),
        k,
    )
    for _ in range(iterations):
        sizes = torch.bincount(labels, minlength=k).double()
        to_centre = gram.new_zeros(n, k).index_add_(1, labels, gram) / sizes
        own = to_centre.gather(1, labels[:, None]).squeeze(1)
        centre_squares = gram.new_zeros(k).index_add_(0, labels, own) / sizes
        # without the point's own square, which is the same for all centres
        distances = centre_squares - 2 * to_centre
        nearest, following = distances.min(1)
        # A point stays where it is unless another centre is truly nearer: rounding must not make
        # two centres swap for ever.
        stays = distances.gather(1, labels[:, None]).squeeze(1) <= nearest + 1e-12 * squares
        following = _filled(torch.where(stays, labels, following), nearest + squares, k)
        if following.equal(labels):
            break
        labels = following
    return labels


def _plus_plus(
    gram: Float64[Tensor, "n n"], k: int, generator: torch.Generator
) -> Int[Tensor, " k"]:
    """Draws k different points in proportion to their squared distance from those before
    (k-means++).
    """
    squares, chosen = gram.diagonal(), torch.zeros(len(gram), dtype=torch.bool)
    distances = torch.ones_like(squares)
    found = []
    for step in range(k):
        weights = distances.masked_fill(chosen, 0)
        if weights.sum() <= 0:  # only copies of chosen points are left
            weights = (~chosen).double()
        point = int(torch.multinomial(weights, 1, generator=generator))
        found.append(point)
        chosen[point] = True
        here = (squares + squares[point] - 2 * gram[point]).clamp_min(0)
        distances = here if step == 0 else torch.minimum(distances, here)
    return torch.tensor(found)


def _filled(
    labels: Int[Tensor, " n"], distances: Float64[Tensor, " n"], k: int
) -> Int[Tensor, " n"]:
    """Moves the point farthest from its own centre into each empty cluster.

    Takes points only from clusters of two or more.
    """
    labels, sizes = labels.clone(), torch.bincount(labels, minlength=k)
    order = iter(distances.argsort(descending=True, stable=True).tolist())
    for empty in (sizes == 0).nonzero().flatten().tolist():
        point = next(i for i in order if sizes[labels[i]] > 1)
        sizes[labels[point]] -= 1
        sizes[empty] += 1
        labels[point] = empty
    return labels
