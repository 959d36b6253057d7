from types import SimpleNamespace

import pytest
from families import D_FF, D_MODEL, FAMILIES, LAYERS, tiny_model, variants
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel

from prunenet.models.architectures import ARCHITECTURES, UnsupportedArchitecture, architecture_for
from prunenet.models.layers import (
    count_parameters,
    decoder_layers,
    down_linears,
    ffn_widths,
    iter_ffns,
)

UNGATED = {"falcon", "gpt_neox", "opt", "phi"}


@pytest.mark.parametrize(("model_type", "bias", "tied"), variants())
def test_every_family_yields_the_ffn_of_every_layer_with_the_right_shapes(
    model_type, bias, tied
) -> None:
    model = tiny_model(model_type, bias=bias, tied=tied)
    ffns = list(iter_ffns(model))
    assert [ffn.index for ffn in ffns] == list(range(LAYERS))
    for ffn in ffns:
        assert ffn.up.shape == (D_FF, D_MODEL)
        assert ffn.down.shape == (D_MODEL, D_FF)
        assert (ffn.gate is None) == (model_type in UNGATED)
        assert ffn.attention_out is not None
        assert (ffn.norm_scale is None) == (not ARCHITECTURES[model_type].norms)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_weights_of_an_ffn_are_views_on_the_models_own(model_type) -> None:
    model = tiny_model(model_type)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for ffn in iter_ffns(model):
        for tensor in (ffn.up, ffn.down, *(() if ffn.gate is None else (ffn.gate,))):
            assert tensor.untyped_storage().data_ptr() in storages


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_channel_has_as_many_parameters_as_a_narrower_configuration_saves(model_type) -> None:
    wide = tiny_model(model_type, bias=True)
    config = type(wide.config)(
        **{**wide.config.to_dict(), ARCHITECTURES[model_type].width: D_FF - 1}
    )
    saved = (
        count_parameters(wide)[0] - count_parameters(AutoModelForCausalLM.from_config(config))[0]
    )
    assert saved == sum(ffn.channel_parameters for ffn in iter_ffns(wide))


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_count_a_tied_embedding_once_and_leave_every_embedding_out_of_the_second_number(
    tied,
) -> None:
    model = tiny_model("llama", tied=tied)
    total, body = count_parameters(model)
    assert total == sum(tensor.numel() for tensor in model.parameters())
    assert total - body == (1 if tied else 2) * model.get_input_embeddings().weight.numel()


def test_the_fused_gate_comes_before_the_up_rows() -> None:
    model = tiny_model("phi3")
    fused = decoder_layers(model)[0].mlp.gate_up_proj.weight
    ffn = next(iter_ffns(model))
    assert ffn.gate.equal(fused[:D_FF])
    assert ffn.up.equal(fused[D_FF:])


def test_the_down_linears_take_the_channels_as_input() -> None:
    model = tiny_model("opt")
    assert (
        [linear.in_features for linear in down_linears(model)]
        == ffn_widths(model)
        == [D_FF] * LAYERS
    )


def test_a_model_without_ffns_is_an_error_that_says_so() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"'mamba' \(MambaForCausalLM\) .* no FFN"):
        architecture_for(AutoConfig.for_model("mamba"))


def test_an_unknown_model_type_is_an_error_that_lists_what_has_a_row() -> None:
    with pytest.raises(
        UnsupportedArchitecture, match=r"'gpt_next' is not supported: .*falcon, gemma.*stablelm"
    ) as error:
        architecture_for(SimpleNamespace(model_type="gpt_next"))
    assert all(model_type in str(error.value) for model_type in ARCHITECTURES)


@pytest.mark.parametrize("model_type", ["internlm3", "iquestcoder"])
def test_a_type_with_the_class_of_a_row_shares_it(model_type) -> None:
    assert architecture_for(AutoConfig.for_model(model_type)) is ARCHITECTURES["llama"]


@pytest.mark.parametrize("fields", [{}, {"model_type": None}, {"model_type": ["llama"]}])
def test_a_configuration_without_a_model_type_is_not_supported(fields) -> None:
    with pytest.raises(UnsupportedArchitecture, match="is not supported"):
        architecture_for(SimpleNamespace(**fields))


def test_a_model_without_a_language_head_is_an_error_that_says_how_to_load_it() -> None:
    with pytest.raises(
        UnsupportedArchitecture, match=r"LlamaModel .*load it with AutoModelForCausalLM"
    ):
        list(iter_ffns(LlamaModel(tiny_model("llama").config)))
