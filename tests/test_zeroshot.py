"""Zero-shot accuracy: forward passes against brute force, prompts and results against lm-eval's
own, errors of task files.
"""

import importlib.util
import json
import logging
import math
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from families import FAMILIES, tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prunenet.evaluation import zeroshot
from prunenet.evaluation.zeroshot import (
    COLUMNS,
    Question,
    TaskError,
    answer_all,
    read_task,
    task_files,
    zero_shot,
)
from prunenet.models.surgery import narrowed

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed; pip install 'prunenet[eval]'",
)
DEFINITIONS = Path(zeroshot.__file__).with_name("tasks")
ROOT = Path(__file__).resolve().parents[1]


def choices(*texts: str) -> dict[str, list[str]]:
    return {"text": list(texts), "label": list("ABCDE"[: len(texts)])}


# Rows like those of the datasets, with what breaks templates: quotes, brackets, braces, digits,
# blanks, several gaps.
EXAM = [
    {
        "question": "Which is a 'gas'?",
        "choices": choices("ice", "steam", 'the "sea"', "[rock]"),
        "answerKey": "B",
    },
    {"question": "2 + 2 = {{x}}?", "choices": choices("4", "5", "it's 22"), "answerKey": "A"},
    {
        "question": "Why does it rain so much\nin the north?",
        "choices": choices("a", "bb", "ccc", "dddd", "ee e"),
        "answerKey": "E",
    },
]
ALGEBRA = {"subject": "abstract_algebra"}
SAMPLES: dict[str, list[dict]] = {
    "arc_easy": EXAM,
    "arc_challenge": EXAM[::-1],
    "piqa": [
        {
            "goal": "dresser",
            "sol1": "replace drawer with pin ",
            "sol2": 'finish, woodgrain\'s "pin" ',
            "label": 1,
        },
        {
            "goal": "How do I cut [a] tree?",
            "sol1": "saw",
            "sol2": "eat it, slowly and with care",
            "label": 0,
        },
    ],
    "winogrande": [
        {
            "sentence": "Ann beat Bea, so _ won the cup.",
            "option1": "Ann",
            "option2": "Bea",
            "answer": "1",
        },
        {
            "sentence": "The cup didn't fit the bag as  _ 's \"too_big\".",
            "option1": "cup's",
            "option2": "bag",
            "answer": "2",
        },
    ],
    "copa": [
        {
            "premise": "The man fell. ",
            "choice1": "It's icy.",
            "choice2": 'He ran "off".',
            "question": "cause",
            "label": 0,
        },
        {
            "premise": "She ate.",
            "choice1": "She slept.",
            "choice2": "A dog barked.",
            "question": "effect",
            "label": 1,
        },
    ],
    "boolq": [
        {"passage": "Ice -- frozen water.", "question": "is ice water", "label": 1},
        {"passage": "Iron is 'heavy'.", "question": "does iron float", "label": 0},
    ],
    "openbookqa": [
        {
            "question_stem": "The sun is",
            "choices": choices("hot", "it's cold", "wet", "7"),
            "answerKey": " A",
        },
        {
            "question_stem": "A fish can",
            "choices": choices("fly", "swim", "read", "[sing]"),
            "answerKey": "B",
        },
    ],
    "sciq": [
        {"support": " Cells divide.", "question": "What divides?", "correct_answer": "cells"}
        | {"distractor1": "rocks", "distractor2": "it's air", "distractor3": "a"},
        {"support": "", "question": "What is H2O?", "correct_answer": "water"}
        | {"distractor1": "salt", "distractor2": "7", "distractor3": '"sand"'},
    ],
    "hellaswag": [
        {"activity_label": "Cooking", "ctx_a": "A man [header] cooks.", "ctx_b": "he", "label": "1"}
        | {"endings": ["eats [title] it. [step] Now", "  sleeps.", "runs  off.", "it's [x"]},
        {"activity_label": "Sport", "ctx_a": "Two girls run.", "ctx_b": "", "label": "3"}
        | {"endings": ["a", "b", "c [substeps]", '"d" d']},
    ],
    "mmlu": [
        {
            "question": " What is two?\n",
            "subject": "abstract_algebra",
            "choices": ["a sum", "1 + 1", "it's 3", "7"],
            "answer": 1,
        },
        {
            "question": "Is 0 even?",
            "subject": "abstract_algebra",
            "choices": ["no", "at times", '"odd"', "yes "],
            "answer": 3,
        },
    ],
}


