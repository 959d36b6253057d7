"""Text as token blocks: from a file, a dataset, the model itself, or at random.

choices.py        the choices of this room, as types
formats.py        prose and rows of local files, by content and suffix
hub.py            rows of datasets
corpora.py        test text and calibration text (two types), loaded from any source
windows.py        token windows, and which of them begin with BOS
generate.py       text that a model writes by itself, filtered
cached.py         the file in which such text is kept
kinds.py          ways to begin self-written text: a random token, openings of every cluster
random_tokens.py  uniformly drawn token ids
calibration.py    calibration sets of every kind
"""
