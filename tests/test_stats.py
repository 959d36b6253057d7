"""Channel statistics: bounded, finite, blind to channel order and to a layer's scale, and each what
its name says.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from families import D_FF, D_MODEL, FAMILIES, LAYERS, tiny_model

from prunenet.features import from_weights as stats
from prunenet.features import leverage, residual
from prunenet.features.from_weights import CONTEXT, STATISTICS, channel_statistics, layer_context
from prunenet.models.layers import activation, iter_ffns

COLUMN = {name: index for index, name in enumerate(STATISTICS)}


def _raw(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Statistics before standardisation."""
    monkeypatch.setattr(stats, "standardised", lambda columns: columns)
    return channel_statistics(model)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_every_family_are_finite_bounded_and_one_row_a_channel(
    family: str, bias: bool
) -> None:
    model = tiny_model(family, bias=bias)
    statistics = channel_statistics(model)
    assert [tuple(layer.shape) for layer in statistics] == [(D_FF, len(STATISTICS))] * LAYERS
    for layer in statistics:
        assert layer.dtype == torch.float32
        assert torch.isfinite(layer).all()
        assert layer.abs().max() <= 4
        missing = {name for name in STATISTICS if not layer[:, COLUMN[name]].any()}
        ffn = next(iter_ffns(model))
        expected = {name for name in STATISTICS if ffn.gate is None and name.startswith("gate")}
        expected |= {
            f"{side}_bias" for side in ("gate", "up") if getattr(ffn, f"{side}_bias") is None
        }
        assert missing == expected
        present = layer[:, [column for name, column in COLUMN.items() if name not in missing]]
        assert present.median(0).values.abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_context_of_every_family_is_finite_bounded_and_tells_layers_apart(family: str) -> None:
    context = layer_context(tiny_model(family))
    assert tuple(context.shape) == (LAYERS, len(CONTEXT))
    assert torch.isfinite(context).all()
    assert context.abs().max() <= 4
    depth = CONTEXT.index("depth")
    assert context[:, depth].tolist() == pytest.approx([0, 0.5, 1])
    assert context[:, depth + 1].tolist() == pytest.approx([1, 0.5, 0])
    assert context[:, CONTEXT.index("from_first")].tolist() == pytest.approx(
        [1, math.exp(-1), math.exp(-2)]
    )


