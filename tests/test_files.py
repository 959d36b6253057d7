"""Files and folders are written whole, by one process at a time, and what the dead leave is removed."""

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from operator import attrgetter
from pathlib import Path

import pytest

from prunenet.compare.results import Results
from prunenet.runtime import files, locks
from prunenet.runtime.files import (
    CheckpointError,
    check_absent,
    check_file,
    expanded,
    lock,
    make_folders,
    new_folder,
    write_atomic,
)
from prunenet.runtime.passing import passing_folder

BEGIN = "import os, signal, sys\nfrom pathlib import Path\nfrom prunenet.runtime import files\n"
HOLD = "with files.lock(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"


def start(code: str, *args: object) -> subprocess.Popen[str]:
    """A process of its own, which says "held" when it has come to its point."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said == "held\n" or process.wait() < 0, process.stderr and process.stderr.read()
    return process


def end(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=20)
    return process.returncode


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- one process at a time ---


def test_a_second_process_is_told_at_once_who_writes_and_may_write_afterwards(tmp_path):
    out = tmp_path / "new" / "out"
    first = start(HOLD, out)
    said = rf"another prunenet \(pid {first.pid}\) is writing .*out; wait for it, or give another"
    for again in (lambda: lock(out), lambda: new_folder(out, 0)):
        with pytest.raises(CheckpointError, match=said), again():
            pytest.fail("two at once")
    with lock(tmp_path / "new" / "another"):
        pass
    assert end(first) == 0
    assert names(tmp_path) == [], "nor lock, nor the folder made for it"
    with lock(out):
        assert names(tmp_path / "new") == [".out.lock"]


def test_the_lock_of_a_killed_process_is_free_and_its_file_goes_with_the_next_holder(tmp_path):
    first = start(HOLD, tmp_path / "out")
    first.kill()
    end(first)
    assert names(tmp_path) == [".out.lock"]
    with lock(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_a_link_and_its_target_are_the_same_output(tmp_path):
    (tmp_path / "link").symlink_to("out")
    first = start(HOLD, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"is writing .*link"), lock(tmp_path / "link"):
        pass
    end(first)


def test_a_process_may_lock_twice_and_from_its_threads(tmp_path):
    entered = []

    def enter() -> None:
        with lock(tmp_path / "out"):
            entered.append(names(tmp_path))

    with lock(tmp_path / "out"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        enter()
        assert names(tmp_path) == [".out.lock"]
    assert entered == [[".out.lock"]] * 2
    assert names(tmp_path) == []


def test_who_opened_a_lock_file_that_its_holder_then_removed_opens_it_again(tmp_path, monkeypatch):
    file, real, opened = tmp_path / ".out.lock", locks._open, []

    def slow(path: Path) -> int:
        descriptor = real(path)
        opened.append(descriptor)
        if len(opened) == 1:
            path.unlink()
        return descriptor

    monkeypatch.setattr(locks, "_open", slow)
    with locks.hold(file) as fresh:
        assert fresh
        assert len(opened) == 2
        with pytest.raises(BlockingIOError):
            locks.lock_descriptor(real(file))
    assert names(tmp_path) == []


def test_many_processes_that_lock_and_let_go_are_never_in_at_once(tmp_path):
    code = """
print('held', flush=True)
inside = Path(sys.argv[1]).with_name('inside')
done = 0
while done < 15:
    try:
        with files.lock(Path(sys.argv[1])):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            inside.unlink()
            done += 1
    except files.CheckpointError as error:
        assert 'another prunenet' in str(error), error
"""
    processes = [start(code, tmp_path / "out") for _ in range(3)]
    assert [end(process) for process in processes] == [0, 0, 0]
    assert names(tmp_path) == []


def test_a_file_system_without_locks_keeps_nobody_away_and_nothing_is_swept(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    left = tmp_path / f".out.{'0' * 32}"
    left.mkdir()
    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with lock(tmp_path / "out"):
        assert names(tmp_path) == [left.name]
    write_atomic(tmp_path / "file", b"1")
    assert names(tmp_path) == [left.name, "file"]


# --- what the dead leave ---


def test_what_killed_writers_of_a_folder_left_is_removed_by_the_next_and_nothing_else(tmp_path):
    code = """
with files.new_folder(Path(sys.argv[1]), 0) as folder:
    (folder / 'weights').write_text('half')
    os.kill(os.getpid(), signal.SIGKILL)
