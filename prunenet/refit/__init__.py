"""Measures activations and repairs a cut by closed-form least squares.

moments.py    second moments of FFN activations, one layer at a time
folds.py      two halves of a calibration set, one to fit on and one to judge on
cholesky.py   the damped Cholesky factor of second moments
ridge.py      ridge least squares of the kept down-projection columns
eliminate.py  greedy Optimal Brain Surgeon elimination of channels
cut.py        cuts all layers of a model: channels chosen and refitted
"""
