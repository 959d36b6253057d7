"""Zero-shot accuracy of a model in memory on multiple-choice tasks read from local files.

Tasks, prompts, tokenisation and metrics are those of lm-eval (Gao et al., "The Language Model
Evaluation Harness", https://github.com/EleutherAI/lm-evaluation-harness; `tasks/*.yaml` repeat its
definitions). What differs:

* Data come from `<task>.jsonl`, not from the hub, and are checked first (`task_files`).
* The tokens that all choices of a question begin with are read once and their KV cache serves every
  choice; the LM head runs only where it is needed. lm-eval reads the whole prompt again for each
  choice.
* Batches are cut where padding and the fixed price of a forward pass are least together.
* Log-probabilities are taken in float32 whatever the model's dtype (lm-eval: in the dtype of the
  logits).
* Prompts begin with the BOS token where the tokenizer begins a text with it, as lm-eval's do by
  default; `bos` can also ask for it where the tokenizer adds none, which lm-eval's `add_bos_token`
  cannot. A prompt that is cut to the model's positions loses it, there and here.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.evaluation.speed import evaluating, last_logits
from prunenet.evaluation.task_files import COLUMNS, Row, TaskError, read_task, task_files
from prunenet.runtime.placement import home
from prunenet.runtime.products import with_fast_products
from prunenet.text.choices import Bos
from prunenet.text.windows import bos_token

__all__ = ["COLUMNS", "TaskError", "TaskResult", "read_task", "task_files", "zero_shot"]

_DEFINITIONS = Path(__file__).with_name("tasks")
# What one forward pass costs besides its tokens, in tokens: reading the weights (CPU), launching
# kernels (elsewhere). Measured for 135 million parameters on one core; the optimum is flat.
_PASS_ON_CPU, _PASS_ELSEWHERE = 20, 2000
# Logits of one forward pass at most, unless one question alone has more: 1 GB in float32.
_LOGITS = 250_000_000
_Pair = tuple[list[int], list[int]]  # tokens of a context and of a choice behind it


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Accuracy of a model on one task.

    Attributes:
        task: one of `COLUMNS`.
        accuracy: share of questions whose right choice has the highest log-probability, in [0, 1].
        standard_error: of `accuracy`; None for a single question.
        accuracy_norm: the same with log-probabilities per character of the choice; None where
            lm-eval does not define it.
        standard_error_norm: of `accuracy_norm`.
        n: questions scored.
        limit: the first questions of the file that were asked for; None for all.
        sha256: hexadecimal, of the whole file.
        bos: whether prompts began with the BOS token.
    """

    task: str
    accuracy: float
    standard_error: float | None
    accuracy_norm: float | None
    standard_error_norm: float | None
    n: int
    limit: int | None
    sha256: str
    bos: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """The tokens that a model reads for one question.

    Attributes:
        inputs: token ids, one list per choice: context and choice without the choice's last token.
        targets: token ids of the choices: what the last positions of their inputs should predict.
    """

    inputs: list[list[int]]
    targets: list[list[int]]

    @property
    def shared(self) -> int:
        """Counts the leading tokens that all inputs have in common, before the positions whose
        predictions count.
        """
        least = min(
            len(read) - len(target) for read, target in zip(self.inputs, self.targets, strict=True)
        )
        same = next(
            (i for i, tokens in enumerate(zip(*self.inputs, strict=False)) if len(set(tokens)) > 1),
            least,
        )
        return min(least, same)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, str | Path] | str | Path,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    bos: Bos = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[TaskResult]:
    """Scores a model on tasks, without examples in the prompt and without chat template.

    Args:
        model: causal LM on any device, per-layer widths included; left as it was.
        tokenizer: the model's own.
        tasks: task -> its file, or a folder: see `task_files`.
        limit: only the first questions of each file, at least 1; default all.
        batch_size: questions in one forward pass at most, at least 1; fewer where that is cheaper.
            Results do not depend on it, up to the order of floating-point sums.
        bos: whether prompts begin with the BOS token: as the tokenizer begins a text, or yes, no.
        progress: called with (questions done, questions in all) after each batch, counted over the
            tasks.

    Returns:
        One result per task, in the order of `tasks`.

    Raises:
        TaskError: unknown task; a file that is missing, empty or has a row that the task cannot
            read.
        ImportError: lm-eval is not installed.
        ValueError: an argument is out of range, the tokenizer has no BOS token, or the model's
            log-probabilities are not finite.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {value}")
    begins = bos_token(tokenizer, bos)
    data = {task: read_task(task, file) for task, file in task_files(tasks).items()}
    total, done, results = sum(len(rows[:limit]) for rows, _ in data.values()), 0, []
    with evaluating(model), _quiet_harness():
        harness = _harness(model, tokenizer, begins)
        for task, (rows, digest) in data.items():
            rows = rows[:limit]

            def report(answered: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + answered, total)

            score = partial(_answers, model, begins, batch_size, report)
            scores = _scores(harness, task, rows, score)
            done += len(rows)
            accuracy, error = _mean(scores["acc"])
            norm, norm_error = _mean(scores["acc_norm"]) if "acc_norm" in scores else (None, None)
            about = (len(rows), limit, digest, begins is not None)
            results.append(TaskResult(task, accuracy, error, norm, norm_error, *about))
    return results


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Gives the mean of zeros and ones, and its standard error (of a sample), as lm-eval does."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(mean * (1 - mean) / (len(values) - 1)) if len(values) > 1 else None


# --- what lm-eval does: prompts, tokens, metrics ---


def _module(name: str) -> Any:
    """Imports a module of lm-eval, when it is needed."""
    try:
        return importlib.import_module(f"lm_eval.{name}")
    except ImportError as error:
        raise ImportError(
            f"zero-shot tasks need lm-eval ({error}); pip install 'prunenet[eval]'"
        ) from error


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Silences lm-eval, which warns of what we do on purpose (a model that is already in memory);
    its level is put back after.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bos: int | None) -> Any:
    """Makes lm-eval's view of a model in memory. It sets a padding token on its tokenizer, so it
    gets a copy.

    Tokens are lm-eval's where its default is what is asked; else the text's, without BOS.
    """
    usual = None if bos == bos_token(tokenizer) else False
    return _module("models.huggingface").HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), add_bos_token=usual
    )


def _task(task: str, rows: list[Row]) -> Any:
    """lm-eval's task object over our rows."""
    definition = importlib.import_module("yaml").safe_load(
        (_DEFINITIONS / f"{task}.yaml").read_text(encoding="utf-8")
    )
    data = {"validation": importlib.import_module("datasets").Dataset.from_list(rows)}
    return _module("api.task").ConfigurableTask(
        config=definition | {"custom_dataset": lambda **_: data}
    )


