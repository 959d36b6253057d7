"""Perplexity, zero-shot accuracy, speed, divergence, and a figure or a page of them.

choices.py       structures and budgets, by name
options.py       how a text is scored and how speed is measured
perplexity.py    sliding-window perplexity
losses.py        loss of a model on token blocks
divergence.py    KL(dense || pruned) on token blocks
units.py         parts of a model, and a model without one of them
prefixes.py      forward passes that start in the middle
interaction.py   how the damages of a model's parts add up: one matrix
latency.py       microseconds of a decoder layer at several widths: a table of this machine
costs.py         what each part costs: parameters, operations, bytes, time
slots.py         one budget over those parts: decisions, costs, damage
shares.py        allocations as the share of every slot that stays
zeroshot.py      multiple-choice tasks by lm-eval's definitions
task_files.py    their questions, from local files
speed.py         tokens per second, side by side
serving.py       the same of llama.cpp, on exported files
result.py        all that was measured on one model, as one record
repetition.py    4-grams that greedy texts repeat
side_by_side.py  all of it for several checkpoints
intervals.py     how sure a mean is: the bootstrap
report.py        the figure
images.py        figures as PNG, SVG or PDF
page.py          all of it as one HTML page (page.html), with a slider over ratios
"""
