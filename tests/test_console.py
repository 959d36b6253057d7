"""The terminal never fails the work, and a command that is told to end cleans up and says one word."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from rich.progress import Progress
from rich.table import Table
from typer.testing import CliRunner

from prunenet.cli import console, signals
from prunenet.cli.console import errors, one_sentence, path, show
from prunenet.runtime.failures import Followed, PeerFailed

ENDING = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class Refusing(io.StringIO):
    """A stream on a full disk, or one whose reader has gone, or that is closed."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, _: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


def refusals() -> list[Exception]:
    return [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
        ValueError("I/O operation on closed file"),
    ]


def python(code: str, *args: object, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # under nohup the tests themselves ignore it, and children would too
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
        **options,  # type: ignore[call-overload]
    )


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    output, error = process.communicate(timeout=120)
    return process.returncode, output.decode(), error.decode()


def interrupted_by(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)


def said(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of a command that fails in this way."""
    with pytest.raises(typer.Exit) as end, one_sentence():
        raise error
    return end.value.exit_code, " ".join(capsys.readouterr().err.split())


# --- told to end ---

WORK = """
import os, signal, sys, time
from pathlib import Path
from prunenet.cli.signals import run
from prunenet.runtime.files import new_folder, write_atomic
def work():
    with new_folder(Path(sys.argv[1]), 0) as folder:
        (folder / 'weights').write_text('half')
        print('working', flush=True)
        {then}
run(work)
"""


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_with_its_code_one_word_and_nothing_left(tmp_path, number):
    process = python(WORK.format(then="time.sleep(30)"), tmp_path / "out")
    assert process.stdout is not None
    assert process.stdout.readline() == b"working\n"
    process.send_signal(number)
    assert ended(process) == (ENDING[number], "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_does_not_stop_the_cleaning(tmp_path):
    then = "os.kill(os.getpid(), 15)"
    code = WORK.format(then=then).replace(
        "def work",
        """
import shutil
real = shutil.rmtree
def slow(*args, **options):
    os.kill(os.getpid(), 2)
    time.sleep(0.1)
    real(*args, **options)
shutil.rmtree = slow
def work""",
    )
    assert ended(python(code, tmp_path / "out")) == (143, "working\n", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_a_destructor_swallows_ends_all_the_same(tmp_path):
    then = """
        class Thing:
            def __del__(self): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2)
        Thing()
        time.sleep(30)
    """
    assert ended(python(WORK.format(then=then), tmp_path / "out")) == (
        130,
        "working\n",
        "interrupted\n",
    )


def test_a_signal_ends_a_process_whose_main_thread_is_in_a_call_that_does_not_return(tmp_path):
    code = WORK.format(then="wait()").replace(
        "def work",
        """
import ctypes, threading, prunenet.cli.signals as signals
signals._DEAF = 0.2
def wait():
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    mutex, library = ctypes.create_string_buffer(100), ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # of itself: for ever
def work""",
    )
    assert ended(python(code, tmp_path / "out")) == (143, "working\n", "interrupted\n")
    assert len(list(tmp_path.iterdir())) == 2, "its lock and its folder, for the next to sweep"


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path):
    then = "os.kill(os.getpid(), signal.SIGHUP)"
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + WORK.format(then=then)
    assert ended(python(code, tmp_path / "out")) == (0, "working\n", "")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("fails", ["pass", "raise ImportError('numpy failed to import')"])
def test_ctrl_c_while_the_command_is_imported_is_one_word(fails):
    code = f"""
import os, signal, sys
class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == 'prunenet.cli.app':
            try:
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
            except KeyboardInterrupt:
                {fails}
                raise
sys.meta_path.insert(0, Finder)
from prunenet.__main__ import main
assert not {{'torch', 'transformers', 'typer', 'rich'}} & set(sys.modules)
main()
"""
    assert ended(python(code)) == (130, "", "interrupted\n")


def test_a_signal_while_typer_reads_the_command_line_has_its_own_code():
    code = """
