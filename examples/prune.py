"""Prunes a model from its weights alone at two ratios, saves both, and loads one without prunenet.

The model is tiny and random, so that this runs in seconds; put a real one in its place:
`model = prunenet.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")`.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import prunenet

torch.manual_seed(0)
sizes = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()

policy = prunenet.Policy.from_pretrained(
    "llama"
)  # ships with the package; or the folder of a trained one
small = prunenet.prune(model, policy, ratio=0.25, widths="uniform", policy_name="llama")
smaller = prunenet.prune(model, policy, ratio=0.5, widths="uniform", policy_name="llama")

for pruned in (small, smaller):
    record = pruned.provenance
    print(
        f"ratio {record.ratio}: {record.widths} channels left, {record.parameters_after:,} parameters in all"
    )
nested = all(bool((low | ~high).all()) for low, high in zip(small.keep, smaller.keep, strict=True))
print(f"channels kept at 0.5 are among those kept at 0.25: {nested}")

with TemporaryDirectory() as folder:
    out = smaller.save_pretrained(
        Path(folder) / "smaller"
    )  # reloaded and compared before it appears
    loaded = AutoModelForCausalLM.from_pretrained(out)  # needs no prunenet
    ids = torch.tensor([[1, 2, 3, 4]])
    print(f"same logits after reload: {torch.equal(loaded(ids).logits, smaller.model(ids).logits)}")
