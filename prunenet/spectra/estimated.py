"""Estimates how far a keep mask moves the singular values, without decomposing the matrix: the
spectral reward of wide layers.

Source: stochastic Lanczos quadrature. Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via
stochastic Lanczos quadrature", SIAM J. Matrix Anal. Appl. 2017; as an estimate of a whole spectrum
with its error, Chen, Trogdon and Ubaru, ICML 2021, arXiv 2105.06595. From a random sign vector z, k
Lanczos steps on A = W[K]^T W[K] give a k x k tridiagonal matrix. Its eigenvalues, weighted by the
squared first entries of its eigenvectors, are the Gauss quadrature of z's share in the spectrum of
A; the mean over z is the distribution of the squared singular values. What differs:

* Difference of two: the dense matrix and every mask take the same sign vectors, so that part of
  their errors cancels.
* All masks of a batch at once: no loop over masks, channels or probes. On a GPU nothing waits for
  the host.
* A weight of the quadrature is spread over the cell around its node, half to either side, and the
  cell is no wider than a uniform grid of `steps` cells has them: a sum of steps would cost 1 /
  steps in the Kolmogorov-Smirnov (KS) distance.
* Structural zeros of a mask narrower than d_model are known and subtracted: as in the exact route,
  min(width, d_model) values count.

Chosen over Chebyshev moments with the Jackson kernel, measured on 10 gate matrices of SmolLM2-135M
at equal cost (probe): root mean square error of the KS distance 0.009 against 0.010 at ratio 0.3
with 8 vectors and 24 products, and no bias of the kernel.

Limits: the estimate cannot distinguish random masks of one width. Their distances differ by about
1 / d_model (eigenvalues repel), while its error falls only with the root of d_model * probes. Where
that matters use `prunenet.spectra.exact`. Estimates of matrices with many equal values differ
between processors, because nodes found twice split by rounding. They stay within their bound of the
exact distance, for which such values are ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from prunenet.models.masks import check_keep
from prunenet.runtime.choices import check_choice
from prunenet.spectra.choices import Distance
from prunenet.spectra.exact import energy_kept
from prunenet.spectra.scale import rescaled

# 8 vectors and 16 products: more products change no error (see docs/log.md), more vectors
# shrink it by their root.
PROBES = 8
STEPS = 16

# A batch of masks whose products, or whose distributions, hold more numbers goes in parts (float32:
# 256 MB).
_MOST = 2**26
# A Lanczos vector shorter than this share of the matrix is rounding: the Krylov space is exhausted.
_NOTHING = 1e-5
_UNIFORM = 64
# The heaviest of 16 nodes holds about this share of a spectrum that is spread out (0.14 to 0.24 in
# SmolLM2-135M, probe).
_SPREAD = 1 / 8

_Vectors = Float32[Tensor, "masks probes side"]


@dataclass(frozen=True, slots=True, eq=False)
class SpectralSketch:
    """Holds one weight matrix of a dense layer and its estimated spectrum, to compare masks with.

    Takes the place of `prunenet.spectra.exact.SpectralReference`. Memory beyond the weight view:
    side * PROBES float32, and the Gram matrix (side^2 float32) on a CPU: with it a mask alone costs
    half (`_multiplied`).

    Attributes:
        weight: (d_ff, d_model), a view (see `rescaled` for extreme weights); pass `down`
            transposed.
        probes: random signs, the same for every matrix of this side.
        gram: W^T W, or W W^T where d_ff < d_model; None: always by the weight itself.
        density: the dense matrix, estimated: singular values, rising from 0, and the share of them
            at or below each.
    """

    weight: Float[Tensor, "d_ff d_model"]
    probes: Float32[Tensor, "probes side"]
    gram: Float32[Tensor, "side side"] | None
    density: Float64[Tensor, "2 points"]

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "d_ff d_model"],
        density: Float64[Tensor, "2 points"] | None = None,
        *,
        held: bool = True,
        probes: int = PROBES,
    ) -> SpectralSketch:
        """Estimates the spectrum of one matrix.

        Args:
            weight: (d_ff, d_model).
            density: from an earlier call; saves the work of one mask.
            held: whether many batches of masks follow; a CPU then computes the Gram matrix too, in
                2 d_ff d_model^2 FLOPs.
            probes: sign vectors.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        d_ff, d_model = weight.shape
        weight = rescaled(weight)
        # Drawn on the CPU: the same on every device.
        signs = (
            torch.randint(
                0, 2, (probes, min(d_ff, d_model)), generator=torch.Generator().manual_seed(0)
            )
            * 2.0
            - 1
        )
        signs = signs.to(weight.device)
        work = weight.float()
        gram: Tensor | None = None
        if d_ff < d_model:
            gram = work @ work.T
        elif held and not weight.is_cuda:
            gram = work.T @ work
        if density is None:
            knots = _knots(
                *_quadrature(
                    work, gram, torch.ones(1, d_ff, dtype=torch.bool, device=weight.device), signs
                )
            )
            # Where the dense distribution bends, and a uniform grid for what lies below all of it.
            below = knots[0].max() * torch.linspace(
                0, 1, _UNIFORM, dtype=torch.float64, device=weight.device
            )
            points = torch.cat((knots[0].flatten(), below)).sort().values
            density = torch.stack((points, _share_below(knots, points)[0]))
        return cls(weight, signs, gram, density)

    def distance(
        self, keep: Bool[Tensor, "masks d_ff"], kind: Distance = "ks"
    ) -> Float[Tensor, " masks"]:
        """Estimates how far each mask moves the spectrum.

        Args:
            keep: at least one channel each; widths may differ.
            kind: "ks", "wasserstein" (relative to the mean singular value, clipped), or "energy"
                (the share removed, exact).

        Returns:
            (masks,) in [0, 1], float32, on the masks' device; exactly 0 for a full mask.

        Raises:
            ValueError: unknown kind, a mask of the wrong length, or one that keeps nothing.
        """
        check_keep(keep, self.weight.shape[0])
        check_choice("spectral distance", kind, Distance)
        masks = keep.to(self.weight.device)
        if kind == "energy":
            distance = 1 - energy_kept(self.weight, masks)
        else:
            part = max(
                1, _MOST // (len(self.probes) * max(self.weight.shape[0], 3 * STEPS * STEPS))
            )
            distance = torch.cat([self._distance(some, kind) for some in torch.split(masks, part)])
        return torch.where(keep.all(-1), 0.0, distance.to(keep.device)).float()

    def bound(
        self, keep: Bool[Tensor, "masks d_ff"], kind: Distance = "ks"
    ) -> Float64[Tensor, " masks"]:
        """Bounds the error of each `distance`, in [0, 1]: three standard deviations, and the
        quadrature. Costs as much as the distance.

        * The share of a spectrum below a point, from `probes` sign vectors, has variance at most 1
          / (2 side probes): that of a projector P of rank r is 2 (r - sum P_ii^2) / (side^2
          probes), and sum P_ii^2 >= r^2 / side. Taking off the structural zeros of a narrow mask
          scales it by side / min(width, side). The same signs estimate the dense matrix, which
          cancels some of it: not counted.
        * A Gauss quadrature's cumulative weight is right to within the weight of one node
          (Chebyshev, Markov, Stieltjes). Spread over cells it is better: a quarter of the heaviest
          node of mask or dense matrix, measured and not proved. Where many values are equal, or
          small beside the largest, one node holds most of them and hides their order: all of its
          weight but 1/8 counts. A quarter left 266 of 4 320 masks of matrices with such values
          outside, this none (probe).
        * "wasserstein" is at most that over the whole range of values, relative to their mean;
          "energy" is exact.
        """
        check_keep(keep, self.weight.shape[0])
        masks = keep.to(self.weight.device)
        if kind == "energy":
            return torch.zeros(len(masks), dtype=torch.float64, device=masks.device)
        probes, side = self.probes.shape
        with_dense = torch.cat((masks, torch.ones_like(masks[:1])))
        _, weights = _quadrature(self.weight.float(), self.gram, with_dense, self.probes)
        zeros = self._zeros(masks)
        weights[:-1, :, 0] = (weights[:-1, :, 0] - zeros).clamp(min=0)
        heaviest = weights.amax(-1).mean(-1)
        heaviest = torch.maximum(heaviest[:-1], heaviest[-1])
        quadrature = torch.maximum(heaviest / 4, heaviest - _SPREAD)
        bound = (3 / math.sqrt(2 * side * probes) + quadrature) / (1 - zeros[:, 0])
        if kind == "wasserstein":
            points, dense = self.density
            bound = bound * points[-1] / torch.trapezoid(1 - dense, points)
        return bound.nan_to_num(1.0).clamp(max=1)

    def _zeros(self, keep: Bool[Tensor, "masks d_ff"]) -> Float64[Tensor, "masks 1"]:
        """Returns the share of structural zeros in a mask's estimated spectrum.

        There are side - width of them, on d_model columns.
        """
        d_model, side = self.weight.shape[1], self.probes.shape[1]
        zeros = (1 - keep.sum(-1, keepdim=True).double() / side).clamp(min=0)
        return zeros if d_model == side else torch.zeros_like(zeros)

    def _distance(
        self, keep: Bool[Tensor, "masks d_ff"], kind: Distance
    ) -> Float64[Tensor, " masks"]:
        points, dense = self.density
        knots = _knots(*_quadrature(self.weight.float(), self.gram, keep, self.probes))
        zeros = self._zeros(keep)
        gap: Tensor = ((_share_below(knots, points) - zeros) / (1 - zeros)).clamp(min=0) - dense
        if kind == "ks":
            return gap.abs().amax(-1).clamp(max=1)
        mean = torch.trapezoid(1 - dense, points)
        moved = torch.trapezoid(gap.abs(), points)
        relative: Tensor = moved / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        return relative.clamp(max=1)


