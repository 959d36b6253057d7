"""The HTML report holds what was measured, and a browser without network shows it."""

import importlib.util
import json
import re
import shutil
from itertools import pairwise

import pytest
import torch
from families import LAYERS, random_keep, tiny_model
from test_policy import some_policy
from typer.testing import CliRunner

from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.save import save_pruned
from prunenet.cli.app import app
from prunenet.evaluation.page import Curve, Extras, Size, page_data, write_page
from prunenet.models.surgery import narrowed

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def row(name: str, ratio: float, folder: str = "/nowhere", **more):
    return {
        "name": name,
        "folder": folder,
        "ratio": ratio,
        "parameters": int(1e7 * (1 - ratio / 2)),
        "bytes": 40_000_000,
        "text": "builtin",
        "tokens": 800,
        "windows": 8,
        "window": 100,
        "perplexity": 20 * (1 + ratio),
        "perplexity_low": 19 * (1 + ratio),
        "perplexity_high": 22 * (1 + ratio),
        "prefill_tokens_per_second": 100.0,
        "prefill_spread": 0.5,
        "decode_tokens_per_second": 10.0,
        "decode_spread": 0.1,
        "repeats": 3,
    } | more


EXTRAS = Extras(
    sizes=tuple(
        Size(f"ratio {r}", r, (48 - k, 48, 40 - k), (48,) * 3) for r, k in ((0.0, 0), (0.3, 16))
    ),
    curves=(Curve("Reward: channels", "environment steps", ((0, 0.1), (100, 0.4), (200, 0.5))),),
    texts=((("dense", "A text."), ("cut", EVIL)),),
)


@pytest.fixture
def cut(tmp_path):
    dense = tiny_model("llama")
    keep = random_keep([16, 40, 24])
    groups = [torch.tensor(mask) for mask in ([True, True], [False, True], [True, True])]
    narrow = narrowed(dense, keep, groups)
    story = Provenance.of(
        dense,
        narrow,
        base_model="owner/dense",
        revision="1" * 40,
        policy="llama",
        policy_sha256=None,
        regime="weights",
        ratio=0.4,
        seed=3,
    )
    return save_pruned(narrow, tmp_path / "cut", keep, story, groups=groups)


def test_widths_heads_and_provenance_come_from_the_folders(cut) -> None:
    data = page_data([row("d", 0.0), row("cut", 0.4, str(cut))], Extras())
    first, second = data["sizes"]
    assert (first["label"], first["kept"]) == ("dense", (48,) * LAYERS)
    assert (second["kept"], second["groups"]) == ((16, 40, 24), (2, 1, 2))
    assert first["groups"] == (2, 2, 2)
    assert data["models"][1]["facts"]["base model"] == "owner/dense"
    assert data["title"] == "dense, pruned"
    assert data["start"] == 1


def test_the_page_needs_no_network_and_data_cannot_leave_its_element(tmp_path) -> None:
    path = tmp_path / "new" / "r.html"
    write_page([row("d", 0.0), row(EVIL, 0.3)], path, EXTRAS)
    text = path.read_text()
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    data = json.loads(held[1])
    assert data["models"][1]["name"] == EVIL
    assert text.count("</script>") == 2
    assert not re.search(r"(?:src|href)=|@import|url\(|fetch\(", text.replace(held[1], ""))
    again = tmp_path / "again.html"
    write_page([row("d", 0.0), row(EVIL, 0.3)], again, EXTRAS)
    assert again.read_bytes() == path.read_bytes()


def test_a_curve_is_said_in_words_and_what_serves_is_noted() -> None:
    served = row("d", 0.0, served_type="q8_0", served_decode_spread=0.5, peak_bytes=10**8)
    data = page_data([served], EXTRAS)
    assert data["curves"][0]["said"] == (
        "From 0.1 to 0.5 over 200 environment steps; the best of 3 evaluations is 0.5, at 200."
    )
    assert "as a q8_0 file, one sequence" in data["note"]
    assert "the most that reading and writing adds" in data["note"]


def test_a_busy_machine_is_said_and_rows_that_are_none_are_refused() -> None:
    assert "The machine was busy" in page_data([row("d", 0.0)], Extras())["note"]
    quiet = row("d", 0.0, prefill_spread=0.02)
    assert "busy" not in page_data([quiet], Extras())["note"]
    with pytest.raises(ValueError, match="at least one row"):
        page_data([], Extras())
    with pytest.raises(ValueError, match="has parameters and bytes"):
        page_data([{"name": "x"}], Extras())


def test_the_command_shows_a_policy_s_allocation_at_every_ratio(tmp_path, cut) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    some_policy().save_pretrained(tmp_path / "policy")
    rows = [row("dense", 0.0, str(tmp_path / "dense")), row("cut", 0.4, str(cut))]
    (tmp_path / "eval.json").write_text(json.dumps({"models": rows}))
    asked = ["report", str(tmp_path / "eval.json"), "--out", str(tmp_path / "r.html")]
    said = CliRunner().invoke(app, [*asked, "--policy", str(tmp_path / "policy")])
    assert said.exit_code == 0
    held = re.search(r'id="data">(.*?)</script>', (tmp_path / "r.html").read_text(), re.S)
    sizes = json.loads(held[1])["sizes"]
    assert [size["ratio"] for size in sizes] == [step / 20 for step in range(15)]
    for wider, narrower in pairwise(sizes):
        assert all(a >= b for a, b in zip(wider["kept"], narrower["kept"], strict=True))
    wrong = CliRunner().invoke(app, [*asked[:-1], str(tmp_path / "r.png"), "--prompt", "x"])
    assert wrong.exit_code == 1


@pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or shutil.which("chromium") is None,
    reason="needs a browser: apt install chromium, pip install 'prunenet[browser]'",
)
def test_a_browser_shows_it_wide_narrow_and_dark_and_the_slider_moves(tmp_path) -> None:
    from playwright.sync_api import sync_playwright

    write_page([row("d", 0.0), row("a", 0.3), row(EVIL, 0.4)], tmp_path / "r.html", EXTRAS)
    seen, asked = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for width, scheme in ((1400, "light"), (380, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("console", lambda message: seen.append(message.text))
            page.on("pageerror", lambda error: seen.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"file://{tmp_path / 'r.html'}")
            page.wait_for_selector("body[data-ready]")
            assert page.title() == "dense, pruned"
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            before = page.locator("#said").inner_text()
            heights = "[...document.querySelectorAll('.kept')].map((b) => b.getAttribute('height'))"
            tall = page.evaluate(heights)
            page.locator("#ratio").focus()
            page.keyboard.press("ArrowLeft")
            assert page.locator("#said").inner_text() != before
            assert page.evaluate(heights) != tall
            assert page.locator("#charts circle").count() == 9
            assert "From 0.1 to 0.5 over 200" in page.locator("#curves").inner_text()
            light, ink = (
                sum(
                    map(
                        int,
                        re.findall(
                            r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}")
                        ),
                    )
                )
                for name in ("backgroundColor", "color")
            )
            assert (light > ink) == (scheme == "light")
            page.close()
        browser.close()
    assert seen == []
    assert all(url.startswith("file://") for url in asked)
