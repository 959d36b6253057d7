"""The ways to prune that `calibration_free.py` measures, and what they share: the model, texts,
policies, measurements.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.envs.divergence import DivergenceReward
from prunenet.models.layers import ffn_widths
from prunenet.models.masks import top_channels, width_at, widths_for_budget
from prunenet.policies.apply import MEASURED, prune
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.methods import Evidence, pruned_model
from prunenet.recover.training import Tuning, tuned
from prunenet.refit.cut import Cut, cut_layers, refit_sequentially
from prunenet.text.calibration import CalibrationSet, data_blocks, self_blocks
from prunenet.text.corpora import CalibrationText, load_text

Make = Callable[[float], PreTrainedModel]
CALIBRATION = {"ptb": "ptb/ptb.valid.txt", "wikitext2": "wikitext2/wiki.valid.tokens"}


@dataclass(frozen=True)
class Row:
    """A way to prune: `make` gives the narrow model at a ratio."""

    group: str
    method: str
    regime: str
    seed: int
    make: Make


class Pruner:
    """What rows share: the model, text, policies."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.model, self.tokenizer = (
            load_model(asked.model, device=asked.device),
            load_tokenizer(asked.model),
        )
        self.data, self.tokens, self.sequences = asked.data, asked.tokens, asked.sequences
        self.ratios: tuple[float, ...] = tuple(asked.ratios)
        self.policies = [Policy.from_pretrained(folder) for folder in asked.policies]
        self._cuts: dict[Any, Any] = {}
        self._evidence: dict[Any, Evidence] = {}

    def external(self, name: str, seed: int = 0) -> CalibrationSet:
        text = load_text(str(self.data / CALIBRATION[name]), CalibrationText)
        return data_blocks(self.tokenizer, text, count=self.tokens // 512, window=512, seed=seed)

    def written(self, seed: int = 0) -> CalibrationSet:
        return self_blocks(self.model, self.tokenizer, sequences=self.sequences, seed=seed)

    def dense(self, _ratio: float) -> PreTrainedModel:
        return self.model

    def baseline(
        self, name: str, blocks: Callable[[], CalibrationSet] | None, seed: int, **options: Any
    ) -> Make:
        def make(ratio: float) -> PreTrainedModel:
            text = None if blocks is None else blocks()
            key = (None if text is None else text.source["text"], seed)
            if key not in self._evidence:
                self._evidence[key] = Evidence(self.model, text, seed)
            return pruned_model(self._evidence[key], name, ratio, **options)

        return make

    def weights(self, policy: Policy, widths: str) -> Make:
        return lambda ratio: prune(self.model, policy, ratio=ratio, widths=widths).model

    def measured(
        self,
        blocks: Callable[[], CalibrationSet],
        *,
        channels: Policy | None,
        widths: Policy | None,
        refit: str = "layerwise",
        measured: float = MEASURED,
    ) -> Make:
        """A policy's channels, blended with measured energies (None: elimination's), refitted on
        blocks.

        widths: as a policy learned (None: uniform).
        """

        def make(ratio: float) -> PreTrainedModel:
            source = blocks().source
            key = (source["text"], source["seed"], channels, refit == "off", measured)
            if key not in self._cuts:  # all ratios and both kinds of widths from one walk
                learned = channels or next(iter(self.policies), None)
                kinds = [(kind, r) for kind in dict.fromkeys((None, learned)) for r in self.ratios]
                scores = None if channels is None else channels.scores(self.model)
                ways = [self._widths(kind, r) for kind, r in kinds]
                cuts = cut_layers(
                    self.model,
                    blocks().ids,
                    ways,
                    scores=scores,
                    measured=measured,
                    refit=refit != "off",
                )
                self._cuts[key] = dict(zip(kinds, cuts, strict=True))
            cut: Cut = self._cuts[key][widths, ratio]
            if refit == "sequential":
                cut = refit_sequentially(self.model, cut, blocks().ids, dense_targets=False)
            return cut.model(self.model)

        return make

    def best_of(self, n: int, policy: Policy | None) -> Make:
        """What chance finds at the cost of a stage of training: n random cuts at ratio 0.3, judged
        as training judges them.

        Random widths; a policy's channels, or random ones. Other ratios take the best one's
        log-odds and channels.
        """

        def make(ratio: float) -> PreTrainedModel:
            if (n, policy) not in self._cuts:
                generator = torch.Generator().manual_seed(0)
                d_ff = ffn_widths(self.model)
                known = None if policy is None else policy.scores(self.model)
                draws = []
                for _ in range(n):
                    offsets = torch.randn(len(d_ff), generator=generator).mul(0.5).tolist()
                    draws.append(
                        (
                            offsets,
                            known or [torch.rand(width, generator=generator) for width in d_ff],
                        )
                    )
                keeps = [self._keep(offsets, scores, 0.3) for offsets, scores in draws]
                reward = DivergenceReward(self.model, self.written().ids[:4, :128])
                paid = reward.sweep([torch.stack(layer) for layer in zip(*keeps, strict=True)])[
                    "divergence"
                ]
                self._cuts[n, policy] = draws[int(paid.argmax())]
            offsets, scores = self._cuts[n, policy]
            return Cut(self._keep(offsets, scores, ratio), None).model(self.model)

        return make

    def recovered(self, make: Make) -> Make:
        """What `make` cuts, trained for 100 steps on the dense model's predictions on its own text
        (`prunenet recover`).
        """

        def trained(ratio: float) -> PreTrainedModel:
            with torch.enable_grad():
                return tuned(make(ratio), self.written(), Tuning(), teacher=self.model).model

        return trained

    def _keep(self, offsets: list[float], scores: list[Tensor], ratio: float) -> list[Tensor]:
        widths = widths_for_budget(ffn_widths(self.model), offsets, ratio)
        return [top_channels(row, width) for row, width in zip(scores, widths, strict=True)]

    def _widths(self, policy: Policy | None, ratio: float) -> list[int]:
        if policy is None:
            return [width_at(d_ff, ratio) for d_ff in ffn_widths(self.model)]
        return policy.widths(self.model, ratio, per_layer=True)


def rows(shop: Pruner) -> Iterator[Row]:
    """Every row of the table."""
    yield Row("dense", "dense", "-", 0, shop.dense)
    for seed, policy in enumerate(shop.policies):
        make = shop.measured(shop.written, channels=policy, widths=policy)
        yield Row("self", "default: blend + refit, learned widths", "self", seed, make)
        make = shop.measured(shop.written, channels=policy, widths=None)
        yield Row("self", "blend + refit, uniform", "self", seed, make)
    for calibration in CALIBRATION:
        text = lambda name=calibration: shop.external(name)  # noqa: E731
        for name in ("wanda_sp", "flap", "llm_pruner_element1"):
            yield Row(
                "data",
                f"{name}, own allocation, {calibration}",
                "data",
                0,
                shop.baseline(name, text, 0),
            )
        for name in ("flap", "llm_pruner_element1"):
            make = shop.baseline(name, text, 0, allocation="uniform")
            yield Row("data", f"{name}, uniform, {calibration}", "data", 0, make)
        make = shop.measured(text, channels=None, widths=None)
        yield Row("data", f"elimination + refit, uniform, {calibration}", "data", 0, make)
    yield from ablations(shop)
    for seed, policy in enumerate(shop.policies):
        make = shop.recovered(shop.measured(shop.written, channels=policy, widths=policy))
        yield Row("recovered", "default, then recovered", "self", seed, make)
    for seed, policy in enumerate(shop.policies):
        yield Row(
            "weights", "policy, learned widths", "weights", seed, shop.weights(policy, "per-layer")
        )
        yield Row("weights", "policy, uniform", "weights", seed, shop.weights(policy, "uniform"))
    yield Row(
        "weights",
        "untrained policy",
        "weights",
        0,
        shop.weights(Policy.untrained(PolicyConfig()), "uniform"),
    )
    if shop.policies:
        yield Row(
            "weights",
            "untrained scores, learned widths",
            "weights",
            0,
            shop.weights(untrained(shop), "per-layer"),
        )
    for seed in range(5):
        yield Row("weights", "random", "weights", seed, shop.baseline("random", None, seed))
    for name in (
        "magnitude",
        "lila",
        "folding",
        "prunenet_published",
        "prunenet_published_trained",
    ):
        yield Row("weights", name, "weights", 0, shop.baseline(name, None, 0))


def ablations(shop: Pruner) -> Iterator[Row]:
    """What each part brings; the first policy stands for all seeds."""
    elimination = partial(shop.measured, shop.written, channels=None)
    yield Row("ablation", "elimination + refit, uniform", "self", 0, elimination(widths=None))
    yield Row(
        "ablation",
        "elimination, uniform, no refit",
        "self",
        0,
        elimination(widths=None, refit="off"),
    )
    if not shop.policies:
        return
    first = shop.policies[0]
    yield Row(
        "ablation",
        "elimination, learned widths, no refit",
        "self",
        0,
        elimination(widths=first, refit="off"),
    )
    yield Row(
        "ablation", "elimination + refit, learned widths", "self", 0, elimination(widths=first)
    )
    ours = partial(shop.measured, shop.written, channels=first, widths=first)
    yield Row(
        "ablation", "blend + sequential refit, learned widths", "self", 0, ours(refit="sequential")
    )
    yield Row("ablation", "blend, learned widths, no refit", "self", 0, ours(refit="off"))
    yield Row(
        "ablation", "policy's channels + refit, learned widths", "self", 0, ours(measured=0.0)
    )
    yield Row(
        "ablation", "measured energies alone + refit, learned widths", "self", 0, ours(measured=1.0)
    )
    make = shop.measured(lambda: shop.external("wikitext2"), channels=None, widths=first)
    yield Row("data", "elimination + refit, learned widths, wikitext2", "data", 0, make)
    yield Row(
        "ablation",
        "policy's channels, best of 96 random widths",
        "self",
        0,
        shop.best_of(96, first),
    )
    yield Row("ablation", "best of 96 random masks and widths", "self", 0, shop.best_of(96, None))


def untrained(shop: Pruner) -> Policy:
    """The first policy's widths, with the scores that training starts from."""
    policy, fresh = shop.policies[0], Policy.untrained(PolicyConfig())
    fresh.scorer.widths.load_state_dict(policy.scorer.widths.state_dict())
    return fresh
