"""Describes channels and layers for a policy.

from_weights.py      37 statistics of weights alone
leverage.py          leading singular directions, leverages and twins of weight rows
from_activations.py  statistics of measured moments
residual.py          second moments of the residual stream, estimated from weights
"""
