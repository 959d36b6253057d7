"""Folders on disk: found, loaded, saved, streamed, verified, recorded, exported.

regimes.py     the three regimes: what a method may look at
sources.py     finds a checkpoint and says in one sentence what is wrong with it
load.py        a model and its tokenizer
identity.py    which model a folder, or a model in memory, is: by its bytes
save.py        writes a pruned model, verified by a reload; padded export
provenance.py  `prunenet.json` and the model card
shards.py      safetensors files, a slab of rows at a time
offload.py     writes and verifies models that are spread over devices and disk
streaming.py   checkpoints larger than memory, a layer at a time
exports/       the same model in the forms of other engines, such as GGUF
hub.py         a checkpoint on the hub; results in its card
demo_model.py  the real model of the demonstration: folder, hub, or package index
"""
