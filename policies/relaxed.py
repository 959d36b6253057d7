"""Relaxes keep masks so that gradients reach what chooses channels (docs/methods.md, section 14).

Source: Huang et al., "Deterministic Differentiable Structured Pruning for Large Language Models"
(DDP), arXiv 2603.08065: the form of the mask and its schedule, one budget, KL to the dense model.
What differs: the budget is met by a threshold at every step, in place of an augmented Lagrangian;
gradients pass where the mask is clamped; the divergence is that of the 256 likeliest successors and
the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from prunenet.evaluation.successors import Divergence, Successors
from prunenet.models.anatomy import Anatomy
from prunenet.models.hooks import requiring_grad, scaling
from prunenet.models.layers import check_tokens
from prunenet.runtime.placement import check_together, home

WIDEST, NARROWEST = 0.5, 0.05
"""First and last `mu` of the schedule."""
_BISECTIONS = 30


def soft_keep(z: Float[Tensor, "*channels"], mu: float) -> Float[Tensor, "*channels"]:
    """Returns clamp(1.2 sigmoid(2.4 (z - mu) / mu) - 0.1, 0, 1): 0 from z = 0 down, 1/2 at mu, 1
    from about 2 mu up.

    Gradients pass the clamp, so that a channel that is off can come back, and one that is on can
    go.
    """
    soft = 1.2 * torch.sigmoid(2.4 * (z - mu) / mu) - 0.1
    return soft + (soft.clamp(0, 1) - soft).detach()


def sharpened(step: int, steps: int) -> float:
    """Returns `mu` at a step: it falls by the same factor each time."""
    done = step / max(steps - 1, 1)
    return float(WIDEST * (NARROWEST / WIDEST) ** done)


def budgeted(
    z: Float[Tensor, "*rows channels"],
    shares: Float[Tensor, "*rows"],
    costs: Float[Tensor, " channels"],
    mu: float,
) -> Float[Tensor, "*rows channels"]:
    """Returns the soft masks of mu + z - c, in [0, 1], with c such that each row keeps its share.

    Differentiable in z and the shares: the derivative of c is that of the constraint, so that the
    gradient of a channel is less what its cost would gain elsewhere.

    Args:
        z: of the channels under one budget; only differences within a row matter.
        shares: cost-weighted means of the masks, in (0, 1].
        costs: of the channels; they sum to 1.
        mu: see `soft_keep`.
    """
    with torch.no_grad():
        low, high = z.amin(-1) - 4 * mu, z.amax(-1) + 4 * mu
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            over = soft_keep(mu + z - middle[..., None], mu) @ costs > shares
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        chance = torch.sigmoid(2.4 * (z - low[..., None]) / mu)
        slope = (2.88 / mu * chance * (1 - chance) @ costs).clamp_min(1e-6)
    # One Newton step, which changes little and carries the derivative.
    excess = soft_keep(mu + z - low[..., None], mu) @ costs - shares
    return soft_keep(mu + z - (low + excess / slope)[..., None], mu)


class RelaxedModel:
    """A frozen dense model behind relaxed masks of its channels, judged against itself.

    Args:
        model: a causal LM in eval mode; read, never changed.
        blocks: token ids.
        divergence: see `prunenet.evaluation.successors.Divergence`.
        unscored: positions at the start of each block that are not judged, such as BOS.

    Attributes:
        count: blocks.
        sizes: channels of each group.
        costs: (channels,) share of all channels' parameters that each one has; they sum to 1.

    Raises:
        ValueError: the model is on several devices, or blocks that it cannot read; when judging,
            logits that are not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Int[Tensor, "n tokens"],
        *,
        divergence: Divergence = "kl",
        unscored: int = 0,
    ) -> None:
        check_together(model, "a gradient through masks")
        check_tokens(model, blocks)
        self._model, self._anatomy = model, Anatomy.of(model)
        self._divergence, self._unscored = divergence, unscored
        self._blocks, self.count = blocks.to(home(model)), len(blocks)
        groups = self._anatomy.groups
        self.sizes = [group.width for group in groups]
        costs = torch.tensor([float(group.channel_parameters) for group in groups])
        each = costs.repeat_interleave(torch.tensor(self.sizes)).to(home(model))
        self.costs = each / each.sum()
        self._dense: dict[int, Successors] = {}

    def lost(
        self, masks: Float[Tensor, " channels"], rows: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Returns the divergence of the masked model on some blocks, a token; differentiable in the
        masks, those of all groups behind one another.
        """
        logits = self._logits(self._blocks[rows], torch.split(masks, self.sizes))
        return self._expected(rows).lost(logits, self._divergence)

    def _expected(self, rows: Int[Tensor, " batch"]) -> Successors:
        """Returns what the dense model predicts; it reads each block once, alone."""
        for row in set(rows.tolist()) - self._dense.keys():
            with torch.no_grad():
                logits = self._logits(self._blocks[row : row + 1], [])
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(
                    f"the model's logits are not finite: damaged weights, or {self._model.dtype}"
                    " overflows"
                )
            self._dense[row] = Successors.of(logits)
        held = [self._dense[row] for row in rows.tolist()]
        return Successors(
            torch.cat([one.top for one in held]), torch.cat([one.logs for one in held])
        )

    def _logits(
        self, ids: Int[Tensor, "n tokens"], masks: Sequence[Float[Tensor, " _"]]
    ) -> Float[Tensor, "n scored vocabulary"]:
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        banks: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            hooks.enter_context(requiring_grad(self._model, ()))
            for (module, _), groups in self._anatomy.down_places().items() if masks else ():
                down, own = groups[0].down, [masks[group.number] for group in groups]
                if down.expert is None:
                    hooks.enter_context(module.register_forward_pre_hook(scaling(own[0])))
                    continue
                whole = getattr(module, down.attribute).detach()
                along = torch.stack(own).unsqueeze(3 - down.axis).to(whole)
                banks[down.name] = whole * along
            logits: Tensor = functional_call(self._model, banks, kwargs=given).logits
        return logits[:, self._unscored :]
