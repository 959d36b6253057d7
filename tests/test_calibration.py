"""Blocks to measure on: the model's own text is reproducible and cached, external text is never
test text.
"""

import pytest
import torch
from families import FAMILIES, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from prunenet.envs.rewards import ReconstructionReward, energy_lost
from prunenet.models.layers import down_linears
from prunenet.models.surgery import masking
from prunenet.policies.training.recipe import Recipe
from prunenet.policies.training.train import train
from prunenet.refit.moments import LayerWalk, ffn_moments
from prunenet.text.calibration import data_blocks, self_blocks
from prunenet.text.corpora import CalibrationText, TestText
from prunenet.text.generate import SamplingOptions, document_start, generate_blocks


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    words = {
        name: i
        for i, name in enumerate([*special, *(f"w{i}" for i in range(63 - len(special))), "[UNK]"])
    }
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", bos_token=special[0] if special else None
    )


def ids(n: int = 6, tokens: int = 10) -> torch.Tensor:
    return torch.randint(3, 64, (n, tokens), generator=torch.Generator().manual_seed(0))


def test_documents_start_with_the_document_separator_even_where_bos_is_a_chat_token():
    assert document_start(tokenizer("<|im_start|>", "<|endoftext|>")) == 1
    assert document_start(tokenizer("<|im_start|>")) == 0
    with pytest.raises(ValueError, match="cannot write text of its own"):
        document_start(tokenizer())


def test_own_text_is_the_same_for_the_same_seed_and_starts_as_documents_do():
    model = tiny_model("llama")
    first = generate_blocks(model, 1, SamplingOptions(sequences=6, tokens=9, batch=4))
    assert torch.equal(
        first, generate_blocks(model, 1, SamplingOptions(sequences=6, tokens=9, batch=4))
    )
    assert not torch.equal(
        first, generate_blocks(model, 1, SamplingOptions(sequences=6, tokens=9, batch=4, seed=1))
    )
    assert first.shape == (5, 9)
    assert (first[:, 0] == 1).all()
    assert not (first[:, 1:] == 1).any()


def test_the_filter_drops_the_sequences_that_the_model_finds_least_likely():
    model = tiny_model("llama")
    everything = generate_blocks(model, 1, SamplingOptions(sequences=10, tokens=9, keep=1.0))
    kept = generate_blocks(model, 1, SamplingOptions(sequences=10, tokens=9, keep=0.5))

    def loss(block: torch.Tensor) -> float:
        # The start token is never sampled, but it keeps its share of the model's probability.
        with torch.no_grad():
            logits = model(block[None]).logits[0, :-1]
        logits[:, 1] = -torch.inf
        return float(torch.nn.functional.cross_entropy(logits, block[1:]))

    losses = sorted(loss(block) for block in everything)
    assert sorted(loss(block) for block in kept) == pytest.approx(losses[:5], rel=1e-4)


def test_own_text_is_written_once_and_damaged_copies_are_replaced(tmp_path, monkeypatch):
    model, words = tiny_model("llama"), tokenizer("<s>")
    first = self_blocks(model, words, sequences=4, tokens=8, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    assert torch.equal(
        self_blocks(model, words, sequences=4, tokens=8, cache=tmp_path).ids, first.ids
    )
    monkeypatch.setattr("prunenet.text.calibration.generate_blocks", None)
    assert torch.equal(
        self_blocks(model, words, sequences=4, tokens=8, cache=tmp_path).ids, first.ids
    )
    monkeypatch.undo()
    self_blocks(tiny_model("llama", seed=1), words, sequences=4, tokens=8, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_external_blocks_refuse_test_text():
    text = " ".join(f"w{i % 60}" for i in range(200))
    blocks = data_blocks(tokenizer("<s>"), CalibrationText("mine", text), count=3, window=16)
    assert blocks.ids.shape == (3, 16)
    assert blocks.regime == "data"
    # the annotation's, under test; the function's own sentence otherwise
    with pytest.raises(TypeError):
        data_blocks(tokenizer("<s>"), TestText("theirs", text))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_walk_measures_what_the_whole_model_computes(family):
    model = tiny_model(family)
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, inputs, i=i: seen.__setitem__(i, inputs[0].reshape(-1, 48))
        )
        for i, linear in enumerate(down_linears(model))
    ]
    with torch.no_grad():
        model(ids())
    for hook in hooks:
        hook.remove()
    for index, moments in enumerate(ffn_moments(model, ids(), batch=4)):
        h = seen[index]
        torch.testing.assert_close(moments.second, h.T @ h / len(h), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(moments.mean, h.mean(0), rtol=1e-3, atol=1e-4)
    assert "forward" not in vars(model.model.layers[0] if family == "llama" else model)


def test_a_layer_is_measured_behind_the_changes_made_before_it():
    model = tiny_model("llama")
    keep = [torch.ones(48, dtype=torch.bool) for _ in range(3)]
    keep[0][:24] = False
    with masking(model, keep):
        expected = [moments.second for moments in ffn_moments(model, ids())]
    walk = LayerWalk(model, ids(), changing=True)
    changed = []
    for index in walk:
        changed.append(walk.moments(index).second)
        if index == 0:
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight[:, :24] = 0
    torch.testing.assert_close(changed[1], expected[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(changed[2], expected[2], rtol=1e-3, atol=1e-4)


def test_the_reconstruction_reward_is_the_energy_of_the_layer_s_output_that_is_kept():
    model = tiny_model("opt")
    reward = ReconstructionReward(model, ids())
    keep = torch.rand(4, 48, generator=torch.Generator().manual_seed(1)) < 0.6
    for index, (linear, moments) in enumerate(
        zip(down_linears(model), ffn_moments(model, ids()), strict=True)
    ):
        weight = linear.weight.detach()
        whole = torch.trace(weight @ moments.second @ weight.T)
        paid = reward.layer(index, keep)["reconstruction"]
        for mask, value in zip(keep, paid, strict=True):
            lost = weight[:, ~mask]
            share = torch.trace(lost @ moments.second[~mask][:, ~mask] @ lost.T) / whole
            assert float(value) == pytest.approx(1 - float(share.clamp(0, 1)), abs=1e-4)
    assert float(reward.layer(0, torch.ones(1, 48, dtype=torch.bool))["reconstruction"]) == 1


def test_losing_nothing_costs_nothing_and_losing_all_costs_all():
    gram = torch.eye(5)
    keep = torch.tensor([[True] * 5, [True] + [False] * 4])
    torch.testing.assert_close(energy_lost(gram, keep), torch.tensor([0.0, 0.8]))


def test_a_policy_trained_on_own_text_says_so_and_is_applied_from_weights_alone(tmp_path):
    model = tiny_model("llama")
    blocks = self_blocks(model, tokenizer("<s>"), sequences=4, tokens=8, cache=tmp_path)
    trained = train(model, Recipe(updates=3, masks=4), blocks=blocks)
    assert trained.policy.config.regime == "self"
    assert trained.policy.config.text["text"] == "self-generated"
    with pytest.raises(ValueError, match="give token blocks"):
        train(model, Recipe(updates=3, masks=4))
