"""What prunenet writes computes the same numbers in transformers 4.57, whose configurations state
rotary embeddings in other fields than those of 5: in an environment of its own, which is made once.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import provenance, random_keep, tiny_model, token_ids
from safetensors.torch import load_file
from transformers import AutoTokenizer

from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.save import save_pruned
from prunenet.models.surgery import narrowed
from prunenet.runtime.files import cache_folder
from prunenet.runtime.locks import hold

pytestmark = pytest.mark.slow

VERSION, TORCH = "4.57.3", "2.13.0"
TOLERANCE = 1e-5
"""Of logits, relative to the largest; a rotary field that is not read moves them by 1e-2 or more."""
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
SAVED_BY_4 = {
    "llama": {"rope_theta": 500000.0},
    "llama-scaled": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3": {"head_dim": 16, "rope_theta": 1000000.0},
    "gemma3_text": _SLIDING
    | {
        "rope_theta": 700000.0,
        "rope_local_base_freq": 20000.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {
        "rope_theta": 30000.0,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.0, 3.0, 4.0],
        },
    },
}
"""Fields of each model's configuration, in the words of transformers 4."""
SAVED_BY_5 = ("llama", "qwen3", "gemma3_text", "phi3")
_MAKE = """
import json, sys, torch, transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers
for name, fields in json.loads(sys.argv[2]).items():
    config = t.AutoConfig.for_model(name.partition("-")[0], **fields)
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape)
            p.add_(0.3 * noise) if p.dim() == 1 else p.copy_(0.25 * noise)
    model.save_pretrained(f"{sys.argv[1]}/{name}")
words = {f"w{number}": number for number in range(63)} | {"[UNK]": 63}
core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
own = t.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token="w1")
own.save_pretrained(f"{sys.argv[1]}/{name}")
"""
_COMPUTE = """
import json, os, sys, torch, transformers as t
from safetensors.torch import save_file
folders, out = json.loads(sys.argv[1]), sys.argv[2]
ids = torch.tensor(json.loads(sys.argv[3]))
found, words = {}, {}
for folder in folders:
    model = t.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found[folder] = model(ids).logits.clone()
    if os.path.exists(f"{folder}/tokenizer.json"):
        words[folder] = t.AutoTokenizer.from_pretrained(folder)("w1 w7 w9")["input_ids"]
save_file(found, out)
print(json.dumps({"version": t.__version__, "words": words}))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment with transformers 4.57."""
    folder = cache_folder() / "envs" / f"transformers-{VERSION.rpartition('.')[0]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold(folder.with_suffix(".lock")):
        if not (folder / "complete").exists():
            _install(folder)
    return folder / "bin" / "python"


def _install(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # torch by itself and first: exactly this one need not be fetched where it lies on the disk.
    for wanted in ([f"torch=={TORCH}"], [f"transformers=={VERSION}"]):
        pip = [folder / "bin" / "pip", "install", "--disable-pip-version-check", "-q", *wanted]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"pip cannot install {wanted[0]}: {reason[:200]}")
    (folder / "complete").touch()


@pytest.fixture(scope="module")
def dense(python, tmp_path_factory) -> list[Path]:
    """Folders that either version has saved; the last of version 4 has a tokenizer."""
    home = tmp_path_factory.mktemp("dense")
    fields = {name: _SIZES | own for name, own in SAVED_BY_4.items()}
    _run(python, _MAKE, home, json.dumps(fields))
    for family in SAVED_BY_5:
        tiny_model(family).save_pretrained(home / f"{family}-of-5")
    return sorted(home.iterdir())


def _run(python: Path, script: str, *arguments: object) -> str:
    command = [python, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def _save_cut(folder: Path, out: Path, widths: list[int]) -> Path:
    model, keep = load_model(folder), random_keep(widths)
    narrow = narrowed(model, keep)
    made = provenance(model, narrow)
    return save_pruned(narrow, out, keep, made)


@torch.no_grad()
def _difference(folder: Path, found: torch.Tensor, ids: torch.Tensor) -> float:
    """Largest difference from the logits here, relative to the largest of those."""
    here = load_model(folder)(ids).logits
    return float((here - found).abs().max() / here.abs().max())


def test_pruned_models_compute_the_same_logits_in_transformers_4(python, dense, tmp_path) -> None:
    ids = token_ids(2, 40)
    kinds = {"uniform": [32] * 3, "per-layer": [16, 40, 8]}
    cuts = [
        _save_cut(folder, tmp_path / kind / folder.name, widths)
        for folder in dense
        for kind, widths in kinds.items()
    ]
    lost = Path(shutil.copytree(tmp_path / "uniform" / "llama", tmp_path / "lost"))
    fields = json.loads((lost / "config.json").read_text())
    fields.pop("rope_theta")
    (lost / "config.json").write_text(json.dumps(fields))
    folders = [*cuts, lost]
    out, names = tmp_path / "logits.safetensors", json.dumps([str(folder) for folder in folders])
    said = json.loads(_run(python, _COMPUTE, names, out, json.dumps(ids.tolist())))
    assert said["version"] == VERSION
    found = load_file(out)
    differences = {folder: _difference(folder, found[str(folder)], ids) for folder in cuts}
    for folder, value in differences.items():
        print(f"{folder.parent.name} {folder.name}: {value:.3g}")
    assert max(differences.values()) <= TOLERANCE, differences
    # were the field not read, the test would see it
    assert _difference(cuts[0].with_name("llama"), found[str(lost)], ids) > 1e-2
    assert len(said["words"]) == len(kinds)
    for folder, known in said["words"].items():
        assert AutoTokenizer.from_pretrained(folder)("w1 w7 w9")["input_ids"] == known == [1, 7, 9]
