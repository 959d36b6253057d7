"""`prunenet compare`: names of methods, every legal combination, resuming, failing cells, the file,
the table, the figures.
"""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from prunenet.cli import compare as command
from prunenet.cli.app import app
from prunenet.compare import comparison, ledger, run, summary
from prunenet.compare.ledger import Ledger
from prunenet.compare.pruner import Amount, Pruner
from prunenet.compare.results import Results
from prunenet.compare.spec import (
    REFITS,
    WITHOUT_SCORES,
    Spec,
    allocations,
    methods,
    parse,
    parse_all,
)
from prunenet.evaluation.zeroshot import TaskResult
from prunenet.features.from_activations import MOMENT_STATISTICS
from prunenet.models.architectures import ARCHITECTURES
from prunenet.models.layers import count_parameters, down_linears
from prunenet.policies import artifact
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.methods import METHODS, Allocation, Evidence, Method, cut
from prunenet.policies.methods.papers.adapruner import AdaPrunerOptions
from prunenet.policies.methods.papers.soft_masks import SoftMaskOptions
from prunenet.refit.cut import cut_layers, refit_kept
from prunenet.refit.folds import folds_of
from prunenet.refit.moments import ffn_moments
from prunenet.text.calibration import PREFIX_SAMPLING, prefix_blocks
from prunenet.text.corpora import CalibrationText, TestText

ON_DENSE = [name for name in methods() if name not in METHODS or METHODS[name].shrinks == "both"]
HEADED = [name for name, row in METHODS.items() if row.with_heads is not None]
# LLM-Pruner leaves 6 layers whole: the other 3 pay for them, with widths that are multiples of 4.
D_MODEL, D_FF, LAYERS, RATIO = 16, 32, 9, 0.125


def words(count: int, step: int) -> str:
    """Documents of 12 words, different for each step."""
    return "\n\n".join(
        " ".join(f"w{(i * i + step * j) % 61}" for i in range(12)) for j in range(count)
    )


SHORT = replace(PREFIX_SAMPLING, tokens=8)


@pytest.fixture(scope="module", autouse=True)
def _outside(tmp_path_factory):
    """A cache of our own, and nothing in the zoo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNENET_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(artifact, "ZOO", tmp_path_factory.mktemp("zoo"))
        yield


def random_model(layers: int) -> LlamaForCausalLM:
    """d_model 16, d_ff 32, vocabulary 64."""
    shape = {
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=32, **shape)
    torch.manual_seed(0)
    found = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return found


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_model(LAYERS)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    known = {f"w{i}": i for i in range(62)} | {"<s>": 62, "[UNK]": 63}
    made = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A model of two layers, two texts, a policy."""
    home = tmp_path_factory.mktemp("compare")
    random_model(2).save_pretrained(home / "tiny")
    tokenizer.save_pretrained(home / "tiny")
    (home / "test.txt").write_text(words(4, 5))
    (home / "calibration.txt").write_text(words(40, 7))
    policy().save_pretrained(home / "policy")
    return home


