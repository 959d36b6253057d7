"""Two processes do what one does: the same policy, the same checkpoint, the same lines; and none
waits for a dead one.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model, token_ids
from ranks import Ended, dies_at, job
from test_cli import contents, save_tiny
from test_compare import words
from test_recover import save_cut
from test_train import SHORT, WHERE

from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.runtime import parallel
from prunenet.text.calibration import CalibrationSet

LEARNING = replace(SHORT, reward="reconstruction", features="moments", updates=3, evaluate_every=2)
WIDTHS = replace(WHERE, updates=3, masks=3)
LAYERS = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model with its tokenizer, a policy, texts, and a cache that is shared by all jobs."""
    folder = tmp_path_factory.mktemp("parallel")
    save_tiny(folder / "tiny")
    (folder / "test.txt").write_text(words(4, 5))
    (folder / "calibration.txt").write_text(words(200, 7))
    policy = Policy.untrained(PolicyConfig(hidden=(8,), regime="self"))
    with torch.no_grad():
        policy.scorer.widths.out.weight.normal_()
    policy.save_pretrained(folder / "policy")
    return folder


def command(home: Path, *args: object) -> None:
    """The command line, as in a process of its own."""
    os.environ["PRUNENET_CACHE"] = str(home / "cache")
    from prunenet.cli import app as cli

    sys.argv = ["prunenet", *map(str, args)]
    cli.main()


def learn(out: Path, resume: bool = False, death: int = 0) -> None:
    """Both stages of a training, with a rank that dies in the second, and the spectral reward."""
    from prunenet.cli.console import one_job
    from prunenet.envs import divergence
    from prunenet.policies.training.train import train

    if death:
        dies_at(divergence, "divergences", death, rank=1)
    with one_job("cpu"):
        blocks = CalibrationSet(token_ids(8, 16), "self", {"text": "self-generated"})
        train(
            tiny_model("llama"),
            replace(LEARNING, allocation=WIDTHS),
            blocks=blocks,
            out=out / "text",
            resume=resume,
        )
        if not resume:
            found = train(
                tiny_model("llama"), replace(SHORT, distance="ks", masks=3), out=out / "spectral"
            )
            assert len(found.history) == 3, "every rank has the whole result"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def said(ended: Ended, text: str) -> bool:
    """Whether exactly one process has said it, and nobody has said more."""
    return (
        sorted(text in error for error in ended.errors)
        == [False] * (len(ended.errors) - 1) + [True]
        and sum(bool(error.strip()) for error in ended.errors) == 1
    )


# --- in one process ---


def test_in_one_process_everything_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tensor = torch.arange(6)
    seen: list[int] = []
    with parallel.joined("cpu") as device, parallel.posted(seen.append) as post:
        post(1)
        assert seen == [1]
        assert device == "cpu"
        assert (parallel.rank(), parallel.size(), parallel.is_first()) == (0, 1, True)
        assert list(parallel.work_queue(3)) == [0, 1, 2]
        assert parallel.share(5) == slice(0, 5)
        assert parallel.all_gather(tensor, 6) is tensor
        assert parallel.broadcast(0, lambda: tensor) is tensor
        assert parallel.gather_from_owners({0: [tensor], 1: []}, 2) == [[tensor], []]
        assert parallel.broadcast_object(0, lambda: (1, 2)) == (1, 2)


# --- the parts ---


def exchange() -> None:
    """Every way in which ranks hand things to each other."""
    taken: list[dict[str, int]] = []
    with parallel.joined("cpu"):
        rank, size = parallel.rank(), parallel.size()
        rows = torch.arange(14.0).view(7, 2)
        assert parallel.all_gather(rows[parallel.share(7)], 7).equal(rows)
        assert parallel.all_gather(rows[:2][parallel.share(2)], 2).equal(rows[:2]), (
            "with nothing on the last rank"
        )
        for sent in (
            torch.tensor(3.5).double(),
            torch.ones(2, 0),
            torch.eye(3).bool(),
            torch.randn(2, 3).bfloat16().T,
        ):
            got = parallel.broadcast(
                1, lambda sent=sent: sent if rank == 1 else pytest.fail("called elsewhere")
            )
            assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
            assert rank != 1 or got.equal(sent)
        owned = {
            index: [torch.tensor(index)] * index for index in range(5) if parallel.is_owner(index)
        }
        assert [len(found) for found in parallel.gather_from_owners(owned, 5)] == [0, 1, 2, 3, 4]
        assert parallel.broadcast_object(0, lambda: {"rank": rank}) == {"rank": 0}
        with parallel.apart():
            assert (parallel.size(), list(parallel.work_queue(2))) == (1, [0, 1])
        with parallel.posted(taken.append) as post:
            for turn in parallel.work_queue(20):
                post({"turn": turn, "rank": rank})
        assert sorted(line["turn"] for line in taken) == (list(range(20)) if rank == 0 else [])
        assert parallel.broadcast_object(size - 1, lambda: rank) == size - 1


