"""What is compared: methods x ratios x seeds on one model. Which cells that makes, and how a cell's
question is put.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prunenet.compare.pruner import Amount, Pruner
from prunenet.compare.results import Line
from prunenet.compare.spec import Spec
from prunenet.evaluation.options import EVALUATION, EvaluationOptions
from prunenet.evaluation.zeroshot import read_task
from prunenet.recover.options import TOKENS, RecoverText, Tuning
from prunenet.recover.text import window_of
from prunenet.runtime.choices import ROUND_TO, RoundTo
from prunenet.text.corpora import TestText, content_sha256
from prunenet.text.windows import bos_token

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model is scored on.

    Attributes:
        texts: for perplexity, at least one.
        options: how they are scored; its `bos` holds for calibration text and tasks too.
        tasks: task -> its file, for `prunenet.evaluation.zeroshot.zero_shot`; none by default.
        limit: questions of each task; default all.
    """

    texts: Sequence[TestText]
    options: EvaluationOptions = EVALUATION
    tasks: Mapping[str, Path] = field(default_factory=dict)
    limit: int | None = None

    @property
    def labels(self) -> list[str]:
        """A short name of each text; the whole source where short ones would be the same."""
        short = [Path(text.name).name for text in self.texts]
        return short if len(set(short)) == len(short) else [text.name for text in self.texts]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared.

    Attributes:
        source: folder or hub id of the model.
        specs: ways to prune.
        ratios: shares removed, in [0, 1), of what the pruner says.
        seeds: of text, windows and draws.
        evaluation: how every cell is scored.
        amount: of calibration text.
        round_to: widths are multiples of this.
        recovery: how methods `+recovered` are trained, and on what.
    """

    source: str
    specs: Sequence[Spec]
    ratios: Sequence[float]
    seeds: Sequence[int]
    evaluation: Evaluation
    amount: Amount = field(default_factory=Amount)
    round_to: RoundTo = ROUND_TO
    recovery: tuple[Tuning, RecoverText] = field(
        default_factory=lambda: (Tuning(), RecoverText(tokens=TOKENS))
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """One model to make and to score; `spec` None is the dense one."""

    spec: Spec | None
    ratio: float
    seed: int

    @property
    def name(self) -> str:
        """For a progress bar."""
        return "dense" if self.spec is None else f"{self.spec.name} {self.ratio:g} seed {self.seed}"


def cells(plan: Plan) -> list[Cell]:
    """The dense model, then those that read no text, then text by text and seed by seed: each is
    measured and dropped once.
    """
    moments = list(dict.fromkeys([None, *(spec.moments for spec in plan.specs)]))
    order = sorted(plan.specs, key=lambda spec: moments.index(spec.moments))
    found = [Cell(None, 0.0, 0)]
    for source in moments:
        for seed in plan.seeds:
            found += [
                Cell(spec, ratio, seed)
                for ratio in plan.ratios
                for spec in order
                if spec.moments == source
            ]
    return found


def asked(plan: Plan, cell: Cell, pruner: Pruner) -> Line:
    """What was asked for, in the words of a line."""
    spec, scored = cell.spec, plan.evaluation
    fields: dict[str, Any] = dict.fromkeys(("score", "allocation", "moments", "refit"))
    policy = None
    if spec is not None:
        fields = {
            "score": spec.method,
            "allocation": spec.allocation,
            "moments": spec.moments,
            "refit": spec.refit,
        }
        # not a field of the others: their cells keep their keys
        fields |= {"heads": True} if spec.heads else {}
        fields |= {} if pruner.share_of == "channels" else {"share_of": pruner.share_of}
        if spec.recovered:
            tuning, text = plan.recovery
            window = window_of(text, pruner.model)
            batch = tuning.blocks_of_step(window)
            how = asdict(replace(tuning, seed=cell.seed, batch=batch, learning_rate=tuning.rate))
            how |= {"betas": list(tuning.betas), "tokens": text.tokens, "window": window}
            fields["recovered"] = how
        policy = pruner.policy if spec.asks_policy else None
    amount = (
        None
        if spec is None or spec.moments is None
        else asdict(plan.amount) | {"sha256": pruner.sha256(spec)}
    )
    return {
        "format": _FORMAT,
        "method": "dense" if spec is None else spec.name,
        **fields,
        "ratio": cell.ratio,
        "seed": cell.seed,
        "round_to": plan.round_to,
        "policy_sha256": None if policy is None else policy.sha256,
        "calibration_asked": amount,
        "evaluation": {
            "texts": [
                {"text": label, "sha256": content_sha256(text)}
                for label, text in zip(scored.labels, scored.texts, strict=True)
            ],
            "window": scored.options.window,
            "stride": scored.options.step,
            "max_windows": scored.options.max_windows,
            "bos": bos_token(pruner.tokenizer, scored.options.bos) is not None,
            "tasks": {task: read_task(task, file)[1] for task, file in scored.tasks.items()},
            "limit": scored.limit,
        },
    }


def key_of(facts: Line) -> str:
    """The same for the same question, whatever its texts are called."""
    evaluation = facts["evaluation"] | {
        "texts": [text["sha256"] for text in facts["evaluation"]["texts"]]
    }
    if not evaluation["bos"]:
        del evaluation["bos"]  # cells without it keep their keys
    kind = (
        facts["moments"]
        if facts["moments"] in (None, "self", "random")
        else facts["moments"].startswith("seed:")
    )
    question = {name: value for name, value in facts.items() if name != "method"} | {
        "evaluation": evaluation,
        "moments": kind,
    }
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