def _quadrature(
    weight: Float32[Tensor, "d_ff d_model"],
    gram: Float32[Tensor, "side side"] | None,
    keep: Bool[Tensor, "masks d_ff"],
    probes: Float32[Tensor, "probes side"],
) -> tuple[Float64[Tensor, "masks probes steps"], Float64[Tensor, "masks probes steps"]]:
    """Singular values, rising, and their weights (sum 1) for each mask and probe."""
    start = probes.expand(len(keep), -1, -1)
    if len(weight) < weight.shape[1]:
        start = start * keep.unsqueeze(1)
    diagonal, beside = _lanczos(_multiplied(weight, gram, keep), start)
    tridiagonal = (
        torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    )
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return nodes.clamp(min=0).sqrt(), vectors[..., 0, :].square()


def _multiplied(
    weight: Float32[Tensor, "d_ff d_model"],
    gram: Float32[Tensor, "side side"] | None,
    keep: Bool[Tensor, "masks d_ff"],
) -> Callable[[_Vectors], _Vectors]:
    """Returns a function that multiplies by W[K]^T W[K] (W[K] W[K]^T where d_ff < d_model).

    There are two routes. The first multiplies all masks' vectors by the whole W and back, with rows
    masked between: 4 d_ff d_model FLOPs a vector, and W is read once for all masks. The second is
    G x - W[R]^T W[R] x with the rows R of each mask gathered: half the FLOPs at ratio 0.3, but each
    mask reads its own rows. Vectors are few, so that memory traffic decides. A GPU always takes the
    first route: the second would have to wait for the number of rows.
    """
    kept = keep.unsqueeze(1).to(weight.dtype)
    d_ff, d_model = weight.shape
    if gram is not None and d_ff < d_model:
        return lambda x: (x @ gram) * kept
    if gram is not None:
        removed, most, most_kept = ~keep, int((~keep).sum(-1).max()), int(keep.sum(-1).max())
        fewer, most = (removed, most) if most <= most_kept else (keep, most_kept)
        if len(keep) * most + d_model / 2 < d_ff:
            order = fewer.int().argsort(dim=-1, descending=True)[:, :most]
            rows = weight[order] * fewer.gather(1, order).unsqueeze(-1)
            if fewer is keep:
                return lambda x: torch.bmm(torch.bmm(x, rows.mT), rows)
            return lambda x: torch.baddbmm(x @ gram, torch.bmm(x, rows.mT), rows, alpha=-1)
    return lambda x: ((x @ weight.T) * kept) @ weight


