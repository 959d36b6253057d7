"""Tables for papers say how sure a value is, and figures are what their names say."""

import csv
import io
import math

import pytest
import torch
from typer.testing import CliRunner

from prunenet.cli.app import app
from prunenet.compare import summary
from prunenet.compare.figures import draw_comparison
from prunenet.compare.tables import comma_separated, latex
from prunenet.evaluation.images import image_format
from prunenet.evaluation.intervals import bootstrap
from prunenet.evaluation.report import draw_report


def line(method: str, seed: int, value: float, *, interval=True, accuracy=None):
    """A line of `compare`, as far as tables read it."""
    scored = {"text": "a_b & c", "value": value, "tokens": 90}
    if interval:
        scored |= {"low": value - 2, "high": value + 3}
    task = {"accuracy": accuracy, "accuracy_norm": None, "standard_error": 0.05}
    return {
        "cell": f"{method}{seed}",
        "error": None,
        "model": "m",
        "dtype": "float32",
        "versions": {"prunenet": "0"},
        "method": method,
        "ratio": 0.0 if method == "dense" else 0.3,
        "seed": seed,
        "regime": "weights",
        "applied_regime": "weights",
        "parameters": 10_000_000,
        "perplexity": [scored],
        "accuracy": accuracy,
        "tasks": [] if accuracy is None else [task, task],
        "seconds_pruning": 2.0,
        "seconds_calibration": None,
        "evaluation": {
            "texts": [{"text": "a_b & c"}],
            "tasks": {} if accuracy is None else {"one": "0", "two": "0"},
            "window": 8,
            "stride": 8,
            "limit": 100,
        },
    }


LINES = [
    line("dense", 0, 10.0, accuracy=0.5),
    *(line("flap", seed, 20.0, accuracy=0.4) for seed in (0, 1)),
    *(line("random", seed, 30.0 + seed, accuracy=0.3) for seed in (0, 1)),
]


def test_a_method_that_draws_nothing_has_an_interval_and_no_spread() -> None:
    rows = {row.method: row for row in summary.summarise(LINES)}
    flap, random = rows["flap"].perplexity["a_b & c"], rows["random"].perplexity["a_b & c"]
    assert (flap.deviation, flap.low, flap.high, flap.seeds) == (None, 18.0, 23.0, 2)
    assert random.deviation == pytest.approx(math.sqrt(0.5))
    assert (random.low, random.seeds) == (None, 2)
    cells = {row[2]: row for row in summary.cells_of(list(rows.values()))}
    assert cells["flap"][4] == "20.0 [18.0, 23.0]"
    assert cells["random"][4] == "30.5 ± 0.7"
    assert "n = 2" in summary.caption(LINES)


def test_the_interval_of_a_mean_accuracy_comes_from_the_errors_of_its_tasks() -> None:
    rows = {row.method: row for row in summary.summarise(LINES)}
    reach = 1.96 * math.hypot(0.05, 0.05) / 2
    assert rows["flap"].accuracy.low == pytest.approx(0.4 - reach)
    assert rows["flap"].accuracy.high == pytest.approx(0.4 + reach)


def test_lines_of_versions_before_have_no_interval() -> None:
    (row,) = summary.summarise([line("flap", 0, 20.0, interval=False)])
    assert summary.cells_of([row])[0][4] == "20.0"


def test_csv_holds_numbers_as_measured() -> None:
    table = list(csv.DictReader(io.StringIO(comma_separated(summary.summarise(LINES)))))
    assert [row["method"] for row in table] == ["dense", "flap", "random"]
    flap, random = table[1:]
    assert float(flap["perplexity a_b & c low"]) == 18.0
    assert (flap["perplexity a_b & c sd"], flap["n"]) == ("", "2")
    assert float(random["perplexity a_b & c sd"]) == pytest.approx(math.sqrt(0.5))


def test_latex_escapes_what_latex_reads_otherwise() -> None:
    text = latex(summary.summarise(LINES), LINES)
    assert r"a\_b \& c" in text
    assert r"30.5 $\pm$ 0.7" in text
    columns = text.split(r"\begin{tabular}{")[1].split("}")[0]
    assert all(
        row.count(" & ") == len(columns) - 1 for row in text.splitlines() if row.endswith(r"\\")
    )


def test_the_bootstrap_covers_the_mean_and_is_narrower_for_more_windows() -> None:
    draws = torch.randn(400, generator=torch.Generator().manual_seed(1)).double() + 3
    few = bootstrap((draws[:20] * 10).tolist(), [10] * 20)
    many = bootstrap((draws * 10).tolist(), [10] * 400)
    for low, high in (few, many):
        assert low < 3.1
        assert high > 2.9
    assert many[1] - many[0] < few[1] - few[0]
    # the normal interval of the mean, for 400 windows
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * float(draws.std()) / 20, rel=0.1)
    assert bootstrap([1.0], [5]) is None


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_a_figure_is_what_its_suffix_says_and_the_same_bytes_again(tmp_path, kind, magic) -> None:
    rows = summary.summarise(LINES)
    first = draw_comparison(rows, tmp_path / "a", kind=kind)
    second = draw_comparison(rows, tmp_path / "b", kind=kind)
    for one, two in zip(first, second, strict=True):
        assert one.suffix == f".{kind}"
        assert one.read_bytes().startswith(magic)
        assert one.read_bytes() == two.read_bytes()
    names = ("parameters", "perplexity", "prefill_tokens_per_second", "decode_tokens_per_second")
    row = {"ratio": 0.0} | dict.fromkeys(names, 5.0)
    draw_report([row], tmp_path / f"r.{kind}")
    assert (tmp_path / f"r.{kind}").read_bytes().startswith(magic)


def test_another_suffix_is_refused_before_anything_is_drawn(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a figure ends in \.png, \.svg, \.pdf, got 'r\.jpg'"):
        image_format(tmp_path / "r.jpg")


def test_the_program_says_its_version_and_lists_its_methods() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output.split()[0]) == (0, "prunenet")
    listed = CliRunner().invoke(app, ["compare", "--list"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in ("wanda_sp", "flap", "elimination", "owl"))
