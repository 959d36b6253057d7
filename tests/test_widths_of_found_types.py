"""Per-layer widths of model types without a row by hand: cut, saved, reloaded here and by stock
transformers, padded; and why others have one width.
"""

import copy
import json

import pytest
import torch
from families import provenance
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.save import export_padded, save_pruned
from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.known import class_of
from prunenet.models.modeling import is_per_layer
from prunenet.models.surgery import masking, narrowed
from prunenet.models.twin import twin
from prunenet.policies.apply import prune, ratio_of
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.policies.options import PruneOptions
from prunenet.policies.order import save_ordered

SAVED = {
    "ungated, biases": "starcoder2",
    "Conv1D": "gpt2",
    "fused": "glm4",
    "hybrid": "qwen3_5_text",
    "wrapper": "gemma3",
    "list": "gemma3n_text",
}
MORE = ["olmo3", "cohere", "nemotron", "gemma4_text"]
LATER = ("glm4", "qwen3_5_text", *MORE)  # as others are: when there is time


def some(model_types):
    """The types as parameters, some of them marked slow."""
    marks = {name: [pytest.mark.slow] if name in LATER else [] for name in model_types}
    return [pytest.param(name, marks=marks[name], id=name) for name in model_types]


TIED = {
    "qwen3_moe": "all its experts have one width",
    "nemotron_h": "all its experts have one width",
    "moshi": "does not state the width of one layer alone",
}


@pytest.fixture(scope="module")
def models():
    """Tiny models in float32, made when first asked for, and their text."""
    made = {}

    def get(model_type):
        if model_type not in made:
            drawn, ids = twin(class_of(model_type), CONFIG_MAPPING[model_type])
            config = copy.deepcopy(drawn.config)
            config._attn_implementation = None  # the default, as when it is loaded
            if hasattr(config, "activation_sparsity_pattern"):
                config.activation_sparsity_pattern = [0.0] * config.num_hidden_layers
            model = type(drawn)(config).eval()
            model.load_state_dict(drawn.state_dict())
            made[model_type] = model, ids
        return made[model_type]

    return get


def uneven(anatomy, step=8):
    """A mask for each layer, widths by turns."""
    generator = torch.Generator().manual_seed(0)
    masks = []
    for index, width in enumerate(anatomy.widths):
        mask = torch.ones(width, dtype=torch.bool)
        mask[torch.randperm(width, generator=generator)[: step * (1 + index % 2)]] = False
        masks.append(mask)
    return masks


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("model_type", some([*SAVED.values(), *MORE]))
def test_layers_of_other_widths_compute_as_masked(model_type, models) -> None:
    model, ids = models(model_type)
    anatomy = Anatomy.of(model)
    keep = uneven(anatomy)
    narrow = narrowed(model, keep)
    with masking(model, keep):
        expected = logits(model, ids)
    torch.testing.assert_close(logits(narrow, ids), expected, rtol=1e-3, atol=1e-4)
    assert is_per_layer(narrow) == (model_type != "gemma3n_text")
    assert len(set(Anatomy.of(narrow).widths)) == 2
    whole = narrowed(narrow, [torch.arange(width) < 8 for width in Anatomy.of(narrow).widths])
    assert not is_per_layer(whole)  # cut again to one width, it is a stock model
    assert Anatomy.of(whole).widths == [8] * len(keep)


@pytest.mark.long
@pytest.mark.parametrize("model_type", some(SAVED.values()))
def test_a_folder_of_other_widths_is_reloaded_by_us_and_by_transformers(
    model_type, models, tmp_path
) -> None:
    model, ids = models(model_type)
    keep = uneven(Anatomy.of(model))
    narrow = narrowed(model, keep)
    folder = save_pruned(narrow, tmp_path / "cut", keep, provenance(model, narrow))
    expected, widths = logits(narrow, ids), [int(mask.sum()) for mask in keep]
    again = load_model(folder)
    assert Anatomy.of(again).widths == widths
    assert logits(again, ids).equal(expected)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert logits(theirs, ids).equal(expected)
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    told = [one.generate(ids[:1], **asked) for one in (again, theirs)]
    assert told[0].equal(told[1])
    fields = json.loads((folder / "config.json").read_text())
    if model_type == "gemma3n_text":  # the family's own list
        assert fields["intermediate_size"] == widths
        assert "auto_map" not in fields
        return
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(bare).__name__.startswith("PerLayer")
    if model_type == "gemma3":
        seen = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        assert logits(seen, ids).equal(expected)
        assert "per_layer_config" in fields["text_config"]
    padded = load_model(export_padded(folder, tmp_path / "padded"))
    assert not is_per_layer(padded)
    torch.testing.assert_close(logits(padded, ids), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", ["starcoder2", "gpt2", "gemma3n_text"])
def test_a_policy_gives_layers_of_found_types_widths_of_their_own(model_type, models) -> None:
    model, _ = models(model_type)
    policy = Policy.untrained(PolicyConfig(hidden=(8,)))
    with torch.no_grad():
        policy.scorer.widths.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    size = {"ratio": 0.4, "round_to": 1}
    even = prune(model, policy, **size, widths="uniform").provenance.widths
    learned = prune(model, policy, **size, widths="per-layer").provenance.widths
    assert len(set(even)) == 1 < len(set(learned))
    assert sum(learned) == sum(even)


@pytest.mark.parametrize("model_type", TIED)
def test_a_family_with_one_width_says_why(model_type, models) -> None:
    model, _ = models(model_type)
    with pytest.raises(ValueError, match=TIED[model_type]):
        ratio_of(model, PruneOptions(ratio=0.4, widths="per-layer"))


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe"])
def test_a_sorted_model_is_not_written_where_its_card_could_not_slice_it(
    model_type, models, tmp_path
) -> None:
    with pytest.raises(UnsupportedArchitecture, match="not one FFN of linear layers in each"):
        save_ordered(models(model_type)[0], tmp_path / "out", Policy.untrained(PolicyConfig()))
