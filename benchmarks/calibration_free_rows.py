"""The ways to prune that `calibration_free.py` measures, named as `prunenet compare` names them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from _common import opened
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.compare.pruner import Amount, Pruner
from prunenet.compare.spec import parse
from prunenet.envs.divergence import DivergenceReward
from prunenet.models.layers import ffn_widths
from prunenet.models.masks import top_channels, widths_for_budget
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.methods import METHODS
from prunenet.recover.training import Tuning, tuned
from prunenet.refit.cut import Cut, cut_layers
from prunenet.text.corpora import CalibrationText, load_text
from prunenet.text.generate import KEEP

Make = Callable[[float], PreTrainedModel]
CALIBRATION = {"ptb": "ptb/ptb.valid.txt", "wikitext2": "wikitext2/wiki.valid.tokens"}
BASELINES = ("wanda_sp", "flap", "llm_pruner_element1")
WITHOUT_TEXT = (
    "magnitude",
    "lila",
    "folding",
    "prunenet_published",
    "prunenet_published_trained",
)


@dataclass(frozen=True)
class Row:
    """A way to prune: `make` gives the narrow model at a ratio."""

    group: str
    method: str
    regime: str
    seed: int
    make: Make


class Bench:
    """The dense model, and what prunes it: on its own text one pruner a policy, on others one."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.model, self.tokenizer = opened(asked.model, device=asked.device)
        self.policies = [Policy.from_pretrained(folder) for folder in asked.policies]
        self.sequences = asked.sequences
        self.own = [self.pruner(policy) for policy in self.policies] or [self.pruner(None)]
        self.external = Pruner(
            self.model,
            self.tokenizer,
            policy=self.own[0].policy,
            texts={
                name: load_text(str(asked.data / file), CalibrationText)
                for name, file in CALIBRATION.items()
            },
            amount=Amount(asked.tokens // 512, 512),
        )

    def pruner(self, policy: Policy | None) -> Pruner:
        """Of a policy, on text that the model writes."""
        amount = Amount(round(self.sequences * KEEP), 256)
        return Pruner(self.model, self.tokenizer, policy=policy, amount=amount)

    def rows(self) -> Iterator[Row]:
        """Every row of the table."""
        yield Row("dense", "dense", "-", 0, lambda _: self.model)
        for seed, pruner in enumerate(self.own if self.policies else []):
            default = way(pruner, "prunenet:learned")
            yield Row("self", "default: blend + refit, learned widths", "self", seed, default)
            uniform = way(pruner, "prunenet:uniform")
            yield Row("self", "blend + refit, uniform", "self", seed, uniform)
            recovered = self.recovered(default)
            yield Row("recovered", "default, then recovered", "self", seed, recovered)
        yield from self._calibrated()
        yield from self._ablations()
        yield from self._from_weights()

    def _calibrated(self) -> Iterator[Row]:
        """What reads a text from outside."""
        named = {}
        for text in CALIBRATION:
            named |= {f"{name}, own allocation, {text}": f"{name}@{text}" for name in BASELINES}
            named |= {
                f"{name}, uniform, {text}": f"{name}:uniform@{text}"
                for name in BASELINES
                if METHODS[name].allocation != "uniform"
            }
            named[f"elimination + refit, uniform, {text}"] = f"elimination@{text}"
        if self.policies:
            learned = "elimination + refit, learned widths, wikitext2"
            named[learned] = "elimination:learned@wikitext2"
        for method, spec in named.items():
            yield Row("data", method, "data", 0, way(self.external, spec))

    def _from_weights(self) -> Iterator[Row]:
        """What reads the weights alone."""
        for seed, pruner in enumerate(self.own if self.policies else []):
            learned = way(pruner, "prunenet-weights:learned")
            yield Row("weights", "policy, learned widths", "weights", seed, learned)
            uniform = way(pruner, "prunenet-weights:uniform")
            yield Row("weights", "policy, uniform", "weights", seed, uniform)
        fresh = way(self.pruner(Policy.untrained(PolicyConfig())), "prunenet-weights:uniform")
        yield Row("weights", "untrained policy", "weights", 0, fresh)
        if self.policies:
            mixed = way(self.pruner(untrained(self.policies[0])), "prunenet-weights:learned")
            yield Row("weights", "untrained scores, learned widths", "weights", 0, mixed)
        for seed in range(5):
            yield Row("weights", "random", "weights", seed, way(self.own[0], "random", seed))
        for name in WITHOUT_TEXT:
            yield Row("weights", name, "weights", 0, way(self.own[0], name))

    def _ablations(self) -> Iterator[Row]:
        """What each part brings; the first policy stands for all seeds."""
        first = self.own[0]
        named = {
            "elimination + refit, uniform": "elimination",
            "elimination, uniform, no refit": "elimination+off",
        }
        if first.policy is not None:
            named |= {
                "elimination, learned widths, no refit": "elimination:learned+off",
                "elimination + refit, learned widths": "elimination:learned",
                "blend + sequential refit, learned widths": "prunenet:learned+sequential",
                "blend, learned widths, no refit": "prunenet:learned+off",
            }
        makes = {method: way(first, spec) for method, spec in named.items()}
        if first.policy is not None:
            makes |= {
                "policy's channels + refit, learned widths": self.policy_alone(first.policy),
                "measured energies alone + refit, learned widths": self.energies(first.policy),
                "policy's channels, best of 96 random widths": self.best_of(96, first.policy),
                "best of 96 random masks and widths": self.best_of(96, None),
            }
        for method, make in makes.items():
            yield Row("ablation", method, "self", 0, make)

    def policy_alone(self, policy: Policy) -> Make:
        """The default, its channels not blended with measured energies."""

        def make(ratio: float) -> PreTrainedModel:
            text = self.own[0].blocks("self", 0)[0]
            options = {"widths": "per-layer", "channels": "policy"}
            return prune(self.model, policy, ratio=ratio, blocks=text, **options).model

        return make

    def energies(self, policy: Policy) -> Make:
        """The default, its channels by measured energies alone."""

        def make(ratio: float) -> PreTrainedModel:
            text = self.own[0].blocks("self", 0)[0]
            widths = policy.widths(self.model, ratio, per_layer=True)
            scores = policy.scores(self.model)
            (cut,) = cut_layers(
                self.model, text.ids, [widths], kinds=text.kinds, scores=scores, measured=1.0
            )
            return cut.model(self.model)

        return make

    def best_of(self, n: int, policy: Policy | None) -> Make:
        """What chance finds at the cost of a stage of training.

        Draws n random cuts at ratio 0.3, with random widths and a policy's channels or random
        ones, and judges them as training does. Other ratios take the best one's log-odds and
        channels.
        """
        best: list[tuple[list[float], list[Tensor]]] = []

        def make(ratio: float) -> PreTrainedModel:
            if not best:
                draws = self._draws(n, policy)
                keeps = [self._keep(offsets, scores, 0.3) for offsets, scores in draws]
                text = self.own[0].blocks("self", 0)[0]
                reward = DivergenceReward(self.model, text.ids[:4, :128])
                masks = [torch.stack(layer) for layer in zip(*keeps, strict=True)]
                best.append(draws[int(reward.sweep(masks)["divergence"].argmax())])
            return Cut(self._keep(*best[0], ratio), None).model(self.model)

        return make

    def recovered(self, make: Make) -> Make:
        """What `make` cuts, trained for 100 steps on the dense model's predictions on its own text,
        as `prunenet recover` does.
        """

        def trained(ratio: float) -> PreTrainedModel:
            text = self.own[0].blocks("self", 0)[0]
            with torch.enable_grad():
                return tuned(make(ratio), text, Tuning(), teacher=self.model).model

        return trained

    def _draws(self, n: int, policy: Policy | None) -> list[tuple[list[float], list[Tensor]]]:
        """Random log-odds of the layers' widths, and scores of their channels."""
        generator = torch.Generator().manual_seed(0)
        d_ff = ffn_widths(self.model)
        known = None if policy is None else policy.scores(self.model)
        draws = []
        for _ in range(n):
            offsets = torch.randn(len(d_ff), generator=generator).mul(0.5).tolist()
            scores = known or [torch.rand(width, generator=generator) for width in d_ff]
            draws.append((offsets, scores))
        return draws

    def _keep(self, offsets: list[float], scores: list[Tensor], ratio: float) -> list[Tensor]:
        widths = widths_for_budget(ffn_widths(self.model), offsets, ratio)
        return [top_channels(row, width) for row, width in zip(scores, widths, strict=True)]


def way(pruner: Pruner, spec: str, seed: int = 0) -> Make:
    """What `prunenet compare` makes of a spec."""
    asked = parse(spec, CALIBRATION)
    return lambda ratio: pruner.make(asked, ratio, seed).model


def untrained(policy: Policy) -> Policy:
    """A policy's widths, with the scores that training starts from."""
    fresh = Policy.untrained(PolicyConfig())
    fresh.scorer.widths.load_state_dict(policy.scorer.widths.state_dict())
    return fresh
