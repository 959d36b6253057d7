"""PruneNet as published: scores channels by its own scorer, sampling and training, for comparison.

Source: Sengupta et al., "You Only Prune Once: Designing Calibration-Free Model Compression With
Policy Learning" (PruneNet), ICLR 2025, arXiv 2501.15296, section 3, and the authors' package
`efficient-pruners` 0.1.0; docs/methods.md, sections 1.1 and 1.2. Kept on purpose: the mask is
sampled; the loss sums log keep weights with new noise, which is not the log-probability of any
action; rewards are 1 / KS, without baseline; layer l's is multiplied by gamma^l; one step an
episode; the policy of the episode with the highest reward is kept.

What differs:
- float32: in the package on a CPU, float16 loss scaling overflows and skips every step, so that its
  policy is its random start (here: without `train`);
- W A is never formed: (W A + b) v = W (A v) + b v, with the same gradients;
- drawing without replacement is done by sorting log p plus Gumbel noise (the same distribution), so
  that one draw gives nested masks at all ratios;
- singular values come from Gram matrices (`prunenet.spectra.exact`), exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from prunenet.models.masks import top_channels
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.runtime.choices import check_ratio
from prunenet.spectra.exact import SpectralReference

_PERFECT = 99999.0  # the package's reward for a KS distance of 0


class PublishedScorer(nn.Module):
    """Computes alpha = sigmoid((W A + b) v), with one A, b and v for all layers.

    Starts as the package's scorer: A and b as in `nn.Linear`, v uniform in [0, 1).

    Args:
        d_model, d_ff: of every layer.
        generator: draws the start.
    """

    def __init__(self, d_model: int, d_ff: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = d_model**-0.5
        self.a = nn.Parameter((2 * torch.rand(d_model, d_ff, generator=generator) - 1) * bound)
        self.b = nn.Parameter((2 * torch.rand(d_ff, generator=generator) - 1) * bound)
        self.v = nn.Parameter(torch.rand(d_ff, generator=generator))

    def forward(self, weight: Float32[Tensor, "d_ff d_model"]) -> Float32[Tensor, " d_ff"]:
        """Returns logit(alpha) of each row."""
        logits: Tensor = weight @ (self.a @ self.v) + self.b @ self.v
        return logits


@dataclass(frozen=True, slots=True)
class PublishedTraining:
    """Holds a trained scorer and its rewards.

    Attributes:
        scorer: of the best episode.
        rewards: of each episode, summed over layers.
    """

    scorer: PublishedScorer
    rewards: list[float]


def scores(
    evidence: Evidence, *, train: bool = False, ratio: float = 0.3
) -> list[Float[Tensor, " _"]]:
    """Returns log keep weights plus Gumbel noise.

    The top k are k rows drawn without replacement in proportion to p.

    Args:
        evidence: its gate matrices are read (fc1 where there is no gate); its seed starts the
            scorer and all draws.
        train: whether to train by the published recipe; otherwise the scorer is at its random
            start.
        ratio: at which the scorer is trained.

    Raises:
        ValueError: layers of different widths, which one scorer cannot serve.
    """
    generator = evidence.generator()
    scorer = (
        trained(evidence, generator, ratio=ratio).scorer if train else started(evidence, generator)
    )
    with torch.no_grad():
        return [
            drawing_keys(log_keep_weights(scorer(w), generator), generator).to(w.device)
            for w in _weights(evidence)
        ]


def log_keep_weights(
    logits: Float[Tensor, " d_ff"], generator: torch.Generator
) -> Float[Tensor, " d_ff"]:
    """Returns log p = log sigmoid(logit(eps) + logit(alpha)), eps uniform in (0, 1).

    This is the binary concrete distribution at temperature 1.
    """
    eps = (
        torch.rand(logits.shape, generator=generator)
        .clamp_min(torch.finfo(torch.float32).tiny)
        .to(logits.device)
    )
    return nn.functional.logsigmoid(torch.logit(eps) + logits)


def drawing_keys(
    log_weights: Float[Tensor, "*batch d_ff"], generator: torch.Generator
) -> Float[Tensor, "*batch d_ff"]:
    """Returns keys whose top k are k items drawn without replacement, in proportion to weights."""
    uniform = torch.rand(log_weights.shape, generator=generator).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    gumbel = -torch.log(-torch.log(uniform))
    return log_weights + gumbel.to(log_weights.device)


def started(evidence: Evidence, generator: torch.Generator) -> PublishedScorer:
    """Makes a scorer at its random start, on the model's device; raises as `scores`."""
    shapes = {(ffn.d_model, ffn.d_ff) for ffn in evidence.ffns}
    if len(shapes) > 1:
        raise ValueError(
            "published PruneNet has weights of shape (d_model, d_ff) and needs equal layers, got"
            f" {sorted(shapes)}"
        )
    return PublishedScorer(*shapes.pop(), generator).to(evidence.ffns[0].up.device)


@torch.enable_grad()
def trained(
    evidence: Evidence,
    generator: torch.Generator,
    *,
    ratio: float = 0.3,
    episodes: int = 20,
    learning_rate: float = 1e-3,
    gamma: float = 0.99,
) -> PublishedTraining:
    """Trains by the published recipe: REINFORCE, AdamW, gradients clipped to norm 1, one step an
    episode.

    Args:
        evidence: its gate matrices are read.
        generator: of the start, the masks and the noise.
        ratio: of every layer, in [0, 1).
        episodes: 1 or more; 20 as published.
        learning_rate, gamma: the published values.
    """
    scorer = started(evidence, generator)
    weights = _weights(evidence)
    references = [SpectralReference.of(weight) for weight in weights]
    width = max(1, int((1 - check_ratio(ratio)) * len(weights[0])))
    optimiser = torch.optim.AdamW(scorer.parameters(), lr=learning_rate)
    best: dict[str, Tensor] = {}
    totals: list[float] = []
    for _ in range(episodes):
        masks, rewards = [], []
        for weight, reference in zip(weights, references, strict=True):
            with torch.no_grad():
                keys = drawing_keys(log_keep_weights(scorer(weight), generator), generator)
            masks.append(top_channels(keys, width))
            rewards.append(_reward(reference, masks[-1]))
        optimiser.zero_grad()
        for layer, (weight, keep, reward) in enumerate(zip(weights, masks, rewards, strict=True)):
            played = log_keep_weights(scorer(weight), generator)[keep].sum()
            (-played * gamma**layer * reward).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimiser.step()
        if sum(rewards) > max(totals, default=0.0):
            best = {name: value.clone() for name, value in scorer.state_dict().items()}
        totals.append(sum(rewards))
    scorer.load_state_dict(best)
    return PublishedTraining(scorer, totals)


def _reward(reference: SpectralReference, keep: Bool[Tensor, " d_ff"]) -> float:
    distance = float(reference.distance(keep[None]))
    return 1 / distance if distance > 0 else _PERFECT


def _weights(evidence: Evidence) -> list[Float32[Tensor, "d_ff d_model"]]:
    return [(ffn.up if ffn.gate is None else ffn.gate).float() for ffn in evidence.ffns]