def policy(**config) -> Policy:
    """Scores and widths that are not the untrained ones."""
    made = Policy.untrained(PolicyConfig(hidden=(8,), regime="self", gain=0.2, **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in (made.scorer.out, made.scorer.widths.out):
            linear.weight.normal_(generator=generator)
    return made


def shop(model, tokenizer, **options) -> Pruner:
    texts = {"words": CalibrationText("words.txt", words(40, 7))}
    options = {
        "policy": policy(),
        "policy_name": "ours",
        "texts": texts,
        "amount": Amount(8, 16),
        "round_to": 4,
    } | options
    return Pruner(model, tokenizer, **options)


def compare(folder: Path, *specs: object, code: int = 0, **options: object):
    """Runs the command; gives its JSON lines and its result."""
    given = {
        "text": folder / "test.txt",
        "window": 16,
        "ratios": "0.5",
        "calibration-tokens": 128,
        "calibration-window": 16,
    }
    given |= {"calibration": f"words={folder / 'calibration.txt'}", "out": folder / "unused.jsonl"}
    given |= {name.replace("_", "-"): value for name, value in options.items()}
    flags = [
        str(part)
        for name, value in given.items()
        if value is not None
        for part in (f"--{name}", value)
    ]
    result = CliRunner().invoke(
        app, ["compare", str(folder / "tiny"), *map(str, specs), *flags], env={"COLUMNS": "200"}
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    out = Path(str(given["out"]))
    return [
        json.loads(line) for line in out.read_text().splitlines()
    ] if out.exists() else [], result


def legal(moments: str | None = None) -> list[Spec]:
    """Every method x allocation x refit that is not refused."""
    found = []
    for method in methods():
        for allocation in allocations():
            for refit in REFITS:
                try:
                    found.append(
                        parse(
                            f"{method}:{allocation}{'' if moments is None else f'@{moments}'}+{refit}"
                        )
                    )
                except ValueError:
                    continue
    return found


# --- names ---


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("wanda_sp", Spec("wanda_sp", "uniform", "self", "off")),
        ("flap", Spec("flap", "global", "self", "mean_bias")),
        ("flap:uniform+off", Spec("flap", "uniform", "self", "off")),
        ("llm_pruner_element1:owl@ptb", Spec("llm_pruner_element1", "owl", "ptb", "off")),
        (
            "wanda_sp:learned@seed:ptb+layerwise",
            Spec("wanda_sp", "learned", "seed:ptb", "layerwise"),
        ),
        ("random", Spec("random", "uniform", None, "off")),
        ("random:owl", Spec("random", "owl", "self", "off")),
        ("folding:owl@random", Spec("folding", "owl", "random", "off")),
        ("prunenet", Spec("prunenet", "auto", "self", "layerwise")),
        ("prunenet:learned+off", Spec("prunenet", "learned", "self", "off")),
        ("prunenet-weights", Spec("prunenet-weights", "learned", None, "off")),
        ("elimination@builtin", Spec("elimination", "uniform", "builtin", "layerwise")),
        ("wanda_sp@me/wiki:raw:train", Spec("wanda_sp", "uniform", "me/wiki:raw:train", "off")),
        ("slicegpt", Spec("slicegpt", "uniform", "self", "off")),
        ("wanda_sp@./a+b.txt+off", Spec("wanda_sp", "uniform", "./a+b.txt", "off")),
        ("wanda_sp@./a+b.txt", Spec("wanda_sp", "uniform", "./a+b.txt", "off")),
        ("flap+heads", Spec("flap", "global", "self", "mean_bias", heads=True)),
        (
            "flap:uniform@./a+b.txt+heads+off",
            Spec("flap", "uniform", "./a+b.txt", "off", heads=True),
        ),
        ("random+heads", Spec("random", "uniform", None, "off", heads=True)),
    ],
)
def test_a_name_says_method_allocation_moments_and_refit(text, spec):
    assert parse(text, ["ptb"]) == spec


def test_the_shortest_name_of_every_legal_combination_means_the_same():
    for spec in [
        *legal(),
        *legal("builtin"),
        *(parse(f"{name}+heads") for name in HEADED),
        parse("flap@ptb+heads+off", ["ptb"]),
    ]:
        assert parse(spec.name, ["ptb"]) == spec
    assert {parse(name).name for name in methods()} == set(methods())


def test_names_come_from_the_tables():
    assert set(METHODS) < set(methods())
    assert set(get_args(Allocation)) < set(allocations())
    assert [spec.name for spec in parse_all(["all", "flap:global@self+mean_bias"])] == methods()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wnada", ["unknown method 'wnada'", "wanda_sp", "prunenet", "method[:allocation]"]),
        ("flap:owll", ["unknown allocation 'owll'", "uniform", "learned"]),
        ("flap:", ["unknown allocation ''"]),
        ("flap:auto", ["unknown allocation 'auto'"]),
        ("flap+ridge", ["unknown refit 'ridge'", "mean_bias", "sequential"]),
        ("flap@self+ridge", ["unknown refit 'ridge'"]),
        (
            "flap+off@self",
            ["unknown method 'flap+off'", "method[:allocation][@moments][+heads][+refit]"],
        ),
        ("flap@pbt", ["unknown moments 'pbt'", "self", "random", "ptb", "`calibration`"]),
        ("flap@seed", ["@seed:TEXT"]),
        ("flap@seed:pbt", ["unknown moments 'pbt'"]),
        ("random@ptb", ["no part of it reads text", "leave @ptb out"]),
        ("folding:global", ["no scores for global", "owl"]),
        ("folding+layerwise", ["not refitted"]),
        ("slicegpt:owl", ["nothing to allocate"]),
        ("slicegpt+layerwise", ["nothing to allocate or to refit"]),
        ("prunenet-weights+layerwise", ["say prunenet"]),
        ("prunenet+mean_bias", ["prunenet:learned"]),
        ("wanda_sp+heads", ["scores no attention heads", "llm_pruner_mix"]),
        ("prunenet+heads", ["scores no attention heads", "flap"]),
        ("flap:owl+heads", ["uniform, protected, global", "owl"]),
        ("flap+heads+sequential", ["+mean_bias", "+layerwise", "sequential"]),
        ("flap+headss", ["unknown refit 'headss'", "[+heads]"]),
        ("flap+ridge+recovered", ["unknown refit 'ridge'"]),
        ("flap+recovered+recovered", ["recovered twice"]),
    ],
)
def test_a_wrong_name_is_refused_in_one_sentence_with_the_choices(text, words):
    with pytest.raises(ValueError, match=r"^'") as refusal:
        parse(text, ["ptb"])
    assert all(word in str(refusal.value) for word in [*words, text])
    assert "\n" not in str(refusal.value)


# --- combinations ---


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "random+heads",
        "flap:uniform+heads",
        "flap:uniform+heads+off",
        "saap:uniform+heads",
        "flap:uniform+heads+layerwise",
    ],
)
def test_a_cut_of_heads_is_of_the_size_of_a_cut_without(name, benches) -> None:
    made = benches.make(parse(name), 0.5, 0)
    alone = benches.make(replace(parse(name), heads=False), 0.5, 0)
    sizes = [count_parameters(cut.model)[0] - cut.biases for cut in (alone, made)]
    assert 0 <= sizes[0] - sizes[1] < 4 * 3 * D_MODEL  # one rounding step of channels
    assert alone.groups is None
    assert made.groups == [1] * LAYERS
    assert (made.biases > 0) == (name == "flap:uniform+heads")
    assert made.biases == 2 * alone.biases


def runs(specs, benches) -> None:
    """Each makes a model of the right size that computes."""
    assert specs
    expected = count_parameters(benches.model)[0] - LAYERS * round(RATIO * D_FF) * 3 * D_MODEL
    for spec in specs:
        made = benches.make(spec, RATIO, 0)
        size = count_parameters(made.model)[0] - made.biases
        if spec.method == "slicegpt":  # steps of its own: never above, and the next one would be
            assert expected * 0.8 < size <= expected
        else:
            assert size == expected, spec.name
        assert (made.biases > 0) == (spec.refit == "mean_bias"), spec.name
        with torch.no_grad():
            assert bool(
                torch.isfinite(made.model(input_ids=torch.arange(12)[None]).logits).all()
            ), spec.name


