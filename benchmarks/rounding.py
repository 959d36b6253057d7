r"""Measures what widths rounded to 8, 32 and 64 cost in perplexity, at the same ratio.

    python benchmarks/rounding.py MODEL --data ../shared/data \
        --out benchmarks/results/rounding.jsonl

Every line is one size (ratio, multiple) cut by the shipped policy with the default widths, from
weights alone or with self-written text and refit, and scored on validation texts: 16 windows of 512
tokens of WikiText-2 and 16 of Penn Treebank. `channels` are those left in all layers together;
widths rounded to a multiple leave a few more or fewer, which the line says.
"""

from __future__ import annotations

from pathlib import Path

from _common import append_line, is_measured, opened, parser, read_lines, setting

from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.perplexity import perplexity
from prunenet.models.layers import count_parameters
from prunenet.policies.apply import decide, pruned_by
from prunenet.policies.artifact import Policy, zoo
from prunenet.policies.options import PruneOptions
from prunenet.text.calibration import self_blocks
from prunenet.text.corpora import TestText, load_text

RATIOS = (0.2, 0.3, 0.5)
MULTIPLES = (8, 32, 64)
TEXTS = {"wikitext2": "wikitext2/wiki.valid.tokens", "ptb": "ptb/ptb.valid.txt"}
OPTIONS = EvaluationOptions(window=512, max_windows=16)


def main() -> None:
    """Cuts every size of a regime at once, and scores one after the other."""
    asked = parser(__doc__)
    asked.add_argument("model")
    asked.add_argument("--data", type=Path, default=Path("../shared/data"))
    args = asked.parse_args()
    model, tokenizer = opened(args.model)
    policy = Policy.from_pretrained(zoo()["llama"])
    for regime in ("weights", "self"):
        places = [
            {"regime": regime, "ratio": ratio, "round_to": multiple}
            for ratio in RATIOS
            for multiple in MULTIPLES
        ]
        lines = read_lines(args.out)
        left = [place for place in places if not is_measured(lines, place)]
        if not left:
            continue
        blocks = self_blocks(model, tokenizer) if regime == "self" else None
        sizes = [PruneOptions(ratio=at["ratio"], round_to=at["round_to"]) for at in left]
        for place, decision in zip(left, decide(model, policy, sizes, blocks=blocks), strict=True):
            cut = pruned_by(model, decision, policy, "llama")
            found: dict[str, float | str] = {
                f"perplexity_{name}": perplexity(
                    cut.model, tokenizer, load_text(str(args.data / file), TestText), OPTIONS
                ).value
                for name, file in TEXTS.items()
            }
            found |= {
                "channels": sum(int(mask.sum()) for mask in cut.keep),
                "parameters": count_parameters(cut.model)[0],
                "widths": decision.how["widths"],
            }
            append_line(args.out, {**place, **found, **setting()})


if __name__ == "__main__":
    main()
