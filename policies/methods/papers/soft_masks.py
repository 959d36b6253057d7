"""Learned soft masks: trains one number a channel on frozen weights, under one budget.

Source: Huang et al., "Deterministic Differentiable Structured Pruning for Large Language Models"
(DDP), arXiv 2603.08065; docs/methods.md, section 14. Each channel has a free z and the mask
`prunenet.policies.relaxed.soft_keep`, which sharpens step by step. The loss is the divergence of
the masked model from the dense one, and a weight on masks between 0 and 1. Only z is trained.

What differs:
- FFN channels alone, ranked by z over all layers at the end, so that the budget is met exactly;
- text that the model writes by itself, or external text as the authors take (`soft_masks@ptb`);
- a short training: 92,160 tokens of text by default (authors: about 30 million);
- the budget is met at every step by a threshold (authors: an augmented Lagrangian, which needs to
  know the size of the loss);
- the learning rate falls with mu, so that a step moves a mask as far at the end as at the start.

    score = partial(soft_masks.scores, options=SoftMaskOptions(steps=360))
    narrow = pruned_model(evidence, replace(METHODS["soft_masks"], score=score), 0.3)
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import weights_sha256
from prunenet.evaluation.successors import Divergence
from prunenet.models.anatomy import Anatomy
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.relaxed import WIDEST, RelaxedModel, budgeted, sharpened
from prunenet.runtime.batches import batch_of
from prunenet.runtime.choices import check_fields, check_ratio
from prunenet.runtime.files import cache_folder, write_atomic
from prunenet.runtime.json_files import Count, JsonError, convert
from prunenet.runtime.own_files import ContentError, check_layout, packed, unpacked
from prunenet.runtime.placement import check_together

_BETAS = (0.9, 0.99)
_SECONDS = 20.0  # between two writes of the state


class _Facts(TypedDict):
    """Of a state's file, beside its tensors."""

    step: Count


@dataclass(frozen=True, slots=True)
class SoftMaskOptions:
    """Holds the options of learned soft masks.

    Attributes:
        steps: of Adam, 1 or more.
        batch: blocks of each step, 1 or more.
        learning_rate: of z at the first step, above 0, where a mask opens over a range of 1.
        divergence: what is kept small, see `prunenet.evaluation.successors`.
        binary: weight of the mean of m (1 - m), in nats, 0 or more.

    Raises:
        ValueError: an unknown divergence, or a number out of range.
    """

    steps: int = 180
    batch: int = 2
    learning_rate: float = 0.05
    divergence: Divergence = "kl"
    binary: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"`learning_rate` must be above 0 and finite, got {self.learning_rate}"
            )
        if not 0 <= self.binary < math.inf:
            raise ValueError(f"`binary` must be 0 or more and finite, got {self.binary}")


def check_maskable(model: PreTrainedModel) -> None:
    """Raises ValueError where the weights are on several devices, and UnsupportedArchitecture for
    an unknown model. Gated and ungated FFNs and experts are all masked.
    """
    Anatomy.of(model)
    check_together(model, "learning soft masks")


def scores(
    evidence: Evidence, *, ratio: float = 0.3, options: SoftMaskOptions | None = None
) -> list[Float[Tensor, " _"]]:
    """Returns the learned z of each layer's channels, comparable between layers.

    A run that is killed goes on from the cache folder (`prunenet.runtime.paths.cache_folder`).
    Arguments and errors as for `learned`.
    """
    cache = cache_folder() / "soft-masks"
    return learned(evidence, ratio=ratio, options=options, cache=cache)