@pytest.mark.long
@pytest.mark.parametrize("method", ON_DENSE)  # experts: test_whole_experts
def test_every_method_runs_with_every_allocation_that_is_no_search_and_with_a_refit(
    method, benches, monkeypatch
):
    if method in METHODS and METHODS[method].searches:
        quick = SoftMaskOptions(steps=3) if method == "soft_masks" else AdaPrunerOptions(trials=6)
        row = METHODS[method]
        monkeypatch.setitem(METHODS, method, replace(row, score=partial(row.score, options=quick)))
    own = parse(method).allocation
    specs = [
        spec
        for spec in legal()
        if spec.method == method and spec.allocation in (*WITHOUT_SCORES, "global", own)
    ]
    runs(
        [
            spec
            for spec in specs
            if spec.refit == "off" or (spec.refit, spec.allocation) == ("layerwise", own)
        ],
        benches,
    )


@pytest.mark.slow
def test_every_allocation_runs_and_every_refit(benches):
    specs = [spec for spec in legal() if spec.method == "flap"]
    runs([spec for spec in specs if spec.refit == "off" or spec.allocation == "uniform"], benches)


def test_a_method_that_searches_does_so_once_for_each_ratio_at_that_ratio(
    model, tokenizer, monkeypatch
):
    asked = []

    def score(evidence, *, ratio):
        asked.append(ratio)
        return [torch.arange(D_FF).float() for _ in evidence.ffns]

    monkeypatch.setitem(METHODS, "seeker", Method("seeker", "text", "here", score, searches=True))
    bench = shop(model, tokenizer)
    for spec in ("seeker@random", "seeker:owl@random"):
        for ratio in (0.125, 0.5):
            bench.make(parse(spec), ratio, 0)
    assert asked == [0.125, 0.5]


@pytest.mark.slow
def test_every_legal_combination_runs(benches):
    runs(legal(), benches)


@pytest.fixture(scope="module")
def benches(model, tokenizer) -> Pruner:
    return shop(model, tokenizer)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.long
@pytest.mark.parametrize(
    ("spec", "widths"), [("prunenet", "auto"), ("prunenet:learned+sequential", "per-layer")]
)
def test_prunenet_is_what_prune_makes(spec, widths, model, benches):
    blocks, _ = benches.blocks("self", 0)
    refit = parse(spec).refit
    with torch.no_grad():
        expected = prune(
            model, policy(), ratio=RATIO, round_to=4, widths=widths, blocks=blocks, refit=refit
        ).model
    made = benches.make(parse(spec), RATIO, 0)
    assert same(made.model, expected)
    assert (made.regime, made.applied_regime, made.policy) == ("self", "self", "ours")


def test_prunenet_weights_reads_no_text_and_says_how_its_policy_was_trained(model, tokenizer):
    bench = shop(model, tokenizer)
    made = bench.make(parse("prunenet-weights"), 0.5, 0)
    assert same(made.model, prune(model, policy(), ratio=0.5, round_to=4, widths="per-layer").model)
    assert (made.regime, made.applied_regime, made.calibration) == ("self", "weights", None)
    assert not bench._blocks


def test_elimination_is_what_prune_makes_without_a_policy(model, benches):
    blocks, _ = benches.blocks("self", 0)
    with torch.no_grad():
        expected = prune(model, None, ratio=0.5, blocks=blocks).model
    assert same(benches.make(parse("elimination"), 0.5, 0).model, expected)
    without = shop(model, benches.tokenizer, policy=None)
    assert same(without.make(parse("prunenet"), 0.5, 0).model, expected)


def test_a_policy_that_reads_activations_reads_those_of_the_text_that_is_named(model, benches):
    reads = policy(moments=MOMENT_STATISTICS)
    bench, blocks = shop(model, benches.tokenizer, policy=reads), benches.blocks("words", 0)[0]
    made = {
        text: bench.make(parse(f"prunenet:uniform@{text}+off", ["words"]), RATIO, 0).model
        for text in ("words", "random")
    }
    expected = prune(
        model, reads, ratio=RATIO, round_to=4, widths="uniform", blocks=blocks, refit="off"
    ).model
    assert same(made["words"], expected)
    assert not same(made["random"], expected)


def test_a_refit_from_known_moments_is_the_one_of_cut_layers(model, benches):
    blocks, _ = benches.blocks("words", 0)
    keep = cut(Evidence(model, blocks), "wanda_sp", 0.5).keep
    (expected,) = cut_layers(
        model, blocks.ids, [[int(m.sum()) for m in keep]], scores=[m.float() for m in keep]
    )
    folds = zip(*(ffn_moments(model, fold) for fold in folds_of(blocks.ids)), strict=True)
    found = refit_kept(model, keep, list(folds))
    assert same(found.model(model), expected.model(model))
    assert same(
        benches.make(parse("wanda_sp@words+layerwise", ["words"]), 0.5, 0).model,
        expected.model(model),
    )
    assert not same(
        benches.make(parse("wanda_sp@words", ["words"]), 0.5, 0).model, expected.model(model)
    )


@pytest.mark.parametrize(
    ("moments", "regime"),
    [("self", "self"), ("random", "self"), ("seed:words", "data"), ("words", "data")],
)
def test_every_source_of_moments_gives_as_much_text_as_asked_for(moments, regime, benches):
    made = benches.make(parse(f"wanda_sp@{moments}", ["words"]), 0.5, 0)
    assert (made.regime, made.applied_regime) == (regime, regime)
    assert made.calibration["tokens_read"] == 8 * 16
    blocks = benches.blocks(moments, 0)[0]
    assert blocks.ids.shape == (8, 16)
    assert not blocks.ids.equal(benches.blocks(moments, 1)[0].ids)


