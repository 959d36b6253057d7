"""Checkpoints of models that are not whole in memory: read by accelerate's device map, written
tensor by tensor.

What is in memory at once is what `prunenet.runtime.placement` says; the bytes that are written are
those of `save_pretrained`, but that files are at most `SHARD` large.
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from prunenet.checkpoints.converted import origins, part_of
from prunenet.checkpoints.shards import write_shard
from prunenet.models.layers import probe_tokens
from prunenet.runtime.files import CheckpointError, cache_folder
from prunenet.runtime.passing import passing_folder
from prunenet.runtime.placement import compute_on, device_map, home, parameters, tensor_of, ties

SHARD = "5GB"
"""Largest file of weights that is written, but for one that holds a single larger tensor."""
Read = Callable[[Mapping[str, Any]], PreTrainedModel]
"""(arguments of `from_pretrained` that say where weights go) -> the model."""


def read_placed(read: Read, max_memory: str | None) -> PreTrainedModel:
    """A model on all devices there are; what the checkpoint's files do not hold as it is needed
    lies in the cache meanwhile.

    Raises:
        ValueError, ImportError: as `prunenet.runtime.placement.device_map`.
        OSError: the cache cannot be written.
    """
    return _read_beside(lambda folder: read(device_map(max_memory, folder)))


def check_reread(model: PreTrainedModel, read: Read) -> None:
    """Raises CheckpointError unless what `read` gives has the tensors and computes the logits of a
    placed model.

    Its weights stay on disk, and are brought to the device one module at a time.
    """
    fresh = _read_beside(
        lambda folder: read({"device_map": {"": "disk"}, "offload_folder": folder})
    )
    compute_on(fresh, home(model))
    for name, _ in parameters(model):
        if not torch.equal(tensor_of(fresh, name), tensor_of(model, name)):
            raise CheckpointError(f"the model was not saved: tensor {name} differs after a reload")
    ids = probe_tokens(model, home(model))
    first, second = (
        m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (model, fresh)
    )
    if not torch.equal(first, second):
        difference = float((first - second).abs().max())
        raise CheckpointError(
            f"the model was not saved: after a reload its logits differ by up to {difference},"
            " not 0"
        )


def write_placed(folder: Path, model: PreTrainedModel) -> None:
    """`save_pretrained` of a placed model, with one tensor in memory at a time."""
    tied = ties(model)
    state = {
        name: tensor.detach().to("meta")
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    write_model(folder, model, state, lambda name: (tensor_of(model, name),))


def write_model(
    folder: Path,
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    rows: Callable[[str], Iterable[Tensor]],
    *,
    shard: int | str = SHARD,
) -> dict[str, str]:
    """Writes a model whose weights come in pieces.

    Args:
        folder: where to.
        model: says all but the weights.
        state: tensors of the right shape and dtype, as on the meta device, by their names in the
            model; of tied ones, one.
        rows: given such a name, the tensor's rows in pieces, first to last.
        shard: largest file, in bytes or as "5GB".

    Returns:
        sha256 of each file of weights, taken on the way to the disk.

    Raises:
        OSError: the disk is full or refuses.
    """
    name_of = {id(tensor): name for name, tensor in state.items()}
    # by the names of the files
    tensors: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=shard)
    with warnings.catch_warnings():
        # that a placed model's weights must fit in memory: there are none
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, state_dict={})
    split = origins(model, state)

    def rows_of(name: str) -> Iterable[Tensor]:
        if id(tensors[name]) in name_of:
            return rows(name_of[id(tensors[name])])
        return (part_of(model, split[name], name, rows),)

    hashes = {
        file: write_shard(folder / file, {name: tensors[name] for name in names}, rows_of)
        for file, names in plan.filename_to_tensors.items()
    }
    if plan.is_sharded:
        count = sum(parameter.numel() for _, parameter in parameters(model))
        index = {
            "metadata": {"total_parameters": count, **plan.metadata},
            "weight_map": plan.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return hashes


def _read_beside(read: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """What `read` gives, told a folder that is there as long as the model is."""
    home = cache_folder() / "offload"
    home.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        model = read(str(stack.enter_context(passing_folder(home))))
        weakref.finalize(model, stack.pop_all().close)
    return model
