"""Perplexity, zero-shot accuracy, speed, divergence, and a figure of them.

perplexity.py    sliding-window perplexity, and one frozen `Result` per model
losses.py        loss of a model on token blocks
divergence.py    KL(dense || pruned) on token blocks
zeroshot.py      multiple-choice tasks by lm-eval's definitions
task_files.py    their questions, from local JSON lines
speed.py         tokens per second, side by side
side_by_side.py  all of it for several checkpoints
report.py        the figure
"""