def test_document_prefixes_are_the_first_tokens_of_documents(model, tokenizer):
    text = CalibrationText("d.txt", words(40, 7) + "\n\nw1 w2")  # the last one is too short
    made = prefix_blocks(
        model, tokenizer, text, replace(PREFIX_SAMPLING, sequences=10, tokens=8), prefix=3
    )
    openings = {
        tuple(int(word[1:]) for word in part.split()[:3])
        for part in text.content.split("\n\n")[:-1]
    }
    assert {tuple(row) for row in made.ids[:, 1:4].tolist()} <= openings
    assert made.ids.shape == (8, 8)
    lines = CalibrationText("l.txt", words(40, 7).replace("\n\n", "\n"))
    assert {
        tuple(row)
        for row in prefix_blocks(model, tokenizer, lines, SHORT, prefix=3).ids[:, 1:4].tolist()
    } <= openings
    with pytest.raises(ValueError, match="no document of 4 tokens"):
        prefix_blocks(model, tokenizer, CalibrationText("s.txt", "w1 w2\n\nw3"), SHORT)


def test_prefixes_are_never_taken_from_a_test_text(model, tokenizer, unchecked):
    with pytest.raises(TypeError, match="only ever scored"):
        prefix_blocks(model, tokenizer, TestText("t", "w1 w2 w3 w4"), SHORT)


@pytest.mark.long
def test_what_is_measured_on_a_text_is_measured_once_and_dropped_when_its_cells_are_done(
    folder, monkeypatch, tmp_path
):
    walks, held, real, step = [], [], Evidence.energies.func, run._measure

    def counted(evidence):
        walks.append(evidence.label)
        return real(evidence)

    def watched(cell, scored, recovery, line):
        step(cell, scored, recovery, line)
        held.append(sorted(label for label, _ in recovery.pruner._evidence if label))

    monkeypatch.setattr(Evidence.energies, "func", counted)
    monkeypatch.setattr(run, "_measure", watched)
    lines, _ = compare(
        folder,
        "flap@words",
        "flap:uniform@words",
        "flap",
        "random",
        ratios="0.25,0.5",
        out=tmp_path / "r.jsonl",
    )
    assert walks == ["words", "self"]
    assert held == [[], [], [], *[["words"]] * 4, *[["self"]] * 2]
    shared = [line["seconds_shared"] for line in lines if line["moments"] == "words"]
    assert shared[0] == 0
    assert min(shared[1:]) > 0
    assert all(line["seconds_pruning"] >= line["seconds_shared"] for line in lines)


def test_a_cell_owes_what_it_finds_measured_and_what_that_is_made_of(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ledger.time, "perf_counter", lambda: now[0])
    book = Ledger()

    def takes(seconds, value, *inner):
        def make():
            for step in inner:
                step()
            now[0] += seconds
            return value

        return make

    def moments():
        return book.measured(("ptb", 0, "moments"), takes(5.0, "m"))

    def scores():
        return book.measured(("ptb", 0, "scores"), takes(2.0, "s", moments))

    with book.cell() as first:
        assert scores() == "s"
    with book.cell() as second:
        book.measured(("ptb", 0, "scores"), lambda: "kept")
    with book.cell() as third:
        book.measured(("ptb", 0, "moments"), lambda: "kept")
    assert (first.shared, second.shared, third.shared) == (0.0, 7.0, 5.0)
    book.forget("ptb", 0)
    with book.cell() as fourth:
        scores()
    assert fourth.shared == 0


# --- the run ---


ASKED = ("random", "flap@words", "elimination@random")
FIELDS = {
    "active_parameters",
    *(
        "cell",
        "error",
        "format",
        "model",
        "revision",
        "dtype",
        "tokenizer",
        "method",
        "score",
        "allocation",
        "moments",
        "refit",
        "ratio",
    ),
    *(
        "seed",
        "round_to",
        "policy_sha256",
        "calibration_asked",
        "evaluation",
        "regime",
        "applied_regime",
        "policy",
    ),
    *(
        "calibration",
        "widths",
        "residual_widths",
        "parameters",
        "non_embedding_parameters",
        "bias_parameters",
    ),
    *("perplexity", "tasks", "accuracy"),
    *("seconds_calibration", "seconds_pruning", "seconds_shared", "seconds_evaluation"),
    *("peak_memory_pruning", "peak_memory_evaluation", "device", "threads", "versions", "commit"),
}


@pytest.mark.long
def test_every_line_has_every_field(folder, tmp_path):
    lines, _ = compare(folder, *ASKED, seeds="0,1", ratios="0.25,0.5", out=tmp_path / "r.jsonl")
    assert len(lines) == 1 + 3 * 2 * 2
    assert len({line["cell"] for line in lines}) == len(lines)
    dense, *others = lines
    for line in lines:
        assert set(line) == FIELDS
        assert line["error"] is None
        assert {"python", "torch", "transformers", "prunenet"} <= set(line["versions"])
        (scored,) = line["perplexity"]
        assert scored["value"] > 1
        assert (scored["text"], scored["window"]) == ("test.txt", 16)
        assert line["peak_memory_evaluation"]["host_bytes"] > 10**7
    assert (dense["method"], dense["ratio"], dense["regime"]) == ("dense", 0, "weights")
    for line in others:
        assert line["seconds_pruning"] > 0
        assert line["parameters"] < dense["parameters"]
        assert (
            line["regime"]
            == {"random": "weights", "flap@words": "data", "elimination@random": "self"}[
                line["method"]
            ]
        )
        assert (line["calibration"] is None) == (line["method"] == "random")
        assert line["calibration"] is None or line["calibration"]["tokens_read"] == 128
    for ratio in (0.25, 0.5):
        assert (
            len(
                {
                    line["parameters"] - line["bias_parameters"]
                    for line in others
                    if line["ratio"] == ratio
                }
            )
            == 1
        )


