import json
import logging
import math
import sys
from dataclasses import replace
from functools import partial

import families
import pytest
import torch
from families import D_FF, tiny_model, token_ids

from prunenet.models.layers import count_parameters
from prunenet.models.surgery import narrowed
from prunenet.policies.methods import METHODS, Budget, Evidence, cut, uniform
from prunenet.policies.methods.evidence import gradients
from prunenet.policies.methods.evidence.gradients import Slice, channel_gradients
from prunenet.policies.methods.papers import adapruner
from prunenet.policies.methods.papers.adapruner import (
    METRICS,
    STARTS,
    AdaPrunerOptions,
    Metric,
    masked_loss,
    searched,
)
from prunenet.policies.methods.papers.calibration_pool import CalibrationPool, mean_hidden_states
from prunenet.policies.methods.papers.tpe import Choice, Log, SearchError, Span, best, search
from prunenet.text.calibration import CalibrationSet

BLOCKS = CalibrationSet(token_ids(15, 12), "data", {})
SPACE = {"x": Span(0.0, 1.0), "y": Span(-2.0, 2.0), "kind": Choice(("a", "b", "c"))}
QUICK = AdaPrunerOptions(widths=uniform, sequences=2, tokens=6, clusters=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bowl(params) -> float:
    return (
        (params["x"] - 0.9) ** 2 + params["y"] ** 2 + {"a": 1.0, "b": 0.0, "c": 0.5}[params["kind"]]
    )


def slice_of(weight, first, second) -> Slice:
    return Slice(*(torch.tensor(rows, dtype=torch.float64) for rows in (weight, first, second)))


# Two channels of one weight. w g is 2 and 3, w^2 G / 2 is 4 and 1.
FIRST = slice_of([[2.0], [1.0]], [[1.0], [3.0]], [[2.0], [2.0]])
# w g is -4 and 1, w^2 G / 2 is 0 and 1/2.
SECOND = slice_of([[4.0], [1.0]], [[-1.0], [1.0]], [[0.0], [1.0]])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        # |w g - w^2 G / 2|: 2 2 and 4 1/2, mean 17/8.
        (Metric(a1=1.0, a2=1.0), [6.0 * 8 / 17, 2.5 * 8 / 17]),
        # sgn(w g) |w|^2 |g|^0 / 2 - w^2 G / 2: |2 - 4|, |1/2 - 1|; |-8 - 0|, |1/2 - 1/2|. Mean
        # 21/8.
        (Metric(lam=1.0, b1=0.5, b2=1.0, p=2.0, q=0.0), [10.0 * 8 / 21, 0.5 * 8 / 21]),
        # Half of |w g| over its mean (10 / 4) from each term: w g alone is both.
        (Metric(lam=0.5, a1=1.0, b1=1.0), [6.0 * 4 / 10, 4.0 * 4 / 10]),
        (Metric(lam=0.5, a1=1.0, b1=1.0, reduce="mean"), [3.0 * 4 / 10, 2.0 * 4 / 10]),
        (Metric(lam=0.5, a1=1.0, b1=1.0, reduce="max"), [4.0 * 4 / 10, 3.0 * 4 / 10]),
        (Metric(lam=0.5, a1=1.0, b1=1.0, reduce="prod"), [8.0 * 16 / 100, 3.0 * 16 / 100]),
        (Metric(), [0.0, 0.0]),
    ],
)
def test_the_metric_by_hand(metric, expected) -> None:
    found = metric.layer_scores([FIRST, SECOND])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi3"])
def test_the_starting_points_rank_channels_as_llm_pruner_and_magnitude_do(model_type) -> None:
    model = tiny_model(model_type, bias=True)
    evidence = Evidence(model, BLOCKS)
    layers = list(
        channel_gradients(model, gradients.draw_windows(BLOCKS.ids, 10, 64, evidence.generator()))
    )
    for name, metric in STARTS.items():
        found = [metric.layer_scores(slices) for slices in layers]
        if name == "magnitude":
            # Behind a ReLU that lets nothing through, a weight has no gradient, and sgn(w g) is 0.
            expected = [
                sum((part.weight.abs() * (part.first != 0)).sum(1) for part in slices)
                for slices in layers
            ]
        else:
            expected = METHODS[name].score(evidence)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(
                ours / ours.mean(), theirs.double() / theirs.double().mean(), rtol=1e-4, atol=1e-5
            )


