"""Devices, processes and files: what every room stands on.

placement.py        where a model's weights are: one device, several (accelerate), or the disk
parallel.py         collectives over the processes of one job; the identity on one process
team.py             joins the processes of a job and notices when one dies
failures.py         how one process of a job ends because of another
batches.py          which rows a step of a training reads
files.py            files and folders that appear complete or not at all
paths.py            what can be said of a path before any work; the cache folder
passing.py          temporary folders, which go with their process
locks.py            lock files: one process at a time, and none that is dead
memory.py           the most memory that a block of code held
tracking.py         what a training tells trackers of experiments
callable_module.py  a package that is called like the function it is named after
"""
