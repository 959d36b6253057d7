"""The benchmarks start, and what they share does what it says."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(
    path.name
    for path in BENCHMARKS.glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return pytest.importorskip("_common", reason="the wheel is tested without the benchmarks")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_says_how_it_is_used(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--out" in shown
    assert f"python benchmarks/{script}" in shown


def test_a_line_is_found_again_by_the_fields_that_identify_it(common, tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    assert common.read_lines(path) == []
    common.append_line(path, {"method": "random", "ratios": [0.2, 0.3], "loss": 1.5})
    common.append_line(path, {"method": "flap", "ratios": [0.2], "loss": 2.5})
    lines = common.read_lines(path)
    assert [line["loss"] for line in lines] == [1.5, 2.5]
    assert {"torch", "prunenet"} <= lines[0].keys()
    assert common.is_measured(lines, {"method": "random", "ratios": [0.2, 0.3]})
    assert not common.is_measured(lines, {"method": "random", "ratios": [0.2]})
    assert not common.is_measured(lines, {"method": "random", "ratios": [0.2, 0.3], "seed": 0})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts peaks anew")
def test_the_peak_of_a_phase_is_the_memory_that_it_held(common, capsys):
    clock = common.Clock("cpu")
    with clock.phase("small"):
        pass
    with clock.phase("large"):
        bytearray(b"x" * 10**8)
    held = {name: phase["peak_megabytes"] for name, phase in clock.phases.items()}
    assert 100 <= held["large"] - held["small"] < 400
    assert set(clock.phases["large"]) == {"seconds", "cpu_seconds", "peak_megabytes"}


def test_a_job_gives_its_last_line_and_what_it_printed_before(common):
    code = "print('on the way'); print('{\"loss\": 1.5}')"
    assert common.job([sys.executable, "-c", code]) == (["on the way"], {"loss": 1.5})
