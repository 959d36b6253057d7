"""Measures what methods score by: energies, gradients, outputs of heads.

measurements.py  `Evidence`: a model, a text, and every measurement of them, each made once
gradients.py     Taylor importance from gradients of the calibration loss
structures.py    channels and groups of attention heads under one budget
"""
