"""Experts removed, and tokens sent to fewer, beside narrower ones: what is scored, how many stay,
and what a comparison says of both sizes.
"""

import copy
import json

import pytest
import torch
from families import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.overrides import TorchFunctionMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner

from prunenet.cli.app import app
from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.experts import Experts, concentration, rerouted, without_experts
from prunenet.models.layers import active_parameters, count_parameters
from prunenet.models.surgery import masking
from prunenet.policies.apply import prune, ratio_of
from prunenet.policies.experts import keep_experts
from prunenet.policies.methods import METHODS, Evidence, cut, pruned_model
from prunenet.policies.methods.widths.allocation import parameters_left
from prunenet.policies.options import PruneOptions
from prunenet.refit.expert_use import expert_use
from prunenet.text.calibration import CalibrationSet

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EIGHT = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAKE = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **EIGHT, intermediate_size=32, num_experts=8)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
            | EIGHT,
            **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "intermediate_size": 32},
            **{"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
            **{"v_head_dim": 8, "first_k_dense_replace": 1},
        )
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES, intermediate_size=16, intermediate_size_mlp=32, num_local_experts=8
        )
    ),
}
IDS = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(0))
BLOCKS = CalibrationSet(IDS, "data", {"text": "random ids"})


def mixture(model_type):
    """A random mixture whose every matrix moves the logits."""
    torch.manual_seed(0)
    made = MAKE[model_type]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def models():
    return {model_type: mixture(model_type) for model_type in MAKE}


def by_hand(model, layer):
    """REAP's score of each expert of a layer, one token and expert at a time."""
    seen, block = [], model.model.layers[layer]
    moe = block.mlp if hasattr(block, "mlp") else block.feed_forward
    hook = moe.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        model(input_ids=IDS)
    hook.remove()
    (hidden,), bank = seen, moe.experts
    router = moe.gate if hasattr(moe, "gate") else moe.router
    scores = [[] for _ in range(8)]
    with torch.no_grad():
        for token in hidden:
            logits = torch.nn.functional.linear(token, router.weight)
            logits = logits if getattr(router, "bias", None) is None else logits + router.bias
            for expert in logits.topk(model.config.num_experts_per_tok).indices.tolist():
                kept = logits.topk(model.config.num_experts_per_tok).values.softmax(0)
                if type(bank).__name__ == "Llama4TextExperts":
                    gate, up = (token * logits[expert].sigmoid() @ bank.gate_up_proj[expert]).chunk(
                        2
                    )
                    weight = 1.0
                    out = (bank.act_fn(gate) * up) @ bank.down_proj[expert]
                elif type(bank).__name__ == "GptOssExperts":
                    both = token @ bank.gate_up_proj[expert] + bank.gate_up_proj_bias[expert]
                    gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
                    weight = float(kept[(logits[expert] < logits).sum()])
                    inner = (up + 1) * gate * torch.sigmoid(gate * 1.702)
                    out = inner @ bank.down_proj[expert] + bank.down_proj_bias[expert]
                else:
                    gate, up = (bank.gate_up_proj[expert] @ token).chunk(2)
                    weight = float(kept[(logits[expert] < logits).sum()])
                    out = bank.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                scores[expert].append(weight * float(out.norm()))
    return torch.tensor([sum(found) / max(len(found), 1) for found in scores])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4"])
def test_reap_is_the_mean_over_routed_tokens_of_what_an_expert_adds(model_type, models) -> None:
    model = models[model_type]
    found = expert_use(model, IDS)
    assert found.keys() == {0, 1}
    for layer, scores in found.items():
        torch.testing.assert_close(scores, by_hand(model, layer), rtol=1e-4, atol=1e-5)


def test_aimer_is_the_share_of_the_first_norm_and_the_flattest_expert_goes_first(models) -> None:
    bank = models["qwen3_moe"].model.layers[1].mlp.experts
    parts = [bank.gate_up_proj[3], bank.down_proj[3]]
    flat = torch.cat([part.detach().flatten() for part in parts])
    measure = flat.abs().sum() / (len(flat) ** 0.5 * flat.norm())
    scores = concentration(models["qwen3_moe"])[1]
    torch.testing.assert_close(scores[3], -measure)
    kept = keep_experts(models["qwen3_moe"], 7, "aimer")[1]
    assert not kept[int(scores.argmin())]


class Blocked(TorchFunctionMode):
    """Inside, the logits of some experts are as low as can be."""

    def __init__(self, dropped):
        super().__init__()
        self.dropped = dropped

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args[1].data_ptr() in self.dropped:
            out[..., self.dropped[args[1].data_ptr()]] = -1e30
        return out