def _lanczos(
    apply: Callable[[_Vectors], _Vectors], start: _Vectors
) -> tuple[Float64[Tensor, "masks probes steps"], Float64[Tensor, "masks probes beside"]]:
    """Runs STEPS steps of the symmetric Lanczos iteration for each mask and probe.

    Not reorthogonalised: eigenvalues found twice share their weight. An exhausted Krylov space
    continues with zeros, of weight 0.

    Returns:
        Diagonal and off-diagonal of the tridiagonal matrices.
    """
    q = start / start.norm(dim=-1, keepdim=True)
    before, beta = torch.zeros_like(q), torch.zeros_like(q[..., :1])
    diagonal, beside, scale = [], [], torch.zeros_like(beta)
    for _ in range(STEPS):
        w = apply(q) - beta * before
        alpha = (w * q).sum(-1, keepdim=True)
        w = w - alpha * q
        scale = torch.maximum(scale, alpha + beta)
        beta = w.norm(dim=-1, keepdim=True)
        going = beta > _NOTHING * scale
        beta = torch.where(going | beta.isnan(), beta, 0.0)
        before, q = q, torch.where(going, w / beta.clamp(min=torch.finfo(beta.dtype).tiny), 0.0)
        diagonal.append(alpha)
        beside.append(beta)
    return torch.cat(diagonal, -1).double(), torch.cat(beside[:-1], -1).double()