def stuck(rank: int) -> None:
    """One rank fails; another is busy and asks nobody; the first waits."""
    import time

    from prunenet.cli.console import one_job

    with one_job("cpu"):
        if parallel.rank() == rank:
            raise ValueError("3 is not a ratio; give 0.3")
        if parallel.rank() == 2:
            time.sleep(30)
        parallel.broadcast_object(rank, lambda: 0)


@pytest.mark.long
def test_three_processes_hand_tensors_objects_and_turns_to_each_other(home):
    ended = job(3, home, exchange)
    assert ended.codes == [0, 0, 0], ended.errors


@pytest.mark.long
def test_a_rank_that_fails_ends_the_whole_job_with_its_one_sentence(home):
    ended = job(3, home, stuck, 1, patience=20)
    assert ended.codes == [1, 1, 1]
    assert said(ended, "error: 3 is not a ratio; give 0.3")


def absent(rank: int) -> None:
    """One rank is killed before it has come to the others, and there is no agent of torchrun's."""
    from prunenet.cli.console import one_job
    from prunenet.runtime import team

    team._PATIENCE, team._MEETING = 0.5, 3.0
    if os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), 9)
    with one_job("cpu"):
        pytest.fail("nobody to work with")


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_before_the_others_have_met_is_named_soon_and_waited_for_in_bounds(
    home, rank
):
    ended = job(2, home, absent, rank, patience=30)
    assert ended.codes == [[-9, 1], [1, -9]][rank]
    if rank == 1:  # where rank 0 is missing, so is the store that would tell who waits
        assert "waiting for process 1 of this job" in ended.errors[0]
    assert said(ended, "of this job has not come within 3 seconds: it was killed, or cannot reach")


# --- the commands ---


@pytest.mark.long
def test_several_processes_cannot_share_one_placed_model_and_say_so_once(home):
    ended = job(
        2,
        home,
        command,
        home,
        "prune",
        home / "tiny",
        "--ratio",
        0.5,
        "--device",
        "auto",
        "--out",
        home / "placed",
    )
    assert ended.codes == [1, 1]
    assert said(
        ended,
        "error: --device auto is for one process, which has all devices: leave torchrun or auto out",
    )


@pytest.mark.long
def test_training_is_the_same_bit_for_bit_and_goes_on_with_another_number_of_processes(home):
    assert job(1, home, learn, home / "one").codes == [0]
    assert job(2, home, learn, home / "two").codes == [0, 0]
    for name in ("text", "spectral"):
        assert weights(home / "one" / name) == weights(home / "two" / name)
        assert (home / "one" / name / "config.json").read_bytes() == (
            home / "two" / name / "config.json"
        ).read_bytes()
    died = job(2, home, learn, home / "died", False, 2)
    assert died.codes[1] == -9
    assert died.codes[0] == 1
    assert "ended without a word" in died.errors[0]
    assert not (home / "died" / "text" / "model.safetensors").exists()
    assert job(3, home, learn, home / "died", True).codes == [0, 0, 0]
    assert weights(home / "died" / "text") == weights(home / "one" / "text")


PRUNED = (
    ("self",),
    ("data", "--channels", "elimination", "--widths", "uniform"),
    ("none", "--stream"),
)


def cut(home: Path, out: Path) -> None:
    """In every way that is split; then what a user gets wrong."""
    policy = home / "policy"
    with pytest.MonkeyPatch.context() as patch:
        from prunenet.policies import apply

        patch.setattr(apply, "AUTO_GAIN", -1)  # per-layer widths, where two ways are compared
        for moments, *more in PRUNED:
            text = ["--text", home / "calibration.txt"] if moments == "data" else []
            given = [
                "--policy",
                policy,
                "--ratio",
                0.3,
                "--round",
                4,
                "--moments",
                moments,
                *text,
                *more,
            ]
            with pytest.raises(SystemExit) as ended:
                command(home, "prune", home / "tiny", "--out", out / moments, *given)
            assert not ended.value.code
    command(home, "prune", home / "tiny", "--out", out / "none", "--ratio", 0.3)


