"""Measured activations, and the closed form that repairs a cut.

moments.py    second moments of FFN activations, one layer at a time
folds.py      two halves of a calibration set: a damping is chosen on one and judged on the other
cholesky.py   one damped factorisation for everybody
ridge.py      least squares of the kept down-projection columns
eliminate.py  greedy optimal-brain-surgeon elimination of channels
cut.py        all layers of a model: channels chosen, refitted, kept as a `Cut`
"""
