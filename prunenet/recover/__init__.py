"""`prunenet recover`: training of a pruned model, low-rank and merged into its weights, or of all
weights of its layers.

Sources: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv
2106.09685 (by peft); Hinton et al., arXiv 1503.02531 (distillation: the loss is KL to the dense
model's predictions), on text that the dense model writes itself, as in Liu et al., "LLM-QAT:
Data-Free Quantization Aware Training for Large Language Models", arXiv 2305.17888. What differs:

- what is recovered is a cut and not a precision, and the dense model teaches by its whole
  distribution at temperature 1;
- without data the dense model is needed: it writes the text and teaches. A model's own text teaches
  that model nothing, for the expected gradient of the likelihood of what it samples is zero. With
  text from outside a teacher is optional, and the loss is that of the next token without one;
- all linears of the decoder layers are updated, attention and FFN, whatever a family calls them;
  embeddings, LM head and norms stay as they are, so that tied tensors stay tied. Full training
  reaches norms and fused experts of the layers too, and embeddings where asked;
- updates are drawn by a seed of their own and merged in float32, rounded once: the result is an
  ordinary pruned checkpoint;
- it is chosen on text held back, among all states seen and the pruned model itself, and never worse
  there.

options.py   how a model is trained, and on which text
text.py      as much text as a training reads
lora.py      updates beside a model's linears, put there and merged
full.py      all weights of the layers, in float32
losses.py    what the dense model teaches
training.py  trains, judges, resumes, keeps the best
state.py     an unfinished run on disk
estimate.py  time and memory, before it starts
record.py    a checkpoint on disk: loaded, trained, written with its provenance
ladder.py    several amounts of text, each a checkpoint
"""

from prunenet.runtime.callable_module import make_callable

make_callable(__name__, "prunenet.recover.record")
