"""A sorted model computes the same, and its prefixes are the models that are cut."""

import re

import pytest
import torch
from families import FAMILIES, tiny_model, token_ids
from test_policy import some_policy
from transformers import AutoModelForCausalLM

from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.records import load_provenance
from prunenet.features.from_activations import MOMENT_STATISTICS
from prunenet.models.anatomy import Anatomy
from prunenet.policies.apply import prune
from prunenet.policies.order import ORDER, order_of, ordered, save_ordered
from prunenet.runtime.own_files import unpacked


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_prefixes_of_the_sorted_model_are_the_cut_models(model_type) -> None:
    model, policy = tiny_model(model_type, bias=True), some_policy()
    order = order_of(model, policy)
    sorted_model = Anatomy.of(ordered(model, order))
    for ratio in (0.2, 0.5, 0.7):
        cut = Anatomy.of(prune(model, policy, ratio=ratio, widths="uniform").model)
        for whole, narrow, channels in zip(sorted_model.groups, cut.groups, order, strict=True):
            first = channels[: narrow.width].argsort()  # by their numbers in the dense model
            for mine, theirs in zip(whole.slices, narrow.slices, strict=True):
                index = mine.entries(first, whole.width)
                assert mine.tensor.index_select(mine.axis, index).equal(theirs.tensor)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_the_sorted_model_computes_the_same(model_type) -> None:
    model = tiny_model(model_type, bias=True)
    before = model(token_ids()).logits
    after = ordered(model, order_of(model, some_policy()))(token_ids()).logits
    assert torch.allclose(before, after, atol=1e-5)
    assert model(token_ids()).logits.equal(before)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "opt"])
@torch.no_grad()
def test_the_snippet_of_the_card_slices_a_model_that_any_loader_reads(
    tmp_path, model_type, monkeypatch
) -> None:
    model, policy = tiny_model(model_type, bias=True), some_policy()
    folder = save_ordered(model, tmp_path / "sorted", policy)
    code = re.search(r"```python\n(import torch.*?)```", (folder / "README.md").read_text(), re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    exec(code[1].replace("path/to/this/folder", str(folder)), {})
    sliced = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    cut = prune(model, policy, ratio=0.5, widths="uniform").model
    assert torch.allclose(sliced(token_ids()).logits, cut(token_ids()).logits, atol=1e-5)


def test_the_folder_says_the_order_and_holds_as_many_parameters(tmp_path) -> None:
    model, policy = tiny_model("llama"), some_policy()
    folder = save_ordered(model, tmp_path / "sorted", policy)
    rows, _ = unpacked(folder / ORDER, hashed=True)
    expected = order_of(model, policy)
    assert all(rows[f"layers.{i}.order"].long().equal(row) for i, row in enumerate(expected))
    made = load_provenance(folder)
    assert (made.ratio, made.how["widths"]) == (0.0, "ordered")
    assert made.parameters_after == made.parameters_before
    assert load_model(folder).config.intermediate_size == model.config.intermediate_size


def test_a_policy_that_reads_activations_is_refused() -> None:
    with pytest.raises(ValueError, match="scores channels by their activations"):
        order_of(tiny_model("llama"), some_policy(moments=MOMENT_STATISTICS))