"""
    out = tmp_path / "out"
    assert end(start(code, out)) == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    kept = (f".out.more.{'0' * 32}", ".out.notes", f".other.{'0' * 32}")
    for name in kept:
        (tmp_path / name).mkdir()
    with new_folder(out, 0) as folder:
        (folder / "weights").write_text("whole")
    assert names(tmp_path) == sorted((*kept, "out"))


def test_what_killed_writers_of_a_file_left_is_removed_by_the_next_and_what_the_living_write_stays(
    tmp_path,
):
    path = tmp_path / "file"
    code = """
files.os.replace = lambda *_: {'die': lambda: os.kill(os.getpid(), signal.SIGKILL),
    'live': lambda: (print('held', flush=True), sys.stdin.read(), os.rename(*_))}[sys.argv[2]]()
files.write_atomic(Path(sys.argv[1]), b'new')
"""
    alive = start(code, path, "live")
    assert end(start(code, path, "die")) == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    write_atomic(path, b"mine")
    assert len(names(tmp_path)) == 2, "mine, and the living one's"
    assert path.read_bytes() == b"mine"
    assert end(alive) == 0
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("sweep", ["unlinks", "holds"])
def test_a_sweep_between_a_hidden_file_s_birth_and_its_lock_does_no_harm(
    tmp_path, monkeypatch, sweep
):
    real, calls, kept = files.lock_descriptor, [], []

    def swept(descriptor: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            [path] = tmp_path.iterdir()
            kept.append(os.open(path, os.O_RDWR))
            if sweep == "holds":
                assert real(kept[0])
            path.unlink()
        return real(descriptor)

    monkeypatch.setattr(files, "lock_descriptor", swept)
    write_atomic(tmp_path / "file", b"content")
    os.close(kept[0])
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"content"


# --- ledgers ---


def test_a_line_on_the_disk_does_not_vanish_though_two_had_opened_the_ledger(tmp_path):
    path = tmp_path / "l.jsonl"
    first = Results(path)
    first.prepare()
    first.add({"cell": "A", "error": "failed"})
    a, b = Results(path), Results(path)
    b.add({"cell": "B", "error": None})
    a.add({"cell": "A", "error": None})
    a.add({"cell": "C", "error": None})
    found = Results(path)
    assert all(found.done(cell) for cell in "ABC")
    assert path.read_text().count("\n") == 3
    assert a.done("B")


def test_a_ledger_that_is_removed_meanwhile_is_written_again_with_all_lines(tmp_path):
    results = Results(tmp_path / "l.jsonl")
    results.prepare()
    results.add({"cell": "A", "error": None})
    results.path.unlink()
    results.add({"cell": "B", "error": None})
    assert all(Results(results.path).done(cell) for cell in "AB")


def test_a_ledger_that_another_process_writes_is_refused_and_a_device_is_no_ledger(tmp_path):
    path = tmp_path / "l.jsonl"
    first = start(HOLD, path)
    for act in (Results(path).prepare, lambda: Results(path).add({"cell": "A", "error": None})):
        with pytest.raises(CheckpointError, match="another prunenet"):
            act()
    end(first)
    with pytest.raises(CheckpointError, match="/dev/zero is a device or a pipe; give a file"):
        Results("/dev/zero")


# --- what is no regular file ---


def test_a_link_stays_a_link_and_its_target_gets_the_content_and_keeps_its_permissions(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    link.symlink_to("there/file")
    write_atomic(link, b"1")
    assert target.read_bytes() == b"1"
    target.chmod(0o640)
    write_atomic(link, b"2")
    assert link.is_symlink()
    assert target.read_bytes() == b"2"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names(tmp_path / "there") == ["file"]


def test_a_device_is_written_straight_into_and_stays_one(tmp_path):
    before = os.stat("/dev/null")
    write_atomic(Path("/dev/null"), b"content")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert os.stat("/dev/null").st_ino == before.st_ino
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="full") as refused:
        write_atomic(tmp_path / "full", b"content")
    assert (refused.value.errno, refused.value.filename) == (errno.ENOSPC, str(tmp_path / "full"))


def test_a_pipe_is_written_straight_into_where_somebody_reads_and_is_refused_at_once_where_nobody_does(
    tmp_path,
):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="Nobody reads this pipe; start its reader first"):
        write_atomic(pipe, b"content")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, b"content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_disks_sockets_and_folders_are_no_files(tmp_path, monkeypatch):
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the names of sockets are short
        server.bind("socket")
        for check in (check_file, lambda path: write_atomic(path, b"")):
            with pytest.raises(CheckpointError, match="socket is a disk or a socket; give a file"):
                check(Path("socket"))
            with pytest.raises(CheckpointError, match="is a folder; give a file"):
                check(tmp_path)


# --- what can be said at the start ---


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    check_absent(tmp_path / "link")
    with new_folder(tmp_path / "link", 0) as folder:
        (folder / "weights").write_text("whole")
    assert names(tmp_path) == ["link", "there"]
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "there") == ["weights"]


@pytest.mark.parametrize("name", ["a" * 200, "a" * 240, "ä" * 127, "a" * 255, "new\nline", " "])
def test_every_name_that_a_folder_may_have_works(tmp_path, name):
    for _ in range(2):
        with suppress(KeyError), new_folder(tmp_path / name, 0) as folder:
            (folder / "weights").write_text("whole")
            raise KeyError
        assert names(tmp_path) == []
    with new_folder(tmp_path / name, 0):
        assert len(names(tmp_path)) == 2
    write_atomic(tmp_path / name / name, b"content")
    assert names(tmp_path) == names(tmp_path / name) == [name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dangling", "dangling is a link that leads nowhere"),
        ("dangling/out", "dangling is a link that leads nowhere"),
        ("loop", "loop is a link that leads nowhere"),
        ("file/out", "file is a file"),
        ("a" * 256, "its name is too long; give a shorter one"),
        ("a\0b", "holds a NUL byte"),
        (os.fsdecode(b"\xff\xfe"), r"\\udcff\\udcfe is not UTF-8"),
        (".", "is the current folder, which cannot be replaced; give a folder in it"),
        ("/proc", "exists already"),
        ("/", "exists already"),
    ],
)
def test_what_cannot_be_a_folder_is_said_before_any_work(tmp_path, monkeypatch, name, message):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("data")
    (tmp_path / "here").mkdir()
    before = names(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    out = Path(".") if name == "." else tmp_path / name
    with pytest.raises(CheckpointError, match=message):
        check_absent(out)
    with pytest.raises(CheckpointError), new_folder(out, 0):
        pytest.fail("worked")
    assert names(tmp_path) == before


def test_a_file_system_that_takes_no_new_file_is_said_to_be_one_and_not_tried_for_ever(
    tmp_path, monkeypatch
):
    def refused(file):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(file))

    monkeypatch.setattr(files, "hold", refused)  # as /proc answers
    said = "out cannot be written: No such file or directory"
    with pytest.raises(CheckpointError, match=said), lock(tmp_path / "out"):
        pass


def test_a_name_that_the_locale_does_not_know_is_refused_before_any_work(tmp_path):
    code = "files.check_absent(Path(sys.argv[1]))"
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code, tmp_path / "naïve"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "cannot be named in this locale; set PYTHONUTF8=1, or give another name" in done.stderr


def test_the_root_of_a_disk_is_said_to_be_one_before_any_work(tmp_path, monkeypatch):
    mounted = tmp_path / "a b"
    mounted.mkdir()
    line = f"36 35 98:0 / {tmp_path}/a\\040b rw,noatime - ext3 /dev/root rw\n"
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, **options: line if path.name == "mountinfo" else real(path, **options),
    )
    with pytest.raises(CheckpointError, match="a b is the root of a disk, which cannot be repl"):
        check_absent(mounted)


def test_a_file_is_refused_before_any_work_where_it_cannot_be(tmp_path):
    (tmp_path / "file").write_text("data")
    (tmp_path / "link").symlink_to("file/below")
    check_file(tmp_path / "new" / "deep" / "name")
    check_file(tmp_path / "file")
    check_file(Path("/dev/null"))
    for path in (tmp_path / "file" / "name", tmp_path / "link"):
        with pytest.raises(CheckpointError, match="file is a file"):
            check_file(path)
    with pytest.raises(CheckpointError, match="too long"):
        check_file(tmp_path / ("a" * 256))


def test_home_is_expanded_wherever_the_path_comes_from_and_an_empty_path_is_refused(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert expanded("~/x") == expanded(Path("~/x")) == Path("/somewhere/x")
    assert expanded("x/~") == Path("x/~")
    with pytest.raises(ValueError, match=r"the path is empty \(an unset variable\?\)"):
        expanded("")
    with pytest.raises(ValueError, match="no known user"):
        expanded("~nobody-of-this-name/x")


# --- what survives a power cut ---


def test_every_folder_whose_entries_change_is_synced_after_its_entry(tmp_path, monkeypatch):
    synced: list[str] = []
    real = os.fsync

    def recorded(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(f"{path.name} {' '.join(names(path)) if path.is_dir() else ''}".strip())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    with new_folder(tmp_path / "p1" / "p2" / "out", 0) as folder:
        assert synced == [f"{tmp_path.name} p1", "p1 p2"]
        (folder / "weights").write_text("whole")
    assert synced[2:] == ["weights", "out weights", "p2 .out.lock out"]
    synced.clear()
    write_atomic(tmp_path / "file", b"content")
    assert synced[0].startswith(".file.")
    assert synced[1:] == [f"{tmp_path.name} file p1"]
    synced.clear()
    assert make_folders(tmp_path / "p1" / "p3" / "p4") == [
        tmp_path / "p1" / "p3" / "p4",
        tmp_path / "p1" / "p3",
    ]
    assert synced == ["p1 p2 p3", "p3 p4"]


# --- what the disk refuses ---


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_refusal_names_the_target_leaves_it_as_it_was_and_nothing_beside_it(
    tmp_path, monkeypatch, step
):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def refuses(*_: object, **__: object) -> None:
        raise full()

    with monkeypatch.context() as patch:
        patch.setattr(files.os, step, refuses)
        with pytest.raises(OSError, match="file") as refused:
            write_atomic(path, b"new")
    assert (refused.value.errno, refused.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_names_the_ledger(tmp_path, monkeypatch):
    results = Results(tmp_path / "l.jsonl")
    results.prepare()
    results.add({"cell": "A", "error": None})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full()))
    with pytest.raises(OSError, match=r"l\.jsonl") as refused:
        results.add({"cell": "B", "error": None})
    assert refused.value.filename == str(results.path)


def test_no_room_does_not_say_that_there_is_as_much_as_is_needed(tmp_path):
    said = r"at least 0\.0 MB \(its weights alone\) and"
    with pytest.raises(CheckpointError, match=said), new_folder(tmp_path / "out", 10):
        raise full()
    assert names(tmp_path) == []


def test_a_temporary_folder_of_a_killed_process_is_removed_by_the_next_and_one_of_the_living_stays(
    tmp_path,
):
    code = """
