"""One model: a spec, a ratio and a seed -> a narrow model. What several cells measure is measured
once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.regimes import most
from prunenet.compare.evidence import SharedEvidence
from prunenet.compare.ledger import Ledger
from prunenet.compare.options import ShareOf
from prunenet.compare.spec import Spec
from prunenet.models.anatomy import Anatomy
from prunenet.models.heads import group_counts, out_linears
from prunenet.models.knobs import step_of
from prunenet.models.layers import check_positions, down_linears, ffn_widths
from prunenet.policies.apply import prune, ratio_of
from prunenet.policies.artifact import Policy
from prunenet.policies.methods import METHODS, Allocation, Evidence, Method, cut
from prunenet.policies.options import PruneOptions
from prunenet.policies.repair import repaired
from prunenet.refit.cut import Cut, refit_kept
from prunenet.runtime import parallel
from prunenet.runtime.choices import ROUND_TO, RoundTo
from prunenet.text.calibration import (
    PREFIX_SAMPLING,
    CalibrationSet,
    blocks_from,
    data_blocks,
    prefix_blocks,
    self_blocks,
    token_blocks,
)
from prunenet.text.choices import Bos
from prunenet.text.corpora import CalibrationText, content_sha256
from prunenet.text.generate import BLOCK, KEEP
from prunenet.text.windows import bos_token, openings

_Scores = Float[Tensor, " _"]
_PROTECTS = (4, 2)  # LLM-Pruner's, for methods that protect no layers of their own


@dataclass(frozen=True, slots=True)
class Amount:
    """How much calibration text is read: `count` blocks of `window` tokens."""

    count: int = 64
    window: int = BLOCK


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A narrow model and what went into it.

    Attributes:
        model: shares what was not cut with the dense one.
        widths: channels of each layer.
        groups: groups of attention heads of each layer; None where heads are whole.
        biases: parameters that a compensation added, which no allocation counts.
        regime: what the whole way looked at, a policy's training included: weights, self or data.
        applied_regime: what cutting this model looked at.
        policy: name of the policy that was asked; None without one.
        calibration: where the text comes from and how much of it was read; None where none was.
    """

    model: PreTrainedModel
    widths: list[int]
    biases: int
    regime: str
    applied_regime: str
    policy: str | None
    calibration: Mapping[str, Any] | None
    groups: list[int] | None = None


