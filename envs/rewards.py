"""Rewards for the mask of one layer, or for the masks of a whole sweep.

A reward is an object with two methods (`Reward`); the environment adds up the terms that they
return. To add one, write its formula as a pure function here (bounded, higher is better, batched
over masks) and a small class that holds what the formula needs of the model.

Source of the spectral reward: Sengupta et al., "You Only Prune Once: Designing Calibration-Free
Model Compression With Policy Learning" (PruneNet), ICLR 2025, arXiv 2501.15296, section 3;
docs/methods.md, sections 1.1 and 2. What differs:
- bounded: 1 - distance, in [0, 1] (`form="bounded"`); the paper's unbounded 1 / KS is
  `form="inverse"`, capped at min(d_model, d_ff);
- any of the FFN's matrices may be compared (the paper: the gate matrix alone), and besides
  Kolmogorov-Smirnov the Wasserstein distance and the energy kept;
- no singular value decomposition at any step: exact through Gram matrices
  (`prunenet.spectra.exact`) or, above `EXACT_UP_TO`, estimated (`prunenet.spectra.estimated`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.layers import FFN, Weights, ffn_at, ffn_widths
from prunenet.refit.expert_use import squared_weights
from prunenet.refit.moments import LayerWalk, check_activations
from prunenet.runtime import parallel
from prunenet.runtime.choices import check_choice
from prunenet.runtime.placement import is_placed
from prunenet.runtime.products import with_fast_products
from prunenet.spectra.choices import Distance, Form, Matrix, Spectrum
from prunenet.spectra.estimated import SpectralSketch
from prunenet.spectra.exact import SpectralReference

Route = SpectralReference | SpectralSketch

EXACT_UP_TO = 2048
"""Largest min(d_model, d_ff) that spectrum "auto" decomposes.

