"""Model cards say what the hub shows, and `push` speaks to the hub as the hub expects."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from families import LAYERS, random_keep, tiny_model
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session as close_sessions
from typer.testing import CliRunner

from prunenet.checkpoints.hub import push, write_card
from prunenet.checkpoints.model_card import card_of, inherited_fields
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.save import load_provenance, save_pruned
from prunenet.cli.app import app
from prunenet.models.surgery import narrowed
from prunenet.runtime.files import CheckpointError

BASE_CARD = (
    "---\nlicense: other\nlicense_name: tiny\nlanguage: [en, de]\nbase_model: a/b\n---\n# Dense"
)
ROW = {
    "folder": "/elsewhere/cut",
    "text": "builtin test half",
    "perplexity": 23.5,
    "tokens": 6138,
    "window": 1024,
    "stride": 1024,
    "bos": False,
}


@pytest.fixture
def cut(tmp_path):
    """A pruned checkpoint whose base model has a card."""
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(BASE_CARD)
    dense.config._name_or_path = str(tmp_path / "dense")
    keep = random_keep([32] * LAYERS)
    narrow = narrowed(dense, keep)
    story = Provenance.of(
        dense,
        narrow,
        base_model="owner/dense",
        revision="0" * 40,
        policy="llama",
        policy_sha256=None,
        regime="weights",
        ratio=0.3,
        seed=0,
        how={"widths": "uniform", "channels": "policy", "refit": "off"},
    )
    return save_pruned(narrow, tmp_path / "cut", keep, story)


def test_the_card_names_base_relation_licence_languages_command_and_limits(cut) -> None:
    card = ModelCard.load(cut / "README.md")
    data = card.data
    assert (data.base_model, data.base_model_relation) == ("owner/dense", "finetune")
    assert (data.license, data.license_name, data.language) == ("other", "tiny", ["en", "de"])
    assert data.library_name == "transformers"
    assert data.tags == ["prunenet", "pruned"]
    command = "prunenet prune owner/dense --ratio 0.3 --widths uniform --moments none"
    assert f"{command} --policy llama --out smaller" in card.text
    assert "## Limits" in card.text


def test_a_command_whose_widths_were_chosen_says_so(cut) -> None:
    made = load_provenance(cut)
    text = {"text": "self-generated", "sequences": 160, "tokens": 256, "seed": 0}
    how = {**made.how, "widths": "per-layer", "refit": "layerwise", "text": text}
    for gain, said in ((0.1, "auto"), (None, "per-layer")):
        card = card_of(replace(made, regime="self", how={**how, "predicted_gain": gain}))
        assert f"prunenet prune owner/dense --ratio 0.3 --widths {said} " in card


def test_results_become_the_model_index_and_what_was_inherited_stays(cut) -> None:
    write_card(cut, [ROW, {**ROW, "folder": "another"}])
    card = ModelCard.load(cut / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", 23.5)
    assert (result.dataset_name, result.metric_args["window"]) == ("builtin test half", 1024)
    assert card.data.license == "other"
    assert "| builtin test half | 23.50 | 6,138 | 1024 |" in card.text


def test_the_command_writes_the_card_from_what_eval_printed(cut, tmp_path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps({"models": [ROW]}))
    asked = ["card", str(cut), "--results", str(tmp_path / "eval.json")]
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert ModelCard.load(cut / "README.md").data.eval_results[0].metric_value == 23.5


def test_results_of_other_models_are_refused(cut) -> None:
    with pytest.raises(ValueError, match="results are of another, and none is of"):
        write_card(cut, [{**ROW, "folder": "another"}])


def test_of_several_folders_of_one_name_the_measured_one_is_taken_and_none_by_chance(cut) -> None:
    rows = [{**ROW, "folder": "/a/cut", "perplexity": 9.0}, {**ROW, "folder": str(cut)}]
    write_card(cut, rows)
    (result,) = ModelCard.load(cut / "README.md").data.eval_results
    assert result.metric_value == 23.5
    with pytest.raises(ValueError, match="of several folders that are called cut"):
        write_card(cut, [rows[0], {**ROW, "folder": "/b/cut"}])


def test_a_base_without_a_card_is_refused_and_one_that_says_nothing_takes_nothing(cut) -> None:
    before = ModelCard.load(cut / "README.md").data
    with pytest.raises(CheckpointError, match="nowhere has no model card"):
        write_card(cut, base=cut.parent / "nowhere")
    bare = cut.parent / "bare"
    bare.mkdir()
    (bare / "README.md").write_text("nothing")
    write_card(cut, base=bare)
    assert ModelCard.load(cut / "README.md").data.license == before.license == "other"


@pytest.mark.parametrize(
    ("field", "value"),
    [("perplexity", 0), ("perplexity", "x"), ("ratio", "x"), ("ratio", 2), ("tokens", "y")],
)
def test_results_that_are_no_results_are_one_sentence(cut, tmp_path, field, value) -> None:
    before = (cut / "README.md").read_bytes()
    (tmp_path / "eval.json").write_text(json.dumps({"models": [{**ROW, field: value}]}))
    asked = ["card", str(cut), "--results", str(tmp_path / "eval.json")]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 1
    assert field in " ".join(result.stderr.split())
    assert result.stderr.count("error:") == 1
    assert (cut / "README.md").read_bytes() == before


def test_a_text_s_name_stays_in_its_cell(cut) -> None:
    write_card(cut, [{**ROW, "text": "a | b\n# hi"}])
    assert "| a \\| b # hi | 23.50 |" in (cut / "README.md").read_text()


@pytest.mark.parametrize(
    "content", ["no metadata", "---\n: [\n---\n", "---\nlicense: {a: 1}\n---\n", b"\xff\xfe---"]
)
def test_a_strange_card_of_the_base_model_states_nothing(tmp_path, content) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert inherited_fields(tmp_path) == {}


class Hub(BaseHTTPRequestHandler):
    """The calls of an upload, answered as the hub answers them; what came is kept in `seen`."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, body))
        answer = {}
        if self.path.endswith("/validate-yaml"):
            answer = {"errors": [], "warnings": []}
        elif self.path.endswith("/repos/create"):
            answer = {"url": f"{self.server.url}/owner/cut", "name": "owner/cut"}
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif "/commit/" in self.path and b"taken" in self.headers["Authorization"].encode():
            return self._answer({"error": "you are not allowed"}, 403)
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.url}/owner/cut/commit/1", "commitOid": "1" * 40}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"sha": "0" * 40, "id": "owner/cut", "siblings": []})

    def _answer(self, answer, code=200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)
    close_sessions()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    close_sessions()


def test_push_makes_the_repository_validates_the_card_and_commits_every_file(cut, hub) -> None:
    assert push(cut, "owner/cut").endswith("/owner/cut")
    paths = [path for path, _ in hub.seen]
    assert "/api/repos/create" in paths
    assert "/api/validate-yaml" in paths
    (commit,) = [body for path, body in hub.seen if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    assert lines[0]["value"]["summary"] == "Upload cut"
    files = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert files == {path.name for path in cut.iterdir()}


def test_a_hub_that_refuses_and_a_folder_without_a_model_are_one_sentence(
    cut, hub, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_taken")
    with pytest.raises(CheckpointError, match=r"was not uploaded to 'owner/cut': .*hf auth login"):
        push(cut, "owner/cut")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds neither config\.json nor a \.gguf"):
        push(tmp_path / "empty", "owner/cut")
