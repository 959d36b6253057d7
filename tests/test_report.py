"""The report's figure."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.image import imread

from prunenet.evaluation.report import draw_report


def row(ratio: float, parameters: int, perplexity: float | None = 20.0) -> dict[str, Any]:
    return {
        "ratio": ratio,
        "parameters": parameters,
        "perplexity": perplexity,
        "prefill_tokens_per_second": 600.0,
        "decode_tokens_per_second": 30.0,
    }


def test_a_report_is_a_png_with_something_in_it_and_leaves_no_figure_open(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.png"
    draw_report([row(0.4, 102, 900.0), row(0, 134), row(0.2, 118)], path, title="A model")
    pixels = imread(path)
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 800
    assert 0.001 < (pixels[..., :3].mean(-1) < 0.9).mean() < 0.3
    assert pyplot.get_fignums() == []


@pytest.mark.long
def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    rows = [row(0, 134_000_000), row(0.2, 118_000_000, 50.0), row(0.4, 102_000_000, 90.0)]
    draw_report(rows, tmp_path / "a.png")
    draw_report([rows[1], rows[0], rows[2]], tmp_path / "b.png")
    draw_report([rows[0], row(0.2, 118_000_000, 70.0), rows[2]], tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


@pytest.mark.long
def test_a_report_of_one_model_and_of_nothing_measured_can_be_drawn(tmp_path: Path) -> None:
    draw_report([row(0, 134)], tmp_path / "one.png")
    draw_report([row(0, 134, None) | {"prefill_tokens_per_second": None}], tmp_path / "none.png")
    assert (tmp_path / "one.png").stat().st_size > (tmp_path / "none.png").stat().st_size > 0


def test_rows_that_lack_something_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks perplexity, decode_tokens_per_second"):
        draw_report(
            [{"ratio": 0, "parameters": 1, "prefill_tokens_per_second": 1.0}], tmp_path / "x.png"
        )
    with pytest.raises(ValueError, match="at least one row"):
        draw_report([], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
