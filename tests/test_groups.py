"""One tiny type of each kind of FFN, from what ships with the package."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import architecture_for
from prunenet.models.discovery import check
from prunenet.models.known import class_of
from prunenet.models.surgery import cut
from prunenet.models.twin import logits_of, twin

KINDS = {
    "Conv1D": "gpt2",
    "experts, concat": "qwen3_moe",
    "experts, interleaved": "gpt_oss",
    "shared experts": "deepseek_v3",
    "a wrapper": "gemma3",
}


@pytest.mark.parametrize("model_type", KINDS.values(), ids=KINDS)
def test_a_kind_is_cut_as_masked_and_ratio_0_is_the_identity(model_type) -> None:
    kind = class_of(model_type)
    model, ids = twin(kind, CONFIG_MAPPING[model_type])
    row = architecture_for(model.config, kind)
    check(model, row, ids)  # narrow == masked dense, reloaded from a stock folder
    anatomy = Anatomy.of(model, row)
    whole = cut(anatomy, [torch.ones(width, dtype=torch.bool) for width in anatomy.widths])
    assert torch.equal(logits_of(whole, ids), logits_of(model, ids))