class Killed(BaseException):
    """A kill, as far as one process can play it."""


def test_a_run_killed_in_the_middle_goes_on_and_does_each_cell_once(folder, tmp_path, monkeypatch):
    made, real, out = [], Pruner.make, tmp_path / "r.jsonl"

    def killed_at(number):
        def make(bench, spec, ratio, seed):
            if len(made) == number:
                raise Killed
            made.append((spec.name, ratio, seed))
            return real(bench, spec, ratio, seed)

        return make

    asked = {"seeds": "0,1", "out": out}
    monkeypatch.setattr(Pruner, "make", killed_at(3))
    with pytest.raises(Killed):
        compare(folder, *ASKED, **asked)
    whole = out.read_bytes()
    assert whole.count(b"\n") == 4
    out.write_bytes(whole[:-20])  # the kill came in the middle of a line
    made.pop()
    monkeypatch.setattr(Pruner, "make", killed_at(None))
    lines, _ = compare(folder, *ASKED, **asked)
    assert sorted(made) == sorted((name, 0.5, seed) for name in ASKED for seed in (0, 1))
    assert [line["method"] for line in lines].count("dense") == 1
    before = out.read_bytes()
    compare(folder, *ASKED, **asked)
    assert len(made) == 6
    assert out.read_bytes() == before


@pytest.mark.long
def test_another_question_is_another_cell_and_another_name_is_not(folder, tmp_path):
    out = tmp_path / "r.jsonl"
    first, _ = compare(folder, "flap@words", out=out)
    again, _ = compare(
        folder,
        "flap:global@other+mean_bias",
        calibration=f"other={folder / 'calibration.txt'}",
        out=out,
    )
    assert again == first
    for change in ({"window": 8}, {"max_windows": 2}, {"calibration_tokens": 64}, {"round": 4}):
        count = len(out.read_text().splitlines())
        lines, _ = compare(folder, "flap@words", out=out, **change)
        assert len(lines) > count, change


def broken(*_):
    raise RuntimeError("the gradient\nis lost")


def test_a_failing_cell_is_recorded_the_others_go_on_and_a_later_run_tries_it_again(
    folder, tmp_path, monkeypatch
):
    out = tmp_path / "r.jsonl"
    monkeypatch.setitem(METHODS, "wanda_sp", replace(METHODS["wanda_sp"], layer_score=broken))
    asked = ("random", "wanda_sp@words", "flap@words")
    lines, result = compare(folder, *asked, out=out, markdown=tmp_path / "t.md", code=1)
    assert "1 of 4 cells failed" in result.stderr
    assert "failed" in result.stdout
    failed = {line["method"]: line["error"] for line in lines}
    assert failed == {
        "dense": None,
        "random": None,
        "wanda_sp@words": "RuntimeError: the gradient is lost",
        "flap@words": None,
    }
    assert all(set(line) == FIELDS for line in lines)
    assert "wanda_sp@words at 0.5 failed: RuntimeError" in (tmp_path / "t.md").read_text()
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(
        run,
        "_prune",
        lambda cell, *rest, real=run._prune: seen.append(cell.spec.name) or real(cell, *rest),
    )
    healed, _ = compare(folder, *asked, out=out)
    assert seen == ["wanda_sp@words"]
    assert len(healed) == 4
    assert all(line["error"] is None for line in healed)


def test_a_method_of_the_table_that_is_new_is_known_at_once(folder, tmp_path, monkeypatch):
    row = Method(
        "first",
        "weights",
        "here",
        lambda evidence: [-torch.arange(D_FF).float() for _ in evidence.ffns],
    )
    monkeypatch.setitem(METHODS, "first", row)
    lines, _ = compare(folder, "first", out=tmp_path / "r.jsonl")
    assert lines[1]["method"] == "first"


def test_a_file_of_something_else_is_left_as_it_is(folder, tmp_path):
    out = tmp_path / "r.jsonl"
    out.write_text('{"cell": "a", "error": null}\nnotes\n')
    _, result = compare_raw(folder, "random", out=out)
    assert "line 2" in result.stderr
    assert out.read_text() == '{"cell": "a", "error": null}\nnotes\n'


@pytest.mark.parametrize(
    "content", ["notes of mine, one line", '{"cell": "a", "error": null}\nnotes', "{}"]
)
def test_a_file_of_something_else_is_left_as_it_is_though_its_last_line_has_no_end(
    content, tmp_path
):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"notes\.txt is not one of 'prunenet compare'"):
        Results(path)
    assert path.read_text() == content


def compare_raw(folder, *specs, **options):
    """A run that is refused."""
    out = options.pop("out")
    result = CliRunner().invoke(
        app,
        [
            "compare",
            str(folder / "tiny"),
            *specs,
            "--out",
            str(out),
            "--text",
            str(folder / "test.txt"),
            "--window",
            "16",
        ],
    )
    assert result.exit_code == 1
    return out, result


def test_results_keep_one_line_a_cell(tmp_path):
    results = Results(tmp_path / "new" / "r.jsonl")
    results.prepare()
    results.add({"cell": "a", "error": "no"})
    results.add({"cell": "b", "error": None})
    results.add({"cell": "a", "error": None})
    again = Results(results.path)
    assert again.done("a")
    assert again.done("b")
    assert results.path.read_text().count("\n") == 2
    assert not again.done("c")


