"""Measures time and peak memory of each phase of `prunenet prune MODEL --ratio 0.3`.

    python benchmarks/phases.py MODEL --out benchmarks/results/phases.jsonl [--device cuda]

The text is written anew, whatever the cache holds. Peak memory includes what the process held
before the phase (Linux only).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _common import Clock, append_line, opened, parser, setting

from prunenet.policies.apply import prune
from prunenet.policies.artifact import policy_for
from prunenet.text.calibration import self_blocks


def main() -> None:
    made = parser(__doc__)
    made.add_argument("model")
    made.add_argument("--ratio", type=float, default=0.3)
    made.add_argument("--device", default="cpu")
    arguments = made.parse_args()
    clock = Clock(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        with clock.phase("load"):
            model, tokenizer = opened(arguments.model, device=arguments.device)
        with clock.phase("write text (once for a model; cached)"):
            blocks = self_blocks(model, tokenizer, cache=Path(scratch))
        policy, name = policy_for(None, model.config.model_type)
        assert policy is not None, f"no policy ships for {model.config.model_type}"
        with clock.phase("score channels from weights"):
            scores = policy.scores(model)
        with clock.phase("measure, refit, choose widths"):
            pruned = prune(
                model, policy, ratio=arguments.ratio, blocks=blocks, scores=scores, policy_name=name
            )
        with clock.phase("save, reload and compare"):
            pruned.save_pretrained(Path(scratch) / "smaller", tokenizer=tokenizer)
    line = {
        "model": Path(arguments.model).name,
        "ratio": arguments.ratio,
        "tokens": blocks.ids.numel(),
        "phases": clock.phases,
    }
    append_line(arguments.out, line | setting(arguments.device))


if __name__ == "__main__":
    main()