import os, signal, sys
from prunenet.cli.signals import run
import typer
def parse(text):
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
app = typer.Typer()
@app.command()
def command(number: int = typer.Option(0, parser=parse)): pass
sys.argv = ['command', '--number', '1']
run(app)
"""
    assert ended(python(code))[0] == 143


def test_handlers_are_put_back_and_inner_blocks_leave_them_alone():
    before = [signal.getsignal(number) for number in (*ENDING, signal.SIGALRM)]
    with pytest.raises(SystemExit) as end, signals.ending_cleanly(), signals.ending_cleanly():
        interrupted_by(signal.SIGTERM)
    assert end.value.code == 143
    assert [signal.getsignal(number) for number in (*ENDING, signal.SIGALRM)] == before
    with pytest.raises(KeyError), signals.ending_cleanly():
        raise KeyError("no signal came")


def test_a_peer_s_failure_is_told_though_it_interrupts_the_main_thread(capsys):
    with signals.ending_cleanly():
        with pytest.raises(signals.Ended):
            interrupted_by(signal.SIGINT)
        assert said(PeerFailed("rank 1 has gone"), capsys) == (1, "error: rank 1 has gone")
        assert said(Followed(), capsys) == (1, "")
        assert said(RuntimeError("broken pipe"), capsys) == (130, "interrupted")


# --- a screen that takes nothing ---


@contextmanager
def stream(name: str, refused: io.StringIO | None):
    before = getattr(sys, name)
    setattr(sys, name, refused)
    try:
        yield
    finally:
        setattr(sys, name, before)


def test_progress_and_messages_on_a_full_or_closed_standard_error_end_nothing():
    for refused in (None, *map(Refusing, refusals())):
        with stream("stderr", refused), Progress(console=errors, transient=True) as bar:
            bar.update(bar.add_task("work", total=2), advance=1)
            bar.refresh()
            errors.print("a message")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_result_on_the_disk_is_complete_though_standard_output_does_not_take_the_table(
    as_json, capsys
):
    def table() -> str:
        return "the result"

    closed = io.StringIO()
    closed.close()
    for refused in (None, closed, *map(Refusing, refusals()[:2])):
        with stream("stdout", refused):
            show({"a": 1}, as_json, table)
            with pytest.raises(OSError, match="standard output"):
                show({"a": 1}, as_json, table, only_here=True)
        note = " ".join(capsys.readouterr().err.split())
        assert note.startswith("note: standard output takes no more (")
        assert note.endswith("); the result is complete")


REDIRECTED = """
import os, sys
import typer
from prunenet.cli.console import errors, one_sentence, show
from prunenet.cli.signals import run
from prunenet.runtime import parallel  # here once, and not in each child

def command(done, only_here):
    with one_sentence():
        errors.print('working')
        open(done, 'w').write('done')
        show({'a': 1}, False, lambda: 'table', only_here=only_here)

def child(done, only_here, targets):
    for number, target in zip((1, 2), targets):
        if target == 'closed':
            os.close(number)
        elif target == 'unread':
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, number)
        else:
            os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT), number)
    # as Python itself opens them
    sys.stdout, sys.stderr = (
        None if target == 'closed' else open(number, 'w', closefd=False)
        for number, target in zip((1, 2), targets)
    )
    code = 0
    try:
        run(lambda: command(done, only_here))
    except typer.Exit as end:
        code = end.exit_code
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()  # as Python does in the end
        except OSError:
            code = 120
    os._exit(code)

for number, case in enumerate(eval(sys.argv[2])):
    done = os.path.join(sys.argv[1], str(number))
    if not (pid := os.fork()):
        child(done, case[2], [name.replace('file', done + '.' + stream)
                              for name, stream in zip(case[:2], ('out', 'err'))])
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
CASES = {  # (standard output, standard error, whether the result is nowhere else): exit code
    ("file", "file", True): 0,
    ("closed", "file", False): 0,
    ("/dev/full", "file", False): 0,
    ("/dev/full", "file", True): 1,
    ("unread", "file", False): 0,
    ("file", "/dev/full", False): 0,
    ("file", "unread", False): 0,
    ("closed", "closed", False): 0,
    ("/dev/full", "/dev/full", False): 0,
    ("/dev/full", "/dev/full", True): 1,
}


@pytest.mark.long
def test_the_work_alone_decides_the_exit_code(tmp_path):
    code, output, error = ended(python(REDIRECTED, tmp_path, list(CASES)))
    assert (code, error) == (0, "")
    assert [int(line) for line in output.split()] == list(CASES.values())
    for number, (stdout, stderr, only_here) in enumerate(CASES):
        assert (tmp_path / str(number)).read_text() == "done"
        if stderr == "file":
            text = (tmp_path / f"{number}.err").read_text()
            assert text.startswith("working\n")
            assert ("the result is complete" in text) == (stdout != "file" and not only_here)
            assert "Traceback" not in text
            assert "Exception ignored" not in text
        if stdout == "file":
            assert (tmp_path / f"{number}.out").read_text() == "table\n"


# --- what names from files may do to it ---

HOSTILE = "x\x1b]0;TITLE\x07\x1b[2J\x9b31m\u202e\udcff"


def test_control_characters_of_names_never_reach_the_terminal(capsys):
    table = Table()
    table.add_column("name")
    table.add_row(HOSTILE)
    for shown in (HOSTILE, table):
        show({}, False, lambda shown=shown: shown)
        errors.print(shown, markup=False)
    show({"name": HOSTILE}, True, lambda: "")
    written = "".join(capsys.readouterr())
    assert not console._CONTROL.search(written.replace("\n", ""))
    assert "x]0;TITLE[2J31m" in written
    _, sentence = said(ValueError(HOSTILE), capsys)
    assert not console._CONTROL.search(sentence)


def test_a_text_with_brackets_is_printed_as_it_is(capsys):
    show({}, False, lambda: "drew [red]x[/red].png")
    assert capsys.readouterr().out == "drew [red]x[/red].png\n"


