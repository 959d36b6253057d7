"""`prunenet compare`: any score x any allocation x any refit x any calibration set, on equal terms,
one JSON line a cell.

options.py     what is varied, scored and read as calibration text
spec.py        how a way to prune is named, and which names make sense
plan.py        the cells of a comparison, and how a cell's question is put
pruner.py      one model: a spec, a ratio and a seed -> a narrow model; measurements are shared
evidence.py    what methods measure, each measurement timed
ledger.py      what shared measurements cost, and which of them a cell used
run.py         the cells, one after the other
comparison.py  all of it from names: `prunenet.compare(...)`
results.py     the file of JSON lines: appended, resumed, repaired
machine.py     versions, commit, peak memory
summary.py     cells -> rows: mean, spread and intervals; text tables
tables.py      rows -> LaTeX and CSV
figures.py     rows -> pictures (matplotlib)
"""

from prunenet.runtime.callable_module import make_callable

make_callable(__name__, "prunenet.compare.comparison")
