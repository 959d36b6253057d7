"""Whole decoder layers: skipped, cut, saved, and refused where layers depend on one another."""

import copy

import pytest
import torch
from families import FAMILIES, LAYERS, provenance, random_keep, tiny_model, token_ids
from transformers import GPT2Config, GPT2LMHeadModel

from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.save import save_pruned
from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.depth import without_layers
from prunenet.models.hooks import skipping
from prunenet.models.layers import count_parameters, decoder_layers
from prunenet.models.surgery import narrowed

QUICK = ("gemma2", "llama", "opt")
WITHOUT_SECOND = torch.tensor([True, False, True])
WITHOUT_FIRST = torch.tensor([False, True, True])


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize(
    "family",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
@pytest.mark.parametrize("keep", [WITHOUT_SECOND, WITHOUT_FIRST], ids=["second", "first"])
def test_a_model_without_layers_is_a_stock_one_that_computes_as_if_they_were_skipped(family, keep):
    dense = tiny_model(family)
    before = copy.deepcopy(dense.config.to_dict())
    narrow = without_layers(dense, keep)
    with skipping(list(decoder_layers(dense)), keep):
        skipped = logits(dense)
    assert logits(narrow).equal(skipped)
    assert (logits(dense) - skipped).abs().max() > 0.05
    assert type(narrow) is type(dense)
    assert narrow.config.num_hidden_layers == 2
    assert dense.config.to_dict() == before
    gone = decoder_layers(dense)[int((~keep).nonzero())]
    size = sum(parameter.numel() for parameter in gone.parameters())
    assert count_parameters(dense)[0] - count_parameters(narrow)[0] == size
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ids = token_ids(batch=1)
    settings["attention_mask"] = torch.ones_like(ids)
    cached, plain = (narrow.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert cached.equal(plain)


@pytest.mark.parametrize("family", ["gemma2", "smollm3"])
def test_a_checkpoint_without_a_layer_reloads_bit_equal(family, tmp_path):
    dense = tiny_model(family)
    narrow = without_layers(dense, WITHOUT_FIRST)
    keep = random_keep([16, 16])
    cut = narrowed(narrow, keep)
    save_pruned(cut, tmp_path / "out", keep, provenance(narrow, cut))
    again = load_model(tmp_path / "out")
    assert type(again) is type(dense)
    assert logits(again).equal(logits(cut))
    kinds = getattr(dense.config, "layer_types", None)
    assert kinds is None or again.config.layer_types == kinds[1:]


def test_layers_go_from_a_model_of_per_layer_widths_too():
    dense = tiny_model("llama")
    keep = random_keep([16, 40, 8])
    narrow = narrowed(dense, keep)
    shallow = without_layers(narrow, WITHOUT_FIRST)
    other = narrowed(without_layers(dense, WITHOUT_FIRST), keep[1:])
    assert Anatomy.of(shallow).widths == [40, 8]
    assert logits(shallow).equal(logits(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_passes_the_check_of_both_models(dtype):
    without_layers(tiny_model("llama").to(dtype), WITHOUT_SECOND)


def test_layers_that_know_their_number_are_refused():
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
    plain = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    assert without_layers(plain, WITHOUT_FIRST).config.n_layer == 2
    numbered = GPT2LMHeadModel(GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)).eval()
    with pytest.raises(UnsupportedArchitecture, match=r"depend on one another: layer 1 .*scaling"):
        without_layers(numbered, WITHOUT_FIRST)


def test_what_a_schedule_by_number_hides_shows_in_the_logits(monkeypatch):
    model = tiny_model("llama")
    real = type(model.model).forward

    def scheduled(self, *args, **kwargs):
        """The last of three layers writes in another order, by its number."""
        last = self.layers[2] if len(self.layers) > 2 else None
        hook = last and last.register_forward_hook(lambda _m, _a, output: output.flip(-1))
        try:
            return real(self, *args, **kwargs)
        finally:
            if hook is not None:
                hook.remove()

    monkeypatch.setattr(type(model.model), "forward", scheduled)
    with pytest.raises(UnsupportedArchitecture, match="logits without a cache are not those"):
        without_layers(model, WITHOUT_FIRST)


@pytest.mark.parametrize(
    "keep",
    [torch.ones(2, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)],
    ids=["short", "empty"],
)
def test_a_mask_that_does_not_fit_is_one_sentence(keep):
    with pytest.raises(ValueError, match="a mask of layers has 3 booleans here and keeps one"):
        without_layers(tiny_model("llama"), keep)