def finished(cell: str) -> dict:
    """A line of a measured cell, as far as a table reads it."""
    asked = {"texts": [{"text": "t"}], "tasks": {}, "window": 8, "stride": 8, "limit": None}
    said = {"cell": cell, "error": None, "method": "random", "ratio": 0.3, "seed": 0}
    said |= {"model": "m", "dtype": "float32", "regime": "weights", "applied_regime": "weights"}
    said |= {"evaluation": asked, "parameters": 9, "accuracy": None, "tasks": None}
    said |= {"perplexity": [{"text": "t", "value": 2.0, "tokens": 6}]}
    said |= {"seconds_pruning": 1.0, "seconds_calibration": None, "versions": {"prunenet": "0"}}
    return said


def test_a_line_that_lacks_anything_that_a_table_reads_is_said_to_be_damaged(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(finished("a")) + "\n")
    results = Results(path)
    assert results.complete("a")
    assert "2.0" in summary.markdown(summary.summarise([results["a"]]), [results["a"]])
    for name in finished("a").keys() - {"cell", "error"}:
        line = finished("a")
        del line[name]
        path.write_text(json.dumps(line) + "\n")
        with pytest.raises(ValueError, match=f"damaged line of cell a: .*{name}"):
            Results(path).complete("a")


@pytest.mark.parametrize("value", ["auto", [], -1.0])
def test_an_interval_that_is_no_number_is_said_to_be_damaged(tmp_path, value):
    path = tmp_path / "r.jsonl"
    for place, name in (("perplexity", "low"), ("perplexity", "high"), ("tasks", "standard_error")):
        line = finished("a")
        line["tasks"] = [{"accuracy": 0.5, "accuracy_norm": None}]
        line[place][0][name] = value
        path.write_text(json.dumps(line) + "\n")
        with pytest.raises(ValueError, match=rf"\.{name} is "):
            Results(path).complete("a")


def test_a_file_that_is_too_large_for_a_comparison_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    path.touch()
    os.truncate(path, 2**40)  # sparse
    monkeypatch.setattr(type(path), "read_bytes", lambda _: pytest.fail("all of it was read"))
    with pytest.raises(ValueError, match=r"no file of 'prunenet compare': it has 1,099,5\d\d,"):
        Results(path)


# --- mistakes, before any work ---


