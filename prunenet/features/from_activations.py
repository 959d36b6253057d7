"""What token blocks say about each FFN channel, beside its weights: more that a policy may read
(METHODS.md 3, 5 and 6).

From a layer's moments (H = E[h h^T], mu = E[h]) and its down matrix W, in units in which every
column of W has norm 1: what channel j writes is then |W_:j| h_j, and no statistic but
`moment_energy` changes where h_j is multiplied and W_:j divided by the same number. Standardised
inside the layer as in `prunenet.features.from_weights`; nothing depends on a width.

`moment_write` ranks channels as Wanda-sp does (with the norm of a column in place of its mean),
`moment_fluctuation` as FLAP (arXiv 2312.11983), `moment_unique` by Optimal Brain Surgeon's loss of
one channel, |W_:j|^2 / [(H + lam I)^-1]_jj (Hassibi and Stork, NIPS 1992;
`prunenet.refit.eliminate` drops one after the other by it). What differs: lam, 1 % of the mean
energy as there, is taken in the units above, where it does not depend on how a channel splits its
size between h and W; and it is taken off the loss again, so that a channel that writes nothing
loses nothing. What is left is min_x E|h_j - x h_K|^2 + lam |x|^2 over the other channels K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.features.from_weights import channel_statistics, standardised
from prunenet.models.layers import down_linears
from prunenet.refit.cholesky import damped_cholesky
from prunenet.refit.moments import LayerWalk, Moments
from prunenet.runtime import parallel

# A policy that reads them stores both and refuses other values. Raise the version when a statistic
# changes its meaning.
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
    """What a policy reads of each layer's channels: `channel_statistics` and, given blocks,
    `moment_statistics` behind them.

    Arguments and errors: as of those.
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
    """Standardised statistics of every FFN channel's activations: (d_ff, len(MOMENT_STATISTICS))
    for each layer.

    Values lie in [-4, 4] and are never NaN; a statistic that is constant in a layer is 0. Memory
    holds the moments of one layer, in float64 while they are inverted. Of several processes
    (`prunenet.runtime.parallel`) each measures its own layers; the way through the layers is walked
    by all.

    Args:
        model: in eval mode; read, never changed.
        blocks: token ids without padding.
        progress: called with (layers done, layers in all).

    Raises:
        ValueError: blocks that the model cannot read, or activations that are not finite.
        UnsupportedArchitecture: see `prunenet.models.layers.decoder_layers`.
    """
    downs, found = down_linears(model), {}
    walk = LayerWalk(model, blocks)
    for index in walk:
        if not parallel.is_owner(index):
            continue
        moments = walk.moments(index)
        if not bool(torch.isfinite(moments.second).all()):
            raise ValueError(
                f"the activations of layer {index} are not finite: the weights are damaged, or"
                f" {model.dtype} overflows"
            )
        found[index] = (layer_moment_statistics(downs[index].weight.detach(), moments),)
        if progress is not None:
            progress(index + 1, len(downs))
    return [statistics for (statistics,) in parallel.gather_from_owners(found, len(downs))]


def layer_moment_statistics(
    weight: Float[Tensor, "d_model d_ff"], moments: Moments
) -> Float32[Tensor, "d_ff n_stats"]:
    """The same of one layer.

    Args:
        weight: the down matrix W, any float dtype.
        moments: of the activations in front of it, finite.
    """
    # which has no float64
    device = weight.device if weight.device.type != "mps" else torch.device("cpu")
    norms = weight.to(device, torch.float64).norm(dim=0)
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
    """The output energy of each channel that a ridge regression on the others does not explain."""
    lam = _DAMPING * max(float(written.diagonal().mean()), _TINY)  # a layer may write nothing
    inverse = torch.cholesky_inverse(damped_cholesky(written, lam, _DAMPING))
    return (1 / inverse.diagonal() - lam).clamp_min(0)


def _log(values: Tensor) -> Tensor:
    return values.clamp_min(_TINY).log()