@pytest.mark.parametrize("block", [1, 3, 8])
def test_symmetric_products_taken_block_by_block_are_the_whole_products(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, half = torch.randn(5, 8), torch.randn(8, 8)
    symmetric = half + half.T
    monkeypatch.setattr(residual, "_BLOCK", block)
    torch.testing.assert_close(residual.self_product(rows), rows.T @ rows)
    torch.testing.assert_close(
        residual.quadratic(rows, symmetric), ((rows @ symmetric) * rows).sum(-1)
    )


def test_context_measures_the_layers_own_spectrum_and_write() -> None:
    model = tiny_model("llama")
    context = layer_context(model)
    written = float(model.get_input_embeddings().weight.detach().square().sum(-1).mean())
    for row, ffn in zip(context, iter_ffns(model), strict=True):
        squared = torch.linalg.svdvals(ffn.down).square()
        expected = math.log(squared.sum() / squared[0] / D_MODEL)
        assert float(row[CONTEXT.index("stable_rank")]) == pytest.approx(expected, abs=0.01)
        share = math.log(squared[:8].sum() / squared.sum())
        assert float(row[CONTEXT.index("down_top_share")]) == pytest.approx(share, abs=0.01)
        assert float(row[CONTEXT.index("write_size")]) == pytest.approx(
            math.log(squared.sum() / written), abs=1e-4
        )
        written += float(squared.sum())


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_permuting_channels_permutes_rows(family: str) -> None:
    model = tiny_model(family, bias=True)
    before = channel_statistics(model)
    order = torch.randperm(D_FF, generator=torch.Generator().manual_seed(0))
    for ffn in iter_ffns(model):  # views: writing to them writes to the model
        for rows in (ffn.gate, ffn.up, ffn.gate_bias, ffn.up_bias):
            if rows is not None:
                rows.copy_(rows[order].clone())
        ffn.down.copy_(ffn.down[:, order].clone())
    for old, new in zip(before, channel_statistics(model), strict=True):
        torch.testing.assert_close(new, old[order], rtol=0, atol=5e-3)


def test_scaling_a_layers_whole_gate_changes_only_the_activation_energy_of_that_layer() -> None:
    model = tiny_model("llama")
    before = channel_statistics(model)
    next(iter_ffns(model)).gate.mul_(5)
    change = (channel_statistics(model)[0] - before[0]).abs().amax(0)
    assert {name for name in STATISTICS if change[COLUMN[name]] > 5e-3} == {"activation_energy"}


def test_the_norm_in_front_is_part_of_the_input_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    folded = copy.deepcopy(model)
    for layer in folded.model.layers:
        norm = layer.post_attention_layernorm.weight.detach()
        layer.mlp.gate_proj.weight.data *= norm
        layer.mlp.up_proj.weight.data *= norm
        norm.fill_(1)
    for old, new in zip(_raw(model, monkeypatch), _raw(folded, monkeypatch), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-3, atol=1e-3)


def test_raw_statistics_are_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", tied=False)
    first = _raw(model, monkeypatch)[0]
    ffn = next(iter_ffns(model))
    gate, up, down = ffn.gate * ffn.norm_scale, ffn.up * ffn.norm_scale, ffn.down.T
    embedding, unembedding = (
        side().weight.detach() for side in (model.get_input_embeddings, model.get_output_embeddings)
    )
    attention = ffn.attention_out @ ffn.attention_out.T
    left = torch.linalg.svd(gate, full_matrices=False).U
    dot = (gate * up).sum(-1)
    cosines = (
        torch.nn.functional.normalize(down, dim=-1) @ torch.nn.functional.normalize(down, dim=-1).T
    )

    def quotient(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        moment = moment * D_MODEL / moment.trace()
        return torch.einsum("ri,ij,rj->r", rows, moment, rows).log() - rows.square().sum(-1).log()

    norms = {"gate": gate.norm(dim=-1), "up": up.norm(dim=-1), "down": down.norm(dim=-1)}
    expected = {f"{name}_norm": norm.log() for name, norm in norms.items()} | {
        "product_norm": (norms["gate"] * norms["up"] * norms["down"]).log(),
        "gate_up_cosine": dot / norms["gate"] / norms["up"],
        "sphere_energy": (
            ((norms["gate"] * norms["up"]) ** 2 + 2 * dot**2) * norms["down"] ** 2
        ).log(),
        "gate_embedding": quotient(gate, embedding.T @ embedding),
        # nothing has written before the first FFN
        "gate_residual": quotient(gate, embedding.T @ embedding),
        "down_unembedding": quotient(down, unembedding.T @ unembedding),
        "up_attention": quotient(up, attention),
        "down_mean": torch.nn.functional.normalize(down, dim=-1)
        @ torch.nn.functional.normalize(embedding.mean(0), dim=0),
        "up_kurtosis": (up.pow(4).mean(-1) / up.square().mean(-1) ** 2).log(),
        "up_peak": (up.abs().amax(-1) / up.square().mean(-1).sqrt()).log(),
        "down_twin": cosines.abs().fill_diagonal_(0).amax(-1),
    }
    for name, values in expected.items():
        torch.testing.assert_close(first[:, COLUMN[name]], values, rtol=1e-3, atol=1e-3, msg=name)
    leverage = left[:, : D_MODEL // 8].square().sum(-1)
    assert (
        torch.corrcoef(torch.stack([first[:, COLUMN["gate_leverage"]].exp(), leverage]))[0, 1]
        > 0.95
    )


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_activation_energy_is_that_of_a_gaussian_residual_stream(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, bias=True)
    first = _raw(model, monkeypatch)[0][:, COLUMN["activation_energy"]]
    ffn = next(iter_ffns(model))
    table = model.get_input_embeddings().weight.detach()
    moment = table.T @ table
    factor = torch.linalg.cholesky(moment * D_MODEL / moment.trace() + 1e-6 * torch.eye(D_MODEL))
    stream = (
        torch.randn(400_000, D_MODEL, generator=torch.Generator().manual_seed(0))
        @ factor.T
        * ffn.norm_scale
    )
    hidden = activation(model)(
        stream @ (ffn.up if ffn.gate is None else ffn.gate).T + _bias(ffn, "gate")
    )
    if ffn.gate is not None:
        hidden = hidden * (stream @ ffn.up.T + ffn.up_bias)
    expected = (hidden.square().mean(0) * ffn.down.square().sum(0)).log()
    torch.testing.assert_close(first, expected, rtol=0, atol=0.1)


def _bias(ffn: object, side: str) -> torch.Tensor:
    return ffn.up_bias if ffn.gate is None else getattr(ffn, f"{side}_bias")


def test_what_an_ffn_writes_is_in_the_residual_stream_of_the_next_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    direction = torch.nn.functional.normalize(
        torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)), dim=0
    )
    first, second = list(iter_ffns(model))[:2]
    first.down.copy_(1000 * direction[:, None] * torch.ones(D_FF))
    second.gate[7] = direction / second.norm_scale  # effective row: the direction itself
    raw = _raw(model, monkeypatch)[1][:, COLUMN["gate_residual"]]
    assert int(raw.argmax()) == 7
    assert float(raw[7]) == pytest.approx(math.log(D_MODEL), abs=0.01)


def test_a_planted_copy_of_a_channel_has_a_twin() -> None:
    model = tiny_model("llama")
    ffn = next(iter_ffns(model))
    ffn.gate[30], ffn.up[30], ffn.down[:, 30] = 2 * ffn.gate[3], -ffn.up[3] / 2, ffn.down[:, 3]
    layer = channel_statistics(model)[0]
    assert set(layer[:, COLUMN["down_twin"]].topk(2).indices.tolist()) == {3, 30}
    ffn.up[30] = ffn.up[3]
    layer = channel_statistics(model)[0]
    assert set(layer[:, COLUMN["input_twin"]].topk(2).indices.tolist()) == {3, 30}


def test_chunked_twins_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    whole = channel_statistics(model)
    monkeypatch.setattr(leverage, "_CHUNK", 7)
    for old, new in zip(whole, channel_statistics(model), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-4)


def test_an_outlier_stays_above_the_rest_and_within_bounds() -> None:
    model = tiny_model("llama")
    next(iter_ffns(model)).down[:, 5] *= 1e6
    column = channel_statistics(model)[0][:, COLUMN["down_norm"]]
    assert int(column.argmax()) == 5
    assert 3.9 < float(column[5]) <= 4


@pytest.mark.parametrize("damage", ["zero channels", "zero layer", "equal channels"])
def test_degenerate_weights_give_finite_statistics(damage: str) -> None:
    model = tiny_model("llama", bias=True)
    ffn = next(iter_ffns(model))
    for rows in (ffn.gate, ffn.up, ffn.down.T, ffn.up_bias[:, None]):
        if damage == "equal channels":
            rows.copy_(rows[:1].clone().expand_as(rows))
        else:
            rows[: 5 if damage == "zero channels" else D_FF] = 0
    for layer in channel_statistics(model):
        assert torch.isfinite(layer).all()
        assert layer.abs().max() <= 4
    if damage != "zero channels":
        names = ("gate_norm", "sphere_energy", "up_kurtosis", "down_leverage", "up_bias")
        assert not channel_statistics(model)[0][:, [COLUMN[name] for name in names]].any()
    assert torch.isfinite(layer_context(model)).all()


def test_a_statistic_that_most_channels_share_still_tells_the_others_apart() -> None:
    model = tiny_model("llama", bias=True)
    bias = next(iter_ffns(model)).up_bias
    bias.zero_()[4] = 1
    column = channel_statistics(model)[0][:, COLUMN["up_bias"]]
    assert float(column[4]) > 1
    assert not column[torch.arange(D_FF) != 4].any()


def test_half_precision_models_give_the_statistics_of_their_float32_copies() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    half = channel_statistics(model), layer_context(model)
    model = model.float()
    for old, new in zip(half[0], channel_statistics(model), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(half[1], layer_context(model))


def test_statistics_are_deterministic_and_leave_the_model_and_the_global_generator_alone() -> None:
    model = tiny_model("qwen2", bias=True)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    first, second = channel_statistics(model), channel_statistics(model)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(layer_context(model), layer_context(model))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_damaged_weights_are_one_clear_sentence() -> None:
    model = tiny_model("llama")
    list(iter_ffns(model))[1].up[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layer 1 .* NaN or infinite"):
        channel_statistics(model)


def test_statistic_and_context_names_are_unique() -> None:
    assert len(set(STATISTICS)) == len(STATISTICS)
    assert len(set(CONTEXT)) == len(CONTEXT)