@pytest.mark.parametrize(
    ("specs", "options", "words"),
    [
        (["wnada"], {}, ["unknown method"]),
        (["random"], {"ratios": "0.2,1.2"}, ["`ratio` must be in [0, 1), got 1.2"]),
        (["random"], {"ratios": "half"}, ["--ratios are numbers between commas, got 'half'"]),
        (["random"], {"seeds": "0.5"}, ["--seeds are whole numbers"]),
        (["random"], {"text": "missing.txt"}, ["missing.txt", "does not exist"]),
        (["random"], {"window": 64}, ["window is 64 tokens", "32 positions"]),
        (["random"], {"max_windows": 0}, ["--max-windows must be 1 or more"]),
        (["flap@words"], {"calibration": "words"}, ["NAME=TEXT"]),
        (["flap@words"], {"calibration": "self=words.txt"}, ["NAME=TEXT", "not self"]),
        (["flap@words"], {"calibration": "words=missing.txt"}, ["missing.txt", "does not exist"]),
        (
            ["flap@words"],
            {"calibration_tokens": 20},
            ["--calibration-tokens must be at least 32, two blocks of 16"],
        ),
        (["flap@words"], {"calibration_window": 64}, ["calibration window is 64"]),
        (["flap"], {"calibration_window": 0}, ["--calibration-window must be 2 or more, got 0"]),
        (["random"], {"seeds": "-1"}, ["`seed` must be in [0, 2^32), got -1"]),
        (["prunenet-weights"], {}, ["asks a policy", "prunenet train"]),
        (["wanda_sp:learned"], {}, ["asks a policy"]),
        (["random"], {"policy": "nowhere"}, ["nowhere"]),
        (["random"], {"round": 64}, ["64"]),
        (["random"], {"tasks": "piqa"}, ["--task-data"]),
        (["random"], {"recover_tokens": 256}, ["--recover-tokens 256 is of methods +recovered"]),
        (["random"], {"recover_window": 32}, ["--recover-window 32 is of methods +recovered"]),
        (
            ["random+recovered"],
            {"recover_window": 2},
            ["--recover-window must be at least 4, got 2"],
        ),
        (
            ["random+recovered"],
            {"recover_window": 512},
            ["--recover-window must be at most 32, what the model has positions for, got 512"],
        ),
        (
            ["random+recovered"],
            {"recover_tokens": 30, "recover_window": 16},
            ["--recover-tokens must be at least 32, 2 blocks of 16, got 30"],
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_no_file(specs, options, words, folder, tmp_path):
    lines, result = compare(folder, *specs, out=tmp_path / "r.jsonl", code=1, **options)
    assert not lines
    assert not (tmp_path / "r.jsonl").exists()
    said = " ".join(result.stderr.split())
    assert said.count("error:") == 1
    assert all(word in said for word in words), said


def test_calibration_text_that_is_too_short_and_task_files_that_miss_a_column_are_seen_before_any_work(
    folder, tmp_path
):
    (tmp_path / "short.txt").write_text("three short words")
    (tmp_path / "piqa.jsonl").write_text('{"goal": "to eat"}\n')
    for specs, options, words in (
        (
            ["flap@short"],
            {"calibration": f"short={tmp_path / 'short.txt'}"},
            ["text 'short'", "0 windows of 16 tokens", "--calibration-window"],
        ),
        (
            ["flap@seed:short"],
            {"calibration": f"short={tmp_path / 'short.txt'}"},
            ["text 'short'", "no document of 4 tokens", "give more text"],
        ),
        (
            ["random"],
            {"tasks": "piqa", "task_data": str(tmp_path)},
            ["piqa.jsonl row 1 has no column 'sol1'"],
        ),
    ):
        if "tasks" in options and importlib.util.find_spec("lm_eval") is None:
            continue
        _, result = compare(folder, *specs, out=tmp_path / "r.jsonl", code=1, **options)
        assert not (tmp_path / "r.jsonl").exists()
        assert all(word in " ".join(result.stderr.split()) for word in words), result.stderr


def test_a_line_says_which_heads_are_left_and_other_lines_do_not_speak_of_heads(folder, tmp_path):
    lines, _ = compare(folder, "random", "random+heads", out=tmp_path / "r.jsonl")
    dense, alone, made = lines
    assert (made["method"], made["heads"], made["head_groups"]) == ("random+heads", True, [1, 1])
    assert made["cell"] != alone["cell"]
    assert not [name for line in (dense, alone) for name in line if "head" in name]


def test_weights_alone_are_not_enough_for_a_policy_that_reads_activations(folder, tmp_path):
    reads = policy(moments=MOMENT_STATISTICS).save_pretrained(tmp_path / "reads")
    _, result = compare(folder, "prunenet-weights", policy=reads, out=tmp_path / "r.jsonl", code=1)
    assert "scores channels by their activations" in " ".join(result.stderr.split())


def test_calibration_never_sees_a_text_that_is_scored(folder, tmp_path):
    _, result = compare(folder, f"flap@{folder / 'test.txt'}", out=tmp_path / "r.jsonl", code=1)
    assert "calibration must not see it" in " ".join(result.stderr.split())


def test_all_leaves_out_what_needs_a_policy_where_there_is_none(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "_measure", lambda cell, *_: seen.append(cell.name))
    monkeypatch.setattr(command, "_present", lambda *_: None)
    monkeypatch.setattr(command, "_report", lambda *_: None)
    compare(folder, "all", out=tmp_path / "a.jsonl")
    assert len(seen) == len(ON_DENSE)  # the dense one takes the place of prunenet-weights
    compare(folder, "all", out=tmp_path / "b.jsonl", policy=folder / "policy")
    assert seen[len(ON_DENSE) :] != seen[: len(ON_DENSE)]
    assert any(name.startswith("prunenet-weights") for name in seen)


def test_slicegpt_is_a_cell_of_no_more_parameters_and_says_how_wide_its_stream_is(folder, tmp_path):
    lines, _ = compare(folder, "slicegpt@words", "random", out=tmp_path / "r.jsonl", round=4)
    (made,) = (line for line in lines if line["method"] == "slicegpt@words")
    (cut_,) = (line for line in lines if line["method"] == "random")
    assert made["error"] is None
    assert made["parameters"] <= cut_["parameters"]
    width = made["residual_widths"][0]
    assert (width % 4, made["residual_widths"]) == (0, [width] * 4 + [D_MODEL])
    assert made["widths"] == [D_FF] * 2
    assert (made["regime"], cut_["residual_widths"]) == ("data", None)


def test_slicegpt_is_left_out_of_all_and_refused_by_name_where_the_family_cannot_be_rotated(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], rotates=False))
    _, result = compare(folder, "slicegpt@words", out=tmp_path / "r.jsonl", code=1)
    assert "'llama' cannot be sliced" in " ".join(result.stderr.split())
    seen = []
    monkeypatch.setattr(run, "_measure", lambda cell, *_: seen.append(cell.name))
    monkeypatch.setattr(command, "_present", lambda *_: None)
    monkeypatch.setattr(command, "_report", lambda *_: None)
    compare(folder, "all", out=tmp_path / "a.jsonl")
    assert len(seen) > 10
    assert not any(name.startswith("slicegpt") for name in seen)


# --- what is shown ---


@pytest.mark.long
def test_the_markdown_parses_and_holds_every_cell(folder, tmp_path):
    asked = {
        "out": tmp_path / "r.jsonl",
        "markdown": tmp_path / "deep" / "t.md",
        "seeds": "0,1",
        "ratios": "0.25,0.5",
    }
    lines, result = compare(folder, *ASKED, **asked)
    text = (tmp_path / "deep" / "t.md").read_text()
    table = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in text.splitlines()
        if row.startswith("|")
    ]
    assert table[0] == ["ratio", "regime", "method", "params", "test.txt", "time"]
    assert {len(row) for row in table} == {6}
    assert set(table[1]) == {"---"}
    assert len(table) == 2 + 1 + 2 * len(ASKED)
    assert "windows of 16" in text
    values = [
        line["perplexity"][0]["value"]
        for line in lines
        if (line["method"], line["ratio"]) == ("random", 0.5)
    ]
    (row,) = [row for row in table if row[0] == "0.5" and row[2] == "random"]
    mean, deviation = torch.tensor(values).mean(), torch.tensor(values).std()
    assert row[4] == f"{mean:,.1f} ± {deviation:,.1f}"
    assert all(name in result.stdout for name in ASKED)


def test_json_holds_every_line(folder, tmp_path):
    out = tmp_path / "r.jsonl"
    flags = [
        "--text",
        str(folder / "test.txt"),
        "--window",
        "16",
        "--ratios",
        "0.5",
        "--out",
        str(out),
        "--json",
    ]
    result = CliRunner().invoke(app, ["compare", str(folder / "tiny"), "random", *flags])
    assert json.loads(result.stdout)["cells"] == [
        json.loads(line) for line in out.read_text().splitlines()
    ]


