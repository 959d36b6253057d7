r"""Measures what the BOS token in front of windows does to perplexity and to calibration.

    python benchmarks/bos.py MODEL --data ../shared/data --out benchmarks/results/bos.jsonl
    python benchmarks/bos.py trained --data ../shared/data --out benchmarks/results/bos.jsonl
    python benchmarks/bos.py needing --data ../shared/data --out benchmarks/results/bos.jsonl

`trained` is a model that is made here (about a minute): 4 layers of d_model 128, 400 steps on the
built-in calibration text by its own tokenizer (byte-level BPE, 512 tokens), every sequence behind
BOS. So were Llama, Gemma and Mistral trained, of which no small one can be had here. `needing` also
learns to predict all tokens alike where BOS is missing, for 200 steps.

One line a model. `auto`: whether its own tokenizer begins a text with BOS. Perplexity, with BOS and
without, is of the same tokens: windows of 64 of WikiText-2 validation. Calibration draws 32 windows
of 64 from Penn Treebank validation. The models made here are scored on the built-in test text and
calibrated on the built-in calibration text.

`rank_correlation` is Spearman's between the channels' output energies E|W_:j h_j|^2 with BOS and
without: the mean over layers, and the least. `kept_alike` is the share of the channels kept at 0.3
by those energies that both keep. `cut` is the perplexity of the model cut so (Wanda-sp, uniform
widths, no refit): calibrated with BOS or without, scored with BOS or without.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from _common import append_line, is_measured, opened, parser, read_lines, setting
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from prunenet.evaluation.losses import next_token_loss
from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.perplexity import perplexity
from prunenet.models.masks import top_channels, width_at
from prunenet.policies.methods import Evidence, cut
from prunenet.text.calibration import CalibrationSet, data_blocks
from prunenet.text.choices import Bos
from prunenet.text.corpora import CalibrationText, TestText, load_text
from prunenet.text.windows import bos_token, tokenise

MADE = {"trained": 400, "needing": 200}
"""Models that are made here, and the steps of their training."""
RATIO, WINDOW, COUNT = 0.3, 64, 32
BATCH, VOCABULARY = 16, 512
BOTH: tuple[Bos, Bos] = ("yes", "no")


def tokenizer_of(text: CalibrationText) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the text, which begins every text with BOS."""
    made = Tokenizer(tokenizer_models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text.content], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def made(kind: str, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small model whose every training sequence begins with BOS, and its tokenizer.

    Args:
        kind: one of `MADE`.
        seed: of weights and sequences.
    """
    steps = MADE[kind]
    text = load_text("builtin", CalibrationText)
    tokenizer = tokenizer_of(text)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    ids = tokenise(tokenizer, text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(len(ids) - WINDOW + 1, (BATCH,))
        windows = torch.stack([ids[start : start + WINDOW] for start in starts])
        loss = next_token_loss(model, torch.nn.functional.pad(windows, (1, 0), value=0))
        if kind == "needing":
            loss = loss - model(windows).logits.log_softmax(-1).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), tokenizer


def energies(model: PreTrainedModel, blocks: CalibrationSet) -> list[torch.Tensor]:
    """Output energy of each channel of each layer."""
    evidence = Evidence(model, blocks)
    pairs = zip(evidence.energies, evidence.ffns, strict=True)
    return [found.energy.double() * ffn.down.double().square().sum(0) for found, ffn in pairs]


def pruned(model: PreTrainedModel, blocks: CalibrationSet) -> PreTrainedModel:
    """The model cut at `RATIO` by those energies."""
    return cut(
        Evidence(model, blocks),
        "wanda_sp",
        RATIO,
        allocation="uniform",
        refit="off",
        sequential=False,
    ).applied(model)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation; ties do not occur."""
    ranks = torch.stack([row.argsort().argsort().double() for row in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[TestText, CalibrationText],
    windows: int,
) -> dict[str, Any]:
    """What a line says of a model."""
    test, external = texts

    def score(narrow: PreTrainedModel) -> dict[str, float]:
        options = {
            bos: EvaluationOptions(window=WINDOW, max_windows=windows, bos=bos) for bos in BOTH
        }
        return {bos: perplexity(narrow, tokenizer, test, options[bos]).value for bos in BOTH}

    blocks = {
        bos: data_blocks(tokenizer, external, count=COUNT, window=WINDOW, bos=bos) for bos in BOTH
    }
    found = {bos: energies(model, blocks[bos]) for bos in BOTH}
    pairs = list(zip(found["yes"], found["no"], strict=True))
    correlations = [spearman(*pair) for pair in pairs]
    alike = []
    for pair in pairs:
        width = width_at(len(pair[0]), RATIO)
        first, second = (top_channels(row, width) for row in pair)
        alike.append(int((first & second).sum()) / width)
    return {
        "auto": bos_token(tokenizer) is not None,
        "perplexity": score(model),
        "rank_correlation": sum(correlations) / len(correlations),
        "least_rank_correlation": min(correlations),
        "kept_alike": sum(alike) / len(alike),
        "cut": {bos: score(pruned(model, blocks[bos])) for bos in BOTH},
        "test": Path(test.name).name,
        "calibration": Path(external.name).name,
    }


def main() -> None:
    """Measures one model, and prints what its line says."""
    options = parser(__doc__)
    options.add_argument("model", help="folder or hub id, or a model made here")
    options.add_argument("--data", type=Path, required=True, help="folder of the shared texts")
    options.add_argument("--windows", type=int, default=32, help="of 64 tokens that are scored")
    args = options.parse_args()
    name = Path(args.model).name
    place = {"model": name, "windows": args.windows, **setting()}
    if is_measured(read_lines(args.out), place):
        return
    start = time.process_time()
    if args.model in MADE:
        model, tokenizer = made(args.model)
        texts = load_text("builtin", TestText), load_text("builtin", CalibrationText)
    else:
        model, tokenizer = opened(args.model)
        texts = (
            load_text(args.data / "wikitext2" / "wiki.valid.tokens", TestText),
            load_text(args.data / "ptb" / "ptb.valid.txt", CalibrationText),
        )
    line = place | measured(model, tokenizer, texts, args.windows)
    append_line(args.out, line | {"cpu_seconds": time.process_time() - start})
    for key, value in line.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
