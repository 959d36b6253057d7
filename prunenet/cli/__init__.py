"""The command line: one file a command, and what they share.

app.py      the program: its commands and its entry point
options.py  the options, each said once
inputs.py   what the commands read: models, tokenizers, text
console.py  the terminal: results, progress, one sentence for a user's mistake
signals.py  how a command ends when it is told to
tables.py   what is printed
"""
