"""Implements one paper a file; each opens with its source and with what differs from it.

random_channels.py, magnitude.py       the two controls
wanda_sp.py, flap.py, llm_pruner.py    scores from activations or gradients
saap.py, saap_tuning.py                SAAP's fused importance; its group-wise fine-tuning
adapruner.py, calibration_pool.py, tpe.py  AdaPruner's search over calibration data and metric
folding.py, lila.py                    data-free: merged channels; a spectral score
prunenet_published.py                  PruneNet as its authors describe it
slicegpt.py                            slices the residual stream instead
"""
