"""Applies a saved policy to a checkpoint that need not fit in memory: read, scored and written
layer by layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.identity import base_of
from prunenet.checkpoints.offload import SHARD
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.streaming import StreamedCheckpoint, save_streamed
from prunenet.models.surgery import narrowed
from prunenet.policies.apply import (
    Progress,
    bytes_left,
    decide,
    provenance_of,
    ratio_of,
    stage_of,
)
from prunenet.policies.artifact import Policy
from prunenet.policies.options import PruneChoices, PruneOptions, options_of
from prunenet.runtime import parallel
from prunenet.runtime.files import check_absent, check_room, expanded


def prune_streamed(
    source: StreamedCheckpoint,
    out: str | Path,
    policy: Policy,
    options: PruneOptions | None = None,
    *,
    policy_name: str = "policy",
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard: int | str = SHARD,
    progress: Progress | None = None,
    **choices: Unpack[PruneChoices],
) -> Provenance:
    """`apply.prune` from weights alone and `Pruned.save_pretrained`, without the model in memory:
    the same tensors and files.

    Memory holds one layer and what is computed from it, whatever the number of layers. Of several
    processes (`prunenet.runtime.parallel`) each scores its own layers, and the first writes.

    Args:
        source: the checkpoint.
        out: folder to create.
        policy: reads weights alone.
        options, policy_name, choices: as for `prune`.
        tokenizer: saved beside the model.
        shard: largest file of weights, see `prunenet.checkpoints.streaming.save_streamed`.
        progress: see `prunenet.policies.apply.Progress`.

    Returns:
        What was written to `prunenet.json`.

    Raises:
        ValueError: as `prune`.
        CheckpointError: as `save_streamed`; that `out` exists or its disk is too small is said
            before anything is read.
    """
    out, dense, asked = expanded(out), source.skeleton, options_of(options, choices)
    asked = asked.filled(policy, measured=False)
    if asked.experts is not None:
        raise ValueError(
            "`experts` are removed from a model in memory, and this one is streamed; load it"
        )
    ratio = ratio_of(source, asked)
    check_absent(out)
    check_room(out, bytes_left(dense, ratio, asked.round_to))
    (decision,) = decide(source, policy, [asked], progress=progress)

    def describe(narrow: PreTrainedModel) -> Provenance:
        return provenance_of(dense, narrow, decision, policy, policy_name, base_of(dense))

    keep = decision.cut.keep
    if not parallel.is_first():
        return describe(narrowed(dense, keep))
    megabytes = stage_of(progress, "writing, MB")
    written = None if megabytes is None else lambda done, of: megabytes(done // 10**6, of // 10**6)
    return save_streamed(
        source, out, keep, describe, tokenizer=tokenizer, shard=shard, progress=written
    )
