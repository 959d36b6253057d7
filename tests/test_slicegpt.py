"""SliceGPT: rotation leaves the function as it is, slices are as large as promised, principal
directions are the right ones.
"""

import json
import re

import pytest
import torch
from families import D_MODEL, LAYERS, VOCABULARY, random_keep, tiny_model, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.save import export_padded, load_masks, load_provenance
from prunenet.checkpoints.streaming import StreamedCheckpoint
from prunenet.features.from_weights import channel_statistics
from prunenet.models import sliced_modeling
from prunenet.models.architectures import ARCHITECTURES, UnsupportedArchitecture
from prunenet.models.layers import count_parameters, ffn_widths
from prunenet.models.rotation import (
    covariance,
    eigenbasis,
    parameters_at,
    residual_widths,
    unrotated,
)
from prunenet.models.surgery import narrowed
from prunenet.policies.apply import prune
from prunenet.policies.methods import Evidence, cut, pruned_model, sliced
from prunenet.policies.methods.papers.slicegpt import (
    slice_stream,
    width_at_slicing,
)
from prunenet.policies.methods.widths.allocation import parameters_left
from prunenet.runtime.files import CheckpointError
from prunenet.text.calibration import CalibrationSet, token_blocks

BLOCKS = CalibrationSet(token_ids(6, 20), "data", {"text": "random ids"})
ROTATABLE = sorted(name for name, row in ARCHITECTURES.items() if row.rotates)


def evidence(model, blocks=BLOCKS) -> Evidence:
    return Evidence(model, blocks)


@torch.no_grad()
def logits(model, ids=None) -> torch.Tensor:
    return model(input_ids=token_ids() if ids is None else ids).logits


def of_low_rank(rank: int):
    """A tiny model whose residual stream never leaves `rank` directions."""
    model = tiny_model("llama", bias=True)
    directions = torch.linalg.qr(torch.randn(D_MODEL, rank)).Q
    onto = directions @ directions.T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ onto)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(onto @ linear.weight)
                linear.bias.copy_(onto @ linear.bias)
    return model


# --- the rotation ---


@pytest.mark.parametrize("model_type", ROTATABLE)
@pytest.mark.parametrize(("bias", "tied"), [(False, True), (True, False)])
def test_a_rotated_model_of_which_nothing_is_sliced_computes_what_the_dense_one_does(
    model_type, bias, tied
):
    model = tiny_model(model_type, bias=bias, tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = sliced(evidence(model), slicing=0.0).model
    assert made.config.residual_widths == [D_MODEL] * (2 * LAYERS + 1)
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-4, atol=1e-4)
    assert not made.model.layers[1].mlp.down_proj.weight.allclose(
        model.model.layers[1].mlp.down_proj.weight, atol=0.1
    )
    assert all(before[name].equal(value) for name, value in model.state_dict().items()), (
        "the dense model changed"
    )


def test_directions_that_the_stream_never_takes_are_sliced_off_for_nothing():
    model = of_low_rank(16)
    torch.testing.assert_close(
        logits(sliced(evidence(model), slicing=0.5).model), logits(model), rtol=1e-4, atol=1e-4
    )
    worse = logits(sliced(evidence(model), slicing=0.75).model)
    assert (worse - logits(model)).abs().max() > 0.1


def test_covariance_and_basis_are_those_of_a_hand_computed_example():
    parts = [torch.tensor([[[3.0, 1.0], [1.0, 3.0]]]), torch.tensor([[[1.0, 1.0]]])]
    found = covariance(parts)
    # X^T X = [[11, 7], [7, 11]]: eigenvalues 18 and 4, directions (1, 1) and (1, -1); 1 % of the
    # mean diagonal is 0.11.
    assert found.tolist() == [[pytest.approx(11.11), 7.0], [7.0, pytest.approx(11.11)]]
    basis = eigenbasis(found)
    torch.testing.assert_close(basis.abs(), torch.full((2, 2), 0.5).sqrt().double())
    torch.testing.assert_close(
        (basis.T @ found @ basis).diagonal(), torch.tensor([18.11, 4.11]).double()
    )


def test_numbers_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="hidden states are not finite"):
        eigenbasis(torch.full((2, 2), torch.inf).double())


def test_principal_directions_beat_random_ones_and_sequential_covariances_are_those_of_the_sliced_model():
    model = tiny_model("llama")
    widths = residual_widths(LAYERS, D_MODEL, 24)
    generator = torch.Generator().manual_seed(0)

    def random(second):
        return torch.linalg.qr(torch.randn(second.shape, generator=generator, dtype=second.dtype)).Q

    def error(made):
        return float((logits(made, BLOCKS.ids) - logits(model, BLOCKS.ids)).square().mean())

    principal = error(slice_stream(model, BLOCKS.ids, widths))
    assert principal < 0.9 * min(
        error(slice_stream(model, BLOCKS.ids, widths, basis=random)) for _ in range(3)
    )


