"""What a policy observes of a channel and of its layer.

from_weights.py      37 statistics of weights alone
from_activations.py  statistics of measured moments
residual.py          what the residual stream holds in front of a layer, estimated from weights
"""