def _scores(
    harness: Any,
    task: str,
    rows: list[Row],
    answers_to: Callable[[list[list[_Pair]], int], Iterator[tuple[float, bool]]],
) -> dict[str, list[float]]:
    """Metric -> 0 or 1 for each question; `answers_to` scores the choices of questions, given the
    model's positions.
    """
    definition = _task(task, rows)
    requests, sizes = [], []
    for number, row in enumerate(definition.eval_docs):
        context = definition.fewshot_context(row, num_fewshot=0)
        found = definition.construct_requests(doc=row, ctx=context, metadata=(task, number, 1))
        requests += found
        sizes.append(len(found))

    def score(encoded: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        pairs = iter((context, choice) for _, context, choice in encoded)
        grouped = [[next(pairs) for _ in range(size)] for size in sizes]
        return list(answers_to(grouped, harness.max_length))

    harness._loglikelihood_tokens = score  # lm-eval turns text into tokens and calls this
    answers = iter(harness.loglikelihood(requests, disable_tqdm=True))
    scores: dict[str, list[float]] = defaultdict(list)
    for row, size in zip(definition.eval_docs, sizes, strict=True):
        for metric, value in definition.process_results(
            row, [next(answers) for _ in range(size)]
        ).items():
            scores[metric].append(float(value))
    return scores


def _answers(
    model: PreTrainedModel,
    bos: int | None,
    most: int,
    report: Callable[[int], None],
    grouped: list[list[_Pair]],
    positions: int,
) -> Iterator[tuple[float, bool]]:
    """Scores (context, choice) pairs, grouped by question; contexts begin with `bos`, if any."""
    front = [] if bos is None else [bos]
    questions = [
        _question([(c if c[:1] == front else front + c, choice) for c, choice in pairs], positions)
        for pairs in grouped
    ]
    for answers in answer_all(model, questions, most, report):
        yield from answers


def _question(pairs: list[_Pair], positions: int) -> Question:
    """Cuts (context, choice) from the left to the model's positions, as lm-eval does."""
    for _, choice in pairs:
        if not 0 < len(choice) <= positions:
            raise TaskError(f"a choice has {len(choice)} tokens; the model takes 1 to {positions}")
    return Question(
        [(context + choice)[-positions - 1 : -1] for context, choice in pairs],
        [choice for _, choice in pairs],
    )


# --- what we do instead of it: forward passes ---


@with_fast_products
@torch.inference_mode()
def answer_all(
    model: PreTrainedModel,
    questions: Sequence[Question],
    most: int,
    report: Callable[[int], None] | None = None,
) -> list[list[tuple[float, bool]]]:
    """Scores each choice of each question: its log-probability (nats) after the context, and
    whether greedy decoding writes it.

    Args:
        model: causal LM in evaluation mode.
        questions: token ids within the model's vocabulary and positions.
        most: questions in one forward pass at most.
        report: called with the number of questions answered after each batch.

    Raises:
        ValueError: a log-probability is not finite.
    """
    answers: dict[int, list[tuple[float, bool]]] = {}
    for batch in _batches(questions, most, model):
        flat = iter(_answer([questions[i] for i in batch], model))
        answers |= {i: [next(flat) for _ in questions[i].inputs] for i in batch}
        if report is not None:
            report(len(answers))
    return [answers[i] for i in range(len(questions))]


def _batches(questions: Sequence[Question], most: int, model: PreTrainedModel) -> list[list[int]]:
    """Splits the questions, sorted by length, where tokens with padding and the price of passes
    have the least sum.

    Exact for that order, by dynamic programming over the end of each batch. The longest come first:
    what does not fit in memory fails at once.
    """
    overhead = _PASS_ON_CPU if home(model).type == "cpu" else _PASS_ELSEWHERE
    room = _LOGITS // model.config.get_text_config().vocab_size
    longest, shared = [max(map(len, q.inputs)) for q in questions], [q.shared for q in questions]
    order = sorted(range(len(questions)), key=lambda i: (-longest[i], -shared[i], i))
    costs, starts = [0.0] + [math.inf] * len(order), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        prefix, width, rows = math.inf, 0, 0
        for start in range(end - 1, max(end - most, 0) - 1, -1):
            i = order[start]
            prefix, width, rows = (
                min(prefix, shared[i]),
                max(width, longest[i]),
                rows + len(questions[i].inputs),
            )
            if start < end - 1 and rows * (width - prefix) > room:
                break
            cost = (
                costs[start]
                + (end - start) * prefix
                + rows * (width - prefix)
                + overhead * (1 + (prefix > 0))
            )
            if cost < costs[end]:
                costs[end], starts[end] = cost, start
    ends = [len(order)]
    while ends[-1] > 0:
        ends.append(starts[ends[-1]])
    return [order[start:end] for end, start in pairwise(ends)][::-1]


def _answer(batch: Sequence[Question], model: PreTrainedModel) -> list[tuple[float, bool]]:
    """Answers one batch, choice by choice. Padding stands on the right, where causal
    attention never looks.
    """
    prefix = min(question.shared for question in batch)
    cache = None
    if prefix > 0:
        ids = torch.tensor([question.inputs[0][:prefix] for question in batch], device=home(model))
        cache = model(input_ids=ids, use_cache=True, **last_logits(model, 1)).past_key_values
        owner = [i for i, question in enumerate(batch) for _ in question.inputs]
        cache.batch_select_indices(torch.tensor(owner, device=home(model)))
    rows = [read[prefix:] for question in batch for read in question.inputs]
    targets = [target for question in batch for target in question.targets]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=home(model))
    first = min(len(row) - len(target) for row, target in zip(rows, targets, strict=True))
    output = model(
        input_ids=ids,
        past_key_values=cache,
        use_cache=cache is not None,
        **last_logits(model, width - first),
    )
    answers = []
    for row, target, logits in zip(rows, targets, output.logits[:, first - width :], strict=True):
        answers.append(
            _log_probability(logits[len(row) - len(target) - first : len(row) - first], target)
        )
    return answers


def _log_probability(
    logits: Float[Tensor, "tokens vocabulary"], target: list[int]
) -> tuple[float, bool]:
    """Gives the log-probability of one choice's tokens (nats), and whether each is the most likely
    one.
    """
    wanted = torch.tensor(target, device=logits.device)
    value = -float(F.cross_entropy(logits.float(), wanted, reduction="sum"))
    if not math.isfinite(value):
        raise ValueError(
            f"a log-probability is {value}: the model's weights are damaged, or its dtype"
            " overflows; load it in float32"
        )
    return value, bool((logits.argmax(-1) == wanted).all())
