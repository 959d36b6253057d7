"""Adds a way to prune: a function that scores channels, and a row that says what it needs.

In the package it is a file in policies/methods/papers/ and a row in policies/methods/table.py.
"""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from prunenet.policies.methods import Evidence, Method, pruned_model


def scores(evidence: Evidence) -> list[Tensor]:
    """Norm of a channel's up row times that of its down column: (d_ff,) of each layer."""
    return [norms.up * norms.down for norms in evidence.norms]


torch.manual_seed(0)
torch.set_grad_enabled(False)
sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128}
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4)).eval()
for layer in model.model.layers:  # as in a trained model, channels differ: here by what they write
    layer.mlp.down_proj.weight *= 10 * torch.randn(96).exp()

ours = Method("up_down_norm", needs="weights", source="this example", score=scores)
evidence = Evidence(model, seed=0)  # measures once; text to measure on would be `blocks=`
ids = torch.randint(3, 128, (4, 16))
dense = model(ids).logits.log_softmax(-1)
for name, method in (("ours", ours), ("random", "random")):
    narrow = pruned_model(evidence, method, 0.5)
    lost = dense.exp() * (dense - narrow(ids).logits.log_softmax(-1))
    count = sum(parameter.numel() for parameter in narrow.parameters())
    print(f"{name}: {count:,} parameters, KL to the dense model {float(lost.sum(-1).mean()):.4f}")