def write(folder: Path, task: str, rows: list[dict] | None = None) -> Path:
    file = folder / f"{task}.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in (SAMPLES[task] if rows is None else rows))
    )
    return file


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, 64 in all, like the vocabulary of the tiny models."""
    letters = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:'?\n"
    core = Tokenizer(
        models.WordLevel(
            {c: i for i, c in enumerate(letters)} | {"<s>": 61, "</s>": 62, "?": 63}, unk_token="?"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="?", bos_token="<s>", eos_token="</s>"
    )


# --- forward passes ---


def some_questions(n: int = 7, seed: int = 0) -> list[Question]:
    """Contexts of 1 to 30 tokens, 2 to 4 choices of 1 to 6 tokens; some contexts differ between the
    choices.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    questions = []
    for number in range(n):
        context = tokens(1, 30)
        pairs = []
        for _ in range(2 + number % 3):
            own = context + tokens(1, 3) if number % 3 == 2 else context
            pairs.append((own, tokens(1, 6)))
        questions.append(
            Question(
                [(own + choice)[:-1] for own, choice in pairs], [choice for _, choice in pairs]
            )
        )
    return questions


@torch.no_grad()
def by_brute_force(
    model: PreTrainedModel, questions: list[Question]
) -> list[list[tuple[float, bool]]]:
    """Each choice alone in one forward pass without cache or padding, in float64 from the logits
    on.
    """
    answers = []
    for question in questions:
        row = []
        for read, target in zip(question.inputs, question.targets, strict=True):
            table = (
                model(input_ids=torch.tensor([read]), use_cache=False)
                .logits[0]
                .double()
                .log_softmax(-1)[-len(target) :]
            )
            greedy = table.argmax(-1).tolist() == target
            row.append((sum(float(table[i, token]) for i, token in enumerate(target)), greedy))
        answers.append(row)
    return answers


def assert_same(
    found: list[list[tuple[float, bool]]], expected: list[list[tuple[float, bool]]]
) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for found_row, expected_row in zip(found, expected, strict=True):
        assert [value for value, _ in found_row] == pytest.approx(
            [value for value, _ in expected_row], abs=2e-4
        )
        assert [greedy for _, greedy in found_row] == [greedy for _, greedy in expected_row]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefixes_and_padding_change_no_log_probability_of_any_family(family: str) -> None:
    model, questions = tiny_model(family), some_questions()
    assert_same(answer_all(model, questions, most=4), by_brute_force(model, questions))


@pytest.mark.parametrize("most", [1, 2, 100])
def test_the_batch_changes_no_log_probability(most: int) -> None:
    model, questions = tiny_model("llama"), some_questions(12, seed=1)
    assert_same(answer_all(model, questions, most), by_brute_force(model, questions))


def test_a_model_with_per_layer_widths_is_scored_as_it_is() -> None:
    model = tiny_model("llama")
    narrow = narrowed(model, [torch.arange(48) < width for width in (8, 48, 24)])
    questions = some_questions(5)
    assert_same(answer_all(narrow, questions, most=16), by_brute_force(narrow, questions))
    assert answer_all(narrow, questions, 16) != answer_all(model, questions, 16)


def test_a_choice_that_greedy_decoding_writes_is_known_as_such() -> None:
    model = tiny_model("llama")
    context = [5, 9, 17, 30]
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    question = Question([context, context], [[best], [(best + 1) % 64]])
    ((first, second),) = answer_all(model, [question], 1)
    assert (first[1], second[1]) == (True, False)
    assert first[0] > second[0]


def test_the_shared_prefix_ends_before_the_first_position_that_counts() -> None:
    same = Question([[1, 2, 3, 4], [1, 2, 3, 4]], [[9], [8]])
    assert same.shared == 3
    assert Question([[1, 2, 3, 4], [1, 2, 7]], [[4, 9], [5]]).shared == 2
    assert Question([[1, 2], [2, 2]], [[9], [9]]).shared == 0
    assert Question([[1], [1, 5]], [[9], [5, 9]]).shared == 0