def test_a_pool_leaves_out_the_windows_with_the_fewest_distinct_tokens() -> None:
    ids = token_ids(5, 13)
    ids[1, 6:12] = 9
    pool = CalibrationPool.of(tiny_model("llama"), ids, seeded(), tokens=6, clusters=4)
    whole = {tuple(row[start : start + 6].tolist()) for row in ids for start in (0, 6)}
    kept = {tuple(window.tolist()) for window in pool.windows}
    assert kept < whole
    assert len(kept) == 8
    assert (9,) * 6 not in kept
    assert max(len(set(w)) for w in whole - kept) <= min(len(set(w)) for w in kept)
    assert sorted(pool.labels.unique().tolist()) == [0, 1, 2, 3]
    assert int(pool.sizes.sum()) == 8
    few = CalibrationPool.of(tiny_model("llama"), ids, seeded(), tokens=64, clusters=50, most=3)
    assert few.windows.shape == (3, 13)
    assert few.clusters == 3


def test_windows_are_drawn_from_clusters_by_weight_and_never_twice() -> None:
    windows = torch.arange(1000)[:, None].expand(-1, 2)
    pool = CalibrationPool(windows, (torch.arange(1000) >= 900).long(), 2)
    drawn = [
        pool.drawn(weights, 50, seeded(1))[:, 0]
        for weights in ([1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0])
    ]
    assert all(len(rows.unique()) == 50 for rows in drawn)
    small = [int((rows >= 900).sum()) for rows in drawn]
    assert 15 <= small[0] <= 35, "equal weights, however large the clusters"
    assert small[1:3] == [50, 0]
    assert small[3] < 50
    assert pool.drawn([1.0, 1.0], 50, seeded(1)).equal(pool.drawn([1.0, 1.0], 50, seeded(1)))
    assert len(pool.drawn([1.0, 0.0], 5000, seeded())) == 1000


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox"])
def test_hidden_states_are_means_of_what_the_head_reads(model_type) -> None:
    model, ids = tiny_model(model_type), token_ids(6, 5)
    means = mean_hidden_states(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(
            model.get_output_embeddings()(means), model(ids).logits.mean(1), rtol=1e-4, atol=1e-4
        )


def test_the_objective_is_the_loss_of_the_narrow_model() -> None:
    model, ids = tiny_model("llama"), token_ids(7, 9)
    keep = families.random_keep([40, 8, 24])
    with torch.no_grad():
        logs = narrowed(model, keep)(ids).logits[:, :-1].log_softmax(-1)
    expected = -logs.gather(2, ids[:, 1:, None]).mean()
    assert masked_loss(model, keep, ids) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["tpe", "random"])
def test_a_search_starts_where_it_is_told_and_ends_no_worse(strategy) -> None:
    model = tiny_model("llama")
    evidence = Evidence(model, BLOCKS, seed=2)
    options = replace(QUICK, trials=8, strategy=strategy)
    found = searched(evidence, ratio=0.5, options=options)
    held = BLOCKS.ids[-3:]
    assert len(found.trials) == 8
    assert [{name: t.params[name] for name in METRICS} for t in found.trials[:5]] == [
        {name: getattr(metric, name) for name in METRICS} for metric in STARTS.values()
    ]
    assert found.best.value == min(trial.value for trial in found.trials)
    assert masked_loss(model, found.keep, held) == found.best.value
    assert [int(mask.sum()) for mask in found.keep] == uniform(Budget.of(model, 0.5)) == [24] * 3
    # A start by itself: LLM-Pruner's mix on the even draw 0 of the same pool.
    pool = CalibrationPool.of(model, BLOCKS.ids[:-3], evidence.generator(), tokens=6, clusters=3)
    windows = pool.drawn((pool.sizes / pool.sizes.max()).tolist(), 2, seeded(0))
    scores = [
        STARTS["llm_pruner_mix"].layer_scores(slices)
        for slices in channel_gradients(model, windows)
    ]
    keep = [row >= row.topk(24).values[-1] for row in scores]
    assert masked_loss(model, keep, held) == found.trials[3].value
    again = searched(evidence, ratio=0.5, options=options)
    assert again.trials == found.trials
    other = searched(Evidence(model, BLOCKS, seed=3), ratio=0.5, options=options)
    assert other.trials[5:] != found.trials[5:]


