"""Removes whole experts of a mixture, or sends tokens to fewer, at the size of a cut of channels.

Sources: REAP and AIMER (arXiv 2603.18492), docs/methods.md, section 19; how experts are scored and
removed is in `prunenet.policies.experts`. What differs: the number of experts left is the largest
that has no more parameters than a model that lost the given share of its FFN channels, since the
papers give a number of experts.

Fewer experts leave the *active* parameters (those that one token uses) as they are. Their
counterpart is `routed_to_fewer`: all experts stay, and each token passes through fewer of them.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.experts import Experts, without_experts
from prunenet.models.knobs import set_field, top_k, top_k_field
from prunenet.models.layers import active_parameters
from prunenet.models.surgery import check_built, restate_modules
from prunenet.policies.experts import MixtureCost, check_experts, scores_without_text
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.widths.allocation import parameters_left
from prunenet.policies.options import ExpertsBy
from prunenet.runtime.placement import check_together, shared_copy


def fewer_experts(
    evidence: Evidence, ratio: float, round_to: int = 8, *, by: ExpertsBy
) -> PreTrainedModel:
    """Returns a model with the experts of highest score, as many in each layer.

    Args:
        evidence: the model and, for "reap", text.
        ratio: share of FFN channels, in [0, 1), whose removal would leave at least as many
            parameters.
        round_to: of that removal.
        by: see `prunenet.policies.experts.keep_experts`.

    Raises:
        ValueError: the fewest experts that a layer can be left with are too many; or no text.
        UnsupportedArchitecture: the model has no experts, or their use cannot be measured.
    """
    model = evidence.model
    check_experts(model, by, measured=evidence.blocks is not None)
    experts = Experts.of(model)
    left = _within(model, experts, parameters_left(model, ratio, round_to))
    if by == "reap":
        scores = evidence.expert_use
    else:
        scores = scores_without_text(model, experts, by, evidence.seed)
    kept = {layer: experts.best(values, left) for layer, values in scores.items()}
    return without_experts(model, kept)


def _within(model: PreTrainedModel, experts: Experts, most: int) -> int:
    """The most experts of a layer in a model of at most so many parameters."""
    price = MixtureCost.of(model, active=False)
    fitting = [left for left in experts.possible if price.whole(left) <= most]
    if not fitting:
        raise ValueError(
            f"the {experts.fewest} experts that a layer must keep leave more parameters than this"
            " ratio does; ask for less"
        )
    return fitting[-1]


def check_routed(model: PreTrainedModel) -> None:
    """Raises UnsupportedArchitecture for a model without experts, or without one whole number that
    says to how many a token goes.
    """
    if all(group.expert is None for group in Anatomy.of(model).groups):
        raise UnsupportedArchitecture(
            f"a {type(model).__name__} has no experts; cut channels instead"
        )
    if top_k_field(model.config) is None:
        raise UnsupportedArchitecture(
            f"no whole number in the configuration of a {type(model).__name__} says to how many"
            " experts a token goes; cut channels instead"
        )


def routed_to_fewer(evidence: Evidence, ratio: float, round_to: int = 8) -> PreTrainedModel:
    """Returns a model with all its experts that sends each token to fewer of them.

    Args:
        evidence: the model; no text is read.
        ratio: share of FFN channels, in [0, 1), whose removal would leave at least as many active
            parameters.
        round_to: of that removal.

    Raises:
        ValueError: even one expert a token is too many.
        UnsupportedArchitecture: as `check_routed`.
    """
    model = evidence.model
    check_routed(model)
    check_together(model, "routing to fewer experts")
    most = parameters_left(model, ratio, round_to, active=True)
    field, made = top_k_field(model.config), shared_copy(model)
    assert field is not None, "check_routed"
    for number in range(top_k(model.config) or 1, 0, -1):
        set_field(made.config, field, number)
        if active_parameters(Anatomy.of(made)) <= most:
            restate_modules(made, check_built(made))
            return made
    raise ValueError("one expert a token uses more parameters than this ratio leaves; ask for less")
