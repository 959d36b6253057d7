"""Every decoder type of transformers is cut, saved and reloaded with equal logits, or refused with
its reason. What ships is compared with a discovery of each, some seconds a type:

    pytest -m slow tests/test_every_type.py -k "qwen3_moe "
"""

import importlib.util

import pytest
import torch
from transformers import CONFIG_MAPPING

from prunenet.models import known
from prunenet.models.architectures import UnsupportedArchitecture
from prunenet.models.experts import Experts, rerouted, without_experts
from prunenet.models.twin import logits_of, twin
from prunenet.refit.expert_use import check_readable

CUT = 240
"""Types of which a class is cut; raise it with `known_types.json`."""
MOST_USED = (
    *("qwen3_5_moe", "qwen3_5", "gemma4", "gemma4_unified", "qwen3_vl", "gpt_oss", "qwen2_5_vl"),
    *("qwen2_vl", "qwen3_moe", "gemma3", "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm4_moe"),
    *("glm4_moe_lite", "glm_moe_dsa", "mistral3", "ministral3", "mistral4", "kimi_k25"),
    *("kimi_linear", "nemotron_h", "minimax_m2", "minimax_m3_vl", "llama4", "qwen3_next"),
    *("qwen3_vl_moe", "qwen3_omni_moe_thinker", "gpt2", "lfm2", "lfm2_moe", "lfm2_vl"),
    *("granitemoehybrid", "mixtral", "olmo3", "olmoe", "smolvlm", "internvl", "llava", "cohere2"),
    *("gemma3n", "gemma3n_text"),
)


@pytest.fixture(scope="module")
def shipped():
    if not known.shipped():
        pytest.skip("discoveries of another version of transformers ship")
    return known.shipped()


def test_every_type_is_cut_or_listed_with_its_reason(shipped) -> None:
    assert set(shipped) == {f"{model_type} {name}" for model_type, name in known.all_entries()}
    reasons = {name: found.reason for name, found in shipped.items() if found.architecture is None}
    assert all(reasons.values())
    assert not any(found.reason for name, found in shipped.items() if name not in reasons)
    types = {name.split()[0] for name in shipped if name not in reasons}
    assert len(types) >= CUT
    assert set(MOST_USED) <= types


@pytest.mark.slow
@pytest.mark.parametrize("entry", known.all_entries(), ids=" ".join)
def test_what_ships_of_a_type_is_what_a_discovery_proves_now(entry, shipped) -> None:
    before = shipped[" ".join(entry)]
    if "timm" in before.reason and importlib.util.find_spec("timm"):
        pytest.skip("what ships was discovered without timm")
    found = known.discovered_anew(*entry)
    if "timm" in found.reason and not importlib.util.find_spec("timm"):
        pytest.skip("needs timm, which the tests do not install")
    assert found.architecture == before.architecture, found.reason
    assert bool(found.reason) == bool(before.reason)
    assert found.left == before.left


def mixtures():
    """Entries whose groups are experts."""
    rows = {name: found.architecture for name, found in known.shipped().items()}
    return [name for name, row in rows.items() if row and any(p.experts for p in row.patterns)]


@pytest.mark.slow
@pytest.mark.parametrize("entry", mixtures())
def test_a_mixture_computes_rerouted_what_it_computes_without_its_experts(entry) -> None:
    model_type, name = entry.split()
    kind = known.class_of(model_type, name)
    model, ids = twin(kind, CONFIG_MAPPING[model_type])
    try:
        experts = Experts.of(model)
        check_readable(model)
    except UnsupportedArchitecture as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    fewest = experts.possible[0]
    assert fewest < experts.count
    kept = {
        layer: experts.best(torch.rand(experts.count, generator=generator), fewest)
        for layer in experts.layers
    }
    expected = logits_of(without_experts(model, kept), ids)
    torch.testing.assert_close(logits_of(rerouted(model, kept), ids), expected)
    assert not torch.allclose(logits_of(model, ids), expected, rtol=1e-2)
