import copy
from types import ModuleType

import pytest
import torch
from families import D_FF, FAMILIES, LAYERS, random_keep, tiny_model, token_ids, variants

from prunenet.models import modeling
from prunenet.models.architectures import ARCHITECTURES
from prunenet.models.layers import (
    count_parameters,
    decoder_layers,
    down_linears,
    ffn_widths,
    iter_ffns,
)
from prunenet.models.surgery import masking, narrowed, zero_padded

WIDTHS = {"uniform": [32] * LAYERS, "per-layer": [16, 40, 1]}

each_variant = pytest.mark.parametrize(("model_type", "bias", "tied"), variants())
each_widths = pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def same_state(first, second) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


@each_variant
@each_widths
def test_the_narrow_model_computes_what_the_masked_dense_model_computes(
    model_type, bias, tied, widths
) -> None:
    dense = tiny_model(model_type, bias=bias, tied=tied)
    keep = random_keep(widths)
    narrow = narrowed(dense, keep)
    with masking(dense, keep):
        masked = logits(dense)
    torch.testing.assert_close(logits(narrow), masked, atol=2e-5, rtol=0)
    assert (masked - logits(dense)).abs().max() > 0.1, (
        "the cut must matter, or the comparison says nothing"
    )


@pytest.mark.parametrize("model_type", FAMILIES)
@each_widths
def test_the_narrow_model_has_the_widths_asked_for_everywhere(model_type, widths) -> None:
    dense = tiny_model(model_type, bias=True)
    narrow = narrowed(dense, random_keep(widths))
    assert ffn_widths(narrow) == widths
    field = ARCHITECTURES[model_type].width
    assert [getattr(layer, field) for layer in narrow.config.per_layer_config] == widths
    if len(set(widths)) == 1:
        assert getattr(narrow.config, field) == widths[0]
        assert type(narrow) is type(dense)
    for layer, linear, ffn, width in zip(
        decoder_layers(narrow), down_linears(narrow), iter_ffns(narrow), widths, strict=True
    ):
        assert linear.in_features == width
        assert ffn.up.is_contiguous()
        assert ffn.down.is_contiguous()
        assert getattr(getattr(layer, "mlp", None), "intermediate_size", width) == width
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                assert (module.out_features, module.in_features) == module.weight.shape
    removed = sum(
        ffn.channel_parameters * (D_FF - width)
        for ffn, width in zip(iter_ffns(dense), widths, strict=True)
    )
    assert count_parameters(dense)[0] - count_parameters(narrow)[0] == removed


@each_variant
def test_keeping_every_channel_is_the_identity(model_type, bias, tied) -> None:
    dense = tiny_model(model_type, bias=bias, tied=tied)
    narrow = narrowed(dense, [torch.ones(D_FF, dtype=torch.bool)] * LAYERS)
    assert same_state(narrow, dense)
    assert narrow.config.to_dict() == dense.config.to_dict()
    assert logits(narrow).equal(logits(dense))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_dense_model_is_left_as_it_was(model_type) -> None:
    dense = tiny_model(model_type, bias=True)
    before, config, answer = copy.deepcopy(dense), dense.config.to_dict(), logits(dense)
    for widths in WIDTHS.values():
        narrowed(dense, random_keep(widths))
    assert same_state(dense, before)
    assert dense.config.to_dict() == config
    assert logits(dense).equal(answer)
    assert type(dense) is type(before)


@pytest.mark.parametrize("tied", [False, True])
def test_everything_outside_the_ffns_is_shared_and_tied_embeddings_stay_tied(tied) -> None:
    dense = tiny_model("llama", bias=True, tied=tied)
    narrow = narrowed(dense, random_keep(WIDTHS["uniform"]))
    shared = {
        name
        for name, tensor in narrow.named_parameters()
        if tensor is dict(dense.named_parameters())[name]
    }
    own = {name for name, _ in narrow.named_parameters()} - shared
    # The bias of the down linear has no channels.
    assert {name.split(".", 3)[-1] for name in own} == {
        *(f"mlp.{linear}_proj.{kind}" for linear in ("gate", "up") for kind in ("weight", "bias")),
        "mlp.down_proj.weight",
    }
    assert (narrow.get_input_embeddings().weight is narrow.get_output_embeddings().weight) == tied


def test_dtype_trainability_attention_and_generation_settings_are_kept() -> None:
    dense = tiny_model("llama").to(torch.bfloat16)
    dense.requires_grad_(False)
    dense.set_attn_implementation("eager")
    dense.generation_config.top_k = 7
    narrow = narrowed(dense, random_keep(WIDTHS["per-layer"]))
    assert {tensor.dtype for tensor in narrow.parameters()} == {torch.bfloat16}
    assert not any(tensor.requires_grad for tensor in narrow.parameters())
    assert narrow.config._attn_implementation == "eager"
    assert narrow.generation_config.top_k == 7
    assert all(layer.self_attn.config is narrow.config for layer in decoder_layers(narrow))


