"""What `benchmarks/chaos.py` does to the package, one file a part.

kinds        what every part shares: a kind of disturbance, an outcome, its line
operations   counts the file operations of a process; ends it, or fails, at one of them
children     runs a command in a fork of this process, in which everything is imported already
commands     the commands that are disturbed, on tiny models, and what a result is
kills        ended by a signal: before each file operation, and at random moments
disks        full and broken disks: at each file operation, and real ones of a few kilobytes
fuzz         files of every kind, mutated, through loaders and through commands
targets      one file of every kind, what reads it, and who says what it holds
folders      odd and hostile folders, through commands
twins        two processes at one output
ranks        ranks of a job under torchrun, one killed
"""
