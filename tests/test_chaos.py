"""A small part of `make chaos`, always the same: kills, full disks, mutations, hostile folders; and
that the benchmark sees the faults that it looks for.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="counts on pidfd and inotify"),
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the wheel is tested without them"),
    # Python 3.12 and later: torch has threads, which none of these forks waits for
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]
sys.path.append(str(BENCHMARKS))


@pytest.fixture(scope="module")
def yard(tmp_path_factory):
    import disturb.targets  # what the commands import: once here, not in the first fork as well
    from disturb.commands import Yard

    import prunenet.cli.app

    assert disturb.targets, prunenet.cli.app
    return Yard(tmp_path_factory.mktemp("yard").resolve(), "prune streamed")


@pytest.fixture(scope="module")
def reference(yard):
    (command,) = yard.commands
    return yard.reference(command)


def attempted(kinds, name: str, number: int):
    (kind,) = [kind for kind in kinds if name in kind.name]
    return kind.attempt(number, random.Random(number))


@pytest.mark.long
@pytest.mark.parametrize("number", range(3))
def test_a_command_that_is_killed_before_a_file_operation_leaves_nothing_behind(yard, number):
    from disturb import kills

    count = len(yard.reference(yard.commands[0]).operations)
    turn = (number % len(kills.SIGNALS)) * count  # of each signal
    made = attempted(kills.kinds(yard), "before an operation", turn + 7 * number)
    assert made.what == kills.SIGNALS[number % len(kills.SIGNALS)].name
    assert not made.faults


@pytest.mark.long
@pytest.mark.parametrize("number", range(3))
def test_a_command_whose_disk_is_full_or_broken_says_so_and_leaves_nothing_behind(yard, number):
    from disturb import disks

    count = len(yard.reference(yard.commands[0]).operations)
    made = attempted(disks.kinds(yard), "at an operation", number * count + 5 * number)
    assert not made.faults


@pytest.mark.long
def test_mutated_files_are_refused_in_one_sentence_or_read_as_they_say(tmp_path):
    from disturb.fuzz import Reader
    from disturb.targets import made

    root = (tmp_path / "files").resolve()
    wanted = {"config.json", "tokenizer config", "provenance", "comparison"}
    for target in made(root):
        if target.kind not in wanted:
            continue
        reader = Reader(target, root)
        for number in range(6):
            outcome = reader.attempt(number, random.Random(f"{target.kind} {number}"))
            assert not outcome.faults, (target.kind, number)
        reader.close()


@pytest.mark.long
@pytest.mark.parametrize("name", ["code 0", "'../secret/s.safetensors'"])
def test_a_hostile_folder_runs_nothing_and_shows_nothing_of_what_is_outside(yard, name):
    from disturb.folders import hostile, kinds

    cases = list(hostile())
    number = next(number for number, case in enumerate(cases) if name in case)
    assert not attempted(kinds(yard), "hostile", number).faults


# --- the benchmark itself ---


def test_what_is_left_over_or_differs_or_is_torn_is_seen(yard, reference):
    from disturb.commands import hidden, judged, torn

    with yard.copy(reference) as place:
        assert not torn(place, reference)
        (place / "out").mkdir()
        (place / "out" / "config.json").write_text("{}")
        (place / ".out.lock").touch()
        assert [fault for fault, _ in torn(place, reference)] == ["torn"]
        assert [seen for _, seen in hidden(place, reference)] == [".out.lock (at once)"]
        assert {fault for fault, _ in judged(place, reference)} == {"leftover", "different"}
        (place / "t.txt").unlink()
        assert ("torn", "t.txt is gone") in torn(place, reference)


@pytest.mark.long
def test_a_traceback_a_hang_and_a_read_outside_are_seen(yard, reference, monkeypatch):
    from disturb import children

    def ran(prepare, **how):
        with yard.copy(reference) as place:
            return children.ran(
                reference.command.argv, place, yard.home / "spool", prepare=prepare, **how
            )

    def broken() -> None:
        import prunenet.policies.stream as stream

        stream.prune_streamed = lambda *_, **__: 1 / 0

    assert [fault for fault, _ in ran(broken).faults()] == ["traceback"]
    end = ran(lambda: open("/etc/hostname").close(), allowed=lambda path: path != "/etc/hostname")
    assert end.faults() == [("outside", "/etc/hostname")]
    monkeypatch.setattr(children, "SECONDS", 0.2)
    child = children.start(["--help"], yard.home, yard.home / "spool", prepare=signal.pause)
    late = child.wait(0.2)
    assert (late.code, late.late) == (-signal.SIGKILL, True)
    assert "hang" in dict(late.faults())


def test_code_that_runs_and_answers_that_differ_are_seen(tmp_path):
    from disturb.fuzz import Guard, read_as
    from disturb.targets import Target

    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "s").write_text("s")
    guard = Guard(tmp_path)
    assert not guard.seen()
    (tmp_path / "canary").touch()
    Path(tmp_path, "secret", "s").read_text()
    assert [fault for fault, _ in guard.seen()] == ["outside", "execution"]
    os.close(guard.notes)
    file = tmp_path / "x.json"
    file.write_text("1")
    target = Target("x", file, lambda: json.loads(file.read_text()))
    assert read_as(target, 1) == ("same", [])
    assert read_as(target, 2)[1][0][0] == "different"
    says = Target("x", file, target.read, lambda: 1)
    assert read_as(says, 2) == ("another", [])
    broken = Target("x", file, lambda: {}["x"])
    assert read_as(broken, 1)[1][0][0] == "traceback"
    refused = Target("x", file, lambda: int("x"))
    assert read_as(refused, 1) == ("clean", [])


def test_batches_that_have_a_line_are_not_tried_again(monkeypatch):
    import runpy

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    chaos = runpy.run_path(str(BENCHMARKS / "chaos.py"))
    kind = chaos["Kind"]("kills", "x", lambda *_: None, most=60)
    line = {"part": "kills", "kind": "x", "seed": 0, "first": 0, "tried": 25}
    assert list(chaos["rest"](kind, 100, 0, [])) == [(0, 25), (25, 25), (50, 10)]
    assert list(chaos["rest"](kind, 55, 0, [line])) == [(25, 25), (50, 5)]
    assert list(chaos["rest"](kind, 25, 0, [line])) == []
    assert list(chaos["rest"](kind, 25, 1, [line])) == [(0, 25)]
