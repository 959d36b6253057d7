"""Trackers are told what a training logs, as one run, and are asked for before any work."""

import importlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest
from families import tiny_model, token_ids

from prunenet.policies.training.recipe import Recipe
from prunenet.policies.training.reports import Reports
from prunenet.policies.training.train import train
from prunenet.recover.options import Tuning
from prunenet.recover.record import Watch, recover
from prunenet.recover.training import tuned
from prunenet.runtime import tracking as module
from prunenet.runtime.tracking import NOTHING, tracking
from prunenet.text.calibration import CalibrationSet

RECIPE = Recipe(reward="spectral", updates=2, masks=4, evaluate_every=1, seed=0)


def recorded(monkeypatch) -> list:
    """wandb's calls, in a module that stands in for it."""
    calls = []

    def note(name):
        return lambda *given, **named: calls.append((name, given, named))

    run = SimpleNamespace(
        log=note("log"), finish=note("finish"), summary=SimpleNamespace(update=note("results"))
    )

    def init(**named):
        calls.append(("init", (), named))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    return calls


def test_one_run_holds_both_stages_their_terms_widths_settings_and_results(
    tmp_path, monkeypatch
) -> None:
    calls = recorded(monkeypatch)
    widths = Recipe(reward="spectral", updates=2, masks=4, subset="widths", evaluate_every=1)
    recipe = Recipe(**{**vars_of(RECIPE), "allocation": widths})
    found = train(
        tiny_model("llama"),
        recipe,
        out=tmp_path / "policy",
        reports=Reports(report_to=["wandb"]),
    )
    names = [name for name, _, _ in calls]
    assert names[0] == "init"
    assert names[-2:] == ["results", "finish"]
    assert names.count("init") == names.count("finish") == 1
    started = calls[0][2]
    assert (started["project"], started["name"]) == ("prunenet", "policy")
    assert started["config"]["recipe/updates"] == 2
    assert started["config"]["trained_on/model_type"] == "llama"
    logged = [(given[0], named["step"]) for name, given, named in calls if name == "log"]
    told = {name for values, _ in logged for name in values}
    assert {f"{stage}/widths/layer_02" for stage in ("channels", "widths")} <= told
    assert any(name.startswith("channels/reward/") for name in told)
    assert "channels/prunenet/reward_of_mode" in told
    assert not any("explained_variance" in name for name in told)
    steps = [step for _, step in logged]
    assert steps == sorted(steps)
    best = max(reward for _, reward in found.history)
    (results,) = [given[0] for name, given, _ in calls if name == "results"]
    assert results["channels/best_reward"] == pytest.approx(best)
    assert "widths/best_reward" in results


def test_a_recovery_tells_the_losses_of_every_step_and_evaluation(monkeypatch) -> None:
    calls = recorded(monkeypatch)
    blocks = CalibrationSet(token_ids(8, 16), "self", {"text": "random"})
    tuning = Tuning(steps=2, batch=2, micro_batch=2, rank=2)
    tuned(tiny_model("llama"), blocks, tuning, report_to=["wandb"])
    logged = [(*given[0], named["step"]) for name, given, named in calls if name == "log"]
    assert [step for name, step in logged if name == "loss"] == [1, 2]
    assert [step for name, step in logged if name == "loss_held_back"] == [0, 1, 2]
    (results,) = [given[0] for name, given, _ in calls if name == "results"]
    assert results["loss_after"] <= results["loss_before"]
    assert calls[0][2]["config"]["tuning/steps"] == 2


def vars_of(recipe):
    return {name: getattr(recipe, name) for name in recipe.__dataclass_fields__}


def test_a_run_that_fails_ends_as_failed(monkeypatch) -> None:
    calls = recorded(monkeypatch)

    def fail() -> None:
        with tracking(["wandb", "tensorboard", "wandb"], "r", {}) as track:
            track.log({"loss": 1.0, "text": "no number", "broken": float("nan")}, 3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [name for name, _, _ in calls] == ["init", "log", "finish"]
    assert calls[1][1:] == (({"loss": 1.0},), {"step": 3})
    assert calls[-1][2] == {"exit_code": 1}


@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [
        (["mlflow"], ImportError, r"mlflow is not installed: pip install 'prunenet\[mlflow\]'"),
        (["sacred"], ValueError, "knows tensorboard, wandb, trackio, mlflow, got 'sacred'"),
    ],
)
def test_a_tracker_that_is_not_there_is_said_before_anything_is_read(
    tmp_path, monkeypatch, names, kind, said
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(kind, match=said):
        train(None, reports=Reports(report_to=names))
    with pytest.raises(kind, match=said):
        recover(tmp_path / "nothing", tmp_path / "out", watch=Watch(report_to=names))


def test_tensorboard_alone_asks_for_no_other_run() -> None:
    with tracking(["tensorboard"], "r", {}) as track:
        assert track is NOTHING


@pytest.mark.filterwarnings("ignore")  # of the trackers' own dependencies
@pytest.mark.parametrize("tracker", ["wandb", "trackio", "mlflow"])
def test_the_tracker_itself_keeps_a_run_without_network(tracker, tmp_path, monkeypatch) -> None:
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with tracking([tracker], "run", {"recipe": {"updates": 2, "name": None}}) as track:
        track.stage("channels", 0).log({"reward": 0.5}, 1)
        track.stage("widths", 10).log({"reward": 0.75}, 1)
        track.results({"gain": 0.25})
    if tracker == "mlflow":
        mlflow = importlib.import_module("mlflow")
        (run,) = mlflow.search_runs(experiment_names=["prunenet"], output_format="list")
        assert run.data.params["recipe/updates"] == "2"
        assert run.data.metrics["widths/reward"] == 0.75
        assert run.data.metrics["results/gain"] == 0.25
        assert run.info.status == "FINISHED"
    else:
        if tracker == "wandb":
            importlib.import_module("wandb").teardown()  # waits for what writes
        held = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        kept = [path.suffix for path, data in held.items() if b"widths" in data and b"gain" in data]
        assert {".wandb", ".db"} & set(kept), list(held)