@pytest.mark.long
def test_adapruner_and_its_control_cost_the_same_and_cut_as_much_as_llm_pruner(monkeypatch) -> None:
    monkeypatch.setitem(families._FIELDS, "num_hidden_layers", 12)
    model = tiny_model("llama")
    evidence = Evidence(model, BLOCKS)
    forwards, sizes = [], []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    for name in ("adapruner", "adapruner_random"):
        row = METHODS[name]
        options = row.score.keywords["options"]
        assert options.strategy == ("random" if name == "adapruner_random" else "tpe")
        forwards.clear()
        small = replace(options, trials=2, tokens=6, clusters=2)
        found = cut(evidence, replace(row, score=partial(adapruner.scores, options=small)), 0.3)
        sizes.append((len(forwards), found.widths))
    assert sizes[0] == sizes[1]
    reference = cut(evidence, "llm_pruner_mix", 0.3)
    assert found.widths == reference.widths
    assert found.widths[:4] + found.widths[-2:] == [D_FF] * 6
    assert count_parameters(found.applied(model)) == count_parameters(reference.applied(model))


def test_tpe_learns_from_the_trials_before_and_random_draws_do_not() -> None:
    found = {
        strategy: search(bowl, SPACE, 40, seed=1, strategy=strategy)
        for strategy in ("tpe", "random")
    }
    late = {
        strategy: sum(trial.value for trial in trials[-10:]) / 10
        for strategy, trials in found.items()
    }
    assert late["tpe"] < late["random"] / 3
    assert best(found["tpe"]).value < best(found["random"]).value
    for trials in found.values():
        assert all(
            0 <= t.params["x"] <= 1 and -2 <= t.params["y"] <= 2 and t.params["kind"] in "abc"
            for t in trials
        )
    mirrored = search(lambda params: -bowl(params), SPACE, 40, seed=1, strategy="random")
    assert [t.params for t in mirrored] == [t.params for t in found["random"]]
    assert {t.params["kind"] for t in mirrored} == {"a", "b", "c"}


class Killed(Exception):
    pass


@pytest.mark.parametrize("strategy", ["tpe", "random"])
@pytest.mark.parametrize("half_written", ["", '{"params": {"x": 0.3'])
def test_a_killed_search_continues_to_the_same_end(strategy, half_written, tmp_path) -> None:
    options = {"seed": 4, "strategy": strategy, "starts": [{"x": 0.5, "y": 1.0, "kind": "a"}]}
    whole = search(bowl, SPACE, 16, **options)
    calls = []

    def dying(params) -> float:
        calls.append(params)
        if len(calls) == 12:
            raise Killed
        return math.nan if len(calls) == 3 else bowl(params)

    log = tmp_path / "new" / "log.jsonl"
    with pytest.raises(Killed):
        search(dying, SPACE, 16, log=Log(log, {}), **options)
    with log.open("a") as file:
        file.write(half_written)
    seen = []
    resumed = search(
        dying, SPACE, 14, log=Log(log, {}), progress=lambda *done: seen.append(done), **options
    )
    assert seen == [(12, 14), (13, 14), (14, 14)]
    assert len(calls) == 15
    assert resumed[2].value == math.inf
    assert resumed[:2] == whole[:2]
    if strategy == "random":
        assert [t.params for t in resumed] == [t.params for t in whole][:14]
    longer = search(bowl, SPACE, 16, log=Log(log, {}), **options)
    assert longer[:14] == resumed
    assert search(dying, SPACE, 16, log=Log(log, {}), **options) == longer
    assert len(calls) == 15
    assert [json.loads(line) for line in log.read_text().splitlines()][3]["value"] is None
    calls[:] = [None] * 20
    fresh = Log(tmp_path / "fresh.jsonl", {})
    assert search(bowl, SPACE, 7, log=fresh, **options) == whole[:7]
    assert search(bowl, SPACE, 16, log=fresh, **options) == whole


