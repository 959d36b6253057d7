"""Measures activations and repairs a cut by closed-form least squares.

moments.py    second moments of each group's activations, one layer at a time
calls.py      how a model calls its decoder layers
expert_use.py what routers send to experts: REAP's score, router weights
few_tokens.py what stands in where too few tokens reach an expert
folds.py      two halves of a calibration set, one to fit on and one to judge on
cholesky.py   the damped Cholesky factor of second moments
ridge.py      ridge least squares of the kept down-projection columns
eliminate.py  greedy Optimal Brain Surgeon elimination of channels
cut.py        cuts all groups of a model: channels chosen and refitted
heads.py      attention's output matrix, where heads are cut
blocks.py     each cut FFN trained as a whole, behind the refit
"""
