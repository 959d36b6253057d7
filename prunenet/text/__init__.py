"""Text as token blocks: from a file, a dataset, the model itself, or at random.

corpora.py        test text and calibration text (two types), cut into windows
generate.py       text that a model writes by itself, filtered
calibration.py    calibration sets of every kind, cached
random_tokens.py  uniformly drawn token ids
"""