def test_each_point_is_measured_behind_what_is_sliced_in_front_of_it():
    model, seen = tiny_model("llama"), []

    def watched(second):
        seen.append(second)
        return eigenbasis(second)

    made = slice_stream(model, BLOCKS.ids, [8, 16, *[D_MODEL] * (2 * LAYERS - 1)], basis=watched)
    first = made.model.layers[0]
    with torch.no_grad():
        hidden = model.model.embed_tokens(BLOCKS.ids)
        torch.testing.assert_close(seen[0], covariance([hidden]))
        kept = eigenbasis(seen[0])[:, :8].float()
        torch.testing.assert_close(made.model.embed_tokens(BLOCKS.ids), hidden @ kept)
        # What the sliced layer writes, turned back, is the part of the measured stream that its
        # basis keeps.
        found = []
        hook = first.post_attention_layernorm.register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0])
        )
        made(input_ids=BLOCKS.ids)
        hook.remove()
    basis = eigenbasis(seen[1])[:, :16]
    expected = (
        basis.T
        @ (seen[1] - 0.01 / 1.01 * seen[1].diagonal().mean() * torch.eye(D_MODEL).double())
        @ basis
    )
    rows = found[0].flatten(0, 1).double()
    torch.testing.assert_close(rows.T @ rows, expected, rtol=1e-4, atol=1e-3)


# --- sizes ---


@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", True), ("qwen3", False), ("phi3", False)]
)
@pytest.mark.parametrize("slice_head", [False, True])
def test_parameters_are_counted_before_anything_is_made(model_type, tied, slice_head):
    model = tiny_model(model_type, bias=True, tied=tied)
    widths = residual_widths(LAYERS, D_MODEL, 24, slice_head=slice_head)
    assert parameters_at(model, widths) == sum(
        p.numel() for p in unrotated(model, widths).parameters()
    )
    assert widths[-1] == (24 if slice_head else D_MODEL)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.35])
@pytest.mark.parametrize("slice_head", [False, True])
def test_a_ratio_gives_the_largest_slice_within_the_parameters_of_a_uniform_cut(
    tied, ratio, slice_head
):
    model = tiny_model("llama", tied=tied)
    budget = count_parameters(pruned_model(Evidence(model), "random", ratio))[0]
    assert parameters_left(model, ratio) == budget
    made = sliced(evidence(model), ratio, round_to=4, slice_head=slice_head)
    width = made.provenance.how["residual_width"]
    more = residual_widths(LAYERS, D_MODEL, width + 4, slice_head=slice_head)
    assert width % 4 == 0
    assert (
        count_parameters(made.model)[0]
        == made.provenance.parameters_after
        <= budget
        < parameters_at(model, more)
    )


def test_attention_as_wide_as_its_heads_and_not_as_d_model_is_sliced():
    config = tiny_model("llama").config
    config.head_dim = 12  # 4 x 12 = 48 in place of 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.testing.assert_close(
        logits(sliced(evidence(model), slicing=0.0).model), logits(model), rtol=1e-4, atol=1e-4
    )
    made = sliced(evidence(model), slicing=0.25).model
    assert made.model.layers[0].self_attn.o_proj.weight.shape == (24, 48)
    assert parameters_at(model, made.config.residual_widths) == count_parameters(made)[0]


@pytest.mark.parametrize(("slicing", "width"), [(0.0, 36), (0.1, 32), (0.3, 24), (0.75, 8)])
def test_slicing_s_leaves_1_minus_s_rounded_down(slicing, width):
    assert width_at_slicing(36, slicing) == width


# --- checkpoints ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    made = sliced(evidence(tiny_model("qwen2", bias=True, tied=True)), 0.35)
    return made, made.save_pretrained(tmp_path_factory.mktemp("sliced") / "model")


def test_a_saved_slice_is_reloaded_bit_for_bit_by_us_and_by_transformers_with_the_code_beside_it(
    saved,
):
    made, folder = saved
    ours = load_model(folder)
    assert type(ours) is type(made.model) is sliced_modeling.SlicedQwen2ForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(theirs).__module__.startswith("transformers_modules")
    for model in (ours, theirs):
        assert logits(model).equal(logits(made.model))
        state = model.state_dict()
        assert all(value.equal(state.pop(name)) for name, value in made.model.state_dict().items())
        assert not state
    code = (folder / "sliced_modeling.py").read_text()
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {
        "functools",
        "typing",
        "torch",
        "transformers",
    }