def test_a_prompt_too_long_for_the_model_is_cut_from_the_left_and_a_choice_never() -> None:
    question = zeroshot._question([(list(range(10)), [20, 21, 22]), ([1, 2], [20])], positions=8)
    # the last token is only predicted
    assert question.inputs == [[4, 5, 6, 7, 8, 9, 20, 21], [1, 2]]
    assert question.targets == [[20, 21, 22], [20]]
    for choice in ([], [0] * 9):
        with pytest.raises(TaskError, match=rf"has {len(choice)} tokens; the model takes 1 to 8"):
            zeroshot._question([([1], choice)], positions=8)


@pytest.mark.parametrize("overhead", [0, 5, 1000])
def test_batches_are_the_cheapest_cuts_of_the_sorted_questions(
    overhead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zeroshot, "_PASS_ON_CPU", overhead)
    model, questions, most = tiny_model("llama"), some_questions(8, seed=2), 5

    def cost(batch: list[int]) -> int:
        prefix = min(questions[i].shared for i in batch)
        rows = [len(read) - prefix for i in batch for read in questions[i].inputs]
        return len(batch) * prefix + len(rows) * max(rows) + overhead * (1 + (prefix > 0))

    batches = zeroshot._batches(questions, most, model)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(8))
    assert max(map(len, batches)) <= most
    lengths = [max(map(len, questions[i].inputs)) for i in order]
    assert lengths == sorted(lengths, reverse=True)  # what does not fit in memory fails at once
    best = math.inf
    for cuts in range(2**7):
        ends = [0, *(i + 1 for i in range(7) if cuts >> i & 1), 8]
        parts = [order[a:b] for a, b in pairwise(ends)]
        if max(map(len, parts)) <= most:
            best = min(best, sum(map(cost, parts)))
    assert sum(map(cost, batches)) == best


def test_batches_shrink_where_the_logits_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = some_questions(8, seed=2)
    monkeypatch.setattr(zeroshot, "_PASS_ON_CPU", 1000)
    monkeypatch.setattr(zeroshot, "_LOGITS", 64 * 40)
    for batch in zeroshot._batches(questions, 8, tiny_model("llama")):
        prefix = min(questions[i].shared for i in batch)
        rows = [len(read) - prefix for i in batch for read in questions[i].inputs]
        assert len(batch) == 1 or len(rows) * max(rows) <= 40


def test_a_broken_model_is_an_error_and_not_a_score() -> None:
    model = tiny_model("llama")
    torch.nn.init.constant_(model.get_input_embeddings().weight, math.nan)
    with pytest.raises(ValueError, match="log-probability is nan"):
        answer_all(model, some_questions(1), 1)


# --- task files ---


@pytest.mark.parametrize("task", COLUMNS)
def test_good_rows_are_read_and_every_column_is_needed(task: str, tmp_path: Path) -> None:
    rows, digest = read_task(task, write(tmp_path, task))
    assert len(rows) == len(SAMPLES[task])
    assert len(digest) == 64
    for column in COLUMNS[task]:
        second = {name: value for name, value in SAMPLES[task][1].items() if name != column}
        file = write(tmp_path, task, [SAMPLES[task][0], second])
        with pytest.raises(TaskError, match=rf"^{task}\.jsonl row 2 has no column '{column}'; "):
            read_task(task, file)
        write(tmp_path, task, [SAMPLES[task][0] | {column: None}])
        with pytest.raises(TaskError, match=rf"row 1 has None in column '{column}', which is not"):
            read_task(task, file)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "arc_easy",
            {"answerKey": "Z"},
            r"'Z' in column 'answerKey', not one of \['A', 'B', 'C', 'D'\]",
        ),
        (
            "arc_easy",
            {"choices": {"text": ["a"], "label": []}},
            "no lists 'text' and 'label' of equal length",
        ),
        (
            "piqa",
            {"label": -1},
            r"has -1 in column 'label', not one of \[0, 1\] \(test splits have no answers\)",
        ),
        ("winogrande", {"answer": ""}, r"has '' in column 'answer', not one of \['1', '2'\]"),
        ("winogrande", {"sentence": "no gap"}, "has no gap '_' in column 'sentence'"),
        (
            "copa",
            {"question": "why"},
            r"'why' in column 'question', not one of \['cause', 'effect'\]",
        ),
        (
            "hellaswag",
            {"label": ""},
            r"has '' in column 'label', not one of \['0', '1', '2', '3'\]",
        ),
        ("mmlu", {"answer": 4}, r"has 4 in column 'answer', not one of \[0, 1, 2, 3\]"),
        ("mmlu", {"choices": ["yes", "no"]}, "has 2 choices in column 'choices', not 4"),
    ],
)
def test_a_row_without_a_right_answer_says_so(
    task: str, change: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=message):
        read_task(task, write(tmp_path, task, [SAMPLES[task][0] | change]))