@pytest.mark.long
def test_tasks_are_scored_shown_and_drawn(folder, tmp_path, monkeypatch):
    (tmp_path / "copa.jsonl").write_text(
        json.dumps(
            {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}
        )
        + "\n"
    )
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: name)
    asked = []

    def scored(model, tokenizer, tasks, *, limit=None, bos="auto"):
        asked.append((sorted(tasks), limit, bos))
        return [
            TaskResult("copa", 0.5, 0.1, None, None, 1, limit, "0"),
            TaskResult("piqa", 0.5, 0.1, 0.75, 0.1, 1, limit, "0"),
        ]

    monkeypatch.setattr(run, "zero_shot", scored)
    out = {"out": tmp_path / "r.jsonl", "figures": tmp_path / "figures"}
    lines, result = compare(folder, "random", tasks="copa", task_data=tmp_path, limit=1, **out)
    assert asked == [(["copa"], 1, "auto")] * 2
    assert [line["accuracy"] for line in lines] == [0.625] * 2
    assert lines[0]["tasks"][0]["task"] == "copa"
    assert "62.5" in result.stdout
    assert (tmp_path / "figures" / "zero_shot.png").exists()


@pytest.mark.long
def test_figures_are_pictures(folder, tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image")
    asked = {"out": tmp_path / "r.jsonl", "figures": tmp_path / "figures", "ratios": "0.25,0.5"}
    compare(folder, *ASKED, **asked)
    found = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in found] == ["perplexity.png", "time.png"]
    for path in found:
        image = matplotlib.imread(path)
        assert min(image.shape[:2]) > 300
        # All three colours of regimes are there.
        for colour in ((0, 114, 178), (0, 158, 115), (213, 94, 0)):
            assert (abs(image[..., :3] * 255 - torch.tensor(colour).numpy()).max(-1) < 8).any()


def test_without_matplotlib_figures_are_refused_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "prunenet.compare.figures", raising=False)
    lines, result = compare(
        folder, "random", out=tmp_path / "r.jsonl", figures=tmp_path / "f", code=1
    )
    assert "pip install 'prunenet[figures]'" in " ".join(result.stderr.split())
    assert not lines
    monkeypatch.undo()
    importlib.import_module("prunenet.compare.figures")


def test_a_table_that_cannot_be_written_is_refused_before_any_work(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for options in (
        {"markdown": tmp_path},
        {"markdown": tmp_path / "file" / "t.md"},
        {"figures": tmp_path / "file"},
    ):
        lines, result = compare(folder, "random", out=tmp_path / "r.jsonl", code=1, **options)
        said = " ".join(result.stderr.split())
        assert said.count("error:") == 1
        assert "give a" in said
        assert not lines
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_method_stands_last_and_an_infinite_perplexity_is_a_dash():
    def line(method, value, error=None, regime="weights"):
        evaluation = {
            "texts": [{"text": "t", "sha256": "0"}],
            "tasks": {},
            "window": 8,
            "stride": 8,
            "limit": None,
        }
        scored = None if error else [{"text": "t", "value": value, "tokens": 7}]
        return {
            "method": method,
            "ratio": 0.5,
            "seed": 0,
            "error": error,
            "evaluation": evaluation,
            "perplexity": scored,
        } | {
            "regime": None if error else regime,
            "applied_regime": None if error else "weights",
            "parameters": None if error else 10,
            "seconds_pruning": 1.0,
            "seconds_calibration": None,
            "accuracy": None,
            "tasks": None,
        }

    rows = summary.summarise(
        [
            line("bad", None, "lost"),
            line("inf", None),
            line("b", 3.0, regime="self"),
            line("a", 9.0),
        ]
    )
    assert [row.method for row in rows] == ["a", "inf", "b", "bad"]
    shown = {row[2]: row for row in summary.cells_of(rows)}
    assert shown["inf"][4] == "-"
    assert shown["bad"][3] == "failed"
    assert shown["b"][1] == "weights (trained: self)"


def test_the_caption_names_the_seeds_that_were_asked_for():
    scored = {
        "texts": [{"text": "t", "sha256": "0"}],
        "tasks": {},
        "window": 8,
        "stride": 8,
        "limit": None,
    }
    line = {
        "model": "m",
        "dtype": "float32",
        "perplexity": None,
        "evaluation": scored,
        "versions": {"prunenet": "1"},
    }
    lines = [line | {"method": "dense", "seed": 0}, line | {"method": "random", "seed": 3}]
    assert "; seeds 3 (mean" in summary.caption(lines)


def test_dense_weights_are_not_touched(model, benches):
    before = [linear.weight.clone() for linear in down_linears(model)]
    benches.make(parse("flap+sequential"), 0.5, 0)
    assert all(
        torch.equal(a, linear.weight) for a, linear in zip(before, down_linears(model), strict=True)
    )


@pytest.mark.long
def test_every_method_can_be_recovered_on_the_same_text_and_its_line_says_so(folder, tmp_path):
    options = {"ratios": 0.25, "recover_tokens": 256, "out": tmp_path / "a.jsonl"}
    names = ("magnitude", "magnitude+recovered", "wanda_sp+recovered")
    found = {line["method"]: line for line in compare(folder, *names, **options)[0]}
    assert set(found) == {"dense", *names}
    plain, recovered, other = (found[name] for name in names)
    assert "recovered" not in plain
    assert "recovery" not in plain
    assert (plain["regime"], recovered["regime"], recovered["applied_regime"]) == (
        *("weights", "self"),
        "self",
    )
    assert recovered["parameters"] == plain["parameters"]
    assert recovered["perplexity"] != plain["perplexity"]
    assert recovered["recovery"]["loss_after"] < recovered["recovery"]["loss_before"]
    assert recovered["recovery"]["text"] == other["recovery"]["text"]
    for changed in ({"recover_tokens": 320}, {"recover_window": 16}):
        again, _ = compare(folder, names[1], **options | changed)
        assert again[-1]["cell"] != recovered["cell"], "another training is another cell"
    assert again[-1]["recovery"]["text"]["tokens"] == 16