@pytest.mark.long
def test_pruned_checkpoints_are_the_same_byte_for_byte_and_a_mistake_is_said_once(home):
    for ranks in (1, 2):
        ended = job(ranks, home, cut, home, home / f"cut{ranks}")
        assert ended.codes == [1] * ranks, ended.errors
        assert sum(error.count("error:") for error in ended.errors) == 1, ended
        assert "none exists already" in "".join(ended.errors)
        assert [text.count("pruned model") for text in ended.output] == [3, 0][:ranks]
    for moments, *_ in PRUNED:
        one, two = (
            {file.name: file.read_bytes() for file in (home / f"cut{n}" / moments).iterdir()}
            for n in (1, 2)
        )
        assert one == two
        assert len(one) > 3


def compared(home: Path, out: Path, death: int = 0, rank: int = 1) -> None:
    """Two texts that are written, one that is read, a cell that fails."""
    from prunenet.compare import run

    if death:
        dies_at(run, "_measure", death, rank)
    specs = (
        "random",
        "wanda_sp@words",
        "flap",
        "prunenet",
        "wanda_sp@seed:words",
        "llm_pruner_element1",
    )
    sizes = [
        "--ratios",
        "0.5",
        "--window",
        16,
        "--calibration-tokens",
        128,
        "--calibration-window",
        16,
        "--round",
        4,
    ]
    texts = [
        "--text",
        home / "test.txt",
        "--calibration",
        f"words={home / 'calibration.txt'}",
        "--policy",
        home / "policy",
    ]
    command(home, "compare", home / "tiny", *specs, *sizes, *texts, "--out", out, "--json")


def lines(path: Path) -> dict[str, dict[str, object]]:
    """By cell, without what measures the machine."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["cell"] for line in found}) == len(found)
    return {
        line["cell"]: {
            name: value for name, value in line.items() if not name.startswith(("seconds", "peak"))
        }
        for line in found
    }


@pytest.mark.slow
def test_a_comparison_has_the_same_lines_and_a_killed_one_goes_on_with_another_number_of_processes(
    home,
):
    # LLM-Pruner protects more layers than there are
    assert job(1, home, compared, home, home / "one.jsonl").codes == [1]
    expected = lines(home / "one.jsonl")
    assert sorted(line["error"] is None for line in expected.values()) == [False, *[True] * 6]
    ended = job(2, home, compared, home, home / "two.jsonl", 2)
    assert ended.codes == [1, -9]
    assert "ended without a word" in ended.errors[0]
    begun = lines(home / "two.jsonl")
    assert 1 <= len(begun) < len(expected)
    ended = job(3, home, compared, home, home / "two.jsonl")
    assert ended.codes == [1, 1, 1]
    assert not any(ended.errors[1:])
    assert lines(home / "two.jsonl") == expected
    assert [bool(json.loads(text)["cells"]) if text else None for text in ended.output] == [
        True,
        None,
        None,
    ]


def recovered(home: Path, out: Path, death: int = 0, *more: str) -> None:
    """Batches of three micro-batches, one of which is the second rank's."""
    from prunenet.recover import training

    if death:
        dies_at(training, "teaching_loss", death, rank=1)
    sizes = (
        "--steps",
        3,
        "--batch",
        5,
        "--micro-batch",
        2,
        "--tokens",
        1024,
        "--rank",
        2,
        "--learning-rate",
        0.01,
    )
    command(
        home, "recover", home / "narrow", "--teacher", home / "tiny", "--out", out, *sizes, *more
    )


@pytest.mark.long
def test_a_recovery_has_the_same_bytes_and_a_killed_one_goes_on_with_another_number_of_processes(
    home,
):
    save_cut(home / "tiny", home / "narrow", [24] * LAYERS)
    assert job(1, home, recovered, home, home / "recovered" / "one").codes == [0]
    assert job(2, home, recovered, home, home / "recovered" / "two", 3).codes == [1, -9]
    ended = job(2, home, recovered, home, home / "recovered" / "two", 0, "--resume")
    assert ended.codes == [0, 0]
    assert not ended.errors[1].strip()
    assert contents(home / "recovered" / "one") == contents(home / "recovered" / "two")
    assert len(contents(home / "recovered" / "one")) > 3
