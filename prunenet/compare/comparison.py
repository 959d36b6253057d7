"""A comparison from names to lines: opens model and texts, checks, measures what is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from prunenet.checkpoints.load import load_model, load_tokenizer
from prunenet.checkpoints.options import LoadOptions
from prunenet.checkpoints.records import check_channels
from prunenet.checkpoints.sources import source_name
from prunenet.compare.options import CalibrationTexts, CompareOptions, Scored, Watch
from prunenet.compare.plan import Evaluation, Plan
from prunenet.compare.pruner import Amount, Pruner
from prunenet.compare.results import Line, Results
from prunenet.compare.run import check, check_spec
from prunenet.compare.run import compare as run
from prunenet.compare.spec import RESERVED, Spec, parse_all
from prunenet.evaluation.task_files import task_files
from prunenet.models.anatomy import Anatomy
from prunenet.policies.artifact import policy_for
from prunenet.recover.options import TOKENS
from prunenet.text.calibration import block_tokens
from prunenet.text.corpora import CalibrationText, TestText, load_text
from prunenet.text.windows import bos_token


def compare(
    model: str | Path,
    methods: Sequence[str],
    out: str | Path,
    options: CompareOptions | None = None,
    *,
    scored: Scored | None = None,
    calibration: CalibrationTexts | None = None,
    loading: LoadOptions | None = None,
    watch: Watch | None = None,
) -> list[Line]:
    """Compares ways to prune at equal size: methods x ratios x seeds, one JSON line a cell.

    Args:
        model: folder or hub id of the dense model.
        methods: each as `method[:allocation][@moments][+heads][+refit][+recovered]`, or "all"; see
            `prunenet.compare.spec`.
        out: file of JSON lines; what is in it is not measured again.
        options: ratios, seeds, rounding, policy.
        scored: texts and tasks.
        calibration: the text that methods read.
        loading: device and dtype.
        watch: callbacks.

    Returns:
        The lines of all cells, those of earlier runs too; `error` says why a cell failed.

    Raises:
        ValueError: a method, text or number that makes no sense; before any work.
        CheckpointError, TextError, UnsupportedArchitecture: see `prunenet.load_model`, `load_text`.
    """
    options, scored = options or CompareOptions(), scored or Scored()
    calibration, loading = calibration or CalibrationTexts(), loading or LoadOptions()
    watch, source = watch or Watch(), source_name(model)
    for name in calibration.named:
        check_name(name)
    specs = parse_all(methods, calibration.named)
    _check_recovery(specs, options)
    results = Results(out)
    evaluation = _evaluation(scored)
    wanted = {spec.text for spec in specs if spec.text is not None}
    texts = _calibration_texts(wanted, calibration.named, scored.column, evaluation)
    dense = load_model(
        source, dtype=loading.dtype, device=loading.device, max_memory=loading.max_memory
    )
    check_channels(dense, "compare on the checkpoint that it was exported from")
    gated = Anatomy.of(dense).architecture.gated
    policy, policy_name = policy_for(options.policy, dense.config.model_type, gated=gated)
    tokenizer, bos = load_tokenizer(source), scored.options.bos
    amount = amount_of(calibration, dense, int(bos_token(tokenizer, bos) is not None))
    pruner = Pruner(
        dense,
        tokenizer,
        policy=policy,
        policy_name=policy_name,
        texts=texts,
        amount=amount,
        round_to=options.round_to,
        share_of=options.share_of,
        bos=bos,
    )
    # "all" means what can be done; what was asked for by name is refused by `check`.
    specs = [spec for spec in specs if spec.name in methods or _possible(spec, pruner)]
    plan = _plan(source, specs, options, evaluation, amount)
    check(plan, pruner)
    if watch.progress is not None:
        progress = watch.progress
        pruner.progress = lambda done, of: progress("writing text", done, of)
    return run(plan, pruner, results, report=watch.line, progress=watch.progress)


def _check_recovery(specs: Sequence[Spec], options: CompareOptions) -> None:
    """Raises ValueError for a training that no method is trained by, or a text that is none."""
    usual = {"recover_tokens": TOKENS, "recover_window": None}
    for name, value in usual.items():
        given = getattr(options, name)
        if given != value and not any(spec.recovered for spec in specs):
            raise ValueError(
                f"`{name}` {given} is of methods +recovered: name one, or leave it out"
            )


def _plan(
    source: str,
    specs: Sequence[Spec],
    options: CompareOptions,
    evaluation: Evaluation,
    amount: Amount,
) -> Plan:
    return Plan(
        source,
        specs,
        options.ratios,
        options.seeds,
        evaluation,
        amount,
        options.round_to,
        (options.tuning, options.recover_text),
    )


def check_name(name: str) -> None:
    """Raises ValueError for a word that cannot name a calibration text."""
    if not name or name in RESERVED or set(name) & set("@+:/, "):
        raise ValueError(
            f"`calibration` is NAME=TEXT, NAME one word and not {', '.join(RESERVED)}; got {name!r}"
        )


def amount_of(calibration: CalibrationTexts, model: PreTrainedModel, front: int) -> Amount:
    """How many blocks of how many tokens a calibration set has.

    Args:
        calibration: tokens in all, and of a block.
        model: reads blocks of as many tokens as it has positions.
        front: tokens before each block: 1 for BOS.

    Raises:
        ValueError: fewer than two blocks, or blocks of fewer than two tokens.
    """
    window, tokens = calibration.window, calibration.tokens
    if window is None:
        window = block_tokens(model, front)
    if window < 2:
        raise ValueError(f"`calibration_window` must be 2 or more, got {window}")
    if tokens < 2 * window:
        raise ValueError(
            f"`calibration_tokens` must be at least {2 * window}, two blocks of {window}, got"
            f" {tokens}"
        )
    return Amount(tokens // window, window)


def _evaluation(scored: Scored) -> Evaluation:
    sources = dict.fromkeys(scored.texts)
    texts = [load_text(source, TestText, scored.column) for source in sources]
    tasks = _task_files(scored.tasks, scored.task_data)
    return Evaluation(texts, scored.options, tasks, scored.limit)


def _task_files(tasks: Sequence[str], folder: Path | None) -> dict[str, Path]:
    if not tasks and folder is None:
        return {}
    if folder is None:
        raise ValueError(
            f"tasks are read from local files: give the folder of {tasks[0]}.jsonl as `task_data`"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "zero-shot tasks need lm-eval; pip install 'prunenet[eval]', or leave `tasks` out"
        )
    return task_files(folder, [] if "all" in tasks else list(dict.fromkeys(tasks)))


def _calibration_texts(
    wanted: set[str], named: Mapping[str, str | Path], column: str | None, evaluation: Evaluation
) -> dict[str, CalibrationText]:
    found = {
        name: load_text(named.get(name, name), CalibrationText, column) for name in sorted(wanted)
    }
    for name, text in found.items():
        if any(text.content == test.content for test in evaluation.texts):
            raise ValueError(
                f"{name!r} is a text to be scored, and calibration must not see it; give another"
                " split or file"
            )
    return found


def _possible(spec: Spec, pruner: Pruner) -> bool:
    """Whether a spec can be done to the pruner's model."""
    try:
        check_spec(spec, pruner)
    except ValueError:
        return False
    return True
