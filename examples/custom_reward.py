"""Trains a policy on a reward of one's own: the share of the down matrix's energy that stays.

A reward is an object with two methods. Its terms are batched over masks, bounded, and higher is
better.
"""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import prunenet


class EnergyKept:
    """Pays the share of squared weights of the down matrix that stays, in [0, 1]."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        downs = [layer.mlp.down_proj.weight.detach() for layer in model.model.layers]
        self.energies = [down.square().sum(0) / down.square().sum() for down in downs]

    def layer(self, index: int, keep: Tensor) -> dict[str, Tensor]:
        """Terms of one layer; `keep` has shape (masks, d_ff), True where a channel stays."""
        return {"energy_kept": keep.float() @ self.energies[index]}

    def sweep(self, keep: list[Tensor]) -> dict[str, Tensor]:
        """Terms once all layers are masked: none here."""
        return {}


torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128}
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4)).eval()

recipe = prunenet.Recipe(updates=30, ratio=(0.5, 0.5), evaluate_at=(0.5,))
trained = prunenet.train(model, recipe, reward=EnergyKept(model), regime="weights")
for updates, reward in trained.history:
    print(f"after {updates:2} updates: {reward:.4f} of the energy kept")
