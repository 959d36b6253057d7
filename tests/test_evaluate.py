"""Perplexity against computation by hand; speed, bytes and the flat result."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from families import FAMILIES, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    StaticCache,
)

from prunenet.evaluation import perplexity as evaluate
from prunenet.evaluation import serving
from prunenet.evaluation import speed as latency
from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.perplexity import perplexity
from prunenet.evaluation.repetition import Repetition
from prunenet.evaluation.result import bytes_on_disk, summarise
from prunenet.evaluation.side_by_side import evaluate as measured
from prunenet.evaluation.speed import (
    Speed,
    SpeedOptions,
    generate_sentence,
    speed,
    speed_side_by_side,
)
from prunenet.models.layers import count_parameters
from prunenet.text.corpora import CalibrationText, TestText, TextError

IDS = torch.randint(3, 64, (45,), generator=torch.Generator().manual_seed(0))
TEXT = TestText("random words", " ".join(f"{i:02d}" for i in IDS.tolist()))


def word_tokenizer(eos: str = "02") -> PreTrainedTokenizerBase:
    """Words "00" to "63" are the ids 0 to 63."""
    words = Tokenizer(models.WordLevel({f"{i:02d}": i for i in range(64)}, unk_token="00"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="01", eos_token=eos)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return word_tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@torch.no_grad()
def losses_by_hand(model: PreTrainedModel, window: int, stride: int) -> list[float]:
    """-log p of every scored token, one token and one forward pass at a time; a token is scored the
    first time it shows.
    """
    losses, scored = [], set()
    for start in range(0, len(IDS) - window + 1, stride):
        for position in range(start + 1, start + window):
            if position not in scored:
                logits = model(input_ids=IDS[None, start:position]).logits[0, -1].double()
                losses.append(float(logits.logsumexp(-1) - logits[IDS[position]]))
                scored.add(position)
    return losses


@pytest.mark.parametrize(("window", "stride"), [(10, None), (10, 4), (7, 1), (45, None)])
def test_perplexity_equals_a_computation_by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, window: int, stride: int | None
) -> None:
    expected = losses_by_hand(model, window, stride or window)
    found = perplexity(model, tokenizer, TEXT, EvaluationOptions(window=window, stride=stride))
    assert found.tokens == len(expected)
    assert found.loss == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert found.value == pytest.approx(math.exp(found.loss))
    assert (found.window, found.stride, found.text) == (window, stride or window, "random words")


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_the_mean_of_transformers_own_losses_for_every_family(
    family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        own = [
            float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in IDS[:40].split(20)
        ]
    assert perplexity(model, tokenizer, TEXT, EvaluationOptions(window=20)).loss == pytest.approx(
        sum(own) / 2, rel=1e-5
    )


def test_batches_and_loss_blocks_do_not_change_the_result(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = perplexity(model, tokenizer, TEXT, EvaluationOptions(window=10, stride=3)).loss
    monkeypatch.setattr(evaluate, "_LOSS_ROWS", 4)
    assert perplexity(
        model, tokenizer, TEXT, EvaluationOptions(window=10, stride=3, batch_size=5)
    ).loss == pytest.approx(once, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    blank = tiny_model("llama", tied=False)
    torch.nn.init.zeros_(blank.get_output_embeddings().weight)
    assert perplexity(blank, tokenizer, TEXT, EvaluationOptions(window=10)).value == pytest.approx(
        64
    )


def test_progress_counts_windows_and_max_windows_stops_early(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    seen: list[tuple[int, int]] = []
    found = perplexity(
        model,
        tokenizer,
        TEXT,
        EvaluationOptions(window=10, max_windows=3, batch_size=2),
        progress=lambda *step: seen.append(step),
    )
    assert seen == [(2, 3), (3, 3)]
    assert found.tokens == 27


def test_only_test_text_is_scored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(TypeError):
        perplexity(
            model, tokenizer, CalibrationText("c", TEXT.content), EvaluationOptions(window=10)
        )  # type: ignore[arg-type]


def test_arguments_out_of_range_are_errors_with_a_remedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(
        TextError, match="random words: the text has 45 tokens, fewer than one window of 50"
    ):
        perplexity(model, tokenizer, TEXT, EvaluationOptions(window=50))
    with pytest.raises(ValueError, match="window is 65 tokens, more than the 64 positions"):
        perplexity(model, tokenizer, TEXT, EvaluationOptions(window=65))
    with pytest.raises(ValueError, match="`max_windows` must be 1 or more, got 0"):
        perplexity(model, tokenizer, TEXT, EvaluationOptions(window=10, max_windows=0))
    with pytest.raises(ValueError, match="`batch` must be 1 or more, got 0"):
        speed(model, SpeedOptions(prompt=4, new_tokens=4, batch=0, repeats=1))
    with pytest.raises(ValueError, match="more than the 64 positions"):
        speed(model, SpeedOptions(prompt=60, new_tokens=8, repeats=1))


def test_damaged_weights_are_an_error_and_not_a_number(tokenizer: PreTrainedTokenizerBase) -> None:
    damaged = tiny_model("llama")
    damaged.get_input_embeddings().weight.data[IDS[3]] = math.nan
    with pytest.raises(ValueError, match="the loss is nan"):
        perplexity(damaged, tokenizer, TEXT, EvaluationOptions(window=10))


def test_evaluation_leaves_the_mode_of_the_model(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model("opt")
    for dropout in (m for m in model.modules() if hasattr(m, "dropout")):
        dropout.dropout = 0.5
    calm = perplexity(model, tokenizer, TEXT, EvaluationOptions(window=10))
    model.train()
    assert perplexity(model, tokenizer, TEXT, EvaluationOptions(window=10)) == calm
    assert model.training


@pytest.mark.parametrize("new_tokens", [1, 2, 5, 8])
def test_the_greedy_continuation_is_the_one_without_a_cache(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: int
) -> None:
    ids = [10, 11, 12]
    for _ in range(new_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.eos_token_id not in ids
    assert generate_sentence(
        model, tokenizer, "10 11 12", new_tokens=new_tokens
    ) == tokenizer.decode(ids, skip_special_tokens=True)


def test_generation_stops_at_the_end_of_sequence_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    free = generate_sentence(model, tokenizer, "10 11 12", new_tokens=6).split()
    assert free[4] not in free[:4]
    assert (
        generate_sentence(model, word_tokenizer(eos=free[4]), "10 11 12", new_tokens=6).split()
        == free[:4]
    )


def test_speed_is_the_median_and_repeats_go_round_all_models(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_model("llama", seed=1)
    order: list[str] = []
    # (prefill, decode) seconds: the first round is the warm-up.
    clock = {
        "a": iter([(9.0, 9.0), (1.0, 1.0), (2.0, 4.0), (4.0, 2.0)]),
        "b": iter([(9.0, 9.0)] + [(1.0, 2.0)] * 3),
    }

    def pretend(measured: PreTrainedModel, *_: int) -> tuple[float, float]:
        order.append("a" if measured is model else "b")
        return next(clock[order[-1]])

    monkeypatch.setattr(latency, "_time_once", pretend)
    found = speed_side_by_side(
        {"a": model, "b": other}, SpeedOptions(prompt=16, new_tokens=4, batch=2, repeats=3)
    )
    assert order == ["a", "b"] * 4
    assert replace(found["a"], forward_bytes=None) == Speed(
        prefill=16.0,
        decode=4.0,
        prefill_spread=1.5,
        decode_spread=1.5,
        prompt=16,
        new_tokens=4,
        batch=2,
        repeats=3,
    )
    assert (found["b"].prefill, found["b"].decode, found["b"].prefill_spread) == (32.0, 4.0, 0.0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts peaks anew")
def test_memory_is_the_weights_and_the_most_that_a_forward_adds(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(*_: object) -> tuple[float, float]:
        torch.ones(25_000_000).sum()  # 10^8 bytes, gone when the clock is read
        return 1.0, 1.0

    monkeypatch.setattr(latency, "_time_once", pretend)
    found = speed(model, SpeedOptions(prompt=4, new_tokens=4, repeats=1))
    assert found.forward_bytes is not None
    assert 0.9e8 < found.forward_bytes < 1.5e8
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert summarise(model, speed=found).peak_bytes == weights + found.forward_bytes
    assert summarise(model).peak_bytes is None


def test_what_serves_is_missing_or_cannot_is_said_before_anything_is_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"llama.cpp, which is not installed: pip install 'prun"):
        measured("nowhere", serve="f32")
    monkeypatch.setattr(serving, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="one sequence at a time, uncompiled; got a `batch` of 2"):
        measured("nowhere", serve="f32", speed=SpeedOptions(batch=2))


class Made(NamedTuple):
    path: Path
    bytes: int


def test_speeds_of_llama_cpp_are_medians_of_rounds_over_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    rounds: list[str] = []
    clock = {"a": iter([9.0, 1.0, 2.0, 4.0]), "b": iter([9.0, 1.0, 1.0, 1.0])}

    class Pretended:
        def __init__(self, name: str) -> None:
            self.name = name

        def seconds(self, prompt: int, new_tokens: int) -> tuple[float, float]:
            rounds.append(self.name)
            return (found := next(clock[self.name])), 2 * found

    monkeypatch.setattr(serving, "find_spec", lambda name: name)
    monkeypatch.setattr(serving, "export_gguf", lambda source, out, kind: Made(Path(source), 7))
    monkeypatch.setattr(serving, "serving", lambda path, context: nullcontext(Pretended(path.name)))
    found = serving.serve_side_by_side(["a", "b"], "q8_0", SpeedOptions(prompt=16, new_tokens=4))
    assert rounds == ["a", "b"] * 4
    assert found["a"] == serving.Served("q8_0", 7, 8.0, 1.0, 1.5, 1.5)
    assert (found["b"].prefill_tokens_per_second, found["b"].prefill_spread) == (16.0, 0.0)


def test_the_cache_of_a_token_is_a_key_and_a_value_of_every_group_of_heads() -> None:
    # 3 layers, 2 groups of 8 numbers, float32
    assert summarise(tiny_model("llama")).kv_bytes_per_token == 3 * 2 * (8 + 8) * 4
    assert summarise(tiny_model("opt")).kv_bytes_per_token is None


def test_speed_is_measured_until_it_is_steady_but_no_longer_than_asked(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = iter([9.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])

    def pretend(*_: object) -> tuple[float, float]:
        value = next(calm)
        return value, value

    monkeypatch.setattr(latency, "_time_once", pretend)
    found = speed_side_by_side(
        {"a": model}, SpeedOptions(prompt=4, new_tokens=2, repeats=2, most=20)
    )["a"]
    assert 4 <= found.repeats <= 8
    swings = iter([1.0, 2.0] * 10)
    monkeypatch.setattr(latency, "_time_once", lambda *_: (next(swings), 1.0))
    options = SpeedOptions(prompt=4, new_tokens=2, repeats=2, most=5)
    assert speed_side_by_side({"a": model}, options)["a"].repeats == 5
    with pytest.raises(ValueError, match="`most` must be 3 or more, got 2"):
        SpeedOptions(most=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_speed_can_be_measured_for_every_family(family: str) -> None:
    found = speed(tiny_model(family), SpeedOptions(prompt=6, new_tokens=3, batch=2, repeats=1))
    assert found.prefill > 0
    assert found.decode > 0


def test_decoding_reads_one_token_per_step_after_one_prefill(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        speed(model, SpeedOptions(prompt=9, new_tokens=4, repeats=1))
    finally:
        handle.remove()
    assert widths == [9, 1, 1, 1, 1] * 2


def test_compiled_code_is_timed_with_a_cache_of_fixed_size_and_writes_the_same_tokens(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, caches = [], []

    def pretend(given: PreTrainedModel, **_: object):
        made.append(given)

        def call(**kwargs):
            caches.append(kwargs["past_key_values"])
            return given(**kwargs)

        return call

    monkeypatch.setattr(torch, "compile", pretend)
    found = speed_side_by_side(
        {"a": model}, SpeedOptions(prompt=5, new_tokens=3, repeats=1, compiled=True)
    )
    assert found["a"].compiled
    assert made == [model]
    assert len(caches) == 2 * (1 + 3)
    assert {type(cache) for cache in caches} == {StaticCache}
    assert len({id(cache) for cache in caches}) == 2  # one a measurement
    plain, fixed = (
        _written(model, cache)
        for cache in (None, StaticCache(config=model.config, max_cache_len=8))
    )
    assert plain == fixed


def _written(model: PreTrainedModel, cache: object) -> list[int]:
    token, written = torch.tensor([[1, 2, 3, 4, 5]]), []
    for _ in range(3):
        cache, token = latency._step(model, token, cache, model)
        written.append(int(token))
    return written


def test_a_machine_without_a_compiler_is_one_sentence(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda _model, **_: fails)
    with pytest.raises(
        ValueError,
        match=r"torch.compile failed \(no compiler\); .* measure code that is not compiled",
    ):
        speed_side_by_side(
            {"a": model}, SpeedOptions(prompt=5, new_tokens=3, repeats=1, compiled=True)
        )


@pytest.mark.slow
# of torch's own compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_models_of_one_class_are_compiled_one_after_the_other(model: PreTrainedModel) -> None:
    found = speed_side_by_side(
        {"a": model, "b": tiny_model("llama")},
        SpeedOptions(prompt=6, new_tokens=3, repeats=1, compiled=True),
    )
    assert min(found["a"].decode, found["b"].decode) > 0


def test_a_result_is_flat_json_with_everything_measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    quality, pace = (
        perplexity(model, tokenizer, TEXT, EvaluationOptions(window=10)),
        speed(model, SpeedOptions(prompt=4, new_tokens=2, repeats=1)),
    )
    model.save_pretrained(tmp_path)
    (tmp_path / "prunenet_masks.safetensors").write_bytes(b"masks")
    result = summarise(
        model,
        perplexity=quality,
        speed=pace,
        repetition=Repetition(distinct_4=0.5, repetition_rate=0.25),
        folder=tmp_path,
    )
    line = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert line["perplexity"] == quality.value
    assert line["decode_tokens_per_second"] == pace.decode
    assert (line["distinct_4"], line["repetition_rate"]) == (0.5, 0.25)
    assert (
        line["bytes"] == (tmp_path / "model.safetensors").stat().st_size == bytes_on_disk(tmp_path)
    )
    assert (line["parameters"], line["non_embedding_parameters"]) == count_parameters(model)
    assert (line["window"], line["prompt"], line["dtype"], line["device"]) == (
        10,
        4,
        "float32",
        "cpu",
    )
    served = {name for name in line if name.startswith("served_")}  # not asked for
    assert {name for name, value in line.items() if value is None} == served


def test_without_a_folder_bytes_are_those_in_memory_and_what_is_not_measured_is_none(
    model: PreTrainedModel,
) -> None:
    result = summarise(model)
    assert result.bytes == 4 * result.parameters
    assert result.perplexity is None
    assert result.decode_tokens_per_second is None


def test_an_infinite_perplexity_is_still_json(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    wild = tiny_model("llama", tied=False)
    wild.get_output_embeddings().weight.data.mul_(1e5)
    quality = perplexity(wild, tokenizer, TEXT, EvaluationOptions(window=10))
    assert quality.value == math.inf
    assert (
        json.loads(json.dumps(summarise(wild, perplexity=quality).as_dict(), allow_nan=False))[
            "perplexity"
        ]
        is None
    )


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        bytes_on_disk(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_count_tied_tables_once_and_embeddings_apart(tied: bool) -> None:
    model = tiny_model("llama", tied=tied)
    total, rest = count_parameters(model)
    table = model.get_input_embeddings().weight.numel()
    assert total - rest == (table if tied else 2 * table)
    assert (
        rest
        == sum(p.numel() for p in model.model.layers.parameters()) + model.model.norm.weight.numel()
    )
