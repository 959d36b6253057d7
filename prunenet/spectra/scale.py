"""Brings matrices whose squared entries leave float32 back into its range."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Lanczos steps square eigenvalues, which are squares of weights already.
_SMALL, _LARGE = 1e-6, 1e6
_EXPONENTS = 126  # largest exponent of a power of two, and of its inverse, in float32


def rescaled(weight: Float[Tensor, "d_ff d_model"]) -> Float[Tensor, "d_ff d_model"]:
    """Divides a matrix by a power of two where squares of its entries would leave float32.

    Distances between spectra do not depend on the scale.

    Args:
        weight: any float dtype.

    Returns:
        The matrix itself where its largest entry is zero or in [1e-6, 1e6]; otherwise a float32
        copy with a largest entry near 1.

    Raises:
        ValueError: an entry is NaN or infinite.
    """
    low, high = (float(bound) for bound in torch.aminmax(weight))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            "a weight matrix holds NaN or infinite values; the checkpoint is damaged, load another"
        )
    largest = max(-low, high)
    if largest == 0 or _SMALL <= largest <= _LARGE:
        return weight
    exponent = min(max(math.frexp(largest)[1], -_EXPONENTS), _EXPONENTS)
    return weight.float() * 2.0**-exponent