def _knots(
    nodes: Float64[Tensor, "masks probes steps"], weights: Float64[Tensor, "masks probes steps"]
) -> Float64[Tensor, "2 masks probes knots"]:
    """Returns the corners of the cumulative distribution: places, and shares at them.

    Each weight is spread over the cell of its node.
    """
    widest = nodes[..., -1:] * (math.pi / 2 / nodes.shape[-1])
    middle = (nodes[..., 1:] + nodes[..., :-1]) / 2
    left = torch.cat(
        ((nodes[..., :1] - widest).clamp(min=0), torch.maximum(middle, nodes[..., 1:] - widest)), -1
    )
    right = torch.cat(
        (torch.minimum(middle, nodes[..., :-1] + widest), nodes[..., -1:] + widest), -1
    )
    total = weights.cumsum(-1)
    places = torch.stack((left, nodes, right), -1).flatten(-2)
    return torch.stack(
        (places, torch.stack((total - weights, total - weights / 2, total), -1).flatten(-2))
    )


def _share_below(
    knots: Float64[Tensor, "2 masks probes knots"], points: Float64[Tensor, " points"]
) -> Float64[Tensor, "masks points"]:
    """Evaluates the cumulative distribution: linear between knots, averaged over the probes."""
    places, shares = knots
    at = points.expand(*places.shape[:-1], -1).contiguous()
    after = torch.searchsorted(places, at).clamp(1, places.shape[-1] - 1)
    (low, high), (below, above) = (
        (of.gather(-1, after - 1), of.gather(-1, after)) for of in (places, shares)
    )
    along = ((at - low) / (high - low).clamp(min=torch.finfo(at.dtype).tiny)).clamp(0, 1)
    share: Tensor = (below + along * (above - below)).mean(-2)
    return share
