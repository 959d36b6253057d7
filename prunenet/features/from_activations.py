"""Computes statistics of each FFN channel's activations on token blocks, for policies that read
them besides the weights (docs/methods.md, sections 3, 5 and 6).

Reads a layer's moments (H = E[h h^T], mu = E[h]) and its down matrix W, in units in which every
column of W has norm 1, so that channel j writes |W_:j| h_j. No statistic but `moment_energy` then
changes where h_j is multiplied and W_:j divided by the same number. Statistics are standardised
inside the layer as in `prunenet.features.from_weights`; none depends on a width.

`moment_write` ranks channels as Wanda-sp does (by the norm of a column in place of its mean) and
`moment_fluctuation` as FLAP (arXiv 2312.11983). `moment_unique` is Optimal Brain Surgeon's loss of
one channel, |W_:j|^2 / [(H + lam I)^-1]_jj (Hassibi and Stork, NIPS 1992), by which
`prunenet.refit.eliminate` drops channels. What differs:

- lam is 1 % of the mean energy in the units above, where it does not depend on how a channel splits
  its size between h and W;
- lam is subtracted from the loss again, so that a channel that writes nothing loses nothing. What
  is left is min_x E|h_j - x h_K|^2 + lam |x|^2 over the other channels K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.features.from_weights import channel_statistics, standardised
from prunenet.models.anatomy import Anatomy
from prunenet.refit.cholesky import damped_cholesky
from prunenet.refit.moments import LayerWalk, Moments
from prunenet.runtime import parallel
from prunenet.runtime.floats import in_float64

# Stored with a policy that reads moments, which refuses other values. Raise the version when a
# statistic changes its meaning.
MOMENT_STATISTICS_VERSION = 1
MOMENT_STATISTICS: tuple[str, ...] = (
    "moment_energy",  # log E[h^2]
    "moment_write",  # log E[h^2] |d|^2: output energy
    "moment_fluctuation",  # log Var[h] |d|^2
    "moment_mean_share",  # E[h]^2 / E[h^2]
    "moment_unique",  # log of the output energy that the other channels cannot stand in for
    "moment_unique_share",  # its log share in the channel's output energy
)
_DAMPING, _TINY = 1e-2, 1e-30


def channel_features(
    model: PreTrainedModel,
    blocks: Int[Tensor, "n tokens"] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Float32[Tensor, "_ n_stats"]]:
    """Computes what a policy reads: `channel_statistics` and, given blocks, `moment_statistics`.

    Args:
        model, blocks, progress: as for `moment_statistics`.

    Returns:
        (d_ff, statistics) for each layer; those of moments are the last columns.

    Raises:
        UnsupportedArchitecture, ValueError: as the two functions.
    """
    from_weights = channel_statistics(model)
    if blocks is None:
        return from_weights
    measured = moment_statistics(model, blocks, progress=progress)
    return [torch.cat((a, b.to(a)), dim=1) for a, b in zip(from_weights, measured, strict=True)]


@torch.no_grad()
def moment_statistics(
    model: PreTrainedModel,
    blocks: Int[Tensor, "n tokens"],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Float32[Tensor, "_ n_stats"]]:
    """Computes standardised statistics of every FFN channel's activations.

    Memory holds the moments of one layer, in float64 while they are inverted. Several processes
    (`prunenet.runtime.parallel`) share the measurements; each passes the hidden states through all
    layers.

    Args:
        model: in eval mode; read, never changed.
        blocks: token ids without padding.
        progress: called with (layers done, layers in all).

    Returns:
        (d_ff, len(MOMENT_STATISTICS)) for each layer, in [-4, 4] and never NaN. A statistic that is
        constant in a layer is 0.

    Raises:
        ValueError: blocks that the model cannot read, or activations that are not finite.
        UnsupportedArchitecture: see `prunenet.models.layers.decoder_layers`.
    """
    anatomy, found = Anatomy.of(model), {}
    count = len(anatomy.groups)
    walk = LayerWalk(model, blocks)
    for index in walk:
        if not parallel.is_owner(index):
            continue
        weight = anatomy.ffn(index).down
        found[index] = (layer_moment_statistics(weight, walk.moments(index)),)
        if progress is not None:
            progress(index + 1, count)
    return [statistics for (statistics,) in parallel.gather_from_owners(found, count)]


def layer_moment_statistics(
    weight: Float[Tensor, "d_model d_ff"], moments: Moments
) -> Float32[Tensor, "d_ff n_stats"]:
    """Computes `moment_statistics` of one layer.

    Args:
        weight: the down matrix W, any float dtype.
        moments: of the activations in front of it.

    Raises:
        ValueError: a moment or a weight is NaN or infinite.
    """
    norms = in_float64(weight)[0].norm(dim=0)
    energy, mean = moments.second.diagonal().to(norms), moments.mean.to(norms)
    mean_share = (mean.square() / energy.clamp_min(_TINY)).clamp(max=1)
    written = energy * norms.square()
    unique = _unique(moments.second.to(norms) * norms * norms[:, None])
    raw = {
        "moment_energy": _log(energy),
        "moment_write": _log(written),
        # the moments' own precision
        "moment_fluctuation": _log(written * (1 - mean_share).clamp_min(1e-6)),
        "moment_mean_share": mean_share,
        "moment_unique": _log(unique),
        "moment_unique_share": _log(unique / written.clamp_min(_TINY)),
    }
    return standardised(torch.stack([raw[name] for name in MOMENT_STATISTICS], dim=-1).float()).to(
        weight.device
    )


def _unique(written: Float[Tensor, "d_ff d_ff"]) -> Float[Tensor, " d_ff"]:
    """Returns each channel's output energy that ridge regression on the others cannot explain."""
    lam = _DAMPING * max(float(written.diagonal().mean()), _TINY)  # 0 for a dead layer
    inverse = torch.cholesky_inverse(damped_cholesky(written, lam, _DAMPING))
    return (1 / inverse.diagonal() - lam).clamp_min(0)


def _log(values: Tensor) -> Tensor:
    return values.clamp_min(_TINY).log()
