"""Windows begin with the BOS token where the model's own tokenizer begins a text with it: scored
text, calibration text, rewards and prompts; other models see what they saw.
"""

import copy
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from prunenet.cli.app import app
from prunenet.compare.plan import key_of
from prunenet.envs.divergence import DivergenceReward
from prunenet.evaluation.divergence import divergence
from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.perplexity import perplexity
from prunenet.evaluation.side_by_side import evaluate
from prunenet.evaluation.zeroshot import zero_shot
from prunenet.models.layers import ffn_widths
from prunenet.models.surgery import masking
from prunenet.policies.apply import prune
from prunenet.policies.methods import Evidence
from prunenet.policies.methods.papers.adapruner import AdaPrunerOptions, searched
from prunenet.policies.methods.papers.calibration_pool import CalibrationPool
from prunenet.policies.training.recipe import PRESETS
from prunenet.policies.training.train import _reward
from prunenet.recover.options import Tuning
from prunenet.recover.training import tuned
from prunenet.refit.cut import Cut
from prunenet.refit.folds import folds_of
from prunenet.text import calibration
from prunenet.text.calibration import (
    PREFIX_SAMPLING,
    CalibrationOptions,
    CalibrationSet,
    calibration_for,
    data_blocks,
    prefix_blocks,
    self_blocks,
    token_blocks,
)
from prunenet.text.corpora import CalibrationText, TestText
from prunenet.text.generate import document_start
from prunenet.text.windows import bos_token, token_windows, tokenise

BOS, FIRST, LAST = 1, 2, 31  # ids; words "w2" to "w31" are the ids 2 to 31
WINDOW = EvaluationOptions(window=16)


