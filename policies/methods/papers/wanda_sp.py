"""Wanda-sp: scores channels by weights times activation norms, the structured form of Wanda.

Sources: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda),
ICLR 2024, arXiv 2306.11695; its structured form in An et al. (FLAP), AAAI 2024, arXiv 2312.11983,
section 5.1; docs/methods.md, section 6.

What differs: FFN channels only.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from prunenet.models.layers import FFN
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.refit.moments import Energies


def layer_score(ffn: FFN, energies: Energies) -> Float[Tensor, " d_ff"]:
    """Returns mean_i |W_ij| * |X_j|_2 of each channel j.

    W is the down matrix, X_j the channel's activations over all tokens.
    """
    norm = (energies.energy * energies.tokens).sqrt()
    return ffn.down.float().abs().mean(0) * norm


def scores(evidence: Evidence) -> list[Float[Tensor, " _"]]:
    """Scores each layer of the dense model, in one pass.

    As published, each layer is measured behind the cut ones: `prunenet.policies.methods.cut` calls
    `layer_score` for that.
    """
    return [
        layer_score(ffn, energies)
        for ffn, energies in zip(evidence.ffns, evidence.energies, strict=True)
    ]
