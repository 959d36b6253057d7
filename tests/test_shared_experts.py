"""One budget for whole experts and channels in `prune`: where it is spent, what it costs, what the
record says, and what is refused.
"""

import pytest
import torch
from families import tiny_model
from test_cli import facts, refused, save_tiny
from test_whole_experts import BLOCKS, IDS, mixture

import prunenet
from prunenet.checkpoints.identity import identify
from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.records import load_provenance
from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.experts import Experts, without_experts
from prunenet.models.layers import active_parameters, count_parameters
from prunenet.models.surgery import narrowed
from prunenet.policies.experts import CANDIDATES, MixtureCost, keep_experts, line_of_cost
from prunenet.policies.options import PruneOptions
from prunenet.text.calibration import CalibrationSet

SHARED = {"widths": "refined", "structures": "channels,experts", "round_to": 1}


def any_width(model_type):
    """A mixture whose experts are multiplied one after another, and so may have any width."""
    made = mixture(model_type)
    made.set_experts_implementation("eager")
    return made


@pytest.fixture(scope="module")
def models():
    return {name: any_width(name) for name in ("qwen3_moe", "gpt_oss", "deepseek_v3")}


@pytest.fixture(scope="module")
def unused():
    """A mixture in which half of the experts are never chosen."""
    made = any_width("gpt_oss")
    for layer in made.model.layers:
        layer.mlp.router.bias.data[[0, 2, 5, 7]] = -1e4
    return made


@pytest.fixture(scope="module")
def idle():
    """A mixture in which half of the channels of every expert write nothing."""
    made = any_width("qwen3_moe")
    for layer in made.model.layers:
        layer.mlp.experts.down_proj.data[:, :, 8:] = 0
    return made


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def half_of_the_experts(model):
    """As share of all parameters."""
    price = MixtureCost.of(model, active=False)
    return 1 - price.whole(4) / price.total


@pytest.mark.long
def test_the_revision_is_that_of_the_model_with_all_its_experts(unused, tmp_path) -> None:
    unused.save_pretrained(tmp_path / "dense")
    model = load_model(tmp_path / "dense")
    half = half_of_the_experts(model)
    made = prunenet.prune(
        model, blocks=BLOCKS, params=half, **SHARED | {"structures": "experts"}
    ).provenance
    assert "experts" in made.how
    assert (made.base_model, made.revision) == identify(tmp_path / "dense")


@pytest.mark.long
@pytest.mark.parametrize("structures", ["channels,experts", "experts"])
def test_experts_that_are_never_chosen_pay_for_the_budget(unused, structures) -> None:
    share = half_of_the_experts(unused)
    made = prunenet.prune(
        unused, blocks=BLOCKS, params=share, **SHARED | {"structures": structures}
    )
    story, total = made.provenance, count_parameters(unused)[0]
    assert story.how["experts"] == {"0": [1, 3, 4, 6], "1": [1, 3, 4, 6]}
    assert (story.parameters_before, story.parameters_after) == (total, round((1 - share) * total))
    torch.testing.assert_close(logits(made.model), logits(unused), rtol=1e-4, atol=1e-5)
    assert story.how["tried"]["4"] == pytest.approx(0, abs=1e-5)
    assert list(story.how["tried"]) == (
        ["8", "7", "6", "5", "4"] if structures[0] == "c" else ["4"]
    )
    assert story.how["experts_by"] == "reap"
    assert story.regime == "data"
    assert story.how["reached"] == pytest.approx(story.ratio)

    assert story.policy == "reap"  # no channels went


@pytest.mark.long
def test_where_the_budget_is_deeper_channels_of_the_experts_that_stay_go_too(
    unused, tmp_path
) -> None:
    price = MixtureCost.of(unused, active=False)
    share = half_of_the_experts(unused) + 0.25 * price.channels(4) / price.total
    made = prunenet.prune(unused, blocks=BLOCKS, params=share, **SHARED | {"round_to": 4})
    story = made.provenance
    assert story.how["experts"] == {"0": [1, 3, 4, 6], "1": [1, 3, 4, 6]}
    assert min(story.how["tried"], key=story.how["tried"].get) == "4"
    assert (set(story.dense_widths), set(story.widths)) == ({16}, {12})
    assert (story.policy, story.how["channels"], story.how["refit"]) == (
        *("elimination", "elimination"),
        "layerwise",
    )
    gone = 1 - story.parameters_after / story.parameters_before
    assert gone == pytest.approx(share)
    made.save_pretrained(tmp_path / "out")  # verifies the reload, logits included
    assert load_provenance(tmp_path / "out") == story
    assert Experts.of(load_model(tmp_path / "out")).count == 4
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "of its FFN channels have, from channels and experts chosen by" in card
    assert "Experts left in each layer: 4, chosen by `reap`." in card
    assert "--structures channels,experts --budget params --experts-by reap" in card
    assert "--policy none" in card


