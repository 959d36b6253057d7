"""Prunes a model from its weights alone at two ratios, and loads the result without prunenet.

The model is tiny and random, so that this runs in seconds. For a real one, say
`model = prunenet.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")`.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import prunenet

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128}
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4)).eval()

policy = prunenet.Policy.from_pretrained("llama")  # ships; or the folder of a trained one
small = prunenet.prune(model, policy, ratio=0.25, widths="uniform", policy_name="llama")
smaller = prunenet.prune(model, policy, ratio=0.5, widths="uniform", policy_name="llama")

for record in (small.provenance, smaller.provenance):
    print(f"ratio {record.ratio}: widths {record.widths}, {record.parameters_after:,} parameters")
pairs = zip(small.keep, smaller.keep, strict=True)
print(f"kept at 0.5 means kept at 0.25: {all(bool((low | ~high).all()) for low, high in pairs)}")

with TemporaryDirectory() as folder:
    # A checkpoint is reloaded and compared before it appears.
    out = smaller.save_pretrained(Path(folder) / "smaller")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[1, 2, 3, 4]])
    same = torch.equal(loaded(ids).logits, smaller.model(ids).logits)
    print(f"same logits after a reload: {same}")