def with_bos(tokenizer: PreTrainedTokenizerFast, bos: str = "<s>") -> PreTrainedTokenizerFast:
    """The tokenizer, which now begins a text with BOS, as Llama's and Gemma's do."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def words(bos: str = "<s>") -> PreTrainedTokenizerFast:
    known = {"[UNK]": 0, bos: BOS} | {f"w{i}": i for i in range(FIRST, LAST + 1)}
    core = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token=bos)


def counting(start: int, tokens: int) -> str:
    """Words in the one order that the model below knows, round and round."""
    return " ".join(f"w{FIRST + (start + i) % (LAST + 1 - FIRST)}" for i in range(tokens))


@torch.no_grad()
def sink_model() -> LlamaForCausalLM:
    """A model that predicts the next word of `counting`, and whose attention rests on BOS.

    Every position attends to BOS, whose value is zero, so that attention adds nothing. Without BOS
    it spreads over the words before, whose values speak for wrong words.
    """
    size = 32
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64,
        rope_theta=1e12, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.zero_() if parameter.dim() > 1 else parameter.fill_(1)
    model.model.embed_tokens.weight.copy_(torch.eye(size))
    attention, ids = model.model.layers[0].self_attn, torch.arange(FIRST, LAST + 1)
    slow = size // 2 - 1  # the pair of dimensions that positions hardly turn
    attention.q_proj.weight[slow, :] = 1.0
    attention.k_proj.weight[slow, BOS] = 10.0
    attention.v_proj.weight[(ids - FIRST + 11) % len(ids) + FIRST, ids] = 3.0
    attention.o_proj.weight.copy_(torch.eye(size))
    model.lm_head.weight[(ids - FIRST + 1) % len(ids) + FIRST, ids] = 2.0
    # What the FFN does is small; there is something to prune.
    for linear in model.model.layers[0].mlp.children():
        if isinstance(linear, torch.nn.Linear):
            linear.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return sink_model()


TEXT = TestText("counting", counting(0, 300))
OTHER = CalibrationText("other", counting(7, 400))


@torch.no_grad()
def test_a_model_whose_attention_rests_on_bos_is_scored_behind_it(model) -> None:
    tokenizer = with_bos(words())
    found = perplexity(model, tokenizer, TEXT, WINDOW)
    without = perplexity(model, tokenizer, TEXT, replace(WINDOW, bos="no"))
    losses = []
    for part in tokenise(tokenizer, TEXT)[: 300 // 16 * 16].split(16):
        read = torch.cat((torch.tensor([BOS]), part))
        logits = model(read[None]).logits[0, 1:-1].double()  # BOS and what it predicts: not scored
        losses.append(torch.nn.functional.cross_entropy(logits, part[1:], reduction="none"))
    assert found.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert found.value < 1.5 < 3 < without.value
    assert found.tokens == without.tokens == len(torch.cat(losses))
    assert (found.bos, without.bos) == (True, False)
    assert (found.window, found.stride) == (16, 16)


def test_a_model_whose_tokenizer_adds_none_is_scored_as_it_was(model) -> None:
    plain, adding = words(), with_bos(words())
    auto = perplexity(model, plain, TEXT, WINDOW)
    assert auto == perplexity(model, adding, TEXT, replace(WINDOW, bos="no"))
    assert not auto.bos
    asked = perplexity(model, plain, TEXT, replace(WINDOW, bos="yes"))
    assert asked == perplexity(model, adding, TEXT, WINDOW)
    assert asked.value < auto.value


@pytest.mark.parametrize("stride", [None, 5, 1])
def test_the_same_tokens_are_scored_with_and_without_bos(stride) -> None:
    ids = torch.arange(100, 170)
    plain = list(token_windows(ids, 12, stride))
    behind = list(token_windows(ids, 12, stride, bos=7))
    assert len(plain) == len(behind)
    for (part, scored), (longer, same) in zip(plain, behind, strict=True):
        assert longer.tolist() == [7, *part.tolist()]
        assert scored == same < len(part)


def test_which_token_begins_a_window_follows_the_tokenizer_or_the_choice() -> None:
    assert [bos_token(words(), bos) for bos in ("auto", "yes", "no")] == [None, BOS, None]
    assert [bos_token(with_bos(words()), bos) for bos in ("auto", "yes", "no")] == [BOS, BOS, None]
    none = words()
    none.bos_token = None
    assert bos_token(none) is None
    with pytest.raises(ValueError, match="has no BOS token for windows to begin with"):
        bos_token(none, "yes")


def test_an_unknown_choice_is_refused_before_anything_is_read(unchecked) -> None:
    with pytest.raises(ValueError, match="`bos` must be one of auto, yes, no, got 'maybe'"):
        EvaluationOptions(bos="maybe")  # type: ignore[arg-type]


def test_a_window_leaves_a_position_for_its_bos_token(model) -> None:
    fits = perplexity(model, with_bos(words()), TEXT, EvaluationOptions(window=63))
    assert fits.tokens == 4 * 62
    with pytest.raises(
        ValueError, match="window with its BOS token is 65 tokens, more than the 64"
    ):
        perplexity(model, with_bos(words()), TEXT, EvaluationOptions(window=64))
    assert perplexity(model, words(), TEXT, EvaluationOptions(window=64)).tokens == 4 * 63


# --- calibration ---


def test_calibration_windows_are_the_same_text_behind_bos(model) -> None:
    plain = data_blocks(words(), OTHER, count=5, window=16)
    behind = data_blocks(with_bos(words()), OTHER, count=5, window=16)
    assert torch.equal(behind.ids[:, 1:], plain.ids)
    assert (behind.ids[:, 0] == BOS).all()
    assert (plain.bos, behind.bos) == (None, BOS)
    assert (plain.source["bos"], behind.source["bos"]) == (False, True)
    assert torch.equal(
        data_blocks(with_bos(words()), OTHER, count=5, window=16, bos="no").ids, plain.ids
    )
    chance = token_blocks(model, count=3, window=9, tokenizer=with_bos(words()))
    assert torch.equal(chance.ids[:, 1:], token_blocks(model, count=3, window=9).ids)
    assert (chance.ids[:, 0] == BOS).all()


def test_what_is_measured_for_calibration_is_what_the_model_computes_behind_bos(model) -> None:
    """Attention adds nothing behind BOS, so the FFN reads the word alone, as in perplexity."""

    def energies(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
        blocks = data_blocks(tokenizer, OTHER, count=12, window=30)
        return Evidence(model, blocks).energies[0].energy.double()

    seen: list[torch.Tensor] = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2).double())
    )
    perplexity(model, with_bos(words()), TEXT, EvaluationOptions(window=30))
    hook.remove()
    scored = torch.cat(seen).square().mean(0)
    off = [
        float((found / found.sum() - scored / scored.sum()).abs().sum())
        for found in (energies(with_bos(words())), energies(words()))
    ]
    assert off[0] < 0.01 < 0.1 < off[1]


def test_text_that_a_model_writes_begins_with_its_tokenizer_s_bos_whatever_that_is_called() -> None:
    unusual = with_bos(words("<|start|>"), "<|start|>")
    unusual.add_special_tokens({"additional_special_tokens": ["<s>"]})
    assert document_start(unusual) == BOS
    chat = words("<|im_start|>")
    chat.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert (document_start(chat), document_start(chat, "yes")) == (LAST + 1, BOS)


def test_self_written_text_knows_its_bos_token_and_can_leave_it_out(model, tmp_path) -> None:
    def written(tokenizer, bos="auto"):
        return self_blocks(model, tokenizer, sequences=6, tokens=10, bos=bos, cache=tmp_path)

    plain, begun, bare = written(words()), written(with_bos(words())), written(words(), "no")
    assert len(list(tmp_path.iterdir())) == 1  # all three read the same text
    assert torch.equal(plain.ids, begun.ids)
    assert (plain.ids[:, 0] == BOS).all()
    assert torch.equal(bare.ids, plain.ids[:, 1:])
    assert (plain.bos, begun.bos, bare.bos) == (None, BOS, None)
    short = replace(PREFIX_SAMPLING, sequences=5, tokens=10)
    behind = prefix_blocks(model, with_bos(words()), OTHER, short, prefix=3, cache=tmp_path)
    assert (behind.bos, behind.ids.shape) == (BOS, (4, 10))
    assert (behind.ids[:, 0] == BOS).all()
    assert not (behind.ids[:, 1:] == BOS).any()


def test_a_short_model_s_calibration_windows_leave_a_position_for_bos(model, tmp_path) -> None:
    (tmp_path / "text.txt").write_text(counting(0, 3000))
    asked = (model, with_bos(words()), "data", str(tmp_path / "text.txt"))
    found = calibration_for(*asked, CalibrationOptions(tokens=256))
    assert found.ids.shape == (4, 64)
    assert found.source["window"] == 63
    bare = calibration_for(*asked, CalibrationOptions(tokens=256, bos="no"))
    assert bare.ids.shape == (4, 64)
    assert bare.source["window"] == 64
    with pytest.raises(ValueError, match="`tokens` must be at least 126, 2 blocks of 63, got 100"):
        calibration_for(*asked, CalibrationOptions(tokens=100))


def test_shorter_windows_of_a_calibration_set_begin_with_bos_too(model) -> None:
    behind = data_blocks(with_bos(words()), OTHER, count=5, window=16)
    plain = data_blocks(words(), OTHER, count=5, window=16)
    drawn = Evidence(model, replace(behind, ids=behind.ids))._sequences
    assert drawn.shape == (10, 17)
    assert torch.equal(drawn[:, 1:], Evidence(model, plain)._sequences)
    assert (drawn[:, 0] == BOS).all()


def test_a_pool_s_windows_are_the_same_text_behind_bos(model) -> None:
    def pool(tokenizer: PreTrainedTokenizerFast) -> CalibrationPool:
        blocks = data_blocks(tokenizer, OTHER, count=5, window=16)
        seeded = torch.Generator().manual_seed(0)
        return CalibrationPool.of(model, blocks.ids, seeded, tokens=8, clusters=2, bos=blocks.bos)

    plain, behind = pool(words()), pool(with_bos(words()))
    assert behind.windows.shape == (8, 9)
    assert torch.equal(behind.windows[:, 1:], plain.windows)
    assert (behind.windows[:, 0] == BOS).all()


def test_adapruner_draws_and_judges_behind_bos_and_does_not_score_it(model, monkeypatch) -> None:
    read: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda _, given, named: read.append(named["input_ids"]), with_kwargs=True
    )
    options = AdaPrunerOptions(trials=1, sequences=2, tokens=8, clusters=2, widths=lambda _: [4])
    blocks = data_blocks(with_bos(words()), OTHER, count=5, window=16)
    found = searched(Evidence(model, blocks), ratio=0.5, options=replace(options, round_to=4))
    hook.remove()
    assert all((ids[:, 0] == BOS).all() for ids in read)
    with torch.no_grad(), masking(model, found.keep):
        logs = model(blocks.ids[-1:]).logits.log_softmax(-1)
    scored = logs[0, 1:-1].gather(1, blocks.ids[-1, 2:, None])
    assert found.best.value == pytest.approx(-float(scored.mean()), rel=1e-5)


def test_recovery_learns_nothing_of_the_token_behind_bos(model) -> None:
    blocks = data_blocks(with_bos(words()), OTHER, count=5, window=8)
    dense = copy.deepcopy(model)
    dense.lm_head.weight.data[:, 0] += 1.0
    for teacher in (None, dense):
        found = tuned(model, blocks, Tuning(steps=1, batch=1, micro_batch=1), teacher=teacher)
        held = blocks.ids[-1:]
        with torch.no_grad():
            own = model(held).logits[0, 1:].log_softmax(-1)
            if teacher is None:
                expected = -own[:-1].gather(1, held[0, 2:, None]).mean()
            else:
                wanted = teacher(held).logits[0, 1:].log_softmax(-1)
                expected = (wanted.exp() * (wanted - own)).sum(-1).mean()
        assert found.before == pytest.approx(float(expected), rel=1e-4)


# --- divergence and rewards ---


def test_the_divergence_and_its_reward_leave_the_bos_position_out(model) -> None:
    blocks = data_blocks(with_bos(words()), OTHER, count=5, window=12)
    keep = [torch.arange(width) % 2 == 0 for width in ffn_widths(model)]
    with torch.no_grad():
        dense = model(blocks.ids).logits.log_softmax(-1)
        with masking(model, keep):
            cut = model(blocks.ids).logits.log_softmax(-1)
    expected = (dense.exp() * (dense - cut)).sum(-1)[:, 1:].mean()
    down = Cut(keep, None).down
    assert divergence(model, down, blocks.ids, unscored=1) == pytest.approx(
        float(expected), rel=1e-3
    )
    reward = _reward(model, replace(PRESETS["widths"], blocks=5, tokens=13), blocks)
    assert isinstance(reward, DivergenceReward)
    paid = reward.sweep([mask[None] for mask in keep])["divergence"]
    assert float(paid) == pytest.approx(math.exp(-float(expected)), rel=1e-5)
    with pytest.raises(ValueError, match=r"`unscored` must be in \[0, 13\)"):
        divergence(model, down, blocks.ids, unscored=13)


# --- kinds of writing ---


def test_folds_are_the_kinds_of_writing_in_whatever_order(model, tmp_path) -> None:
    blocks = self_blocks(model, words(), sequences=10, tokens=6, cache=tmp_path)
    assert blocks.kinds.tolist() == [0, 1] * 4
    for found, every in zip(folds_of(blocks.ids, blocks.kinds), (0, 1), strict=True):
        assert torch.equal(found, blocks.ids[every::2])
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    shuffled = replace(blocks, ids=blocks.ids[order], kinds=blocks.kinds[order])
    for found, same in zip(
        folds_of(shuffled.ids, shuffled.kinds), folds_of(blocks.ids, blocks.kinds), strict=True
    ):
        assert torch.equal(found, same)
    half = shuffled.rows(slice(4, None))
    assert half.kinds.tolist() == [1, 1, 1, 1]
    for kinds in (None, half.kinds):
        assert [len(fold) for fold in folds_of(half.ids, kinds)] == [2, 2]
    one = data_blocks(words(), OTHER, count=4, window=8)
    assert one.kinds is None
    assert CalibrationSet(one.ids, "data", {}).rows(slice(1)).ids.shape == (1, 8)


@pytest.mark.parametrize("refit", ["layerwise", "sequential"])
def test_a_refit_chooses_its_damping_across_kinds_in_whatever_order(model, tmp_path, refit) -> None:
    blocks = self_blocks(model, words(), sequences=10, tokens=6, cache=tmp_path)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    shuffled = replace(blocks, ids=blocks.ids[order], kinds=blocks.kinds[order])
    found = [
        prune(model, ratio=0.5, round_to=4, refit=refit, blocks=rows).model.state_dict()
        for rows in (blocks, shuffled, replace(shuffled, kinds=None))
    ]
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(found[0][name], found[1][name])
    assert not torch.equal(found[0][name], found[2][name])


# --- side by side, compare, zero-shot ---


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.long
def test_models_side_by_side_share_the_tokens_of_one_text(model, tmp_path, monkeypatch) -> None:
    folders = [saved(model, with_bos(words()), tmp_path / name) for name in "ab"]
    folders.append(saved(model, words(), tmp_path / "c"))
    seen = []
    real = PreTrainedTokenizerFast.__call__

    def called(self, text, **rest):
        seen.append(len(text))
        return real(self, text, **rest)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", called)
    rows = evaluate(folders, TEXT, WINDOW, speed=None)
    # shorter ones are probes: "x" for BOS, "a b" for whether a tokenizer works
    assert [length for length in seen if length > 3] == [len(TEXT.content)] * 2
    assert [row.bos for row in rows] == [True, True, False]
    assert rows[0].perplexity == rows[1].perplexity < rows[2].perplexity
    line = json.loads(json.dumps(rows[0].as_dict()))
    assert list(line)[:3] == ["name", "folder", "ratio"]
    assert (line["name"], line["bos"], line["ratio"]) == ("a", True, 0.0)


def run(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.long
def test_the_command_line_scores_and_calibrates_behind_bos_and_says_so(
    model, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path / "cache"))
    folder = saved(model, with_bos(words()), tmp_path / "model")
    rows = [{"story": counting(0, 300)}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "other.json").write_text(json.dumps([{"story": OTHER.content}]))
    scored = ("--text", tmp_path / "test.json", "--text-column", "story", "--window", 16)
    ask = ("eval", folder, *scored, "--no-speed")
    found = {bos: run(*ask, "--bos", bos)["models"][0] for bos in ("auto", "yes", "no")}
    assert found["auto"] == found["yes"]
    assert found["auto"]["perplexity"] < 1.5 < 3 < found["no"]["perplexity"]
    shown = CliRunner().invoke(app, [*map(str, ask)]).stdout
    assert "windows of 16 behind BOS" in " ".join(shown.split())
    lines = {}
    for bos in ("auto", "no"):
        lines[bos] = run(
            "compare", folder, f"flap@{tmp_path / 'other.json'}", *scored, "--bos", bos,
            "--ratios", 0.5, "--round", 4, "--calibration-tokens", 64, "--calibration-window", 16,
            "--out", tmp_path / f"{bos}.jsonl",
        )["cells"]  # fmt: skip
    for bos, begins in (("auto", True), ("no", False)):
        dense, flap = lines[bos]
        assert dense["perplexity"][0]["value"] == pytest.approx(found[bos]["perplexity"], rel=1e-6)
        assert [line["perplexity"][0]["bos"] for line in (dense, flap)] == [begins, begins]
        assert dense["evaluation"]["bos"] == flap["calibration"]["bos"] == begins
        assert flap["calibration"]["tokens_read"] == 4 * (16 + begins)
    assert lines["auto"][0]["cell"] != lines["no"][0]["cell"]


def test_cells_of_models_without_bos_keep_the_keys_that_they_had() -> None:
    facts = {"method": "dense", "moments": None, "evaluation": {"texts": [], "window": 8}}
    keys = [
        key_of(facts | {"evaluation": facts["evaluation"] | {"bos": bos}}) for bos in (False, True)
    ]
    assert keys[0] == "f1768a343b7bb3ad"  # as before there was BOS
    assert keys[0] != keys[1]


def letters() -> PreTrainedTokenizerFast:
    known = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:'?\n"
    core = Tokenizer(
        models.WordLevel(
            {c: i for i, c in enumerate(known)} | {"<s>": 61, "</s>": 62, "¿": 63}, unk_token="¿"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="¿", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_prompts_begin_with_bos_where_lm_eval_s_do(tmp_path, monkeypatch) -> None:
    rows = [
        {"goal": goal, "sol1": "a saw", "sol2": "eat it", "label": 1}
        for goal in ("cut a tree", "sit", "rest")
    ]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_model("llama")
    read: list[list[int]] = []

    def watched(_model, questions, *_rest):
        read.extend(tokens for question in questions for tokens in question.inputs)
        return [[(0.0, False)] * len(question.inputs) for question in questions]

    monkeypatch.setattr("prunenet.evaluation.zeroshot.answer_all", watched)

    def prompts(tokenizer, bos):
        read.clear()
        (found,) = zero_shot(model, tokenizer, tmp_path, bos=bos)
        return found.bos, [list(tokens) for tokens in read]

    from lm_eval.models.huggingface import HFLM

    for tokenizer in (letters(), with_bos(letters())):
        theirs = HFLM(pretrained=model, tokenizer=tokenizer)
        first = theirs.tok_encode("Question: cut a tree\nAnswer:")
        assert prompts(tokenizer, "auto")[1][0][: len(first)] == first
    plain, begun = letters(), with_bos(letters())
    bare = prompts(plain, "auto")
    assert bare == prompts(plain, "no") == prompts(begun, "no")
    behind = prompts(begun, "auto")
    assert behind == prompts(begun, "yes") == prompts(plain, "yes")
    assert (bare[0], behind[0]) == (False, True)
    assert behind[1] == [[61, *tokens] for tokens in bare[1]]


def test_every_process_is_given_bos_and_kinds(model, tmp_path) -> None:
    made = self_blocks(model, with_bos(words()), sequences=4, tokens=6, cache=tmp_path)
    given = calibration.blocks_from(0, lambda: made)
    assert torch.equal(given.ids, made.ids)
    assert torch.equal(given.kinds, made.kinds)
    assert (given.bos, given.regime, given.source) == (BOS, "self", made.source)