def test_generation_with_a_cache_is_generation_without_one(saved):
    model, prompt = load_model(saved[1]), token_ids(2, 5)
    found = [
        model.generate(prompt, max_new_tokens=10, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert found[0].equal(found[1])
    assert found[0].shape == (2, 15)
    assert (
        model(prompt, output_hidden_states=True).hidden_states[0].shape[-1]
        == model.config.residual_widths[0]
    )


def test_the_folder_says_how_it_was_made_and_counts_what_untying_costs(saved):
    made, folder = saved
    story = load_provenance(folder)
    width = story.residual_widths[0]
    assert story == made.provenance
    assert story.how["slicing"] == 1 - width / D_MODEL
    tables = made.model.get_input_embeddings().weight, made.model.get_output_embeddings().weight
    assert [tuple(table.shape) for table in tables] == [(VOCABULARY, width), (VOCABULARY, D_MODEL)]
    stored = load_file(folder / "model.safetensors")
    assert story.parameters_after == sum(tensor.numel() for tensor in stored.values())
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    card = (folder / "README.md").read_text()
    assert f"residual stream sliced to {width} directions by `slicegpt`" in card
    assert "trust_remote_code=True" in card
    assert all(bool(mask.all()) for mask in load_masks(folder))
    with pytest.raises(CheckpointError, match="sliced residual stream"):
        export_padded(folder, folder.parent / "padded")


# --- what is refused ---


@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - set(ROTATABLE)))
def test_a_family_that_cannot_be_rotated_is_one_sentence_that_says_which_can(model_type):
    with pytest.raises(
        UnsupportedArchitecture,
        match=rf"'{model_type}' cannot be sliced.*llama, mistral, phi3, qwen2",
    ):
        sliced(evidence(tiny_model(model_type)), 0.3)


def test_a_sliced_model_is_neither_cut_nor_sliced_again(saved):
    model = saved[0].model
    for again in (
        lambda: prune(model, ratio=0.3, blocks=BLOCKS),
        lambda: pruned_model(evidence(model), "magnitude", 0.3),
        lambda: sliced(evidence(model), 0.3),
        lambda: narrowed(model, saved[0].keep),
        lambda: channel_statistics(model),
        lambda: channel_statistics(StreamedCheckpoint.open(saved[1])),
    ):
        with pytest.raises(UnsupportedArchitecture, match="sliced residual stream"):
            again()


@pytest.mark.parametrize("widths", [[16, 40, 24], [48, 48, 48]])
def test_layers_of_different_shapes_are_refused(widths):
    groups = (
        None
        if len(set(widths)) > 1
        else [torch.tensor(mask) for mask in ([True, False], [True, True], [True, True])]
    )
    narrow = narrowed(tiny_model("llama"), random_keep(widths), groups)
    with pytest.raises(UnsupportedArchitecture, match="layers of different shapes"):
        sliced(evidence(narrow), 0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda text: sliced(text), "got neither"),
        (lambda text: sliced(text, 0.3, slicing=0.3), "got both"),
        (lambda text: sliced(text, 1.0), "`ratio` must be in"),
        (lambda text: sliced(text, slicing=1.0), r"slicing must be in \[0, 1\), got 1.0"),
        (lambda text: sliced(text, slicing=0.9), "leaves no multiple of 8"),
        (
            lambda text: sliced(text, 0.7, round_to=24),
            r"no slice .* fits .* parameters.*remove less",
        ),
        (lambda text: sliced(Evidence(text.model), 0.3), "needs text"),
        (lambda text: cut(text, "slicegpt", 0.3), "cuts no FFN channels"),
        (
            lambda text: pruned_model(text, "slicegpt", 0.3, allocation="owl"),
            "one allocation, uniform",
        ),
        (
            lambda text: pruned_model(text, "slicegpt", 0.3, refit="mean_bias"),
            "no options but round_to",
        ),
        (lambda text: unrotated(text.model, [8] * LAYERS), f"has {2 * LAYERS + 1} widths"),
    ],
)
def test_a_mistake_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(evidence(tiny_model("llama")))


def test_the_table_s_row_is_the_function_and_sees_nothing_but_its_text():
    model = tiny_model("llama")
    found = [pruned_model(evidence(model), "slicegpt", 0.35), sliced(evidence(model), 0.35).model]
    assert logits(found[0]).equal(logits(found[1]))
    assert ffn_widths(found[0]) == ffn_widths(model)
    other = pruned_model(
        evidence(model, CalibrationSet(token_ids(6, 20, seed=1), "data", {})), "slicegpt", 0.35
    )
    assert not logits(other).equal(logits(found[0]))


@pytest.mark.slow
def test_smollm2_of_which_nothing_is_sliced_computes_what_the_dense_one_does(smollm2):
    model = load_model(smollm2, dtype="float32")
    blocks = token_blocks(model, count=4, window=64)
    made = sliced(Evidence(model, blocks), slicing=0.0).model
    assert (logits(made, blocks.ids[:1]) - logits(model, blocks.ids[:1])).abs().max() < 1e-2
