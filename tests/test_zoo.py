"""The policies that ship: they load by name, say where they come from, and cut a model of another
width and depth.
"""

import pytest
import torch
import transformers
from families import tiny_model
from transformers import CONFIG_MAPPING

import prunenet
from prunenet.models import known
from prunenet.models.architectures import ARCHITECTURES, UnsupportedArchitecture
from prunenet.models.layers import ffn_widths
from prunenet.models.twin import twin
from prunenet.policies.apply import AUTO_GAIN
from prunenet.policies.artifact import FALLBACK, Policy, PolicyError, policy_for, zoo


def test_every_policy_of_the_zoo_loads_and_says_what_it_was_trained_on():
    assert {"llama", FALLBACK} == zoo().keys()
    for name, folder in zoo().items():
        policy = Policy.from_pretrained(name)
        learned = policy.config.recipe["where"].get("models", [policy.config.trained_on])
        families = {model["model_type"] for model in learned}
        assert families == {name} if name != FALLBACK else len(families) == len(learned) == 5
        assert policy.config.regime in ("weights", "self")
        assert policy.config.gain > AUTO_GAIN, "prune takes learned widths from weights alone"
        assert not (folder / "training").exists()


def test_a_model_s_family_chooses_its_policy_unless_the_user_does():
    assert policy_for(None, "llama")[1] == "llama"
    assert policy_for("none", "llama") == (None, "none")
    assert policy_for(None, "a family without one", gated=True)[1] == "universal"
    assert policy_for(None, "a family without one") == (None, "none")
    with pytest.raises(PolicyError, match=r"does not exist.*one that ships: llama, universal"):
        policy_for("lama", "llama")


def test_the_universal_policy_has_llama_s_channels_and_widths_of_its_own():
    llama, universal = (Policy.from_pretrained(name).scorer.state_dict() for name in zoo())
    same = {name for name in llama if torch.equal(llama[name], universal[name])}
    assert all(name in same for name in llama if not name.startswith("widths."))
    assert any(name not in same for name in llama if name.startswith("widths."))


def test_gated_dense_ffns_are_told_from_others():
    rows = {name: row.gated for name, row in ARCHITECTURES.items()}
    assert not any(rows[name] for name in ("opt", "gpt_neox", "falcon", "phi"))
    assert all(rows[name] for name in ("llama", "qwen3", "gemma3_text", "phi3"))
    if not known.shipped():
        pytest.skip("discoveries of another version of transformers ship")
    found = {name.split()[0]: one.architecture for name, one in known.shipped().items()}
    types = ("lfm2", "gpt2", "qwen3_moe", "deepseek_v3")
    assert [found[name].gated for name in types] == [True, False, False, False]


def test_it_says_where_to_cut_at_ratios_it_was_not_trained_at():
    model = tiny_model("llama")
    policy = Policy.from_pretrained("llama")
    previous = ffn_widths(model)
    for ratio in (0.05, 0.25, 0.5, 0.75):
        widths = policy.widths(model, ratio, per_layer=True)
        assert sum(widths) == sum(policy.widths(model, ratio))
        assert all(a >= b for a, b in zip(previous, widths, strict=True))
        previous = widths


def test_it_cuts_another_width_and_depth_from_weights_alone():
    model = tiny_model("llama")
    pruned = prunenet.prune(
        model, Policy.from_pretrained("llama"), ratio=0.5, widths="uniform", policy_name="llama"
    )
    assert pruned.provenance.policy == "llama"
    assert all(
        bool(torch.isfinite(row).all()) for row in Policy.from_pretrained("llama").scores(model)
    )
    assert set(ffn_widths(pruned.model)) == {24}


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("lfm2", "Lfm2ForCausalLM"),  # its code names the activation
        pytest.param(  # attention writes another width
            "muse_spark", "MuseSparkForConditionalGeneration", marks=pytest.mark.slow
        ),
        ("reformer", "ReformerModelWithLMHead"),  # the head reads two streams
    ],
)
def test_the_shipped_policy_scores_types_of_odd_shapes(model_type, name):
    model, _ = twin(getattr(transformers, name), CONFIG_MAPPING[model_type])
    scores = Policy.from_pretrained("llama").scores(model.float())
    assert [len(row) for row in scores] == ffn_widths(model)
    assert all(bool(torch.isfinite(row).all()) for row in scores)


def test_a_model_that_no_policy_reads_is_refused_with_the_way_out():
    model, _ = twin(transformers.MusicgenForCausalLM, CONFIG_MAPPING["musicgen"])
    with pytest.raises(UnsupportedArchitecture, match=r"4 tables.*cut it without a policy"):
        Policy.from_pretrained("llama").scores(model.float())
