"""Each kind of FFN is cut as masked, in memory and from disk, at once and in steps.

One tiny random type stands for each kind: `prunenet.models.twin`, float32, from what ships.
"""

import dataclasses
from functools import cache, partial

import pytest
import torch
from families import provenance
from transformers import CONFIG_MAPPING

from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.streaming import StreamedCheckpoint, save_streamed
from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import architecture_for
from prunenet.models.discovery import check
from prunenet.models.groups import FFN
from prunenet.models.knobs import tied
from prunenet.models.known import class_of
from prunenet.models.layers import iter_ffns
from prunenet.models.masks import top_channels
from prunenet.models.surgery import masking, narrowed
from prunenet.models.twin import logits_of, twin
from prunenet.runtime.files import CheckpointError

KINDS = {
    "gated": "llama",
    "ungated": "starcoder2",
    "fused": "glm4",
    "Conv1D": "gpt2",
    "experts, concat": "qwen3_moe",
    "experts, interleaved, with biases": "gpt_oss",
    "experts, ungated, layers without an FFN": "nemotron_h",
    "experts, transposed": "llama4_text",
    "shared experts": "deepseek_v3",
    "hybrid": "granitemoehybrid",
    "wrapper": "gemma3",
    "a list of widths": "gemma3n_text",
    "a field in a list": "ernie4_5_vl_moe",
}
WRITTEN_TOGETHER = ("a field in a list",)  # experts of text and of images
each_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def tiny(kind):
    """The model of a kind and ids of its text; never changed."""
    model_type = KINDS[kind]
    model, ids = twin(class_of(model_type), CONFIG_MAPPING[model_type])
    return model.float(), ids[:2]


@cache
def scores(kind):
    """Random scores of every channel of a model."""
    generator = torch.Generator().manual_seed(0)
    groups = Anatomy.of(tiny(kind)[0]).groups
    return [torch.rand(group.width, generator=generator) for group in groups]


def masks(kind, ratio):
    """The channels with the highest scores, as many as a ratio leaves."""
    widths = Anatomy.of(tiny(kind)[0]).uniform_widths(ratio, 8)
    return [top_channels(*pair) for pair in zip(scores(kind), widths, strict=True)]


def distance(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


@each_kind
def test_the_narrow_model_computes_what_the_masked_one_computes(kind) -> None:
    (model, ids), keep = tiny(kind), masks(kind, 0.4)
    dense = logits_of(model, ids)
    with masking(model, keep):
        expected = logits_of(model, ids)
    narrow = narrowed(model, keep)
    assert distance(logits_of(narrow, ids), expected) < 1e-5
    assert distance(expected, dense) > 1e-3
    assert Anatomy.of(narrow).widths == [int(mask.sum()) for mask in keep]
    assert torch.equal(logits_of(model, ids), dense)


@each_kind
def test_a_narrow_model_is_read_by_stock_transformers_as_it_was_saved(kind) -> None:
    model, ids = tiny(kind)
    check(model, architecture_for(model.config, type(model)), ids)


@each_kind
def test_ratio_0_is_the_identity(kind) -> None:
    model, ids = tiny(kind)
    keep = masks(kind, 0.0)
    assert all(bool(mask.all()) for mask in keep)
    whole = narrowed(model, keep)
    assert type(whole) is type(model)
    assert same_state(whole, model)
    assert torch.equal(logits_of(whole, ids), logits_of(model, ids))


@each_kind
def test_masks_nest_and_cutting_twice_is_cutting_once(kind) -> None:
    model, _ = tiny(kind)
    wide, slim = masks(kind, 0.2), masks(kind, 0.5)
    assert all(bool((a | ~b).all()) for a, b in zip(wide, slim, strict=True))
    assert sum(map(len, wide)) > sum(int(mask.sum()) for mask in wide)
    inner = [b[a] for a, b in zip(wide, slim, strict=True)]
    twice, once = narrowed(narrowed(model, wide), inner), narrowed(model, slim)
    assert same_state(twice, once)
    assert Anatomy.of(twice).widths == Anatomy.of(once).widths


@each_kind
def test_what_is_streamed_is_what_is_cut_in_memory(kind, tmp_path) -> None:
    (model, _), keep = tiny(kind), masks(kind, 0.4)
    model.save_pretrained(tmp_path / "dense")
    source = StreamedCheckpoint.open(tmp_path / "dense")
    fields = [field.name for field in dataclasses.fields(FFN)]
    for streamed, own in zip(iter_ffns(source), iter_ffns(model), strict=True):
        for name in fields:
            a, b = getattr(streamed, name), getattr(own, name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
    describe = partial(provenance, source.skeleton)
    if kind in WRITTEN_TOGETHER:
        with pytest.raises(CheckpointError, match="cut it in memory"):
            save_streamed(source, tmp_path / "cut", keep, describe)
        assert not (tmp_path / "cut").exists()
        return
    save_streamed(source, tmp_path / "cut", keep, describe)
    assert same_state(load_model(tmp_path / "cut"), narrowed(model, keep))


@each_kind
def test_widths_differ_between_layers_where_a_kind_allows_it(kind) -> None:
    model, ids = tiny(kind)
    anatomy, narrower = Anatomy.of(model), masks(kind, 0.5)
    free = anatomy.architecture.per_layer
    sets = [[group] for group in anatomy.groups] if free else tied(anatomy.groups)
    keep = masks(kind, 0.2)
    for group in (group for some in sets[::2] for group in some):
        keep[group.number] = narrower[group.number]
    narrow = narrowed(model, keep)
    with masking(model, keep):
        assert distance(logits_of(narrow, ids), logits_of(model, ids)) < 1e-5
    assert Anatomy.of(narrow).widths == [int(mask.sum()) for mask in keep]
    assert (type(narrow) is type(model)) != free
    if len(sets[0]) > 1:
        keep[sets[0][0].number] = masks(kind, 0.2)[sets[0][0].number]
        with pytest.raises(ValueError, match="is one number"):
            narrowed(model, keep)
