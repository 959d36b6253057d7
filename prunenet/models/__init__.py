"""The anatomy of a supported model, and cutting it.

anatomy.py          decoder layers and what can be cut of each, resolved once
architectures.py    one frozen row per model type: where the FFN and the attention of a layer are
layers.py           reads a model in memory or on disk: FFNs layer by layer, embeddings, sizes
heads.py            groups of attention heads: key-value heads with their query heads
masks.py            ratio -> widths (rounding, budgets) -> keep masks; pure
observed.py         activations of groups, seen where output matrices are multiplied
hooks.py            changes what a module computes for a while, and no weight
surgery.py          keep masks + model -> narrow model
depth.py            whole decoder layers: skipped, and cut
modeling.py         model classes with a width per layer; travels beside checkpoints
rotation.py         slicing the residual stream in its principal directions
sliced_modeling.py  model classes with a sliced residual stream; travels beside checkpoints
"""