from prunenet.runtime.passing import passing_folder
with passing_folder(Path(sys.argv[1])) as folder:
    (folder / 'weights').write_text('many')
    {'die': lambda: os.kill(os.getpid(), signal.SIGKILL),
     'live': lambda: (print('held', flush=True), sys.stdin.read())}[sys.argv[2]]()
"""
    alive = start(code, tmp_path, "live")
    (living,) = names(tmp_path)
    assert end(start(code, tmp_path, "die")) == -signal.SIGKILL
    kept = tmp_path / "prunenet-of-somebody"
    kept.mkdir()
    assert len(names(tmp_path)) == 3
    with passing_folder(tmp_path) as folder:
        assert names(tmp_path) == sorted((living, folder.name, kept.name))
        assert (tmp_path / living / "weights").is_file()
        with passing_folder(tmp_path) as other:
            assert other != folder
            assert folder.is_dir(), "another block of the same process"
    assert names(tmp_path) == sorted((living, kept.name))
    assert end(alive) == 0
    assert names(tmp_path) == [kept.name]


def test_a_temporary_folder_needs_no_file_that_tries_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # as in a new process
    monkeypatch.setattr(tempfile, "gettempdir", lambda: pytest.fail("it writes a file"))
    with passing_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["os.truncate", "os.write", "pathlib.Path.unlink"])
def test_a_signal_while_a_lock_is_taken_or_let_go_leaves_no_lock_file(tmp_path, monkeypatch, place):
    real, came = attrgetter(place.partition(".")[2])(sys.modules[place.partition(".")[0]]), []

    def once(*given, **how):
        if not came:
            came.append(place)
            raise KeyboardInterrupt
        return real(*given, **how)

    monkeypatch.setattr(place, once)
    with pytest.raises(KeyboardInterrupt), lock(tmp_path / "out"):
        pass
    assert came
    assert names(tmp_path) == []
    with lock(tmp_path / "out"):
        assert names(tmp_path) == [".out.lock"]
