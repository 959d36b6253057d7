"""What a pruned model is taught by: the dense model's predictions, and its hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from prunenet.evaluation.successors import Successors
from prunenet.models.layers import decoder_layers
from prunenet.recover.options import Loss


def teaching_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Int[Tensor, "n tokens"],
    *,
    unscored: int = 0,
    kind: Loss = "kl",
    hidden: float = 0.0,
) -> Float[Tensor, ""]:
    """KL(teacher || student) of next-token distributions, in nats per token; differentiable in the
    student (docs/methods.md, section 18).

    Args:
        student, teacher: of the same vocabulary.
        ids: token blocks, without padding.
        unscored: as for `prunenet.evaluation.losses.next_token_loss`.
        kind: "kl" over the vocabulary, or "top256" over the teacher's 256 likeliest tokens and one
            bin for the rest.
        hidden: weight of the mean over layers and tokens of |h_s - h_t|^2 / |h_t|^2, h the hidden
            state behind a decoder layer; it is added.
    """
    with torch.no_grad(), _hidden_states(teacher, hidden > 0) as wanted:
        expected = _logits(teacher, ids, unscored)
    with _hidden_states(student, hidden > 0) as found:
        own = _logits(student, ids, unscored)
    loss = (
        Successors.of(expected).lost(own, "kl") if kind == "top256" else _divergence(own, expected)
    )
    if not hidden:
        return loss
    pairs = zip(found, wanted, strict=True)
    return loss + hidden * torch.stack([_relative(a, b, unscored) for a, b in pairs]).mean()


def _logits(
    model: PreTrainedModel, ids: Int[Tensor, "n tokens"], unscored: int
) -> Float[Tensor, "n scored vocabulary"]:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, unscored:]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _divergence(
    own: Float[Tensor, "n scored vocabulary"], expected: Float[Tensor, "n scored vocabulary"]
) -> Float[Tensor, ""]:
    """KL(expected || own) over the vocabulary, nats a token."""
    logs, known = (logits.log_softmax(-1).flatten(0, 1) for logits in (own, expected))
    return F.kl_div(logs, known, reduction="batchmean", log_target=True)


def _relative(
    found: Float[Tensor, "n tokens d_model"], wanted: Float[Tensor, "n tokens d_model"], front: int
) -> Float[Tensor, ""]:
    """Squared error relative to the energy, the mean over tokens; a few massive activations would
    be all that a mean over the energies sees.
    """
    a, b = (t[:, front:].float() for t in (found, wanted))
    return ((a - b).square().sum(-1) / b.square().sum(-1).clamp(min=1e-12)).mean()


@contextmanager
def _hidden_states(model: PreTrainedModel, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects what the decoder layers give inside the block, in their order; nothing unless it is
    wanted.
    """
    found: list[Tensor] = []

    def keep(_module: nn.Module, _given: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    layers = decoder_layers(model) if wanted else ()
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
