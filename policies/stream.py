"""Applies a saved policy to a checkpoint that need not fit in memory: read, scored and written
layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.checkpoints.offload import SHARD
from prunenet.checkpoints.provenance import Provenance
from prunenet.checkpoints.streaming import StreamedCheckpoint, save_streamed
from prunenet.models.layers import iter_ffns
from prunenet.models.masks import top_channels
from prunenet.models.surgery import narrowed
from prunenet.policies.apply import (
    check_choices,
    check_size,
    chosen_way,
    provenance_of,
    stage_of,
    ways_to_cut,
)
from prunenet.policies.artifact import Policy
from prunenet.runtime import parallel
from prunenet.runtime.files import check_absent, check_room


def prune_streamed(
    source: StreamedCheckpoint,
    out: str | Path,
    policy: Policy,
    *,
    ratio: float | None = None,
    params: float | None = None,
    round_to: int = 8,
    widths: str = "auto",
    policy_name: str = "policy",
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard: int | str = SHARD,
    progress: Callable[[str, int, int], None] | None = None,
) -> Provenance:
    """`apply.prune` from weights alone and `Pruned.save_pretrained`, without the model in memory:
    the same tensors and files.

    Memory holds one layer and what is computed from it, whatever the number of layers. Of several
    processes (`prunenet.runtime.parallel`) each scores its own layers, and the first writes.

    Args:
        source: the checkpoint.
        out: folder to create.
        policy: reads weights alone.
        ratio, params, round_to, widths, policy_name: as for `prune`.
        tokenizer: saved beside the model.
        shard: largest file of weights, see `prunenet.checkpoints.streaming.save_streamed`.
        progress: called with (what is going on, done, in all).

    Returns:
        What was written to `prunenet.json`.

    Raises:
        ValueError: as `prune`.
        CheckpointError: as `save_streamed`; that `out` exists or its disk is too small is said
            before anything is read.
    """
    out, dense = Path(out), source.skeleton
    channels, refit = check_choices(policy, False, widths, None, None)
    ratio = check_size(dense, ratio, params, round_to)
    check_absent(out)
    check_room(
        out, _bytes_left(dense, ways_to_cut(dense, None, ratio, "uniform", round_to)["uniform"])
    )
    scores, offsets = policy.read(source, progress=stage_of(progress, "scoring"))
    ways = ways_to_cut(dense, policy, ratio, widths, round_to, offsets)
    chosen, gain = chosen_way(ways, policy.config.gain)
    keep = [top_channels(*pair) for pair in zip(scores, ways[chosen], strict=True)]
    how = {"widths": chosen, "predicted_gain": gain, "channels": channels, "refit": refit}

    def describe(narrow: PreTrainedModel) -> Provenance:
        regime = policy.config.regime
        return provenance_of(
            dense, narrow, policy=policy, name=policy_name, regime=regime, ratio=ratio, how=how
        )

    if not parallel.is_first():
        return describe(narrowed(dense, keep))
    megabytes = stage_of(progress, "writing, MB")
    written = None if megabytes is None else lambda done, of: megabytes(done // 10**6, of // 10**6)
    return save_streamed(
        source, out, keep, describe, tokenizer=tokenizer, shard=shard, progress=written
    )


def _bytes_left(dense: PreTrainedModel, widths: Sequence[int]) -> int:
    """Of a model's parameters once its layers have these widths."""
    gone = [
        (ffn.d_ff - width) * ffn.channel_parameters
        for ffn, width in zip(iter_ffns(dense), widths, strict=True)
    ]
    return (
        sum(parameter.numel() for parameter in dense.parameters()) - sum(gone)
    ) * dense.dtype.itemsize
