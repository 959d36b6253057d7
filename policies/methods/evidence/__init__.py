"""What methods measure: energies, gradients, scores of structures.

measurements.py  `Evidence`: a model, a text, and every measurement of them, each made once
gradients.py     Taylor importance from gradients of the calibration loss
structures.py    channels and groups of heads in one budget
"""
