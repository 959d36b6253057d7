"""Applies a saved policy to a model at any ratio. Needs neither gymnasium nor stable-baselines3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoint import Provenance, identify, save_pruned
from prunenet.layers import count_parameters, iter_ffns
from prunenet.masks import check_ratio, ratio_for_parameters
from prunenet.policies.artifact import Policy
from prunenet.surgery import narrowed


@dataclass(frozen=True, slots=True)
class Pruned:
    """A narrow model and how it came about.

    Attributes:
        model: an ordinary transformers model. Parameters outside the FFNs are shared with the dense one.
        keep: (d_ff,) mask of each layer, over the dense model's channels.
        provenance: what is written beside the checkpoint.
    """

    model: PreTrainedModel
    keep: list[Bool[Tensor, " d_ff"]]
    provenance: Provenance

    def save_pretrained(self, out: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Writes an ordinary Hugging Face checkpoint, verified by reloading it; see `prunenet.checkpoint.save_pruned`."""
        return save_pruned(self.model, out, self.keep, self.provenance, tokenizer=tokenizer)


def prune(
    model: PreTrainedModel,
    policy: Policy,
    *,
    ratio: float | None = None,
    params: float | None = None,
    round_to: int = 8,
    policy_name: str = "policy",
) -> Pruned:
    """Cuts a model to a size, deterministically; the given model stays as it is.

    Args:
        model: a causal LM of a supported family.
        policy: decides which channels stay.
        ratio: share of FFN channels removed from each layer, in [0, 1).
        params: share of *all* parameters removed, in [0, 1), as nearly as rounded widths allow. Exactly one of the two is
            given.
        round_to: widths are multiples of this.
        policy_name: recorded in the provenance.

    Raises:
        ValueError: neither or both of ratio and params, or one out of range.
        UnsupportedArchitecture: see `prunenet.architectures`.
    """
    ratio = resolve_ratio(model, ratio, params)
    keep = policy.masks(model, ratio, round_to=round_to)
    narrow = narrowed(model, keep)
    provenance = Provenance.of(
        model,
        narrow,
        policy=policy_name,
        policy_sha256=policy.sha256,
        regime=policy.config.regime,
        ratio=ratio,
        seed=policy.config.recipe.get("seed"),
        **_base(model),
    )
    return Pruned(narrow, keep, provenance)


def resolve_ratio(model: PreTrainedModel, ratio: float | None, params: float | None) -> float:
    """The share of FFN channels to remove, from exactly one of the two ways to say it.

    Raises:
        ValueError: neither or both given, or out of range.
    """
    check_amount(ratio, params)
    if params is None:
        assert ratio is not None
        return ratio
    ffns = list(iter_ffns(model))
    total, _ = count_parameters(model)
    return ratio_for_parameters(params, total, [f.channel_parameters for f in ffns], [f.d_ff for f in ffns])


def check_amount(ratio: float | None, params: float | None) -> None:
    """Raises ValueError unless exactly one amount is given, in [0, 1)."""
    if (ratio is None) == (params is None):
        given = "neither" if ratio is None else "both"
        raise ValueError(f"give one of --ratio (share of FFN channels) and --params (share of all parameters), got {given}")
    if ratio is not None:
        check_ratio(ratio)
    elif not 0 <= (params or 0) < 1:
        raise ValueError(f"share of parameters must be in [0, 1), got {params}")


def _base(model: PreTrainedModel) -> dict[str, Any]:
    source = model.config._name_or_path
    if source and Path(source).is_dir():
        name, revision = identify(source)
        return {"base_model": name, "revision": revision}
    return {"base_model": source or type(model).__name__, "revision": getattr(model.config, "_commit_hash", None) or "unknown"}
