"""What earlier versions wrote still loads and means the same (tests/before_the_move/README.md)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.records import load_head_masks, load_masks, load_provenance
from prunenet.checkpoints.save import export_padded
from prunenet.models.heads import group_counts
from prunenet.models.layers import ffn_widths
from prunenet.policies.artifact import Policy

HERE = Path(__file__).parent / "before_the_move"
WIDTHS, GROUPS = [16, 40, 8], [2, 1, 2]

# What a user's own process does; the code beside the checkpoint is the old one.
STRANGER = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[2])["ids"]).logits.clone()}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, torch.Tensor]:
    return load_file(HERE / "answers.safetensors")


@torch.no_grad()
def test_a_checkpoint_written_before_the_move_computes_the_same_logits(answers) -> None:
    model = load_model(HERE / "per_layer")
    assert ffn_widths(model) == WIDTHS
    assert group_counts(model) == GROUPS
    assert model(answers["ids"]).logits.equal(answers["logits"])


@pytest.mark.long
def test_a_checkpoint_written_before_the_move_loads_without_prunenet(answers, tmp_path) -> None:
    folder = Path(shutil.copytree(HERE / "per_layer", tmp_path / "per_layer"))
    out = tmp_path / "logits.safetensors"
    subprocess.run(
        [sys.executable, "-c", STRANGER, folder, HERE / "answers.safetensors", out],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    assert load_file(out)["logits"].equal(answers["logits"])


def test_its_provenance_and_masks_are_read_and_it_can_be_padded(answers, tmp_path) -> None:
    made = load_provenance(HERE / "per_layer")
    assert (list(made.widths), list(made.groups or ())) == (WIDTHS, GROUPS)
    assert [int(mask.sum()) for mask in load_masks(HERE / "per_layer")] == WIDTHS
    assert [int(mask.sum()) for mask in load_head_masks(HERE / "per_layer") or ()] == GROUPS
    padded = export_padded(HERE / "per_layer", tmp_path / "padded")
    assert json.loads((padded / "config.json").read_text())["intermediate_size"] == max(WIDTHS)
    with torch.no_grad():
        logits = load_model(padded)(answers["ids"]).logits
    torch.testing.assert_close(logits, answers["logits"], atol=0.05, rtol=0.02)


def test_a_policy_written_before_the_move_scores_the_same(answers) -> None:
    policy = Policy.from_pretrained(HERE / "policy")
    scores = policy.scores(load_model(HERE / "per_layer"))
    expected = [answers[f"scores.{layer}"] for layer in range(len(WIDTHS))]
    for found, known in zip(scores, expected, strict=True):
        torch.testing.assert_close(found, known, atol=1e-5, rtol=1e-4)
        assert found.argsort().equal(known.argsort())