def test_a_log_of_another_search_or_of_another_model_is_not_continued(tmp_path) -> None:
    log = tmp_path / "log.jsonl"
    run = partial(search, bowl, SPACE, 2, strategy="random", log=Log(log, {}))
    run(seed=0)
    with pytest.raises(SearchError, match="was started with seed 0, not 1"):
        run(seed=1)
    with pytest.raises(SearchError, match="was started with extra None, not 3"):
        run(seed=0, log=Log(log, {"extra": 3}))
    other = tmp_path / "other.jsonl"
    look = partial(searched, options=replace(QUICK, trials=1, log=other))
    look(Evidence(tiny_model("llama"), BLOCKS))
    with pytest.raises(SearchError, match="with model '"):
        look(Evidence(tiny_model("llama", seed=1), BLOCKS))
    with pytest.raises(SearchError, match="with text '"):
        look(Evidence(tiny_model("llama"), CalibrationSet(BLOCKS.ids.flip(1), "data", {})))
    with pytest.raises(SearchError, match=r"with ratio 0\.3, not 0\.5"):
        look(Evidence(tiny_model("llama"), BLOCKS), ratio=0.5)


@pytest.mark.parametrize(
    "content",
    [
        "no log",
        "no log\n",
        "[]\n",
        "[" * 99_999 + "\n",
        '{"search": {}}\n{"params": 1}\n',
        '{"search": 3}\n',
        '{"search": {}}\n{"params": {}, "value": 1}\n',
        '{"search": {}}\n{"params": {"x": 0.5, "y": 9, "kind": "a"}, "value": 1}\n',
        '{"search": {}}\n{"params": {"x": 0.5, "y": 0, "kind": "z"}, "value": 1}\n',
        '{"search": {}}\n{"params": {"x": 0.5, "y": 0, "kind": "a"}, "value": NaN}\n',
    ],
)
def test_a_file_that_is_no_log_is_refused_and_left_as_it_is(content, tmp_path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(content)
    with pytest.raises(SearchError, match="no log of a search, or is damaged"):
        search(bowl, SPACE, 2, seed=0, strategy="random", log=Log(log, {}))
    assert log.read_text() == content


def test_a_log_that_another_process_writes_is_refused(tmp_path) -> None:
    def twice(_) -> float:
        assert (tmp_path / ".log.jsonl.lock").exists()
        return 0.0

    search(twice, SPACE, 1, seed=0, strategy="random", log=Log(tmp_path / "log.jsonl", {}))
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_without_optuna_tpe_says_how_to_get_it_and_random_draws_work(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'prunenet\[search\]'"):
        search(bowl, SPACE, 2, seed=0)
    assert len(search(bowl, SPACE, 2, seed=0, strategy="random")) == 2


def test_a_search_says_nothing_and_leaves_optunas_log_as_it_was(capfd) -> None:
    optuna = pytest.importorskip("optuna")
    before = optuna.logging.get_verbosity()
    search(bowl, SPACE, 3, seed=0)
    assert optuna.logging.get_verbosity() == before == logging.INFO
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": CalibrationSet(BLOCKS.ids[:1], "data", {})}, "give 2 blocks or more"),
        ({"blocks": None}, "blocks=None"),
        ({"trials": 0}, "1 trial or more"),
        ({"sequences": 0}, "0 sequences"),
        ({"clusters": 0}, "clusters >= 1"),
        ({"tokens": 1}, "tokens >= 2"),
        ({"widths": adapruner.as_llm_pruner}, "protect fewer layers"),
        ({"ratio": 1.0}, "`ratio` must be in"),
        ({"strategy": "grid"}, "`strategy` must be one of tpe, random, got 'grid'"),
    ],
)
def test_what_cannot_be_searched_is_said(unchecked, changes, message) -> None:
    evidence = Evidence(tiny_model("llama"), changes.pop("blocks", BLOCKS))
    ratio = changes.pop("ratio", 0.3)
    changes = {"strategy": "random", "trials": 1} | changes
    with pytest.raises(ValueError, match=message):
        searched(evidence, ratio=ratio, options=replace(QUICK, **changes))