@pytest.mark.parametrize("model_type", MAKE)
def test_without_experts_the_others_compute_as_if_these_were_never_chosen(model_type, models):
    model = models[model_type]
    kept = keep_experts(model, 4, "random", seed=3)
    narrow = without_experts(model, kept)
    assert {int(mask.sum()) for mask in kept.values()} == {4}
    dropped = {}
    for layer, mask in kept.items():
        block = model.model.layers[layer]
        moe = block.mlp if hasattr(block, "mlp") else block.feed_forward
        router = moe.gate if hasattr(moe, "gate") else moe.router
        dropped[router.weight.data_ptr()] = ~mask
    with torch.no_grad():
        found = narrow(input_ids=IDS).logits
        with Blocked(dropped):
            expected = model(input_ids=IDS).logits
    assert not torch.equal(expected, model(input_ids=IDS).logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", MAKE)
def test_the_rerouted_model_computes_what_the_cut_one_does_and_shares_its_experts(
    model_type, models
):
    model = models[model_type]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = keep_experts(model, 4, "random", seed=3)
    made, narrow = rerouted(model, kept), without_experts(model, kept)
    generator = torch.Generator().manual_seed(2)
    groups = Anatomy.of(model).groups
    keep = [
        torch.randperm(group.width, generator=generator) < 3 * group.width // 4 for group in groups
    ]
    left = [
        mask
        for group, mask in zip(groups, keep, strict=True)
        if group.expert is None or kept[group.layer][group.expert]
    ]
    with torch.no_grad():
        expected = narrow(input_ids=IDS).logits
        torch.testing.assert_close(made(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
        with masking(narrow, left), masking(made, keep):
            zeroed = narrow(input_ids=IDS).logits
            torch.testing.assert_close(made(input_ids=IDS).logits, zeroed, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(zeroed, expected, atol=1e-2)
    own = {id(parameter) for parameter in model.parameters()}
    for name, parameter in made.named_parameters():
        assert id(parameter) in own or parameter.numel() < 8 * 33, name  # rows of routers alone
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "model_type"),
    [("random_experts", "gpt_oss"), ("aimer", "deepseek_v3"), ("reap", "llama4")],
)
def test_as_many_experts_stay_as_fit_the_size_of_a_cut_of_channels(name, model_type, models):
    model, experts = models[model_type], Experts.of(models[model_type])
    for ratio in (0.0, 0.25):
        most = parameters_left(model, ratio, 4)
        made = pruned_model(Evidence(model, BLOCKS), name, ratio, round_to=4)
        left = Experts.of(made).count
        assert (left == experts.count) == (ratio == 0)
        assert count_parameters(made)[0] <= most
        following = [more for more in experts.possible if more > left][:1]
        for more in following:  # one step more would not fit
            larger = without_experts(model, keep_experts(model, more, "aimer"))
            assert count_parameters(larger)[0] > most


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_fewer_per_token_is_the_model_of_that_configuration(model_type, models) -> None:
    model = models[model_type]
    made = METHODS["fewer_per_token"].rebuild(Evidence(model), 0.15, 4)
    assert made.config.num_experts_per_tok == 1
    assert model.config.num_experts_per_tok == 2
    assert active_parameters(Anatomy.of(made)) <= parameters_left(model, 0.15, 4, active=True)
    fresh = type(model)(made.config).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(made(input_ids=IDS).logits, fresh(input_ids=IDS).logits)
        assert not torch.equal(made(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_what_is_no_mixture_or_has_an_unknown_router_is_refused_before_anything_is_measured(models):
    dense = tiny_model("llama")
    for name in ("reap", "aimer", "random_experts", "fewer_per_token"):
        with pytest.raises(UnsupportedArchitecture, match="LlamaForCausalLM has no experts"):
            METHODS[name].able(dense)

    class Odd(torch.nn.Module):
        def forward(self, inputs, expert_size):
            raise AssertionError

    model = mixture("qwen3_moe")
    model.model.layers[1].mlp.experts.__class__ = type(
        "Odd", (type(model.model.layers[1].mlp.experts),), {"forward": Odd.forward}
    )
    with pytest.raises(UnsupportedArchitecture, match=r"\(Odd takes inputs, expert_size\)"):
        METHODS["reap"].able(model)
    METHODS["aimer"].able(model)
    with pytest.raises(ValueError, match="reap measures experts on text"):
        prune(models["qwen3_moe"], experts=4, experts_by="reap")
    with pytest.raises(ValueError, match="must be from 2 to 8 here, got 1"):
        ratio_of(models["qwen3_moe"], PruneOptions(experts=1))


@pytest.mark.parametrize(
    ("dtype", "ratio", "unit"), [(torch.float32, 0.1, 4), (torch.bfloat16, 0.25, 8)]
)
def test_widths_that_the_grouped_product_refuses_are_refused_before_the_work(
    models, dtype, ratio, unit
) -> None:
    model, ids = copy.deepcopy(models["qwen3_moe"]).to(dtype), torch.randint(3, 60, (2, 16))
    asked = PruneOptions(ratio=ratio, round_to=unit // 2)
    model.set_experts_implementation("eager")
    assert ratio_of(model, asked) == ratio  # one expert after another takes any width
    model.set_experts_implementation("grouped_mm")
    both = {"widths": "refined", "structures": "channels,experts", "round_to": 1}
    for wrong in (asked, PruneOptions(ratio=0.25, **both)):
        with pytest.raises(ValueError, match=f"takes multiples of {unit}; give `round_to` {unit}"):
            ratio_of(model, wrong)
    blocks = CalibrationSet(ids, "self", {})
    cut = prune(model, ratio=ratio, round_to=unit, blocks=blocks).model
    assert cut.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        assert torch.isfinite(cut(ids).logits).all()


def test_experts_of_one_number_have_one_allocation(models) -> None:
    evidence = Evidence(models["deepseek_v3"])
    found = cut(evidence, "magnitude", 0.25)
    assert found.widths == Anatomy.of(models["deepseek_v3"]).uniform_widths(0.25)
    with pytest.raises(ValueError, match="give allocation uniform, got 'global'"):
        cut(evidence, "magnitude", 0.25, allocation="global")


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4"])
def test_channels_of_experts_are_scored_on_text_layer_behind_cut_layer(model_type, models) -> None:
    model = models[model_type]
    groups, before = Anatomy.of(model).groups, {n: p.clone() for n, p in model.named_parameters()}
    found = cut(Evidence(model, BLOCKS), "wanda_sp", 0.25, round_to=4)
    dense = cut(Evidence(model, BLOCKS), "wanda_sp", 0.25, round_to=4, sequential=False)
    for group, one, other in zip(groups, found.keep, dense.keep, strict=True):
        assert int(one.sum()) == found.widths[group.number] == 12 * group.width // 16
        assert group.layer or one.equal(other)  # nothing is cut in front of the first
    assert not all(map(torch.equal, found.keep, dense.keep))
    assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models):
    """A mixture with a tokenizer, a text to score and one to measure on."""
    home = tmp_path_factory.mktemp("mixture")
    known = {f"w{i}": i for i in range(63)} | {"[UNK]": 63}
    made = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    models["qwen3_moe"].save_pretrained(home / "tiny")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(home / "tiny")
    for name, step in (("test", 5), ("other", 7)):
        words = [" ".join(f"w{(i * i + step * j) % 61}" for i in range(12)) for j in range(40)]
        (home / f"{name}.txt").write_text("\n\n".join(words))
    return home


def compare(folder, out, *asked, code=0):
    """The lines of `prunenet compare`, and all that it said."""
    given = ["--text", folder / "test.txt", "--window", 16, "--max-windows", 2, "--round", 4]
    given += ["--calibration-tokens", 64, "--calibration-window", 16, "--out", out]
    result = CliRunner().invoke(
        app,
        ["compare", str(folder / "tiny"), *map(str, [*asked, *given])],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == code, result.output
    lines = out.read_text().splitlines() if out.exists() else []
    return [json.loads(line) for line in lines], " ".join(result.output.split())


@pytest.mark.long
def test_a_comparison_says_both_sizes_at_equal_parameters_and_at_equal_active_ones(
    folder, tmp_path
) -> None:
    reap = f"reap@{folder / 'other.txt'}"
    lines, said = compare(
        folder, tmp_path / "a.jsonl", reap, "aimer", "magnitude", "--ratios", "0.5"
    )
    assert [line["error"] for line in lines] == [None] * 4
    sizes = {line["score"]: (line["parameters"], line["active_parameters"]) for line in lines}
    assert sizes["reap"] == sizes["aimer"]
    assert sizes["reap"][0] <= sizes["magnitude"][0] < sizes[None][0]
    assert sizes["magnitude"][1] < sizes["reap"][1] <= sizes[None][1]
    assert "params active" in said
    assert {line["regime"] for line in lines} == {"weights", "data"}
    asked = ("fewer_per_token", "magnitude", "--share-of", "active", "--ratios", "0.2")
    lines, _ = compare(folder, tmp_path / "b.jsonl", *asked)
    dense, *others = lines
    wanted = 0.8 * dense["active_parameters"]
    active = {line["score"]: line["active_parameters"] for line in others}
    step = 4 * 3 * 32 * 2 * 2  # channels x matrices x d_model x experts of a token x layers
    assert abs(active["magnitude"] - wanted) <= step / 2
    assert active["fewer_per_token"] <= active["magnitude"]
    assert {line["share_of"] for line in others} == {"active"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["aimer", "--share-of", "active"], "'aimer' leaves the active parameters as they are"),
        (["fewer_per_token"], "take shares (--share-of) of the active ones"),
        (
            ["random:global", "flap:uniform"],
            "share one, for all its experts have one width; say random",
        ),
        (["flap:uniform"], "mlp.experts.down_proj of a Qwen3MoeForCausalLM is none; take another"),
        (["llm_pruner_vector:uniform"], "gradients are read of linear layers"),
    ],
)
def test_what_a_mixture_cannot_do_is_said_before_the_work(folder, tmp_path, asked, words) -> None:
    _, said = compare(folder, tmp_path / "r.jsonl", *asked, code=1)
    assert words in said
    assert not (tmp_path / "r.jsonl").exists()