def learned(
    evidence: Evidence,
    *,
    ratio: float = 0.3,
    options: SoftMaskOptions | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[Float[Tensor, " _"]]:
    """Trains the masks of all channels for one ratio.

    A step takes a forward and a backward pass over its blocks; every block of text that is used
    takes one dense forward pass besides, and 257 numbers a token of memory.

    Args:
        evidence: its model, text and seed; the seed draws the order of the blocks.
        ratio: share of FFN channels removed, in [0, 1).
        options: default `SoftMaskOptions()`.
        cache: folder where a run that takes minutes keeps its state until it ends; the same run,
            started again, goes on and ends with the same masks. None keeps all in memory.
        progress: called with (steps done, in all, divergence in nats or as a share).

    Returns:
        z of each group, (d_ff,).

    Raises:
        ValueError: no text, a ratio out of range, or a loss that is not finite.
    """
    run = _Run(evidence, 1 - check_ratio(ratio), options or SoftMaskOptions())
    file = None if cache is None else cache / f"{run.named(evidence)}.safetensors"
    if file is not None:
        run.load(file)
    saved = time.monotonic()
    while run.step < run.options.steps:
        lost = run.play()
        if progress is not None:
            progress(run.step, run.options.steps, lost)
        if file is not None and time.monotonic() - saved > _SECONDS:
            run.save(file)
            saved = time.monotonic()
    if file is not None:
        file.unlink(missing_ok=True)
    return [row.clone() for row in torch.split(run.z.detach(), run.judge.sizes)]


class _Run:
    """One training of z."""

    def __init__(self, evidence: Evidence, share: float, options: SoftMaskOptions) -> None:
        self.options, self.share, self.seed = options, share, evidence.seed
        self.judge = RelaxedModel(
            evidence.model,
            evidence.ids,
            divergence=options.divergence,
            unscored=int(evidence.bos is not None),
        )
        self.step = 0
        self.z = torch.zeros_like(self.judge.costs).requires_grad_()
        self.adam = torch.optim.Adam([self.z], lr=options.learning_rate, betas=_BETAS, eps=1e-12)

    def named(self, evidence: Evidence) -> str:
        """Hashes all that the masks depend on."""
        settings = ["soft masks 1", asdict(self.options), self.share, self.seed, evidence.bos]
        digest = hashlib.sha256(weights_sha256(evidence.model).encode())
        digest.update(json.dumps(settings).encode())
        digest.update(evidence.ids.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:24]

    def play(self) -> float:
        """Takes one step; returns the divergence before it."""
        options, mu = self.options, sharpened(self.step, self.options.steps)
        rows = batch_of(self.step, options.batch, self.judge.count, self.seed)
        share = torch.tensor(self.share, device=self.z.device)
        for settings in self.adam.param_groups:
            settings["lr"] = options.learning_rate * mu / WIDEST
        with torch.enable_grad():
            masks = budgeted(self.z, share, self.judge.costs, mu)
            undecided = (self.judge.costs * masks * (1 - masks)).sum()
            lost = self.judge.lost(masks, rows)
            loss = lost + options.binary * undecided
            (self.z.grad,) = torch.autograd.grad(loss, [self.z])
        reached = float(loss.detach())
        if not math.isfinite(reached):
            raise ValueError(
                f"the loss of soft masks is {reached} at step {self.step}: damaged weights, or"
                " a `learning_rate` that is too large"
            )
        self.adam.step()
        self.step += 1
        return float(lost.detach())

    def save(self, path: Path) -> None:
        """Writes z and all that the next step reads."""
        held = self.adam.state[self.z]
        tensors = {"z": self.z, "exp_avg": held["exp_avg"], "exp_avg_sq": held["exp_avg_sq"]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, packed(tensors, {"step": self.step}))

    def load(self, path: Path) -> None:
        """Goes on from a state; begins anew where there is none, or its file is damaged."""
        layout = dict.fromkeys(("z", "exp_avg", "exp_avg_sq"), (self.z.dtype, tuple(self.z.shape)))
        try:
            tensors, facts = unpacked(path, hashed=True)
            check_layout(tensors, layout)
            known = convert(facts, _Facts)
        except (FileNotFoundError, ContentError, JsonError):
            return
        self.step = known["step"]
        with torch.no_grad():
            self.z.copy_(tensors.pop("z"))
        held = {name: tensor.to(self.z.device) for name, tensor in tensors.items()}
        self.adam.state[self.z] = {"step": torch.tensor(float(self.step)), **held}
