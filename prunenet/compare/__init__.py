"""`prunenet compare`: any score x any allocation x any refit x any moments source, on equal terms,
one JSON line per cell.

spec.py      how a way to prune is named on the command line, and which names make sense ledger.py
what shared measurements cost, and which of them a cell used pruner.py    one model: a spec, a ratio
and a seed -> a narrow model; measurements are shared between cells results.py   the file of JSON
lines: appended, resumed, repaired machine.py   versions, commit, peak memory run.py       the cells
of a comparison, one after the other summary.py   cells -> rows: mean and spread over seeds; text
tables figures.py   rows -> pictures (matplotlib) command.py   the subcommand
"""