@each_widths
def test_cutting_twice_is_cutting_once(widths) -> None:
    dense = tiny_model("phi3")
    first, final = random_keep([44, 46, 47]), random_keep(widths)
    final = [mask & outer for mask, outer in zip(final, first, strict=True)]
    twice = narrowed(
        narrowed(dense, first), [mask[outer] for mask, outer in zip(final, first, strict=True)]
    )
    once = narrowed(dense, final)
    assert same_state(twice, once)
    assert type(twice) is type(once)
    assert twice.config.to_dict() == once.config.to_dict()


def test_a_model_of_equal_widths_again_is_an_ordinary_model() -> None:
    dense = tiny_model("opt")
    narrow = narrowed(dense, random_keep([8, 16, 24]))
    assert isinstance(narrow, modeling.PerLayerWidths)
    again = narrowed(narrow, [torch.arange(width) < 8 for width in (8, 16, 24)])
    assert type(again) is type(dense)
    assert again.config.ffn_dim == 8
    assert not hasattr(again.config, "per_layer_ffn")


@pytest.mark.parametrize("model_type", ["llama", "phi3", "opt", "gpt_neox", "falcon"])
def test_filling_up_with_zero_channels_changes_the_shape_and_not_the_function(model_type) -> None:
    narrow = narrowed(tiny_model(model_type, bias=True), random_keep(WIDTHS["per-layer"]))
    wide = zero_padded(narrow)
    assert ffn_widths(wide) == [40] * LAYERS
    assert ffn_widths(narrow) == WIDTHS["per-layer"]
    torch.testing.assert_close(logits(wide), logits(narrow), atol=2e-5, rtol=0)
    for ffn, width in zip(iter_ffns(wide), WIDTHS["per-layer"], strict=True):
        assert not ffn.up[width:].any()
        assert not ffn.down[:, width:].any()
        assert ffn.up_bias is None or not ffn.up_bias[width:].any()


def test_a_per_layer_model_generates_like_the_masked_dense_model() -> None:
    dense = tiny_model("qwen2")
    keep = random_keep(WIDTHS["per-layer"])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids = token_ids(batch=1)
    with masking(dense, keep):
        wanted = dense.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    made = narrowed(dense, keep).generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert made.equal(wanted)
    assert not made.equal(dense.generate(ids, attention_mask=torch.ones_like(ids), **settings))


def test_masking_ends_with_its_block_even_by_an_exception() -> None:
    dense = tiny_model("llama")
    answer = logits(dense)
    with pytest.raises(KeyError), masking(dense, random_keep(WIDTHS["uniform"])):
        raise KeyError
    assert logits(dense).equal(answer)
    assert not any(linear._forward_pre_hooks for linear in down_linears(dense))


def test_a_dropped_channel_that_overflows_does_not_reach_the_masked_model() -> None:
    dense = tiny_model("opt")
    keep = random_keep(WIDTHS["uniform"])
    with torch.no_grad():
        decoder_layers(dense)[0].fc1.weight[~keep[0]] = 3e38
    with masking(dense, keep):
        masked = logits(dense)
    torch.testing.assert_close(masked, logits(narrowed(dense, keep)), atol=2e-5, rtol=0)


BAD = {
    "one mask too few": (lambda keep: keep[:-1], "3 layers .* got 2 masks"),
    "a mask that is too long": (
        lambda keep: [*keep[:-1], torch.ones(D_FF + 1, dtype=torch.bool)],
        "layer 2: .* 48 booleans, got 49",
    ),
    "a mask that keeps nothing": (
        lambda keep: [keep[0], torch.zeros(D_FF, dtype=torch.bool), keep[2]],
        "layer 1: .*at least one",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize(
    "use",
    [narrowed, lambda model, keep: masking(model, keep).__enter__()],
    ids=["narrowed", "masking"],
)
def test_masks_that_do_not_fit_are_refused_before_anything_changes(use, spoil, message) -> None:
    dense = tiny_model("llama")
    before = copy.deepcopy(dense)
    with pytest.raises(ValueError, match=message):
        use(dense, spoil(random_keep(WIDTHS["uniform"])))
    assert same_state(dense, before)
    assert not any(linear._forward_pre_hooks for linear in down_linears(dense))


def test_the_travelling_module_knows_transformers_classes_and_nothing_else() -> None:
    assert modeling.PerLayerLlamaForCausalLM is modeling.PerLayerLlamaForCausalLM
    assert isinstance(modeling, ModuleType)
    for name in ("PerLayerNonsense", "LlamaForCausalLM", "__transformers_module_hash__"):
        assert not hasattr(modeling, name)