def test_files_that_are_missing_empty_or_not_json_say_so(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"piqa\.jsonl' does not exist"):
        read_task("piqa", tmp_path / "piqa.jsonl")
    file = tmp_path / "piqa.jsonl"
    for content in ("", "\n \n"):
        file.write_text(content)
        with pytest.raises(TaskError, match="is empty; piqa needs at least one row"):
            read_task("piqa", file)
    file.write_text(json.dumps(SAMPLES["piqa"][0]) + "\n{'goal'\n")
    with pytest.raises(TaskError, match=r"line 2 of '.*piqa\.jsonl' is not JSON"):
        read_task("piqa", file)
    file.write_bytes(b'{"goal": "\xff"}\n')
    with pytest.raises(TaskError, match=r"piqa\.jsonl' is not UTF-8 text \(byte 10\)"):
        read_task("piqa", file)
    file.write_text("[1]\n")
    with pytest.raises(TaskError, match="row 1 is not an object"):
        read_task("piqa", file)


def test_tasks_are_found_in_a_folder_or_named_one_by_one(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="'triviaqa'; known tasks: arc_easy"):
        task_files({"triviaqa": tmp_path})
    with pytest.raises(TaskError, match="'triviaqa'; known tasks: arc_easy"):
        read_task("triviaqa", tmp_path)
    with pytest.raises(TaskError, match="does not exist"):
        task_files(tmp_path / "none")
    (tmp_path / "notes.jsonl").write_text("{}")
    with pytest.raises(TaskError, match=r"no <task>\.jsonl file of a known task"):
        task_files(tmp_path)
    files = {task: write(tmp_path, task) for task in ("piqa", "copa")}
    assert list(task_files(tmp_path).items()) == sorted(files.items())
    assert list(task_files(files)) == ["piqa", "copa"]


def test_lines_that_only_other_alphabets_break_are_one_row(tmp_path: Path) -> None:
    file = tmp_path / "copa.jsonl"
    file.write_text(
        json.dumps(SAMPLES["copa"][0] | {"premise": "One\u2028two."}, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    assert read_task("copa", file)[0][0]["premise"] == "One\u2028two."


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"batch_size": 0}])
def test_a_limit_or_batch_below_one_is_refused(arguments: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be 1 or more, got"):
        zero_shot(
            tiny_model("llama"), letter_tokenizer(), {"piqa": write(tmp_path, "piqa")}, **arguments
        )


def test_without_lm_eval_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"need lm-eval .*pip install 'prunenet\[eval\]'"):
        zero_shot(tiny_model("llama"), letter_tokenizer(), {"piqa": write(tmp_path, "piqa")})


def test_every_task_has_a_definition_and_every_definition_a_task() -> None:
    names = {
        file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))["task"]
        for file in DEFINITIONS.glob("*.yaml")
    }
    assert names == {task: task for task in COLUMNS}


# --- against lm-eval itself ---

OWN = {
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "piqa": "piqa/piqa",
    "winogrande": "winogrande/default",
    "copa": "super_glue/copa/default",
    "boolq": "super_glue/boolq/default",
    "openbookqa": "openbookqa/openbookqa",
    "sciq": "sciq/sciq",
    "hellaswag": "hellaswag/hellaswag",
    "mmlu": "mmlu/default/mmlu_abstract_algebra",
}