@pytest.mark.long
def test_channels_that_write_nothing_pay_for_it_where_all_experts_matter(idle) -> None:
    share = half_of_the_experts(idle)
    made = prunenet.prune(idle, blocks=BLOCKS, params=share, **SHARED)
    alone = prunenet.prune(idle, blocks=BLOCKS, params=share, widths="uniform", round_to=1)
    tried = made.provenance.how["tried"]
    assert tried["8"] == min(tried.values()) == pytest.approx(0, abs=1e-5)
    assert tried.keys() == {"8", "7", "6"}  # then none gets better
    assert min(tried["7"], tried["6"]) > 0.001
    assert "experts" not in made.provenance.how
    for name, tensor in made.model.state_dict().items():  # one pipeline
        assert torch.equal(tensor, alone.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("model_type", "active"),
    [("qwen3_moe", False), ("gpt_oss", True), ("deepseek_v3", True)],
)
def test_places_of_the_line_cost_the_same_to_a_channel(model_type, active, models) -> None:
    model = models[model_type]
    size = {"active": 0.1} if active else {"params": 0.2}
    options = PruneOptions(**size, **SHARED)

    def counted(made):
        return active_parameters(Anatomy.of(made)) if active else count_parameters(made)[0]

    price = MixtureCost.of(model, active)
    wanted = (1 - (0.1 if active else 0.2)) * counted(model)
    line = line_of_cost(model, options, (counted(model) - wanted) / price.channels(8))
    assert max(line) == 8
    assert [*line] == sorted(line, reverse=True)
    if active:  # fewer experts of the same width save nothing
        assert len(line) < 4
    for left, ratio in [*line.items()][-2:]:
        fewer = without_experts(model, keep_experts(model, left, "aimer"))
        assert price.whole(left) == counted(fewer)
        anatomy = Anatomy.of(fewer)
        widths = anatomy.uniform_widths(ratio, 1)
        keep = [torch.arange(g.width) < w for g, w in zip(anatomy.groups, widths, strict=True)]
        step = sum(g.channel_parameters * (g.share if active else 1) for g in anatomy.groups)
        assert counted(narrowed(fewer, keep)) <= wanted + step / 2
        assert ratio == 0 or counted(narrowed(fewer, keep)) >= wanted - step / 2


def test_experts_alone_are_the_most_that_fit_and_at_most_so_many_numbers_are_tried(models) -> None:
    model = models["qwen3_moe"]
    price = MixtureCost.of(model, active=False)
    for share in (0.0, 0.1, 0.3):
        asked = PruneOptions(params=share, **SHARED | {"structures": "experts"})
        ratio = share * price.total / price.channels(8)
        ((left, over),) = line_of_cost(model, asked, ratio).items()
        assert over == 0
        assert price.whole(left) <= (1 - share) * price.total + 1e-6
        assert left == 8 or price.whole(left + 1) > (1 - share) * price.total
    many = mixture("qwen3_moe")
    many.config.num_experts = 200
    with torch.device("meta"):
        many = type(many)(many.config)
    line = line_of_cost(many, PruneOptions(ratio=0.9, **SHARED), 0.9)
    assert len(line) == CANDIDATES
    assert max(line) == 200
    assert line[min(line)] < 1 / 32  # of 16 channels none goes


def test_short_text_leaves_the_choice_of_experts_to_the_weights(models) -> None:
    short = CalibrationSet(IDS[:4, :6], "data", {"text": "random ids"})
    size = {"params": 0.05, "refit": "off"}
    made = prunenet.prune(models["qwen3_moe"], blocks=short, **size, **SHARED)
    assert made.provenance.how["experts_by"] == "aimer"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"structures": "channels,experts,heads"}, "experts share a budget with channels alone"),
        ({"structures": "layers,experts"}, "with channels alone, got layers too"),
        ({"experts": 4}, "`experts` says how many stay, and `structures` asks which number"),
        ({"budget": "latency"}, "counted in parameters, and the budget is 'latency'"),
        ({"budget": "active"}, "`params` is a share of all parameters, and the budget is 'active'"),
        ({"widths": "uniform"}, "only refined widths cut channels,experts"),
        ({"structures": "expert"}, "structures 'expert'"),
        (
            {"structures": "experts", "params": None, "active": 0.1},
            "they alone leave the active parameters as they are",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(choices, message) -> None:
    with pytest.raises(ValueError, match=message):
        PruneOptions(**{"params": 0.2} | SHARED | choices)


def test_what_cannot_be_done_is_said_before_anything_is_measured(models, monkeypatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    asked = {"params": 0.2, "blocks": BLOCKS} | SHARED
    with pytest.raises(UnsupportedArchitecture, match="LlamaForCausalLM has no experts to remove"):
        prunenet.prune(tiny_model("llama"), **asked)
    with pytest.raises(ValueError, match=r"or text to choose them by \(`blocks`\)"):
        prunenet.prune(models["qwen3_moe"], **asked | {"blocks": None})
    with pytest.raises(ValueError, match=r"at most \d+\.\d% of the parameters, for 2 of 8 stay"):
        prunenet.prune(models["qwen3_moe"], **asked | {"params": 0.6, "structures": "experts"})


@pytest.mark.long
def test_the_command_shares_a_budget_and_says_what_it_tried(idle, tmp_path) -> None:
    save_tiny(tmp_path / "tiny")  # for its tokenizer
    idle.save_pretrained(tmp_path / "tiny")
    (tmp_path / "text").write_text(" ".join(f"w{(i * i) % 61}" for i in range(400)))
    options = ["--widths", "refined", "--structures", "channels,experts", "--params", 0.2]
    options += ["--moments", "data", "--text", tmp_path / "text", "--tokens", 256, "--round", 4]
    said = facts("prune", tmp_path / "tiny", "--out", tmp_path / "out", *options)
    assert "8" in said["tried"]
    assert len(said["tried"]) > 1
    assert said["structures"] == "channels,experts"
    assert said["parameters"] < said["parameters_before"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--structures channels,experts --budget params --experts-by" in card
    message = refused("prune", tmp_path / "tiny", "--out", tmp_path / "no", *options, "--stream")
    assert "say --moments none as well" in message
    message = refused(
        "prune", tmp_path / "tiny", "--out", tmp_path / "no", *options, "--budget", "flops"
    )
    assert "whole experts are counted in parameters, and the budget is 'flops'" in message