class Pruner:
    """Makes narrow models of one dense model.

    Holds the measurements of each text (moments: 3 d_ff^2 float32 a layer at most, for refits)
    until `forget`.

    Args:
        model, tokenizer: the dense model, which must not change.
        policy, policy_name: what `prunenet` specs and learned allocations ask; None: there is none.
        texts: calibration texts by the names that specs have for them.
        amount: of calibration text.
        round_to: widths are multiples of this; "auto": see `prunenet.models.knobs.rounding`.
        share_of: what ratios are shares of, see `prunenet.compare.options`.
        bos: whether calibration text begins with the BOS token, see `prunenet.text.windows`.

    Attributes:
        progress: called with (tokens, tokens in all) while the model writes text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        policy: Policy | None = None,
        policy_name: str = "none",
        texts: Mapping[str, CalibrationText] | None = None,
        amount: Amount | None = None,
        round_to: RoundTo = ROUND_TO,
        share_of: ShareOf = "channels",
        bos: Bos = "auto",
    ) -> None:
        self.model, self.tokenizer, self.policy, self.policy_name = (
            model,
            tokenizer,
            policy,
            policy_name,
        )
        self.ledger, self.round_to, self.bos = Ledger(), round_to, bos
        self.share_of: ShareOf = share_of
        self.progress: Callable[[int, int], None] | None = None
        self._texts, self._amount = texts or {}, amount or Amount()
        self._blocks: dict[tuple[str, int], tuple[CalibrationSet, float | None]] = {}
        self._evidence: dict[tuple[str, int], SharedEvidence] = {}
        self._scores: dict[tuple[str, int, str], Any] = {}

    def blocks(self, moments: str, seed: int) -> tuple[CalibrationSet, float | None]:
        """Text to measure on, and how many seconds it took to have it; None where the model had
        written it before.

        Raises:
            TextError, ValueError: see `prunenet.text.calibration`.
        """
        if (moments, seed) not in self._blocks:
            wrote = False

            def progress(done: int, total: int) -> None:
                nonlocal wrote
                wrote = True
                if self.progress is not None:
                    self.progress(done, total)

            start = time.perf_counter()
            found = self._written(moments, seed, progress)
            writes = moments == "self" or moments.startswith("seed:")
            self._blocks[moments, seed] = (
                found,
                None if writes and not wrote else time.perf_counter() - start,
            )
        return self._blocks[moments, seed]

    def check_texts(self, specs: Sequence[Spec]) -> None:
        """Raises ValueError for calibration text that is too short, or windows that the model
        cannot read.
        """
        front = int(bos_token(self.tokenizer, self.bos) is not None)
        what = "calibration window" + " with its BOS token" * front
        check_positions(self.model, self._amount.window + front, what)
        for moments, name in sorted(
            {(spec.moments, spec.text) for spec in specs if spec.moments and spec.text}
        ):
            try:
                if moments == name:
                    self._written(name, 0, lambda done, of: None)
                else:
                    openings(self.tokenizer, self._texts[name], 1)
            except ValueError as error:
                raise ValueError(
                    f"calibration text {name!r}: {error} (`calibration_tokens`,"
                    " `calibration_window`)"
                ) from None

    def share_texts(self, wanted: Sequence[tuple[str | None, int]]) -> None:
        """Splits the sampling of texts over the processes, and gives each text to all of them.

        One process alone waits until a text is needed. A text that cannot be sampled fails the
        cells that read it, in each process anew.

        Args:
            wanted: (moments, seed) of every cell.
        """
        if parallel.size() == 1:
            return
        sampled = [
            (moments, seed)
            for moments, seed in dict.fromkeys(wanted)
            if moments is not None and (moments == "self" or moments.startswith("seed:"))
        ]
        for number, place in enumerate(sampled):
            if parallel.is_owner(number):
                with parallel.apart(), suppress(Exception):
                    self.blocks(*place)
        for number, place in enumerate(sampled):
            self._receive(place, number % parallel.size())

    def _receive(self, place: tuple[str, int], source: int) -> None:
        """Takes over a text that the process `source` has, if it could be sampled."""
        held = self._blocks.get(place)
        # A list, because JSON tells "no seconds" (None) from "no text" ([]).
        seconds = parallel.broadcast_object(source, lambda: [] if held is None else [held[1]])
        if seconds:

            def own() -> CalibrationSet:
                assert held is not None, "the source has sent its seconds"
                return held[0]

            self._blocks[place] = blocks_from(source, own), seconds[0]

    def sha256(self, spec: Spec) -> str | None:
        """Of the external text that a spec reads, if any."""
        return None if spec.text is None else content_sha256(self._texts[spec.text])

    def channels(self, share: float) -> float:
        """The share of FFN channels whose removal removes a share of `share_of`.

        Raises:
            ValueError: a layer cannot be rounded, or the channels hold less than that.
        """
        if self.share_of == "channels":
            size = PruneOptions(ratio=share, round_to=self.round_to)
        elif self.share_of == "parameters":
            size = PruneOptions(params=share, round_to=self.round_to)
        else:
            size = PruneOptions(active=share, round_to=self.round_to)
        return ratio_of(self.model, size)

    def make(self, spec: Spec, ratio: float, seed: int) -> Made:
        """The narrow model of a spec, at a share of `share_of`.

        Raises:
            ValueError: the method, its allocation or its refit cannot do this; the sentence says
                why.
        """
        ratio = self.channels(ratio)
        step = step_of(Anatomy.of(self.model).groups, ratio, self.round_to)
        blocks = None if spec.moments is None else self.blocks(spec.moments, seed)[0]
        evidence = self._evidence_of(spec.moments, blocks, seed)
        row = METHODS.get(spec.method)
        if row is not None and row.rebuild is not None:
            narrow, biases = row.rebuild(evidence, ratio, step), 0
        elif spec.product:
            narrow, biases = self._product(spec, ratio, step, evidence), 0
        else:
            narrow, biases = self._assembled(spec, ratio, step, evidence)
        asked = self.policy if spec.asks_policy else None
        seen = ["weights"] if blocks is None else [blocks.regime]
        regimes = [*seen, *([] if asked is None else [asked.config.regime])]
        return Made(
            model=narrow,
            widths=ffn_widths(narrow),
            biases=biases,
            regime=most(regimes),
            applied_regime=seen[0],
            policy=None if asked is None else self.policy_name,
            calibration=(
                None
                if blocks is None
                else dict(blocks.source) | {"tokens_read": blocks.ids.numel()}
            ),
            groups=group_counts(narrow) if spec.heads else None,
        )

    def forget(self, moments: str | None, seed: int) -> None:
        """Drops everything measured on a text."""
        label = moments or ""
        self.ledger.forget(label, seed)
        self._blocks.pop((label, seed), None)
        self._evidence.pop((label, seed), None)
        for key in [key for key in self._scores if key[:2] == (label, seed)]:
            del self._scores[key]

    def _written(
        self, moments: str, seed: int, progress: Callable[[int, int], None]
    ) -> CalibrationSet:
        model, tokenizer, bos = self.model, self.tokenizer, self.bos
        count, window = self._amount.count, self._amount.window
        many = 2 * round(count / KEEP / 2)
        if moments == "self":
            return self_blocks(
                model,
                tokenizer,
                sequences=many,
                tokens=window,
                seed=seed,
                bos=bos,
                progress=progress,
            )
        if moments == "random":
            return token_blocks(
                model, count=count, window=window, seed=seed, tokenizer=tokenizer, bos=bos
            )
        if moments.startswith("seed:"):
            text = self._texts[moments.removeprefix("seed:")]
            sampling = replace(PREFIX_SAMPLING, sequences=many, tokens=window, seed=seed)
            return prefix_blocks(model, tokenizer, text, sampling, bos=bos, progress=progress)
        text = self._texts[moments]
        return data_blocks(tokenizer, text, count=count, window=window, seed=seed, bos=bos)

    def _evidence_of(
        self, moments: str | None, blocks: CalibrationSet | None, seed: int
    ) -> SharedEvidence:
        label = moments or ""
        if (label, seed) not in self._evidence:
            self._evidence[label, seed] = SharedEvidence(
                self.model, blocks, seed, self.ledger, label
            )
        return self._evidence[label, seed]

    def _product(
        self, spec: Spec, ratio: float, step: int, evidence: SharedEvidence
    ) -> PreTrainedModel:
        widths = "per-layer" if spec.allocation == "learned" else spec.allocation
        scores = None if self.policy is None else self._policy_scores(evidence)
        options: dict[str, Any] = {
            "blocks": evidence.blocks,
            "widths": widths,
            "refit": spec.refit,
            "scores": scores,
        }
        with torch.no_grad():
            return prune(self.model, self.policy, ratio=ratio, round_to=step, **options).model

    def _assembled(
        self, spec: Spec, ratio: float, step: int, evidence: SharedEvidence
    ) -> tuple[PreTrainedModel, int]:
        """Scores, then widths, then refit; and how many parameters a bias adds."""
        allocation: Any = spec.allocation
        if allocation == "learned":
            learned = cast(Policy, self.policy)
            allocation = learned.widths(self.model, ratio, per_layer=True, round_to=step)
        refit: Any = "mean_bias" if spec.refit == "mean_bias" else "off"
        found = cut(
            evidence,
            self._method(spec, ratio, evidence),
            ratio,
            allocation=cast(Allocation, allocation),
            refit=refit,
            round_to=step,
            heads=spec.heads,
        )
        if spec.refit in ("off", "mean_bias"):
            pairs = ((found.biases, down_linears), (found.group_biases, out_linears))
            biases = sum(
                _new_biases(linears(self.model)) for added, linears in pairs if added is not None
            )
            return found.applied(self.model), biases
        chosen = Cut(found.keep, None, groups=found.groups)
        return self._refitted(spec, chosen, evidence).model(self.model), 0

    def _refitted(self, spec: Spec, chosen: Cut, evidence: SharedEvidence) -> Cut:
        if spec.refit != "sequential":
            refitted = refit_kept(self.model, chosen.keep, evidence.folds)
            chosen = replace(refitted, groups=chosen.groups)
        return repaired(self.model, chosen, spec.refit, evidence.ids, evidence.kinds)

    def _method(self, spec: Spec, ratio: float, evidence: SharedEvidence) -> Method:
        """The method's row, its scores shared between cells."""
        if spec.method == "elimination":
            return Method(
                "elimination",
                "text",
                "greedy elimination, prunenet.refit.eliminate",
                lambda _: evidence.elimination,
            )
        if spec.method in ("prunenet", "prunenet-weights"):
            return Method(
                spec.method, "weights", "the policy", lambda _: self._policy_scores(evidence)
            )
        row = METHODS[spec.method]
        if spec.allocation == "protected" and row.protects == (0, 0):
            row = replace(row, protects=_PROTECTS)
        if row.score is None:
            return row
        if spec.heads:
            return replace(
                row,
                with_heads=self._shared_scores(
                    f"joint scores of {row.name}", row.with_heads, row, evidence
                ),
            )
        given: Callable[..., list[_Scores]] = row.score
        score = partial(given, ratio=ratio) if row.searches else given
        name = f"scores of {row.name}" + (f" at {ratio:g}" if row.searches else "")
        shared = self._shared_scores(name, score, row, evidence)
        return replace(row, score=shared, searches=False)

    def _shared_scores(
        self, name: str, score: Any, row: Method, evidence: SharedEvidence
    ) -> Callable[[Evidence], Any]:
        """The scores of a method's row, computed once."""
        # Scores of the weights are the same whatever text the allocation reads.
        home = self._evidence_of(None, None, evidence.seed) if row.needs == "weights" else evidence
        key = (home.label, home.seed, name)

        def make() -> Any:
            if key not in self._scores:
                self._scores[key] = score(home)
            return self._scores[key]

        return lambda _: self.ledger.measured(key, make)

    def _policy_scores(self, evidence: SharedEvidence) -> list[_Scores]:
        policy = cast(Policy, self.policy)
        place = (evidence.label, evidence.seed) if policy.config.moments else ("", 0)
        key = (*place, "scores of the policy")

        def make() -> Any:
            if key not in self._scores:
                self._scores[key] = policy.scores(self.model, evidence.blocks)
            return self._scores[key]

        return self.ledger.measured(key, make)


def _new_biases(linears: list[nn.Linear]) -> int:
    return sum(linear.out_features for linear in linears if linear.bias is None)