def harness_task(task: str, file: Path, tmp_path: Path) -> dict:
    """lm-eval's own definition; only where it would fetch the data from the hub, it reads `file`
    with its own json loader.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    local = {
        "path": "json",
        "name": None,
        "kwargs": {"data_files": {"own": str(file)}, "cache_dir": str(tmp_path / "cache")},
    }
    splits = {
        "training_split": None,
        "validation_split": "own",
        "test_split": None,
        "fewshot_split": None,
    }
    include = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / f"{OWN[task]}.yaml"),
        "task": task,
    }
    (tmp_path / "own").mkdir(exist_ok=True)
    definition = include | {f"dataset_{key}": value for key, value in local.items()} | splits
    (tmp_path / "own" / f"{task}.yaml").write_text(json.dumps(definition))
    return TaskManager(include_defaults=False, include_path=str(tmp_path / "own")).load([task])


def assert_same_prompts(task: str, file: Path, tmp_path: Path) -> None:
    with zeroshot._quiet_harness():
        theirs = harness_task(task, file, tmp_path)["tasks"][task]
        ours = zeroshot._task(task, read_task(task, file)[0])
    assert list(ours._metric_fn_list) == list(theirs._metric_fn_list)
    assert len(ours.eval_docs) == len(theirs.eval_docs) > 0
    for our_row, their_row in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        for part in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            found, expected = getattr(ours, part)(our_row), getattr(theirs, part)(their_row)
            # "1" and 1 both stand for the second choice
            assert (str(found), type(found)) == (str(expected), type(found)), part
        asked = [
            [
                request.args
                for request in of.construct_requests(
                    doc=row, ctx=of.fewshot_context(row, num_fewshot=0)
                )
            ]
            for of, row in ((ours, our_row), (theirs, their_row))
        ]
        assert asked[0] == asked[1]


@needs_harness
@pytest.mark.parametrize("task", COLUMNS)
def test_prompts_and_targets_are_those_of_the_installed_lm_eval(task: str, tmp_path: Path) -> None:
    assert_same_prompts(task, write(tmp_path, task), tmp_path)


@needs_harness
def test_the_prompt_names_every_subject_of_mmlu_as_lm_eval_does(tmp_path: Path) -> None:
    import lm_eval

    files = sorted((Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml"))
    theirs = [yaml.safe_load(file.read_text(encoding="utf-8"))["description"] for file in files]
    rows = [SAMPLES["mmlu"][0] | {"subject": file.stem.removeprefix("mmlu_")} for file in files]
    with zeroshot._quiet_harness():
        ours = zeroshot._task("mmlu", read_task("mmlu", write(tmp_path, "mmlu", rows))[0])
    prompts = [ours.fewshot_context(row, num_fewshot=0) for row in ours.eval_docs]
    assert len(files) == 57
    assert all(
        prompt.startswith(description) for prompt, description in zip(prompts, theirs, strict=True)
    )


@needs_harness
@pytest.mark.parametrize("task", ["arc_easy", "copa", "piqa", "winogrande"])
def test_prompts_and_targets_of_the_real_questions_are_those_of_lm_eval(
    task: str, data_dir: Path, tmp_path: Path
) -> None:
    rows = (data_dir / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    file = tmp_path / f"{task}.jsonl"
    file.write_text("\n".join(rows[::29]) + "\n", encoding="utf-8")
    assert_same_prompts(task, file, tmp_path)


@needs_harness
@pytest.mark.parametrize("task", COLUMNS)
def test_accuracy_and_standard_error_are_those_of_lm_eval(task: str, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # Models answer differently, so that equal accuracies are no accident. 64 positions: some
    # prompts are cut.
    file = write(tmp_path, task, SAMPLES[task] * 2)
    rows = len(SAMPLES[task]) * 2
    with zeroshot._quiet_harness():
        own = harness_task(task, file, tmp_path)
        for seed in range(3):
            model = tiny_model("llama", seed=seed)
            (found,) = zero_shot(model, letter_tokenizer(), {task: file})
            theirs = lm_eval.evaluate(HFLM(pretrained=model, tokenizer=letter_tokenizer()), own)[
                "results"
            ][task]
            expected = [
                theirs.get(f"{key},none")
                for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
            ]
            ours = [
                found.accuracy,
                found.standard_error,
                found.accuracy_norm,
                found.standard_error_norm,
            ]
            assert ours == pytest.approx(expected)
            assert (found.task, found.n, found.limit) == (task, rows, None)


@needs_harness
def test_nothing_is_written_and_model_tokenizer_and_logging_stay_as_they_were(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = tiny_model("llama").train(), letter_tokenizer()
    tokenizer_before = (tokenizer.pad_token, len(tokenizer))
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.INFO)
    logging.getLogger("lm_eval").setLevel(logging.INFO)  # clears what loggers remember of levels
    weights = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    zero_shot(
        model,
        tokenizer,
        {"piqa": write(tmp_path, "piqa"), "hellaswag": write(tmp_path, "hellaswag")},
    )
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert (tokenizer.pad_token, len(tokenizer)) == tokenizer_before
    assert logging.getLogger("lm_eval").level == logging.INFO
    assert caplog.records == []
    for name, parameter in model.named_parameters():
        assert id(parameter) == weights[name][0]
        assert torch.equal(parameter, weights[name][1])


@needs_harness
def test_a_limit_takes_the_first_questions_and_progress_counts_over_the_tasks(
    tmp_path: Path,
) -> None:
    model, tokenizer, seen = tiny_model("llama"), letter_tokenizer(), []
    # The same question, its answer turned round after the second row: the last rows would give
    # another accuracy.
    rows = [SAMPLES["piqa"][0] | {"label": label} for label in (0, 0, 1, 1, 1, 1)]
    files = {"piqa": write(tmp_path, "piqa", rows), "arc_easy": write(tmp_path, "arc_easy", EXAM)}
    limited = zero_shot(
        model, tokenizer, files, limit=2, batch_size=1, progress=lambda *step: seen.append(step)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(result.task, result.n, result.limit) for result in limited] == [
        ("piqa", 2, 2),
        ("arc_easy", 2, 2),
    ]
    (short,) = zero_shot(model, tokenizer, {"piqa": write(tmp_path, "piqa", rows[:2])})
    assert (short.accuracy, short.accuracy_norm) == (limited[0].accuracy, limited[0].accuracy_norm)
    assert short.sha256 != limited[0].sha256
    (one,) = zero_shot(model, tokenizer, {"arc_easy": files["arc_easy"]}, limit=1)
    assert (one.standard_error, one.standard_error_norm) == (None, None)


@needs_harness
def test_the_runner_writes_a_line_per_model_and_task_and_skips_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tasks, out = tmp_path / "tiny", tmp_path / "tasks", tmp_path / "out" / "zeroshot.jsonl"
    tasks.mkdir()
    tiny_model("llama").save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    write(tasks, "piqa")

    def run() -> list[dict]:
        command = [
            "zeroshot.py",
            str(folder),
            "--tasks",
            str(tasks),
            "--limit",
            "2",
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        runpy.run_path(str(ROOT / "benchmarks" / "zeroshot.py"), run_name="__main__")
        return [json.loads(line) for line in out.read_text().splitlines()]

    (line,) = run()
    assert (line["model"], line["task"], line["n"], line["limit"]) == ("tiny", "piqa", 2, 2)
    assert {
        "parameters",
        "accuracy",
        "standard_error",
        "seconds",
        "prunenet",
        "lm_eval",
        "transformers",
        "torch",
    } <= line.keys()
    assert run() == [line]
    write(tasks, "copa")
    assert [line["task"] for line in run()] == ["piqa", "copa"]
    tiny_model("llama", seed=1).save_pretrained(folder)  # another model under the same name
    assert [line["task"] for line in run()] == ["piqa", "copa", "copa", "piqa"]


@needs_harness
@pytest.mark.slow
def test_the_real_model_answers_better_than_chance(smollm2: Path, data_dir: Path) -> None:
    from prunenet.checkpoints.load import load_model, load_tokenizer

    files = {
        "arc_easy": data_dir / "tasks" / "arc_easy.jsonl",
        "piqa": data_dir / "tasks" / "piqa.jsonl",
    }
    easy, piqa = zero_shot(load_model(smollm2), load_tokenizer(smollm2), files, limit=60)
    assert easy.accuracy > 0.35  # 0.25 by chance
    assert piqa.accuracy > 0.58  # 0.5 by chance