def test_a_standard_output_of_ascii_shows_what_it_can(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    show({}, False, lambda: "naïve")
    assert sys.stdout.buffer.getvalue() == b"na\\xefve\n"  # type: ignore[attr-defined]


# --- one sentence ---


@pytest.mark.parametrize(
    "error",
    [
        TypeError("'int' object is not iterable"),
        RuntimeError("linalg.cholesky: failed"),
        RecursionError("maximum recursion depth exceeded"),
        OverflowError("int too large to convert to float"),
        KeyError("widths"),
        AssertionError(),
    ],
)
def test_what_nobody_thought_of_is_said_to_be_a_fault_of_prunenet(error, capsys, monkeypatch):
    code, text = said(error, capsys)
    assert code == 1
    assert text.startswith(f"error: this is a fault of prunenet: {type(error).__name__}")
    assert text.endswith("; PRUNENET_DEBUG=1 shows the traceback")
    monkeypatch.setenv("PRUNENET_DEBUG", "1")
    with pytest.raises(type(error)), one_sentence():
        raise error


def test_exits_and_usage_errors_pass_and_a_user_s_mistake_is_its_own_sentence(capsys):
    for error in (typer.Exit(3), typer.Abort(), typer.BadParameter("no")):
        with pytest.raises(type(error)), one_sentence():
            raise error
    assert said(ValueError("ratio\nis 3"), capsys) == (1, "error: ratio is 3")
    assert said(FileNotFoundError(errno.ENOENT, "No such file", "there"), capsys) == (
        1,
        "error: there: no such file",
    )
    assert said(KeyboardInterrupt(), capsys) == (130, "interrupted")


def test_a_sentence_has_about_four_hundred_characters_and_keeps_its_remedy(capsys):
    _, text = said(ValueError(f"{'[1, 2], ' * 1000} is no list; give another"), capsys)
    assert 350 < len(text) < 450
    assert text.endswith("is no list; give another")


SHORT = (
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"
        " tried to allocate 400000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("unable to mmap 602491088 bytes from file <x>: Cannot allocate memory (12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
)


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_too_little_memory_is_known_by_class_and_by_text_and_in_what_wraps_it(error, capsys):
    text = said(error, capsys)[1]
    assert "out of memory" in text
    assert text.endswith(
        "take --dtype bfloat16, spread the weights with --device auto, or read them with --stream"
    )
    wrapping = ValueError("m cannot be loaded")
    wrapping.__cause__ = error
    assert "take --dtype bfloat16" in said(wrapping, capsys)[1]


def test_the_size_that_is_too_large_is_said(capsys):
    assert "out of memory (400 MB more): take" in said(SHORT[1], capsys)[1]


def command(failure: BaseException, *arguments: str) -> str:
    """What a command with these options says of a failure."""
    app = typer.Typer()

    @app.command()
    def prune(
        model: str,
        out: Annotated[Path, typer.Option("--out", "-o", parser=path)] = Path("x"),
        round_to: Annotated[int, typer.Option("--round")] = 8,
        dtype: str = "auto",
        device: str = "cpu",
        max_memory: str | None = None,
        stream: Annotated[bool, typer.Option("--stream")] = False,
        tokens: int | None = None,
    ) -> None:
        with one_sentence():
            raise failure

    result = CliRunner().invoke(app, ["m", *arguments])
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ((), ": take --dtype bfloat16, spread the weights with --device auto, or read them with"),
        (("--dtype", "float16", "--device", "auto"), "or take a machine with more"),
        (("--dtype", "bfloat16"), ": spread the weights with --device auto, or read them with"),
        (("--stream",), ": take --dtype bfloat16"),
        (("--stream", "--dtype", "bfloat16"), "free some, or take a machine with more"),
        (("--tokens", "1000000"), ": give fewer --tokens than 1000000, take --dtype bfloat16,"),
    ],
)
def test_no_remedy_is_named_that_is_in_use_already(given, remedy):
    text = command(MemoryError(), *given)
    assert remedy in text
    for option in ("--stream", "--dtype bfloat16", "--device auto"):
        assert option not in text or option.split()[0] not in given


def test_arguments_that_the_library_names_become_the_command_s_options():
    failure = ValueError("give another `out`, a `round_to` of 4, or a `model`; not `code`")
    assert "give another --out, a --round of 4, or a MODEL; not `code`" in command(failure)


def test_an_option_that_is_a_path_expands_home_and_refuses_an_empty_text(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert path("~/x") == Path("/somewhere/x")
    assert "the path is empty" in command(ValueError(), "--out", "")
    assert "no known user" in command(ValueError(), "--out=~nobody-of-this-name/x")


def test_a_process_that_goes_on_after_a_signal_was_answered_is_not_ended_later() -> None:
    work = """
import os, signal, time
import prunenet.cli.signals as signals
signals._DEAF = 0.3
for _ in range(20):
    try:
        with signals.ending_cleanly():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    except SystemExit as end:
        assert end.code == 143
time.sleep(0.8)
print("still here")
"""
    code, output, _ = ended(python(work))
    assert (code, output.strip()) == (0, "still here")
