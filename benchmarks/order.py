"""Compares the model that `prunenet order` writes with the dense model, and its first channels with
the models that `prune` cuts: logits of 64 fixed tokens, in float32 and in float64.

    python benchmarks/order.py DENSE --out benchmarks/results/exports.jsonl

In float32 sums run in another order, and differ by what rounding makes of that; in float64 the same
functions must agree within 1e-9.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from _common import append_line, parser
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.load import load_model
from prunenet.models.anatomy import Anatomy
from prunenet.models.layers import text_config
from prunenet.models.surgery import narrowed
from prunenet.policies.apply import prune
from prunenet.policies.artifact import policy_for
from prunenet.policies.order import order_of, ordered

RATIOS = (0.2, 0.3, 0.5)


@torch.no_grad()
def logits(model: PreTrainedModel, dtype: torch.dtype) -> Tensor:
    ids = [(n * 7919 + 11) % text_config(model).vocab_size for n in range(64)]
    own = model if dtype == model.dtype else deepcopy(model).to(dtype)
    return own(torch.tensor([ids])).logits[0]


def sliced(sorted_model: PreTrainedModel, width: int) -> PreTrainedModel:
    """The first channels of every layer."""
    whole = Anatomy.of(sorted_model).widths
    return narrowed(sorted_model, [torch.arange(d_ff) < width for d_ff in whole])


def main() -> None:
    reading = parser(__doc__)
    reading.add_argument("dense")
    asked = reading.parse_args()
    dense = load_model(asked.dense, dtype="float32")
    policy, _ = policy_for("llama", text_config(dense).model_type)
    assert policy is not None
    sorted_model = ordered(dense, order_of(dense, policy))
    scores = policy.scores(dense)
    pairs = {"dense": (dense, sorted_model)}
    for ratio in RATIOS:
        cut = prune(dense, policy, ratio=ratio, widths="uniform", scores=scores).model
        pairs[f"{ratio}"] = (cut, sliced(sorted_model, Anatomy.of(cut).widths[0]))
    for name, (expected, found) in pairs.items():
        line: dict[str, object] = {"command": "order", "compared_with": name}
        for dtype in (torch.float32, torch.float64):
            ours, theirs = logits(found, dtype), logits(expected, dtype)
            kind = str(dtype).removeprefix("torch.")
            line[f"logits_differ_by_{kind}"] = float((ours - theirs).abs().max())
            line[f"same_likeliest_{kind}"] = bool((ours.argmax(-1) == theirs.argmax(-1)).all())
        append_line(asked.out, line)
        print(line, flush=True)


if __name__ == "__main__":
    main()