The estimate is cheaper much earlier: one mask alone takes half of the exact route's time at 576
columns, a third at 2048 and a quarter at 4096, where that is 5 s (docs/log.md). But it
cannot tell apart masks whose distances differ by less than its error, as those of random masks do.
"""


@runtime_checkable
class Reward(Protocol):
    """The two methods that the environment calls; their terms must have different names."""

    def layer(
        self, index: int, keep: Bool[Tensor, "masks d_ff"]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns the terms paid when layer `index` has been masked."""
        ...

    def sweep(
        self, keep: Sequence[Bool[Tensor, "masks d_ff"]]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns the terms paid once all layers have been masked, given the masks of each."""
        ...


def bounded(distance: Float[Tensor, " masks"]) -> Float[Tensor, " masks"]:
    """Returns 1 - distance, for distances in [0, 1]."""
    return 1 - distance


def inverse(distance: Float[Tensor, " masks"], most: float) -> Float[Tensor, " masks"]:
    """Returns 1 / distance, capped at `most` (PruneNet, section 3).

    The published code returns 99999 for a distance of 0.
    """
    return (1 / distance.clamp(min=1 / most)).clamp(max=most)


class SpectralReward:
    """Compares the singular values of a layer's matrices before and after the mask
    (docs/methods.md, section 2).

    The reward is averaged over the matrices. Several processes (`prunenet.runtime.parallel`) share
    the decompositions of the dense matrices.

    Args:
        model: its weights are read, never changed. A streamed or placed model
            (`prunenet.runtime.placement`) keeps only spectra, d_model numbers a matrix (or some 900
            where they are estimated), and reads a layer again for each batch of its masks.
        distance: "ks", "wasserstein" (relative to the mean singular value) or "energy" (squared
            norm lost); all in [0, 1].
        matrices: which of gate, up and down to compare; the family may lack some of them.
        form: "bounded" pays 1 - distance, "inverse" pays 1 / distance as published.
        spectrum: "exact", "stochastic" (estimated, with distances to within `SpectralSketch.bound`)
            or "auto", exact up to `EXACT_UP_TO`. The attribute is never "auto".

    Raises:
        ValueError: unknown names, a weight that is NaN or infinite, or none of the matrices exists
            in this family.
        UnsupportedArchitecture: see `prunenet.models.architectures`.
    """

    def __init__(
        self,
        model: Weights,
        *,
        distance: Distance = "ks",
        matrices: Sequence[Matrix] = ("gate", "up", "down"),
        form: Form = "bounded",
        spectrum: Spectrum = "auto",
    ) -> None:
        check_choice("distance", distance, Distance)
        check_choice("form", form, Form)
        check_choice("spectrum", spectrum, Spectrum)
        for name in matrices:
            check_choice("matrix", name, Matrix)
        self.distance, self.form = distance, form
        self._model, self._matrices = model, matrices
        self.spectrum = spectrum
        if spectrum == "auto":
            self.spectrum = "stochastic" if _side(model) > EXACT_UP_TO else "exact"
        # Estimates are products of the whole batch of masks, whose rounding depends on its size: a
        # batch must not be split (`prunenet.envs.split`).
        self.split: Mapping[str, str] = {
            "layer": "layers" if self.spectrum == "stochastic" else "masks"
        }
        self._held: dict[int, list[Route]] = {}
        layers, spectra = len(ffn_widths(model)), {}
        for index in filter(parallel.is_owner, range(layers)):
            references = self._read(index, None)
            spectra[index] = [_spectrum(reference) for reference in references]
            if self._keeps():
                self._held[index] = references
        self._spectra: list[list[Tensor]] = parallel.gather_from_owners(spectra, layers)
        if self._keeps() and self.spectrum == "exact":
            # Any process may judge masks of any layer: take over what the others decomposed.
            for index in range(layers):
                if index not in self._held:
                    self._held[index] = self._read(index, self._spectra[index])

    def layer(
        self, index: int, keep: Bool[Tensor, "masks d_ff"]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns the term `spectral_<distance>`, (masks,).

        It lies in [0, 1] if bounded, in [1, min(d_model, d_ff)] if inverse.
        """
        references = self._held.get(index) or self._read(index, self._spectra[index])
        distances = [
            reference.distance(keep, kind=self.distance).float() for reference in references
        ]
        most = float(min(references[0].weight.shape))
        paid = [bounded(d) if self.form == "bounded" else inverse(d, most) for d in distances]
        return {f"spectral_{self.distance}": torch.stack(paid).mean(0)}

    def _keeps(self) -> bool:
        """Returns whether all layers have room on their devices at once."""
        return isinstance(self._model, PreTrainedModel) and not is_placed(self._model)

    def _read(self, index: int, spectra: Sequence[Tensor] | None) -> list[Route]:
        make = (
            partial(SpectralSketch.of, held=self._keeps())
            if self.spectrum == "stochastic"
            else SpectralReference.of
        )
        return _references(ffn_at(self._model, index), self._matrices, make, spectra)

    def sweep(
        self, keep: Sequence[Bool[Tensor, "masks d_ff"]]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns no term: everything has been paid layer by layer."""
        return {}


def energy_lost(
    output_gram: Float[Tensor, "d_ff d_ff"], keep: Bool[Tensor, "masks d_ff"]
) -> Float[Tensor, " masks"]:
    """Returns the share of a layer's output energy lost with the removed channels R.

    That is tr(W_R H_RR W_R^T) / tr(W H W^T), clipped to [0, 1]; 0 for a layer that writes nothing.

    Args:
        output_gram: H * (W^T W), element by element, with H = E[h h^T] and W the down matrix. The
            energy lost by a mask is the sum of the entries whose row and column are both removed.
        keep: the masks.
    """
    dropped = (~keep).to(output_gram)
    lost = ((dropped @ output_gram) * dropped).sum(1)
    return (lost / output_gram.sum().clamp_min(torch.finfo(lost.dtype).tiny)).clamp(0, 1)


class ReconstructionReward:
    """Measures the share of each layer's output energy that its mask keeps, without refit
    (docs/methods.md, section 2, "reconstruction").

    Each layer is judged alone, on the dense model's activations: 1 - tr(W_R H_RR W_R^T) / tr(W H
    W^T), by one (masks, d_ff) by (d_ff, d_ff) product. `prunenet.envs.divergence` measures how the
    cuts of different layers add up.

    Of a mixture each expert is judged by what its whole layer loses, with the router as it is: its
    loss is weighed by its share in the summed energy of the layer's groups, over the tokens that
    are routed to it and by the mean square of the router's weights. What experts write together is
    not counted.

    Memory holds d_ff^2 float32 a layer: 283 MB for SmolLM2-135M; on the CPU where the model is
    placed (`prunenet.runtime.placement`). Several processes (`prunenet.runtime.parallel`) share the
    layers; each passes the hidden states through all of them.

    Args:
        model: a causal LM; read, never changed.
        blocks: (n, tokens) token ids on which activations are measured. Where they were written by
            the model itself (`prunenet.text.generate`), no external data is used.

    Raises:
        ValueError: activations that are not finite, or blocks that the model cannot read.
    """

    split: ClassVar[Mapping[str, str]] = {"layer": "layers"}  # see `prunenet.envs.split`

    @with_fast_products
    def __init__(self, model: PreTrainedModel, blocks: Int[Tensor, "n tokens"]) -> None:
        anatomy, walk = Anatomy.of(model), LayerWalk(model, blocks)
        weights = squared_weights(model, blocks)
        self._output_grams: dict[int, Float[Tensor, "d_ff d_ff"]] = {}
        energies: dict[int, list[Tensor]] = {}
        for index in walk:
            if not parallel.is_owner(index):
                continue
            down, moments = anatomy.ffn(index).down.float(), walk.moments(index)
            output_gram = self._output_grams[index] = moments.second.mul_(down.T @ down)
            check_activations(output_gram, anatomy.groups[index].layer, model.dtype)
            energies[index] = [output_gram.sum().double().cpu() * moments.tokens * weights[index]]
            if is_placed(model):
                self._output_grams[index] = output_gram.cpu()
        count = len(anatomy.groups)
        self._shares = _shares(
            [float(one) for (one,) in parallel.gather_from_owners(energies, count)],
            [group.layer for group in anatomy.groups],
        )

    def layer(
        self, index: int, keep: Bool[Tensor, "masks d_ff"]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns the term `reconstruction`, (masks,), in [0, 1]."""
        lost = energy_lost(self._output_grams[index], keep) * self._shares[index]
        return {"reconstruction": bounded(lost).to(keep.device)}

    def sweep(
        self, keep: Sequence[Bool[Tensor, "masks d_ff"]]
    ) -> dict[str, Float[Tensor, " masks"]]:
        """Returns no term: everything has been paid layer by layer."""
        return {}


def _shares(energies: Sequence[float], layers: Sequence[int]) -> list[float]:
    """Each group's share in the energy of its layer; 1 where the layer has one group."""
    totals: dict[int, float] = {}
    for energy, layer in zip(energies, layers, strict=True):
        totals[layer] = totals.get(layer, 0.0) + energy
    return [
        energy / totals[layer] if totals[layer] > 0 else 1.0
        for energy, layer in zip(energies, layers, strict=True)
    ]


def _side(model: Weights) -> int:
    """Returns min(d_model, d_ff) of the widest layer."""
    return min(ffn_at(model, 0).up.shape[1], max(ffn_widths(model)))


def _spectrum(reference: Route) -> Tensor:
    """Returns the costly part of a reference, kept for a streamed layer's next reading."""
    return reference.density if isinstance(reference, SpectralSketch) else reference.eigenvalues


def _references(
    ffn: FFN, matrices: Sequence[str], make: Callable[..., Route], spectra: Sequence[Tensor] | None
) -> list[Route]:
    # An ungated FFN has one input matrix; the paper's gate matrix is fc1 there.
    gate = ffn.up if ffn.gate is None else ffn.gate
    views = {"gate": gate, "up": None if ffn.gate is None else ffn.up, "down": ffn.down.T}
    found = [views[name] for name in dict.fromkeys(matrices)]
    present = [weight for weight in found if weight is not None]
    known: Sequence[Tensor | None] = spectra or [None] * len(present)
    references = [make(*pair) for pair in zip(present, known, strict=True)]
    if not references:
        raise ValueError(
            f"this family has none of the matrices {', '.join(matrices) or '(none given)'}; use"
            " gate or down"
        )
    return references
