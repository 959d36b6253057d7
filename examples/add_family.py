"""Adds a model family: one row that says where its feed-forward network is.

A row overrides what is discovered, and lets layers differ in width. In the package it is a row of
`ARCHITECTURES`, and a tiny configuration in tests/families.py.
"""

import torch
from transformers import AutoModelForCausalLM, Starcoder2Config

import prunenet
from prunenet.models.architectures import ARCHITECTURES, Architecture, architecture_for

torch.manual_seed(0)
torch.set_grad_enabled(False)
sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128}
tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
config = Starcoder2Config(**sizes, **tokens, num_attention_heads=4, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(config).eval()
policy = prunenet.Policy.from_pretrained("llama")

# A type without a row is discovered: found on a tiny model of the same class, and proved on it.
found = architecture_for(config)
print(f"discovered: {found.found[0].down.tensor}, width in {found.found[0].knob}")

# An FFN without a gate: up is d_model -> d_ff, down is d_ff -> d_model. The field of the width, the
# path of the layers and the norm in front of the FFN are those of Llama, the defaults of a row.
row = Architecture("starcoder2", up="mlp.c_fc", down="mlp.c_proj", gate=None)
ARCHITECTURES[row.model_type] = row

pruned = prunenet.prune(model, policy, ratio=0.5, widths="uniform")
print(f"after: {pruned.model.config.intermediate_size} of {config.intermediate_size} channels")

# The narrow model computes what the dense one does with the removed channels at zero.
ids = torch.randint(3, 128, (2, 12))
for layer, keep in zip(model.model.layers, pruned.keep, strict=True):
    layer.mlp.c_proj.weight[:, ~keep] = 0
difference = float((pruned.model(ids).logits - model(ids).logits).abs().max())
print(f"largest difference to the masked model: {difference:.1e}")
